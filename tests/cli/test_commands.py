"""The command line as a whole: its commands, their help, and how it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fomoe_flwr.cli.main import main
from fomoe_flwr.errors import InputError, RunError

COMMANDS = (
    *("run", "sweep", "costs", "plan", "evaluate", "sample", "export", "report"),
    *("worker", "bench", "bench step", "status", "federation", "federation run"),
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: fomoe {command}".rstrip())
    if not command:
        assert [name for name in COMMANDS if f"    {name.split()[0]}" not in text] == []


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "fomoe_flwr.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("0.")


@pytest.mark.parametrize(
    ("error", "status"), [(InputError("no"), 2), (RunError("no"), 1), (KeyboardInterrupt(), 130)]
)
def test_the_exit_status_says_how_a_command_ended(
    error: BaseException,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_words: object) -> None:
        raise error

    monkeypatch.setattr("fomoe_flwr.config.expand_files", fail)
    assert main(["costs"]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("interrupted\n" if status == 130 else "error: no\n")
