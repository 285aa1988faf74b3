"""The rounds of one process on one GPU, phase by phase, each beside what its bytes would need.

`rounds.py gpu` runs this; `rounds.py gpus` runs a federation with a worker on each GPU of a host.
A steady round is one that neither captures passes (the first) nor writes a checkpoint (the last);
the last one's own figures are given too.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measurement import FOMOE, best_seconds

from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.costs import summary
from fomoe_flwr.model.device_copy import copy
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.phases import phases_of

COMMON = (
    *("layout.kind=fixed", "local.precision=bfloat16_parameters", "local.device=auto"),
    *("eval.max_tokens=32768", "eval.sample_tokens=0", "checkpoint.every=1000"),
)
SHAPES: dict[str, tuple[str, ...]] = {
    "olmoe-1b4": (
        *("model=olmoe-1b4", "layout.num_workers=2", "layout.overlap=1"),
        *("local.batch_size=8", "data.sequence_length=1024", "local.steps=16"),
        "eval.batch_size=32",
    ),
    "48m": (
        *("model.hidden_size=512", "model.num_layers=6", "model.num_heads=8"),
        *("model.num_kv_heads=8", "model.num_experts=16", "model.top_k=2"),
        *("model.expert_size=512", "model.vocab_size=8192"),
        *("layout.num_workers=4", "layout.overlap=2"),
        *("local.batch_size=32", "data.sequence_length=256", "local.steps=32"),
        "eval.batch_size=128",
    ),
    "tiny": ("preset=tiny", "local.steps=2"),
}
"""`tiny` is for trying this script without a GPU."""
_PIECE = 2**28
"""Bytes that the speeds of links are measured with."""


def rounds_on_gpu(
    shape: str, rounds: int, overrides: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Run some rounds in one process; return a steady round's phases, shares and limits."""
    words = [*COMMON, *SHAPES[shape], f"rounds={rounds}", f"output_dir={folder}", *overrides]
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run([*FOMOE, "run", *words], check=True, stdout=subprocess.DEVNULL)
    run = RunDirectory(folder)
    rows = run.read_metrics()
    steady = rows[1:-1] or rows
    settings = load_settings(words)
    phases = _phases(steady)
    total = statistics.median(row["round/seconds"] for row in steady)
    limits = _limits(settings)
    return {
        "shape": shape,
        "steps": settings.local.steps,
        "rounds": rounds,
        "round_seconds": total,
        "local_share": phases["local steps"] / total,
        "phases": phases,
        "shares": {phase: seconds / total for phase, seconds in phases.items()},
        "limits": limits,
        "first_round_seconds": rows[0]["round/seconds"],
        "round_with_checkpoint_seconds": rows[-1]["round/seconds"],
        "checkpoint_seconds": rows[-1]["round/checkpoint_seconds"],
        "losses": [row["eval/loss"] for row in rows],
        "process_seconds": time.perf_counter() - started,
        "overrides": list(overrides),
    }


def rounds_over_gpus(
    shape: str, gpus: int, rounds: int, overrides: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Run a federation with TLS on this host, one warm worker on each GPU, and take it apart.

    The federation deals the GPUs out. Without any, all workers are on the CPU, to try this out.
    """
    run = folder / "run"
    words = [*COMMON, *SHAPES[shape], f"layout.num_workers={gpus}", "layout.overlap=1"]
    words += [f"rounds={rounds}", *overrides, f"output_dir={run}"]
    command = [
        *FOMOE,
        "federation",
        "run",
        str(folder / "federation"),
        *("--nodes", str(gpus)),
        # Messages of gigabytes keep a database busy for seconds (docs/wire.md).
        *("--superlink-state", "memory"),
        *words,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = RunDirectory(run).read_metrics()
    steady = rows[1:-1] or rows
    phases: dict[str, list[float]] = {}
    for row in steady:
        steps = row["round/slowest_worker_seconds"]
        seconds = phases_of(row)
        outside = {
            "local steps": steps,
            "workers besides": row["round/overhead_seconds"] / gpus,
            "wait": seconds.pop("wait", 0.0) - steps - row["round/overhead_seconds"] / gpus,
        }
        for phase, value in (outside | seconds).items():
            phases.setdefault(phase, []).append(value)
    medians = {phase: statistics.median(values) for phase, values in phases.items()}
    total = statistics.median(row["round/seconds"] for row in steady)
    return {
        "shape": shape,
        "gpus": gpus,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "rounds": rounds,
        "round_seconds": total,
        "local_share": medians["local steps"] / total,
        "phases": medians,
        "bytes_per_round": rows[-1]["comm/bytes_up"] + rows[-1]["comm/bytes_down"],
        "losses": [row["eval/loss"] for row in rows],
        "overrides": list(overrides),
    }


def _phases(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return medians; the phase in which workers compute is parted into steps and the rest."""
    found: dict[str, list[float]] = {}
    for row in rows:
        seconds = phases_of(row)
        computing = {phase: seconds.pop(phase, 0.0) for phase in ("wait", "receive")}
        steps, rest = row["round/local_seconds"], row["round/overhead_seconds"]
        parted = {
            "local steps": steps,
            "workers besides": rest,
            "wait and receive besides": sum(computing.values()) - steps - rest,
        }
        for phase, value in (parted | seconds).items():
            found.setdefault(phase, []).append(value)
    return {phase: statistics.median(values) for phase, values in found.items()}


def _limits(settings: Settings) -> dict[str, float]:
    """Return the seconds that the bytes of a phase need at the speeds measured here."""
    figures = summary(settings)
    size, carried = 4.0 * figures["params/total"], float(figures["bytes/down_per_round"])
    link, memory = _link_speed(), _memory_speed()
    return {
        "link_gb_per_second": link / 1e9,
        "memory_gb_per_second": memory / 1e9,
        # Weights go up, and up again beside the trained ones; the difference comes down.
        "workers besides": 3 * carried / link,
        "send": carried / memory,
        # A reply is added to a sum; the step reads the mean and the weights.
        "fold": carried / memory,
        "outer": 2 * size / memory,
        "eval": size / link,
    }


def _link_speed() -> float:
    if not torch.cuda.is_available():
        return float("inf")
    host, there = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True), torch.device("cuda")
    device = torch.empty(_PIECE, dtype=torch.uint8, device=there)

    def up() -> None:
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    return _PIECE / best_seconds(up, 5)


def _memory_speed() -> float:
    one, other = torch.ones(_PIECE, dtype=torch.uint8), torch.ones(_PIECE, dtype=torch.uint8)
    return _PIECE / best_seconds(lambda: copy(one, other), 5)
