"""docs/deploy.md: its commands are run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fomoe_flwr.federation.deployment.process_family import family
from fomoe_flwr.run.directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.flower
def test_the_commands_of_the_loopback_part_work_as_written(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    local = text.partition("## On one machine first")[2].partition("## On real hosts")[0]
    blocks = re.findall(r"```bash\n(.*?)```", local, flags=re.DOTALL)
    assert len(blocks) == 2
    folder = tmp_path / "federation"
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-ec", "\n".join(blocks)],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("run", "run2"):
        assert RunDirectory(folder / name).read_summary()["status"] == "completed"
    assert "state        completed, round 2 of 2" in done.stdout
    assert family(folder) == []
