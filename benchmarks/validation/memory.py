"""Memory: a worker's training state, and the growth of a fresh process that trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from measurement import forget_peak, process_bytes

from fomoe_flwr import costs
from validation.cases import BASE, first_layout, label, settings_of
from validation.comparison import Row
from validation.local_worker import LocalWorker

MEMORY = (
    f"{BASE} layout.overlap=2 model.hidden_size=512 local.batch_size=1 data.sequence_length=16",
    f"{BASE} layout.overlap=4 model.hidden_size=512 local.batch_size=1 data.sequence_length=16",
    f"{BASE} layout.overlap=2 model=qwen3-moe-demo model.expert_size=1024 local.batch_size=1 "
    "data.sequence_length=16",
    f"{BASE} layout.overlap=2 model=fomoe-demo model.expert_size=1024 local.optimizer=sgd "
    "local.batch_size=1 data.sequence_length=16",
)
VALIDATE = Path(__file__).parents[1] / "validate.py"
"""It measures one case in a process of its own."""


def check_memory() -> Iterable[Row]:
    for words in MEMORY:
        settings = settings_of(f"{words} local.steps=1")
        layout = first_layout(settings)
        held = costs.resident_counts(settings.model, layout)[0]
        told = costs.memory_bytes(held, settings.local.optimizer, settings.local.precision)
        found = json.loads(
            subprocess.run(
                [sys.executable, VALIDATE, "--measure-memory", words],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "MALLOC_ARENA_MAX": "1"},
            ).stdout.splitlines()[-1]
        )
        yield Row("training state", label(words), told, found["state"], "B", 0.0)
        yield Row("growth of the process", label(words), told, found["growth"], "B", 0.10)


def measure_memory(words: str) -> None:
    """Print the training state and the growth of this process while it trains."""
    # Libraries and their buffers come first. What this frees would be used again, so it is tiny.
    warm = settings_of("layout.overlap=1 local.steps=1")
    LocalWorker(warm, first_layout(warm).of_worker(0)).train()
    settings = settings_of(f"{words} local.steps=2")
    residents = first_layout(settings).of_worker(0)
    forget_peak()
    before = process_bytes("VmRSS")
    worker = LocalWorker(settings, residents)
    worker.train()
    print(json.dumps({"state": worker.state_bytes(), "growth": process_bytes() - before}))
