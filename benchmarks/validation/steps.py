"""Seconds of a step: two rates of this machine, measured on some shapes, predict others."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fomoe_flwr import costs
from validation.cases import BASE, first_layout, label, settings_of
from validation.comparison import Row
from validation.local_worker import LocalWorker

CALIBRATION = (
    f"{BASE} layout.overlap=2",
    f"{BASE} layout.overlap=2 model.hidden_size=512 model.num_heads=8 model.num_kv_heads=8 "
    "local.batch_size=4",
    f"{BASE} layout.overlap=1 model.num_layers=6 local.batch_size=16",
    f"{BASE} layout.overlap=4 local.batch_size=2",
)
PREDICTED = (
    f"{BASE} layout.overlap=4",
    f"{BASE} layout.overlap=1",
    f"{BASE} layout.overlap=2 model.num_layers=6 local.batch_size=4",
    f"{BASE} layout.overlap=2 model.hidden_size=384 model.num_heads=6 model.num_kv_heads=6",
    f"{BASE} layout.overlap=2 model=fomoe-demo local.batch_size=8",
    f"{BASE} layout.overlap=2 model.top_k=4 model.routing=partitioned",
    f"{BASE} layout.overlap=2 data.sequence_length=256 local.accumulate=2 local.batch_size=4",
)
STEPS = 3
"""Optimizer steps that are timed in one go."""


@dataclass(frozen=True)
class TimedCase:
    """A worker to time, with the work of its step."""

    words: str
    worker: LocalWorker
    flops: float
    state_bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def check_steps(repeats: int) -> Iterable[Row]:
    """Time all cases in turn, so that a machine whose speed drifts does so for all of them.

    With one thread the CPU's time is the time that a step takes where nobody else works.
    """
    cases = [timed_case(words) for words in (*CALIBRATION, *PREDICTED)]
    for _ in range(repeats):
        for case in cases:
            started = time.process_time()
            case.worker.train()
            case.seconds.append((time.process_time() - started) / STEPS)
    rates = calibrate(cases[: len(CALIBRATION)])
    print(
        f"calibrated: {rates.flops_per_second / 1e9:.4g} GFLOP/s, optimizer "
        f"{rates.state_bytes_per_second / 1e9:.4g} GB/s",
        flush=True,
    )
    for number, case in enumerate(cases):
        what = "step" if number >= len(CALIBRATION) else "step (calibration)"
        told = rates.step_seconds(case.flops, case.state_bytes)
        yield Row(what, label(case.words), told, case.median, "s", 0.15)


def calibrate(cases: Sequence[TimedCase]) -> costs.Site:
    """Return the two rates of this machine that fit these steps best, relatively."""
    system = [[case.flops / case.median, case.state_bytes / case.median] for case in cases]
    ones = torch.ones(len(cases), 1, dtype=torch.float64)
    found = torch.linalg.lstsq(torch.tensor(system, dtype=torch.float64), ones).solution
    per_flop, per_byte = (float(value) for value in found.flatten())
    if per_byte <= 0:
        per_flop = statistics.mean(case.median / case.flops for case in cases)
    return costs.Site(1 / per_flop, 1.0, 1.0, 0.0, 1 / per_byte if per_byte > 0 else math.inf)


def timed_case(words: str) -> TimedCase:
    """Return a warmed-up worker."""
    settings = settings_of(f"{words} local.steps={STEPS}")
    worker = LocalWorker(settings, first_layout(settings).of_worker(0))
    worker.train()
    model = settings.model
    executed = costs.executed_experts(model, first_layout(settings))[0]
    if model.routing == "skip_token":
        # Untrained routers are not even; the model takes the measured share of residents.
        executed = model.top_k * (1 - worker.probe.counts.ghost_fraction)
    tokens = settings.tokens_per_worker_step
    flops = tokens * costs.token_flops(model, settings.data.sequence_length, executed).train
    return TimedCase(words, worker, flops, worker.state_bytes())
