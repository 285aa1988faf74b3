"""What a node reports as its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from micro import micro

from fomoe_flwr.config import SettingsError
from fomoe_flwr.errors import InputError
from fomoe_flwr.worker import device
from fomoe_flwr.worker.device import capacity_gib, check_worker_memory

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


@pytest.mark.parametrize(
    ("num_parameters", "processes", "parallel", "fits"),
    [
        (2**26, 1, "auto", True),
        (2**26 + 1, 1, "auto", False),
        (2**27, 2, "auto", True),
        (2**27, 2, "fsdp", True),
        (2**27, 2, "ddp", False),
    ],
)
def test_a_worker_whose_state_cannot_fit_is_refused_with_the_sizes(
    num_parameters: int,
    processes: int,
    parallel: str,
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "_memory_bytes", lambda device: 2**30)
    settings = micro(f"local.parallel={parallel}", "layout.overlap=3")
    if fits:
        check_worker_memory(settings, num_parameters, CPU, processes)
        return
    expected = rf"has {num_parameters * 16 / 2**30:.1f} GiB of training state, cpu has 1.0 GiB: "
    with pytest.raises(SettingsError, match=expected + r"lower layout.overlap=3 \(of 3 workers\)"):
        check_worker_memory(settings, num_parameters, CPU, processes)
