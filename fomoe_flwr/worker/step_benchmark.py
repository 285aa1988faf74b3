"""The step benchmark: how fast a worker trains, and how near that is to what is possible.

Every variant takes real steps on random tokens. `share S` is the step of a worker that holds a part
S of the experts. `stock` is the same step with transformers' `grouped_mm` experts, everything else
equal. `plain` is what transformers' Trainer does with the stock model: its loss over whole logits,
nothing compiled, clipping and fused AdamW.

On a CPU the variants take turns step by step: if the machine's speed drifts, it drifts for all of
them. On a GPU each variant runs alone, so that its peak memory is its own.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fomoe_flwr import costs
from fomoe_flwr.config import Settings
from fomoe_flwr.config.execution import is_heap_held
from fomoe_flwr.model.execution import Execution
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.state import cast_parameters
from fomoe_flwr.parameters.shapes import num_sparse_layers
from fomoe_flwr.worker.heap import held_heap
from fomoe_flwr.worker.trainer import LocalTrainer
from fomoe_flwr.worker.training_model import TrainingModel

SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)
STOCK, PLAIN = "stock grouped_mm", "plain Trainer step"


@dataclass
class RandomBatches:
    """Random windows that note when each of them was asked for: once a step."""

    settings: Settings
    device: torch.device
    generator: torch.Generator = field(init=False)
    marks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.settings.seed)

    def next_batch(self) -> Tensor:
        """Return the next [B, S + 1] windows."""
        self.marks.append(_mark(self.device))
        local, data = self.settings.local, self.settings.data
        shape = (local.batch_size, data.sequence_length + 1)
        return torch.randint(self.settings.model.vocab_size, shape, generator=self.generator)

    def state(self) -> dict[str, Any]:
        """Return no cursor."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Have no cursor to go to."""

    def seconds(self) -> list[float]:
        """Return the time between one batch and the next; forget them."""
        marks, self.marks = [*self.marks, _mark(self.device)], []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
        return [b - a for a, b in pairwise(marks)]


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Variant:
    """One model and its optimizer, ready to take timed steps."""

    def __init__(
        self, label: str, settings: Settings, device: torch.device, share: float | None
    ) -> None:
        self.label, self.device = label, device
        self.settings = replace(settings, local=replace(settings.local, accumulate=1))
        self.share = 1.0 if share is None else share
        shape = settings.model
        config = transformers_config(shape, settings.data.sequence_length)
        residents = _residents(settings, self.share)
        held = None if self.share == 1.0 else residents
        self.model: PreTrainedModel = build_model(
            shape, config, held, device=device, seed=settings.seed
        )
        execution = Execution.choose(settings, device)
        if label in (STOCK, PLAIN):
            self.model.set_experts_implementation("grouped_mm")
        if label == PLAIN:
            execution = Execution()
        execution.prepare(self.model)
        cast_parameters(self.model, settings.local.precision)
        self.batches = RandomBatches(settings, device)
        training = TrainingModel(self.model, self.settings, execution=execution)
        self.trainer = LocalTrainer(
            training, self.settings, residents, lambda position: self.batches
        )
        self.probe = self.trainer.probe
        if label == PLAIN:
            self.probe.close()
        self.step_seconds: list[float] = []

    def take(self, steps: int) -> list[float]:
        """Take steps; return their seconds."""
        if self.label == PLAIN:
            for _ in range(steps):
                self._plain_step(self.batches.next_batch().to(self.device))
            return self.batches.seconds()
        # The schedule stands still, so that random tokens cannot make a long run diverge.
        self.trainer.step = 0
        self.trainer.train(steps)
        return self.batches.seconds()

    def _plain_step(self, windows: Tensor) -> None:
        local = self.settings.local
        self.model.train()
        optimizer = self.trainer.optimizer
        optimizer.zero_grad(set_to_none=True)
        autocast = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=local.precision == "bfloat16"
        )
        with autocast:
            ids = windows[:, :-1]
            logits = self.model(input_ids=ids, use_cache=False).logits
            loss = self.model.loss_function(
                logits=logits,
                labels=ids,
                vocab_size=self.settings.model.vocab_size,
                shift_labels=windows[:, 1:].contiguous(),
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), local.grad_clip or math.inf)
        optimizer.step()

    @property
    def resident_share(self) -> float:
        """Share of assignments that went to residents, measured since `forget`."""
        counts = self.probe.counts
        return 1.0 - counts.ghost_fraction if int(counts.load.sum()) else 1.0


