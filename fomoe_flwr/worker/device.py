"""The device that a worker trains on, and the memory that its node grants it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import psutil
import torch

from fomoe_flwr.config import Settings, SettingsError
from fomoe_flwr.costs import memory_bytes
from fomoe_flwr.errors import InputError

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def pick_device(name: str) -> torch.device:
    """Resolve `auto` to the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def check_device(key: str, name: str) -> None:
    """Refuse a GPU that is not there; `key` is the setting that names it. Raises SettingsError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"{key}=cuda but torch sees no GPU: use auto or cpu")


def check_cuda_graph(settings: Settings, device: torch.device) -> None:
    """Refuse a CUDA graph on what is no GPU. Raises SettingsError."""
    if settings.execution.cuda_graph == "on" and device.type != "cuda":
        raise SettingsError(
            f"execution.cuda_graph=on needs a GPU, workers train on {device.type} "
            f"(local.device={settings.local.device}): use auto or off"
        )


def check_worker_memory(
    settings: Settings, num_parameters: int, device: torch.device, num_processes: int = 1
) -> None:
    """Refuse a worker of so many parameters whose training state cannot fit on its device.

    Activations come on top: that it fits is no promise. Raises SettingsError.
    """
    local = settings.local
    needed = memory_bytes(num_parameters, local.optimizer, local.precision)
    if local.parallel in ("auto", "fsdp"):
        needed //= num_processes  # `auto` cuts what does not fit otherwise.
    held = _memory_bytes(device)
    if needed > held:
        raise SettingsError(
            f"a worker of {num_parameters / 1e9:.2f}B parameters has {needed / 2**30:.1f} GiB of "
            f"training state, {device.type} has {held / 2**30:.1f} GiB: lower layout.overlap="
            f"{settings.layout.overlap} (of {settings.layout.num_workers} workers), so that it "
            "holds fewer experts, or take a smaller model"
        )


def capacity_gib(granted: Any, share: float, device: torch.device) -> float:
    """Return the GiB for a worker's training state: `granted` if there is a grant.

    Otherwise `share` of the device's memory: the GPU's, or that of the machine (or its container).
    Raises InputError for a grant that is not a finite number > 0.
    """
    if granted is None:
        return share * _memory_bytes(device) / 2**30
    try:
        gib = float(granted)
    except (TypeError, ValueError):
        gib = math.nan
    if not (math.isfinite(gib) and gib > 0):
        raise InputError(f"capacity-gib={granted} of this node must be a finite number > 0")
    return gib


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total
