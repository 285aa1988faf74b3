"""Printing never ends a command: gone readers, full disks, closed streams, narrow encodings."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOMOE = (sys.executable, "-m", "fomoe_flwr.cli")
SHELL = {"gone": "| true", "full": "> /dev/full", "closed": ">&-", "both": ">&- 2>&-"}
SLOW = pytest.mark.slow
RUN = (
    *("run", "preset=tiny", "rounds=1", "local.threads=1", "local.steps=1"),
    *("local.batch_size=2", "eval.max_tokens=512", "eval.sample_tokens=2", "eval.sample_prompt="),
)


def shell(words: tuple[str, ...], end: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the end of a shell's line behind it; return its own exit status."""
    line = f'set -o pipefail; "$@" {end}'
    command = ["bash", "-c", line, "bash", *FOMOE, *words]
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env={**os.environ, **variables},
    )


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("costs", "preset=tiny")])
@pytest.mark.parametrize("where", SHELL)
def test_a_short_command_ends_quietly(words: tuple[str, ...], where: str) -> None:
    done = shell(words, SHELL[where])
    if where == "full":
        assert (done.returncode, done.stderr) == (1, "error: stdout: No space left on device\n")
    else:
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "where", ["gone", *(pytest.param(name, marks=SLOW) for name in ("full", "closed", "both"))]
)
def test_training_goes_on_without_a_console(where: str, tmp_path: Path) -> None:
    done = shell((*RUN, f"output_dir={tmp_path}"), SHELL[where])
    assert done.returncode == 0
    for word in ("Traceback", "Exception ignored", "error: "):
        assert word not in done.stderr
    assert '"status": "completed"' in (tmp_path / "summary.json").read_text("utf-8")
    for name in ("report.html", "metrics.jsonl", "export", "checkpoints", "samples"):
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_console_takes_every_letter(encoding: str, tmp_path: Path) -> None:
    folder = tmp_path / "é日"
    done = shell(("status", str(folder)), "", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert done.stderr.endswith("is not a run directory: it has no config.yaml\n")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_no_colours_gets_none(variables: dict[str, str]) -> None:
    code = (
        "from fomoe_flwr.cli.streams import guard_streams; guard_streams()\n"
        "import sys; print('\\x1b[3mone\\x1b[0m'); print('\\x1b[91mtwo\\x1b[0m', file=sys.stderr)"
    )
    shown = {}
    for name, extra in (("asked", variables), ("other", {})):
        child, terminal = pty.openpty()
        env: dict[str, Any] = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        env |= {"TERM": "xterm", **extra}
        subprocess.run(
            [sys.executable, "-c", code], stdout=terminal, stderr=terminal, env=env, check=True
        )
        shown[name] = os.read(child, 4096)
        os.close(child)
        os.close(terminal)
    assert shown["asked"].split() == [b"one", b"two"]
    assert b"\x1b[3mone" in shown["other"]


@SLOW
def test_what_is_no_terminal_gets_no_escape_codes_and_no_bars(tmp_path: Path) -> None:
    variables = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = shell((*RUN, f"output_dir={tmp_path / 'run'}"), "", **variables)
    assert done.returncode == 0
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text
        assert "it/s" not in text
        assert "%|" not in text