def measure(
    settings: Settings,
    shares: Sequence[float],
    device: torch.device,
    *,
    steps: int,
    warmup: int,
    baselines: Sequence[str] = (STOCK, PLAIN),
) -> dict[str, Any]:
    """Time every variant; return one row for each, with ratios of this run only."""
    wanted: list[tuple[str, float | None]] = [
        *((name, None) for name in baselines),
        *((f"share {share:g}", share) for share in shares),
    ]
    run = _one_by_one if device.type == "cuda" else _in_turn
    with held_heap(is_heap_held(settings.execution, device.type)):
        rows = list(run(settings, wanted, device, steps, warmup))
    peak = matmul_peak(device, settings.local.precision)
    tokens = settings.local.batch_size * settings.data.sequence_length
    flops = costs.token_flops(settings.model, settings.data.sequence_length)
    by_label = {row["variant"]: row for row in rows}
    own, stock = by_label.get("share 1"), by_label.get(STOCK)
    for row in rows:
        seconds, share = row["seconds_per_step"], row["resident_share"]
        executed = costs.token_flops(
            settings.model, settings.data.sequence_length, settings.model.top_k * share
        )
        row["tokens_per_second"] = tokens / seconds
        row["flop_limit"] = costs.skip_speedup_limit(flops.expert_share, share)
        row["mfu"] = executed.train * tokens / seconds / peak
        if own is not None:
            row["speedup"] = _ratio(own, row)
            row["efficiency"] = row["speedup"] / row["flop_limit"]
        if stock is not None:
            row["over_stock"] = _ratio(stock, row)
            if stock["peak_bytes"]:
                row["memory_over_stock"] = row["peak_bytes"] / stock["peak_bytes"]
    for row in rows:
        del row["step_seconds"]
    return {
        "model": settings.model.name,
        "parameters": costs.parameter_counts(settings.model).total,
        "expert_flop_share": flops.expert_share,
        "batch_size": settings.local.batch_size,
        "sequence_length": settings.data.sequence_length,
        "precision": settings.local.precision,
        "execution": vars(settings.execution),
        "matmul_peak_flops": peak,
        "steps": steps,
        "rows": rows,
    }


def _ratio(base: dict[str, Any], row: dict[str, Any]) -> float:
    """Return the median of the ratios of steps that were taken side by side."""
    pairs = zip(base["step_seconds"], row["step_seconds"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def _one_by_one(
    settings: Settings,
    wanted: Sequence[tuple[str, float | None]],
    device: torch.device,
    steps: int,
    warmup: int,
) -> Iterator[dict[str, Any]]:
    for label, share in wanted:
        # Compiled code of earlier variants keeps some of their tensors.
        left = torch.cuda.memory_allocated(device)
        variant: Variant | None = Variant(label, settings, device, share)
        assert variant is not None
        variant.take(warmup)
        variant.probe.forget()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        seconds = variant.take(steps + 1)[1:]  # the first has the round's own set-up in it
        peak = torch.cuda.max_memory_allocated(device) - left
        yield _row(variant, seconds, peak)
        variant = None
        gc.collect()
        torch.cuda.empty_cache()


def _in_turn(
    settings: Settings,
    wanted: Sequence[tuple[str, float | None]],
    device: torch.device,
    steps: int,
    warmup: int,
) -> Iterator[dict[str, Any]]:
    variants = [Variant(label, settings, device, share) for label, share in wanted]
    for variant in variants:
        variant.take(warmup)
        variant.probe.forget()
    for _ in range(steps):
        for variant in variants:
            variant.step_seconds += variant.take(1)
    for variant in variants:
        yield _row(variant, variant.step_seconds, 0)


def _row(variant: Variant, seconds: list[float], peak_bytes: int) -> dict[str, Any]:
    parameters = list(variant.model.parameters())
    return {
        "variant": variant.label,
        "share": variant.share,
        "resident_share": variant.resident_share,
        "parameters": sum(p.numel() for p in parameters),
        "seconds_per_step": statistics.median(seconds),
        "seconds_spread": max(seconds) - min(seconds),
        "peak_bytes": peak_bytes,
        "step_seconds": seconds,
    }


def _residents(settings: Settings, share: float) -> Residents:
    """Draw residents: the same for every share-th of the experts, another set in each layer."""
    model = settings.model
    count = round(share * model.num_experts)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    return [
        sorted(torch.randperm(model.num_experts, generator=generator)[:count].tolist())
        for _ in range(num_sparse_layers(model))
    ]


def matmul_peak(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of a large matrix product in the step's type, best of a few."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1536
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(12):
        if on_gpu:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


COLUMNS = (
    ("variant", "variant", "{}"),
    ("parameters", "parameters", "{:,}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("resident share", "resident_share", "{:.3f}"),
    ("speed-up", "speedup", "{:.2f}"),
    ("FLOP limit", "flop_limit", "{:.2f}"),
    ("efficiency", "efficiency", "{:.2f}"),
    ("over stock", "over_stock", "{:.2f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("peak GiB", "peak_gib", "{:.2f}"),
    ("of stock's", "memory_over_stock", "{:.2f}"),
)
"""Title, key and form of the table's columns."""


def table(result: dict[str, Any]) -> str:
    """Return the rows as a Markdown table."""
    rows = [
        row | ({"peak_gib": row["peak_bytes"] / 2**30} if row["peak_bytes"] else {})
        for row in result["rows"]
    ]
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    lines = [[title for title, _, _ in columns], ["---"] * len(columns)]
    for row in rows:
        lines.append([form.format(row[key]) if key in row else "" for _, key, form in columns])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
