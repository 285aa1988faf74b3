"""Time the whole training step against transformers' grouped_mm and against the FLOP limit.

    python benchmarks/step.py --shape demo --shape fine
    python benchmarks/step.py --json benchmarks/results/step-cpu.json

Every variant takes its steps in turn (A B C A B C ...), so that a machine whose speed drifts does
so for all; figures are medians, and what is compared are ratios of one run. The step is forward,
cross entropy, backward, clipping and fused AdamW on random tokens. The limit for resident share a
(as measured, not as drawn) is 1 / (1 - f (1 - a)), f the experts' share of the FLOPs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fomoe_flwr import costs, report
from fomoe_flwr.config import LocalSettings, ModelSettings, load_settings
from fomoe_flwr.model.families import model_class, transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.router_probe import RouterProbe
from fomoe_flwr.training import make_optimizer, token_loss

BASE = ModelSettings()
SHAPES: dict[str, tuple[ModelSettings, int, int]] = {
    # name: (shape, batch, sequence length)
    "demo": (load_settings(["preset=demo"]).model, 8, 128),
    "fine": (
        replace(BASE, num_layers=6, hidden_size=256, expert_size=128, num_experts=64, top_k=8),
        8,
        256,
    ),
    "wide": (
        replace(
            BASE,
            num_layers=4,
            hidden_size=512,
            expert_size=512,
            num_heads=8,
            num_kv_heads=8,
            top_k=4,
            vocab_size=8192,
        ),
        4,
        512,
    ),
}


class Variant:
    """One model with its optimizer, stepped and timed."""

    def __init__(self, shape: ModelSettings, sequence: int, share: float | None) -> None:
        config = transformers_config(shape, sequence)
        self.share = share
        if share is None:
            torch.manual_seed(0)
            self.model: PreTrainedModel = model_class(shape.family)._from_config(
                config, experts_implementation="grouped_mm"
            )
            self.probe = None
        else:
            count = round(share * shape.num_experts)
            generator = torch.Generator().manual_seed(1)
            residents = [
                sorted(torch.randperm(shape.num_experts, generator=generator)[:count].tolist())
                for _ in range(shape.num_layers)
            ]
            self.model = build_model(shape, config, residents, seed=0)
            self.probe = RouterProbe(self.model, shape.num_experts, residents)
        self.model.train()
        self.optimizer = make_optimizer(self.model, LocalSettings())
        self.seconds: list[float] = []

    def step(self, windows: torch.Tensor) -> None:
        """Take one optimizer step and note its time."""
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        token_loss(self.model, windows).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - started)
        if self.probe is not None:
            self.probe.losses()

    @property
    def resident_share(self) -> float:
        """Share of assignments that went to residents, measured."""
        return 1.0 if self.probe is None else 1.0 - self.probe.counts.ghost_fraction


def matmul_peak() -> float:
    """Return the FLOP/s of a large fp32 product on this machine, best of a few."""
    a = torch.randn(1024, 1024)
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, a)
        best = max(best, 2 * 1024**3 / (time.perf_counter() - started))
    return best


def measure(name: str, shares: list[float], steps: int, warmup: int) -> dict[str, object]:
    shape, batch, sequence = SHAPES[name]
    variants = {
        "stock grouped_mm": Variant(shape, sequence, None),
        **{f"ours, share {share:g}": Variant(shape, sequence, share) for share in shares},
    }
    generator = torch.Generator().manual_seed(2)
    for index in range(warmup + steps):
        windows = torch.randint(0, shape.vocab_size, (batch, sequence + 1), generator=generator)
        for variant in variants.values():
            variant.step(windows)
        if index == warmup - 1:
            for variant in variants.values():
                variant.seconds.clear()
    flops = costs.token_flops(shape, sequence)
    peak = matmul_peak()
    own = variants["ours, share 1"].seconds
    stock = variants["stock grouped_mm"].seconds
    rows = []
    for label, variant in variants.items():
        limit = costs.skip_speedup_limit(flops.expert_share, variant.resident_share)
        speedup = statistics.median(a / b for a, b in zip(own, variant.seconds, strict=True))
        median = statistics.median(variant.seconds)
        executed = costs.token_flops(shape, sequence, shape.top_k * variant.resident_share)
        rows.append(
            {
                "variant": label,
                "milliseconds": round(1000 * median, 1),
                "tokens_per_second": round(batch * sequence / median),
                "resident_share": round(variant.resident_share, 3),
                "speedup_over_own_full": round(speedup, 3),
                "limit": round(limit, 3),
                "efficiency": round(speedup / limit, 3),
                "over_stock": round(
                    statistics.median(a / b for a, b in zip(stock, variant.seconds, strict=True)), 3
                ),
                "share_of_matmul_peak": round(executed.train * batch * sequence / median / peak, 3),
            }
        )
    return {
        "shape": name,
        "expert_flop_share": round(flops.expert_share, 3),
        "parameters": costs.parameter_counts(shape).total,
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "steps": steps,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=SHAPES, default=None)
    parser.add_argument("--share", action="append", type=float, default=None)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shares = options.share or [1.0, 0.5, 0.25]
    if 1.0 not in shares:
        parser.error("--share must include 1, what the others are compared with")
    results = [
        measure(name, shares, options.steps, options.warmup) for name in options.shape or SHAPES
    ]
    for result in results:
        print(
            f"\n{result['shape']}: {result['parameters']} parameters, experts "
            f"{result['expert_flop_share']:.0%} of FLOPs, matmul peak "
            f"{result['matmul_peak_gflops']} GFLOP/s, medians of {result['steps']} steps"
        )
        rows = result["rows"]
        assert isinstance(rows, list)
        print(" | ".join(f"{key:>18}" for key in rows[0]))
        for row in rows:
            print(" | ".join(f"{value:>18}" for value in row.values()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {**report.environment(), "results": results}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
