"""A server whose state lies in files ends with the same bits as one that keeps it in memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Start, assert_same_end
from safetensors.torch import load_file

from fomoe_flwr import costs
from fomoe_flwr.cli.main import main
from fomoe_flwr.config import Settings, load_settings, read_settings
from fomoe_flwr.federation import server_state
from fomoe_flwr.federation.server import Server
from fomoe_flwr.layout import Layout, draw_layout
from fomoe_flwr.model import slab
from fomoe_flwr.run import stored as stored_run
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.heartbeat import Heartbeat
from fomoe_flwr.worker import device

FILES, MEMORY = "checkpoint.server_state=files", "checkpoint.server_state=memory"
RESUMED = ["rounds=4", "outer=nesterov", "layout.kind=random", "layout.reshuffle_every=2"]


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def stop_in_round(patch: pytest.MonkeyPatch, server_round: int) -> None:
    inner = Server._close_round

    def instead(self: Server, record: object) -> object:
        if record.server_round == server_round:  # type: ignore[attr-defined]
            raise StoppedError
        return inner(self, record)  # type: ignore[arg-type]

    patch.setattr(Server, "_close_round", instead)


def draw(settings: Settings) -> Layout:
    shape = settings.model.num_layers, settings.model.num_experts
    return draw_layout(settings.layout, *shape, settings.seed, 1, costs.layout_context(settings))


def exported(run: RunDirectory) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(run.export.glob("*.safetensors")):
        found |= {key: value.tolist() for key, value in load_file(path).items()}
    return found


MODES = {
    "nesterov": "outer=nesterov layout.kind=rolling layout.overlap=1",
    "moments": "outer=local_adamw layout.kind=random",
    "fragments": "outer.fragments=2 layout.kind=balanced",
    "int4": "wire.up=int4 wire.rounding=stochastic wire.down=bfloat16",
    "median": "outer.robust=median outer.weighting=uniform",
    "router rows": "outer.router_rows=holders outer.weighting=routed",
    "privacy": "outer.weighting=uniform privacy.clip_norm=0.1 privacy.noise_multiplier=1 "
    "privacy.noise_seed=3",
    "tied, partitioned": "model.tie_embeddings=true model.routing=partitioned",
    "buffers": "model.family=deepseek_v3 model.num_kv_heads=${model.num_heads}",
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_files_and_memory_end_with_the_same_bits(mode: str, start: Start) -> None:
    memory = start("memory", *mode.split(), MEMORY)
    files = start("files", *mode.split(), FILES)
    assert_same_end(memory, files)
    assert exported(memory) == exported(files)


@pytest.mark.parametrize("first", [FILES, MEMORY])
@pytest.mark.parametrize("then", [FILES, MEMORY])
def test_either_kind_of_server_goes_on_from_either_kind_of_checkpoint(
    first: str, then: str, start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = start("whole", *RESUMED, MEMORY)
    with monkeypatch.context() as patch:
        stop_in_round(patch, 3)
        with pytest.raises(StoppedError):
            start("halved", *RESUMED, first)
    halved = RunDirectory(tmp_path / "halved")
    assert main(["run", f"resume={halved.path}", then]) == 0
    assert_same_end(whole, halved)
    # What only the files' server needs goes with it.
    assert (halved.path / "server").exists() == (then == FILES)


def slabs_of(run: RunDirectory, server_round: int) -> dict[str, Path]:
    folder = run.checkpoints / f"round-{server_round:06d}" / "slabs"
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.safetensors"))}


def test_a_checkpoint_names_files_and_never_changes(start: Start) -> None:
    run = start("files", "outer=nesterov", "rounds=3", "checkpoint.keep=3", FILES)
    last, before = slabs_of(run, 3), slabs_of(run, 2)
    assert last.keys() == before.keys()
    assert {name.split("/")[0] for name in last} == {"weights", "momentum"}
    live = run.path / "server"
    for name, path in last.items():
        assert os.path.samefile(path, live / name)
        assert not os.path.samefile(path, before[name])
    # The same run, stopped a round earlier, ends where the second checkpoint was taken.
    shorter = start("shorter", "outer=nesterov", "rounds=2", "local.schedule=constant", FILES)
    other = start("longer", "outer=nesterov", "rounds=3", "local.schedule=constant", FILES)
    kept = {name: path.read_bytes() for name, path in slabs_of(other, 2).items()}
    assert kept == {name: path.read_bytes() for name, path in slabs_of(shorter, 2).items()}


@pytest.mark.parametrize("outer", ["average", "nesterov", "local_adamw"])
def test_the_files_have_the_bytes_that_costs_foretells(outer: str, start: Start) -> None:
    run = start("files", f"outer={outer}", "model=deepseek-v3-tiny", FILES)
    settings = read_settings(run.config)
    foretold = costs.server_memory(settings, costs.predict_bytes(settings, draw(settings)))
    held = list((run.path / "server").rglob("*.safetensors"))
    numbers = sum(value.nbytes for path in held for value in load_file(path).values())
    assert numbers == foretold.state + foretold.outer_state


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def spoil_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:8] = b"\xff" * 8
    path.write_bytes(data)


def change_type(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))


def swap(path: Path) -> None:
    path.write_bytes(
        path.with_name("model.layers.1.mlp.experts.down_proj.safetensors").read_bytes()
    )


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (Path.unlink, "is missing"),
        (cut, "are expected"),
        (spoil_header, "is damaged"),
        (swap, "is expected"),
        (change_type, "is int32 [12, 32, 32], float32 [12, 32, 32] is expected"),
    ],
)
@pytest.mark.parametrize("mode", [FILES, MEMORY])
def test_a_harmed_slab_is_told_and_nothing_is_lost(
    harm: object, told: str, mode: str, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("files", "rounds=2", FILES)
    key = "model.layers.0.mlp.experts.down_proj"
    path = slabs_of(run, 2)[f"weights/{key}.safetensors"]
    copy = path.read_bytes()
    path.unlink()  # so that only the checkpoint's name is harmed
    path.write_bytes(copy)
    harm(path)  # type: ignore[operator]
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file() and p != path}
    capsys.readouterr()
    assert main(["run", f"resume={run.path}", "rounds=3", mode]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert told in line
    assert key in line
    assert line.startswith(("error: cannot read the checkpoint", "error: checkpoint of round 2"))
    after = {p: p.read_bytes() for p in before if p.exists()}
    changed = {p.name for p in before if after.get(p) != before[p]}
    assert changed <= {"heartbeat.json", ".made-by-fomoe"}


@pytest.mark.parametrize("key", ["run_key", "spec_digest", "totals", "memory"])
def test_a_checkpoint_that_lacks_what_a_run_needs_is_told(
    key: str, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("run", "rounds=1", "local.steps=1", MEMORY)
    path = run.checkpoints / "round-000001" / "state.json"
    state = json.loads(path.read_text("utf-8"))
    del state[key]
    path.write_text(json.dumps(state), "utf-8")
    capsys.readouterr()
    assert main(["run", f"resume={run.path}", "rounds=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.endswith(f"{run.path} has no {key}: its state.json is damaged")


SLACK = 2**29
"""What the server may hold beside one reply."""


def test_the_server_holds_one_reply_and_not_the_model(small_text: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("server_files_process.py")
    shape = ["model.hidden_size=512", "model.expert_size=640", "model.num_experts=32"]
    rest = ["rounds=1", "outer=nesterov", "layout.num_workers=4", "layout.overlap=1", *shape]
    words = [sys.executable, str(script), str(small_text), str(tmp_path), FILES, *rest]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # In memory it would hold weights, momentum, means and a reply.
    assert found["reply"] + SLACK < 2.5 * found["model"]
    assert found["peak"] - found["idle"] <= found["reply"] + SLACK
    assert max(found["told"]) <= found["peak"]
    assert max(found["told"]) > found["idle"]


def test_a_full_disk_is_told_before_anything_starts(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = SimpleNamespace(total=2**30, used=2**30, free=2**20)
    monkeypatch.setattr(server_state.shutil, "disk_usage", lambda path: usage)
    assert main([*words, f"output_dir={tmp_path / 'run'}", FILES]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: checkpoint.server_state=files needs ")
    assert line.endswith("MiB are free: make room, or lower checkpoint.keep=2")
    assert list((tmp_path / "run").rglob("*.safetensors")) == []


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_loses_nothing(
    start: Start,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = start("whole", *RESUMED, MEMORY)
    inner, left = slab.os.posix_fallocate, [120]

    def allocate(*place: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(*place)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(slab.os, "posix_fallocate", allocate)
        assert main([*words, f"output_dir={tmp_path / 'full'}", *RESUMED, FILES]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    full = RunDirectory(tmp_path / "full")
    assert line.startswith(f"error: the run stopped at {full.path / 'server'}")
    assert line.endswith(
        f"make room, or name another place; then go on with fomoe run resume={full.path}"
    )
    assert 1 <= len(full.read_metrics()) < 4
    assert main(["run", f"resume={full.path}"]) == 0
    assert_same_end(whole, full)


def test_a_folder_that_another_run_works_in_is_left_alone(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("run", "rounds=2", FILES)
    before = {path: path.stat().st_ino for path in (run.path / "server").rglob("*")}
    with Heartbeat(run.heartbeat):
        assert main(["run", f"resume={run.path}", "rounds=3"]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"error: another process writes to {run.path}")
    assert {path: path.stat().st_ino for path in (run.path / "server").rglob("*")} == before


def test_a_folder_that_this_run_did_not_make_is_left_alone(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("run", "rounds=2", MEMORY)
    mine = run.path / "server" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("all of it")
    assert main(["run", f"resume={run.path}", "rounds=3", FILES]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line == f"error: {mine.parent} was not made by this run: move it away"
    assert mine.read_text() == "all of it"


def test_where_memory_has_no_room_the_state_lies_in_files(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start("roomy")
    assert not (run.path / "server").exists()
    assert "server state:   in memory: " in capsys.readouterr().out
    monkeypatch.setattr(server_state, "available_bytes", lambda: 2**20)
    run = start("narrow")
    assert (run.path / "server" / "weights").is_dir()
    assert f"of disk in {run.path / 'server'}" in capsys.readouterr().out


def test_an_export_by_small_files_is_the_same_model(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = start("whole", MEMORY)
    monkeypatch.setattr(server_state, "SMALL_SHARD", "100KB")
    parts = start("parts", FILES)
    assert len(list(whole.export.glob("*.safetensors"))) == 1
    assert len(list(parts.export.glob("*.safetensors"))) > 3
    assert exported(parts) == exported(whole)
    index = json.loads((parts.export / "model.safetensors.index.json").read_text("utf-8"))
    assert index["weight_map"].keys() == exported(whole).keys()
    # Later, from the checkpoint's files; they are read, and stay what they are.
    before = {name: path.read_bytes() for name, path in slabs_of(parts, 2).items()}
    again = tmp_path / "again"
    monkeypatch.setattr(stored_run, "SMALL_SHARD", "100KB")
    assert main(["export", str(parts.path), "--to", str(again)]) == 0
    for path in parts.export.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert before == {name: path.read_bytes() for name, path in slabs_of(parts, 2).items()}


def test_a_run_from_an_export_begins_with_its_weights(start: Start) -> None:
    first = start("first", FILES)
    pretrained = f"model.pretrained={first.export}"
    memory = start("memory", pretrained, "rounds=1", MEMORY)
    files = start("files", pretrained, "rounds=1", FILES)
    assert_same_end(memory, files)
    untrained = files.read_summary()["eval/loss"]["untrained"]
    assert untrained == first.read_summary()["eval/loss"]["last"]


def test_full_replicas_that_cannot_fit_are_refused_with_the_sizes(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partial = costs.summary(load_settings([w for w in words if "=" in w]))
    room = int(partial["memory/full_replica_bytes"]) - 1
    assert partial["memory/worker_bytes"] <= room
    monkeypatch.setattr(device, "_memory_bytes", lambda device: room)
    assert main([*words, f"output_dir={tmp_path / 'part'}", "rounds=1"]) == 0
    capsys.readouterr()
    assert main([*words, f"output_dir={tmp_path / 'full'}", "layout.overlap=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: a worker of 0.00B parameters has 0.0 GiB of training state, ")
    assert "lower layout.overlap=2 (of 2 workers)" in line
    assert not (tmp_path / "full").exists()
