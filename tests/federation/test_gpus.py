"""GPUs of a machine, dealt out to its nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fomoe_flwr.federation.deployment.gpus import VISIBLE, gpus_of_machine, share_of_node


@pytest.mark.parametrize(
    ("gpus", "num_nodes", "shares"),
    [
        ("", 2, [None, None]),
        ("a", 1, ["a"]),
        ("a", 3, ["a", "a", "a"]),
        ("ab", 2, ["a", "b"]),
        ("ab", 3, ["a", "b", "a"]),
        ("abcd", 2, ["a,c", "b,d"]),
        ("abc", 2, ["a,c", "b"]),
    ],
)
def test_every_node_has_gpus_of_its_own_while_there_are_enough(
    gpus: str, num_nodes: int, shares: list[str | None]
) -> None:
    found = [share_of_node(list(gpus), node, num_nodes) for node in range(num_nodes)]
    assert [share.get(VISIBLE) for share in found] == shares


@pytest.mark.parametrize(("value", "gpus"), [("", []), ("1", ["1"]), ("0, 2", ["0", "2"])])
def test_the_users_choice_counts(
    monkeypatch: pytest.MonkeyPatch, value: str, gpus: list[str]
) -> None:
    monkeypatch.setenv(VISIBLE, value)
    assert gpus_of_machine() == gpus


def test_the_driver_names_the_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus_of_machine() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-1\necho GPU-2\n")
    tool.chmod(0o755)
    assert gpus_of_machine() == ["GPU-1", "GPU-2"]
    tool.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert gpus_of_machine() == []
