"""Paths on the command line that name nothing: refused before anything is read or written."""

from __future__ import annotations

import pytest

from fomoe_flwr.cli.main import main


@pytest.mark.parametrize(
    "words",
    [
        ("export", "RUN", "--to", "PATH"),
        ("export", "PATH"),
        ("report", "PATH"),
        ("status", "PATH"),
        ("sample", "PATH"),
        ("plan", "PATH"),
        ("bench", "step", "--to", "PATH"),
        ("sweep", "--dir", "PATH"),
        ("sweep", "--resume", "PATH"),
        ("federation", "up", "PATH"),
        ("federation", "down", "PATH"),
        ("federation", "credentials", "PATH"),
        ("federation", "node-key", "PATH", "berlin"),
    ],
)
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "'' is empty: name a path"),
        (" ", "' ' is empty: name a path"),
        (
            "~nobody-has-it/x",
            "~nobody-has-it/x: ~ stands for no folder that is known: write it out",
        ),
    ],
)
def test_a_path_that_names_nothing_is_refused(
    words: tuple[str, ...], path: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([path if word == "PATH" else word for word in words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(reason)
