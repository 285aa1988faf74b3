"""Compare the peak memory of a worker's round with what the cost model predicts.

    python benchmarks/memory.py                       # CPU: resident set of one process each
    python benchmarks/memory.py --device cuda --json benchmarks/results/memory-gpu.json

Every case is a process of its own, and on a CPU it is two: as workers run by default, with a heap
that keeps what is freed until the round ends (`held`), and with one that was told to give
everything back at once (`measured`), which shows what is really in use.

A process trains a tiny model first, so that libraries and thread pools are there; what counts is
the peak above that, in the second of two rounds on random tokens. Predicted is
`costs.activations.peak_bytes`, and on a CPU the received weights beside it, which lie in the same
memory there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from measurement import forget_peak, parser_of, process_bytes, save

from fomoe_flwr import report
from fomoe_flwr.config import (
    DataSettings,
    ExecutionSettings,
    LocalSettings,
    ModelSettings,
    Settings,
)
from fomoe_flwr.costs import activations, memory_bytes, parameter_counts
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.state import StateSpec
from fomoe_flwr.worker.round import RoundTask, run_round
from fomoe_flwr.worker.step_benchmark import RandomBatches

SHARES = (1.0, 0.5, 0.25)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc: map every tensor on its own, and unmap it when it is freed."""


@dataclass(frozen=True)
class Case:
    """A shape and how it is trained."""

    model: ModelSettings
    batch_size: int
    sequence_length: int
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)
    local: LocalSettings = field(default_factory=LocalSettings)


def _shape(**fields: Any) -> ModelSettings:
    return replace(ModelSettings(), **fields)


_FINE = _shape(
    num_layers=6, hidden_size=256, expert_size=128, num_experts=64, top_k=8, vocab_size=4096
)
_WIDE = _shape(
    num_layers=4,
    hidden_size=512,
    expert_size=512,
    num_heads=8,
    num_kv_heads=8,
    top_k=4,
    vocab_size=8192,
)
CPU_CASES = {
    "demo": Case(_shape(), 8, 128),
    "fine": Case(_FINE, 8, 256),
    "wide": Case(_WIDE, 4, 512),
    "wide, chunked loss": Case(_WIDE, 4, 512, ExecutionSettings(loss="chunked")),
    "wide, checkpointed": Case(_WIDE, 4, 512, ExecutionSettings(checkpoint_activations=True)),
    "wide, accumulating": Case(_WIDE, 4, 512, local=replace(LocalSettings(), accumulate=2)),
    "deep, untied": Case(
        _shape(num_layers=8, hidden_size=256, num_experts=32, top_k=4, tie_embeddings=False), 8, 256
    ),
    "qwen3_moe": Case(replace(_FINE, family="qwen3_moe", num_experts=32, norm_topk=True), 8, 256),
    "paper's block": Case(
        _shape(
            family="fomoe",
            hidden_size=512,
            expert_size=128,
            num_heads=8,
            num_kv_heads=8,
            num_experts=32,
            top_k=4,
            num_layers=6,
        ),
        4,
        256,
    ),
}
_LARGE = _shape(
    num_layers=6,
    hidden_size=1024,
    expert_size=512,
    num_heads=16,
    num_kv_heads=16,
    num_experts=64,
    top_k=8,
    vocab_size=50304,
)


def _on_gpu(precision: str, **execution: Any) -> Case:
    local = replace(LocalSettings(), precision=precision, device="cuda")
    return Case(_LARGE, 8, 1024, ExecutionSettings(**execution), local)


CUDA_CASES = {
    "float32": _on_gpu("float32"),
    "bfloat16": _on_gpu("bfloat16"),
    "bfloat16, nothing compiled": _on_gpu("bfloat16", compile="off"),
    "bfloat16, checkpointed": _on_gpu("bfloat16", checkpoint_activations=True),
    "bfloat16_parameters": _on_gpu("bfloat16_parameters"),
}
"""All with a shape of 0.7 billion parameters, 8 x 1024 tokens."""


def settings_of(case: Case) -> Settings:
    local = replace(case.local, batch_size=case.batch_size, steps=2)
    data = DataSettings(sequence_length=case.sequence_length)
    return Settings(rounds=2, model=case.model, data=data, local=local, execution=case.execution)


