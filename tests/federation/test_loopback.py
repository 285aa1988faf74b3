"""A secure federation of real processes: who is refused, and the same numbers as in one process."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fomoe_flwr.cli.main import main
from fomoe_flwr.federation.deployment.credentials import make_authority, make_node_key
from fomoe_flwr.federation.deployment.loopback import Loopback, end_federation
from fomoe_flwr.federation.deployment.process_family import family, free_port, start, tool
from fomoe_flwr.run.directory import RunDirectory

WORDS = [
    "preset=tiny",
    "model.num_experts=10",
    "layout.num_workers=3",
    "layout.overlap=1",
    "layout.kind=weighted",
    "layout.residents=[4,4,2]",
    "local.threads=1",
    "seed=5",
]
"""The last worker has half the room of the others."""

pytestmark = [pytest.mark.flower, pytest.mark.slow]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    made = Loopback(tmp_path_factory.mktemp("federation"), ["", "", "capacity-gib=0.5"])
    made.up()
    stop = threading.Event()
    keeper = threading.Thread(target=made.keep, args=[stop])
    keeper.start()
    yield made
    stop.set()
    keeper.join()
    made.end()
    assert family(made.folder) == []


def supernode(federation: Loopback, authority: Path, key: Path) -> list[str]:
    return [
        tool("flower-supernode"),
        *("--root-certificates", str(authority), "--auth-supernode-private-key", str(key)),
        *("--superlink", federation.address, "--port", str(free_port())),
        *("--max-retries", "1", "--max-wait-time", "10"),
    ]


def attempt(federation: Loopback, command: list[str], folder: Path) -> tuple[int | None, str]:
    """Run a node for a while; return its status (None: still at it) and what it said.

    It says that to a file: the helper it starts would keep a pipe open.
    """
    log = folder / "node.log"
    process = start(command, federation.variables, folder, log)
    try:
        status: int | None = process.wait(timeout=25)
    except subprocess.TimeoutExpired:
        status = None
        process.kill()
        process.wait()
    return status, log.read_text(encoding="utf-8", errors="replace")


def test_a_key_that_is_not_registered_is_refused(federation: Loopback, tmp_path: Path) -> None:
    key = make_node_key(tmp_path, "stranger")
    command = supernode(federation, federation.credentials / "ca.crt", key)
    status, text = attempt(federation, command, tmp_path)
    assert status not in (0, None), text
    assert "SuperNode ID" not in text


def test_a_node_that_trusts_another_authority_does_not_connect(
    federation: Loopback, tmp_path: Path
) -> None:
    make_authority(tmp_path / "other")
    # A key that is known would be let in, were it not for the certificate.
    command = supernode(
        federation, tmp_path / "other" / "ca.crt", federation.credentials / "node-0"
    )
    before = requests_seen(federation)
    status, text = attempt(federation, command, tmp_path)
    assert status != 0, text
    assert "SuperNode ID" not in text
    assert requests_seen(federation) == before


def requests_seen(federation: Loopback) -> int:
    """Count how often a node asked the SuperLink to let it in."""
    log = federation.folder / "logs" / "superlink.log"
    return log.read_text(encoding="utf-8", errors="replace").count("/v1/fleet/activate-node")


def test_plain_text_is_refused(federation: Loopback, tmp_path: Path) -> None:
    with pytest.raises((urllib.error.URLError, OSError)):
        urllib.request.urlopen(f"http://{federation.address}/health", timeout=5)
    key = federation.credentials / "node-0"
    command = supernode(federation, federation.credentials / "ca.crt", key)
    before = requests_seen(federation)
    status, text = attempt(federation, [*command, "--insecure"], tmp_path)
    assert status not in (0, None), text
    assert requests_seen(federation) == before


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["local.steps=4", "outer.delay_steps=3", "outer.merge_alpha=0.5"],
        ["local.steps=4", "outer.delay_steps=2", "outer.fragments=2"],
    ],
    ids=["plain", "delayed", "delayed fragments"],
)
def test_three_nodes_give_the_run_that_one_process_gives(
    more: list[str], federation: Loopback, small_text: Path, tmp_path: Path
) -> None:
    words = [*WORDS, *more, f"data.path={small_text}"]
    folder = str(federation.folder)
    out = tmp_path / "federation"
    assert main(["federation", "submit", folder, *words, f"output_dir={out}"]) == 0
    assert main(["run", *words, f"output_dir={tmp_path / 'here'}"]) == 0
    rows = RunDirectory(out).read_metrics()
    wanted = RunDirectory(tmp_path / "here").read_metrics()
    assert len(rows) == len(wanted) == 2
    for row, want in zip(rows, wanted, strict=True):
        for key in ("eval/loss", "train/loss", "train/grad_norm", "moe/ghost_fraction"):
            assert row[key] == pytest.approx(want[key], abs=1e-6), key
        for key in ("comm/bytes_up", "comm/bytes_down", "round/participants"):
            assert row[key] == want[key], key
    assert RunDirectory(out).read_layouts() == RunDirectory(tmp_path / "here").read_layouts()
    # What a node keeps lies with the node, not with the run.
    assert not RunDirectory(out).workers.exists()
    assert len(list((federation.folder / "nodes").glob("node-*/*/worker-*/*.safetensors"))) >= 3


def test_experts_of_a_node_that_never_comes_back_find_other_homes(
    small_text: Path, tmp_path: Path
) -> None:
    made = Loopback(tmp_path / "federation", ["", "", ""])
    run = RunDirectory(tmp_path / "run")
    words = [
        *("preset=tiny", "layout.num_workers=3", "layout.overlap=1", "layout.rehome_after=1"),
        *("federation.min_workers=2", "federation.grace_seconds=4", "rounds=6"),
        *("local.threads=1", f"data.path={small_text}", f"output_dir={run.path}"),
    ]
    statuses: list[int] = []
    # Nobody keeps this federation: what ends stays away.
    made.up()
    try:
        command = ["federation", "submit", str(made.folder), *words]
        submission = threading.Thread(target=lambda: statuses.append(main(command)))
        submission.start()
        deadline = time.monotonic() + 120
        while not run.read_metrics():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(made.pids()["node-2"], signal.SIGKILL)
        submission.join(timeout=300)
        assert statuses == [0]
    finally:
        made.end()
    rows, layouts = run.read_metrics(), run.read_layouts()
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["round/participants"] == [0, 1, 2]
    assert rows[-1]["round/participants"] == [0, 1]
    assert sum(row["layout/rehomed_experts"] for row in rows) > 0
    for before, after in zip(layouts["1"], layouts["6"], strict=True):
        assert after[2] == []
        assert {e for held in after for e in held} == {e for held in before for e in held}


def test_a_run_that_fails_has_a_true_exit_status(
    federation: Loopback, small_text: Path, tmp_path: Path
) -> None:
    words = [*WORDS, f"data.path={small_text}", f"output_dir={tmp_path / 'failed'}"]
    diverging = ["local.lr=1e30", "local.optimizer=sgd", "local.steps=6"]
    assert main(["federation", "submit", str(federation.folder), *words, *diverging]) == 1
    assert RunDirectory(tmp_path / "failed").read_summary()["status"] == "failed"


def test_a_keeper_starts_again_what_ends_and_down_ends_all(tmp_path: Path) -> None:
    assert main(["federation", "up", str(tmp_path), "--nodes", "1", "--detach"]) == 0
    before = Loopback(tmp_path).pids()
    os.kill(before["superexec"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while Loopback(tmp_path).pids()["superexec"] == before["superexec"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert main(["federation", "up", str(tmp_path), "--nodes", "1"]) == 2
    assert end_federation(tmp_path) > 0
    assert family(tmp_path) == []
    assert not Path(f"/proc/{before['keeper']}").exists()


def test_without_a_database_nodes_are_let_in_again_after_the_superlink(tmp_path: Path) -> None:
    made, stop = Loopback(tmp_path, [""], state_in_memory=True), threading.Event()
    made.up()
    keeper = threading.Thread(target=made.keep, args=[stop])
    keeper.start()
    try:
        before = made.pids()
        os.kill(before["superlink"], signal.SIGKILL)
        words = ["preset=tiny", "layout.num_workers=1", "layout.overlap=1", "rounds=1"]
        deadline = time.monotonic() + 60
        while made.pids()["superlink"] == before["superlink"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        run = tmp_path / "run"
        command = ["federation", "submit", str(tmp_path), *words, f"output_dir={run}"]
        assert main(command) == 0
        assert RunDirectory(run).read_summary()["status"] == "completed"
    finally:
        stop.set()
        keeper.join()
        made.end()
    assert not (tmp_path / "link.db").exists()
    # The same folder with a database: its nodes are made known to that, too.
    again = Loopback(tmp_path)
    again.up()
    again.end()
    assert (tmp_path / "link.db").exists()
