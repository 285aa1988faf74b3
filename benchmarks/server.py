"""Measure the server's share of a round: peak memory and speed of folding replies.

    python benchmarks/server.py                   # 1 GB of parameters; 4, 8 and 16 workers
    python benchmarks/server.py --gigabytes 0.1 --workers 4 --json out.json

Replies are made of bytes, one at a time, decoded, checked, folded and dropped, as the strategy
does; then the outer step (Nesterov) is taken. Speed is bytes of replies over seconds, as a share
of what a copy of a block of memory reaches in the same process. Every number of workers has a
process of its own, so that its peak memory (VmHWM) is its own; what Python, torch and a round of a
tiny model take before is taken off.
"""

from __future__ import annotations

import multiprocessing
import struct
import time
from typing import Any

import torch
from flwr.app import Array, RecordDict
from measurement import best_seconds, markdown, parser_of, process_bytes, save

from fomoe_flwr import report
from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.codecs.sizes import Codec
from fomoe_flwr.config import OuterSettings
from fomoe_flwr.federation import wire
from fomoe_flwr.model.state import Entry, StateSpec
from fomoe_flwr.parameters.fragments import PSEUDO_GRADIENT

LAYERS, EXPERTS = 8, 16


def spec_of(num_bytes: float) -> StateSpec:
    """Return a model of so many bytes in fp32, three tenths of them shared."""
    elements = int(num_bytes / 4)
    row = int(elements * 0.7 / (LAYERS * EXPERTS * 2))
    shared = int(elements * 0.3 / LAYERS)
    return StateSpec(
        tuple(Entry(f"model.layers.{i}.attention", (shared,), None) for i in range(LAYERS)),
        tuple(
            Entry(f"model.layers.{i}.mlp.experts.{name}", (EXPERTS, row), i)
            for i in range(LAYERS)
            for name in ("up", "down")
        ),
        LAYERS,
        EXPERTS,
    )


def copy_speed(num_bytes: int) -> float:
    """Return bytes a second of copying one block of memory to another, best of five."""
    source, target = torch.ones(num_bytes // 4), torch.ones(num_bytes // 4)
    return num_bytes / best_seconds(lambda: target.copy_(source), 5)


def _array(value: float, size: int, codec: str) -> Array:
    if codec == "float32":  # without a tensor of this size on the way
        return Array("float32", (size,), wire.STYPE, struct.pack("<f", value) * size)
    return wire.encode(torch.full((size,), value), codec)


def measure(
    gigabytes: float, workers: int, overlap: int, codec: str, threads: int
) -> dict[str, Any]:
    """Fold one round's replies and take the outer step."""
    torch.set_num_threads(threads)
    _fold_round(spec_of(1e6), workers, overlap, codec)
    base = process_bytes()
    found = _fold_round(spec_of(gigabytes * 1e9), workers, overlap, codec)
    peak = process_bytes()
    copy = copy_speed(2**28)
    folded = found.pop("folded_bytes")
    seconds = found["fold_seconds"]
    return {
        "workers": workers,
        **found,
        "peak_bytes": peak - base,
        "allowed_bytes": 3 * found["model_bytes"] + found["largest_reply_bytes"],
        "copy_bytes_per_second": copy,
        "fold_share_of_copy": folded / seconds / copy,
        "decode_and_fold_share_of_copy": folded / (seconds + found["decode_seconds"]) / copy,
    }


def _fold_round(spec: StateSpec, workers: int, overlap: int, codec: str) -> dict[str, Any]:
    """Return bytes and seconds of a round on a model whose memory goes when this returns."""
    state = {e.key: torch.zeros(e.shape) for e in (*spec.shared, *spec.expert)}
    outer = OuterStep(OuterSettings(name="nesterov", lr=0.7, momentum=0.9))
    outer.momentum = {key: torch.zeros_like(value) for key, value in state.items()}
    mean = HolderMean(spec)
    model_bytes = sum(value.numel() * 4 for value in state.values())
    folded = reply_bytes = 0
    decode_seconds = fold_seconds = 0.0
    for worker in range(workers):
        step = EXPERTS * overlap // workers
        held = tuple(sorted({(worker * EXPERTS // workers + i) % EXPERTS for i in range(step)}))
        residents = (held,) * LAYERS
        sizes = spec.shared_size, spec.experts_size(residents)
        content = RecordDict()
        arrays = [_array(1e-3 * (worker + 1), size, codec) for size in sizes]
        content[PSEUDO_GRADIENT] = wire.arrays_of(*arrays)
        del arrays
        started = time.perf_counter()
        vectors = wire.vectors_in(content, PSEUDO_GRADIENT, codec, sizes)
        decode_seconds += time.perf_counter() - started
        started = time.perf_counter()
        mean.fold(*vectors, residents, 1.0)
        fold_seconds += time.perf_counter() - started
        folded += 4 * sum(sizes)
        reply_bytes = max(reply_bytes, 4 * sum(sizes))
        del vectors, content
    started = time.perf_counter()
    outer.apply(state, mean)
    outer_seconds = time.perf_counter() - started
    return {
        "model_bytes": model_bytes,
        "largest_reply_bytes": reply_bytes,
        "folded_bytes": folded,
        "decode_seconds": decode_seconds,
        "fold_seconds": fold_seconds,
        "outer_seconds": outer_seconds,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--workers", type=int, action="append", default=None)
    parser.add_argument("--overlap", type=int, default=2)
    parser.add_argument("--codec", default="float32", type=lambda name: Codec(name).name)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    for workers in options.workers or (4, 8, 16):
        words = options.gigabytes, workers, options.overlap, options.codec, options.threads
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, words))
    titles = ("workers", "peak GB", "allowed GB", "copy GB/s")
    titles += ("fold", "decode + fold", "outer step s")
    shown = [
        (
            row["workers"],
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['allowed_bytes'] / 1e9:.2f}",
            f"{row['copy_bytes_per_second'] / 1e9:.1f}",
            f"{row['fold_share_of_copy']:.0%}",
            f"{row['decode_and_fold_share_of_copy']:.0%}",
            f"{row['outer_seconds']:.2f}",
        )
        for row in rows
    ]
    print(markdown(titles, shown))
    save(options.json, {**report.environment(), "threads": options.threads, "rows": rows})


if __name__ == "__main__":
    main()
