"""What a node reports as its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fomoe_flwr.errors import InputError
from fomoe_flwr.worker import device
from fomoe_flwr.worker.device import capacity_gib

CPU = torch.device("cpu")


def test_a_grant_counts_as_it_is() -> None:
    assert capacity_gib("2.5", 0.5, CPU) == capacity_gib(2.5, 0.1, CPU) == 2.5


@pytest.mark.parametrize("grant", [0, -1, "nan", "inf", "much"])
def test_a_grant_must_be_a_number_above_zero(grant: Any) -> None:
    with pytest.raises(InputError, match=f"capacity-gib={grant} of this node must be"):
        capacity_gib(grant, 0.5, CPU)


def test_without_a_grant_it_is_a_share_of_machine_or_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device, "_CGROUP_LIMIT", limit)
    whole = psutil.virtual_memory().total / 2**30
    assert capacity_gib(None, 1.0, CPU) == whole
    limit.write_text("max\n")
    assert capacity_gib(None, 0.25, CPU) == whole / 4
    limit.write_text(f"{2**28}\n")
    assert capacity_gib(None, 0.5, CPU) == 0.125
