"""The environment of a run: what a number must be quoted with."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from fomoe_flwr import __version__


@cache
def environment() -> dict[str, str]:
    """Return versions, machine and commit."""
    # Only whoever has run something asks, and has torch.
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "environment/fomoe_flwr": __version__,
        "environment/torch": torch.__version__,
        "environment/python": platform.python_version(),
        "environment/machine": (
            f"{platform.machine()}, {_cpu_name()}, {torch.get_num_threads()} threads{gpu}"
        ),
        "environment/commit": _commit(),
    }


def _commit() -> str:
    """Ask git, or where there is no checkout the variable that CI systems set."""
    root = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GIT_COMMIT", "unknown")
    return found.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"