def train(case: Case, share: float, folder: Path, server_round: int) -> float:
    """Train one round; return the measured share of resident assignments."""
    settings, model = settings_of(case), case.model
    held = tuple(range(round(share * model.num_experts)))
    residents = (held,) * model.num_layers
    spec = StateSpec.of(model, transformers_config(model, case.sequence_length))
    generator = torch.Generator().manual_seed(server_round)
    task = RoundTask(
        settings,
        spec,
        worker=0,
        server_round=server_round,
        residents=residents,
        shared=_weights(spec.shared_size, generator),
        experts=_weights(spec.experts_size(residents), generator),
        state_dir=folder,
    )
    result = run_round(task, lambda position: RandomBatches(settings, torch.device("cpu")))
    return 1.0 - result.report.routing.ghost_fraction


def _weights(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return random weights that repeat after a million: drawing billions takes minutes."""
    block = torch.randn(min(count, 1_000_003), generator=generator).mul_(0.02)
    return block.repeat(-(-count // len(block)))[:count]


def measure(case: Case, share: float) -> dict[str, float]:
    """Measure a case in this process."""
    device = torch.device(case.local.device if case.local.device != "auto" else "cpu")
    tiny = replace(case, model=_shape(hidden_size=64, num_layers=1, expert_size=32), batch_size=1)
    with tempfile.TemporaryDirectory() as scratch:
        train(tiny, 0.5, Path(scratch) / "tiny", 1)
        base = process_bytes("VmRSS")
        for server_round in (1, 2):
            _reset_peak(device)
            resident_share = train(case, share, Path(scratch) / "worker", server_round)
        peak = _peak(device) - (base if device.type == "cpu" else 0)
    return predict(case, share, resident_share, device) | {"measured_bytes": peak}


def run_apart(name: str, share: float, device: str, is_held: bool = False) -> dict[str, float]:
    """Measure a case in a process of its own."""
    command = [sys.executable, __file__, "--one", "--device", device]
    command += ["--case", name, "--share", str(share), *(["--held"] * is_held)]
    variables = {**os.environ, **({} if is_held else GIVE_BACK)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def predict(
    case: Case, share: float, resident_share: float, device: torch.device
) -> dict[str, float]:
    counts, model = parameter_counts(case.model), case.model
    held = counts.shared + counts.expert // model.num_experts * round(share * model.num_experts)
    step = activations.step_of(settings_of(case), resident_share, device.type)
    received = activations.received_bytes(held, device.type)
    return {
        "parameters": held,
        "resident_share": round(resident_share, 3),
        "state_bytes": memory_bytes(held, "adamw", case.local.precision),
        "kept_bytes": round(activations.kept_bytes(model, step)),
        "predicted_bytes": activations.peak_bytes(model, "adamw", held, step) + received,
    }


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return process_bytes()


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", action="append", default=None)
    parser.add_argument("--share", action="append", type=float, default=None)
    parser.add_argument("--one", action="store_true", help="one case and share, here; prints JSON")
    parser.add_argument("--held", action="store_true", help="with --one: execution.hold_heap")
    options = parser.parse_args()
    cases = CPU_CASES if options.device == "cpu" else CUDA_CASES
    on_cpu = options.device == "cpu"
    names, shares = options.case or list(cases), options.share or list(SHARES)
    if options.one:
        case = cases[names[0]]
        case = replace(case, execution=replace(case.execution, hold_heap=options.held))
        print(json.dumps(measure(case, shares[0])))
        return
    rows = []
    columns = ("state", "kept", "predicted", "measured", *(["held"] * on_cpu))
    print(f"{'case':<40}{'share':>6}" + "".join(f"{name:>10}" for name in columns) + "     off")
    for name in names:
        for share in shares:
            row = {
                "case": name,
                "share": share,
                **run_apart(name, share, options.device),
            }
            if on_cpu:
                held = run_apart(name, share, options.device, is_held=True)
                row["held_bytes"] = held["measured_bytes"]
            row["off"] = row["predicted_bytes"] / row["measured_bytes"] - 1
            rows.append(row)
            sizes = "".join(f"{row[f'{column}_bytes'] / 2**20:>10.0f}" for column in columns)
            print(f"{name:<40}{share:>6g}{sizes}{row['off']:>+8.1%}", flush=True)
    worst = max(abs(row["off"]) for row in rows)
    print(f"MiB; the prediction is off by at most {worst:.1%}")
    save(options.json, {**report.environment(), "device": options.device, "rows": rows})


if __name__ == "__main__":
    main()
