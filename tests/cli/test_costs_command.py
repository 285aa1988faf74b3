"""`fomoe costs` as a person meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fomoe_flwr.cli.main import main
from fomoe_flwr.report.cost_curves import overlaps_of

KEYS = {
    *(f"params/{kind}" for kind in ("total", "active", "shared", "expert", "resident")),
    *(f"bytes/{way}_per_{unit}" for way in ("up", "down") for unit in ("round", "step", "token")),
    *(f"ratio/{other}" for other in ("full_replica", "diloco", "ddp")),
    *(f"memory/{whose}_bytes" for whose in ("worker", "server")),
    *("flops/train_per_token", "time/round_seconds", "time/run_seconds"),
    *("speedup/diloco", "speedup/ddp"),
}


def test_composing_goes_through_no_preset_that_nobody_asked_for() -> None:
    # 180 of them took Hydra as long as everything else together.
    code = (
        "from hydra.core.config_store import ConfigStore as Store;"
        "from fomoe_flwr.config import load_settings;"
        "load_settings(['model=paper-2b']); before = 'paper' in Store.instance().repo;"
        "found = load_settings(['paper=diloco-fixed-m4-k32-oe2']).layout.num_workers;"
        "print(before, found)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "4"]


def test_json_has_the_keys_that_others_rely_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["costs", "model=paper-2b", "--json", "layout.overlap=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS
    assert all(found[key] > 0 for key in KEYS)


def test_explain_shows_formula_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["costs", "preset=tiny", "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("time/round_seconds"))
    assert lines[place + 1].strip() == "= down + compute + up - hidden"
    assert lines[place + 2].count("+") == 2


@pytest.mark.parametrize("words", [[], ["layout=weighted"], ["costs.topology=ring"]])
def test_a_sweep_draws_pictures(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "sweep"
    assert main(["costs", "--sweep", str(folder), *words]) == 0
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "bytes.png",
        "flops.png",
        "ghosts.png",
        "memory.png",
        "time.png",
    ]
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_sweeps_go_over_powers_of_two_and_end_at_full_replicas() -> None:
    assert overlaps_of(1) == [1]
    assert overlaps_of(6) == [1, 2, 4, 6]
    assert overlaps_of(8) == [1, 2, 4, 8]


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["costs", "preset=tiny", "--jsn"])
    assert "unrecognized arguments: --jsn" in capsys.readouterr().err
    assert main(["costs", "--json", "layout.num_workers=3", "layout.overlap=9"]) == 2
    assert "layout.overlap=9 needs" in capsys.readouterr().err
