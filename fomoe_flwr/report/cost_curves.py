"""Pictures of what a run would cost, swept over overlap, workers and bandwidth.

Imports matplotlib, so callers import this module only when they draw. No display is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fomoe_flwr import costs
from fomoe_flwr.config import Settings
from fomoe_flwr.files import check_folder, mark_folder
from fomoe_flwr.layout import Layout, draw_layout
from fomoe_flwr.parameters.shapes import num_sparse_layers

BANDWIDTHS_MBPS = tuple(10 ** (n / 3) for n in range(3, 19))
"""10 Mb/s to 1 Tb/s."""
_DAY = 86_400


def draw_costs(settings: Settings, folder: Path) -> list[Path]:
    """Draw the paper's kinds of sweep (its Fig. 8 to 11) for these settings; return the files."""
    drawn = []
    pictures: Sequence[tuple[str, Callable[[Axes, Settings], None]]] = (
        ("flops", _flops),
        ("bytes", _bytes),
        ("memory", _memory),
        ("time", _time),
        ("ghosts", _ghosts),
    )
    check_folder(folder, "--sweep")
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures:
        figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=130)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw(axes, settings)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
        path = folder / f"{name}.png"
        figure.savefig(path)
        drawn.append(path)
    mark_folder(folder)
    return drawn


def overlaps_of(num_workers: int) -> list[int]:
    """Return powers of two up to the number of workers, and that number."""
    return sorted({*(2**n for n in range(num_workers.bit_length())), num_workers} - {0})


def at(settings: Settings, num_workers: int, overlap: int, kind: str = "") -> Settings:
    """Return the settings with other workers and overlap, and an even layout."""
    chosen = kind or (settings.layout.kind if settings.layout.kind == "random" else "fixed")
    layout = replace(
        settings.layout,
        kind=chosen,
        num_workers=num_workers,
        overlap=overlap,
        residents=[],
        capacity_gib=[],
        path="",
        allow_uneven=True,
    )
    return replace(settings, layout=layout)


def _summary(settings: Settings) -> dict[str, Any]:
    return dict(costs.summary(settings))


def _flops(axes: Axes, settings: Settings) -> None:
    workers = settings.layout.num_workers
    overlaps = _possible(settings, workers)
    for routing in ("skip_token", "partitioned"):
        model = replace(settings, model=replace(settings.model, routing=routing))
        found = [_summary(at(model, workers, overlap)) for overlap in overlaps]
        shares = [f["flops/worker_train_per_token"] / f["flops/train_per_token"] for f in found]
        axes.plot(overlaps, shares, marker="o", label=routing)
    _powers(axes, overlaps)
    axes.set_xlabel(f"overlap, of {workers} workers")
    axes.set_ylabel("FLOPs of a token, share of the whole model's")
    axes.set_title(f"{settings.model.name}: training FLOPs of a worker")


def _bytes(axes: Axes, settings: Settings) -> None:
    own = settings.layout.num_workers
    counts = costs.parameter_counts(settings.model)
    for workers in sorted({4, 8, 32, own}):
        shares = [overlap / workers for overlap in overlaps_of(workers)]
        for name, rate, style in (("fixed", 0.0, "-"), ("random each round", 1.0, "--")):
            ratios = [
                costs.ring_ratio_full_replica(counts.shared, counts.expert, workers, overlap, rate)
                for overlap in overlaps_of(workers)
            ]
            axes.plot(shares, ratios, style, marker=".", label=f"ring of {workers}, {name}")
    star = [
        costs.star_ratio_full_replica(counts.shared, counts.expert, 64, overlap)
        for overlap in overlaps_of(64)
    ]
    axes.plot([n / 64 for n in overlaps_of(64)], star, "k-", lw=2, label="star (Flower)")
    axes.set_xscale("log", base=2)
    names = ["1/64", "1/32", "1/16", "1/8", "1/4", "1/2", "1"]
    axes.set_xticks([n / 64 for n in overlaps_of(64)], names)
    axes.set_xlabel("overlap / workers")
    axes.set_ylabel("full replica's bytes over FoMoE's")
    axes.set_title(f"{settings.model.name}: bytes of a synchronisation")


def _memory(axes: Axes, settings: Settings) -> None:
    for workers in sorted({4, 8, 32, settings.layout.num_workers}):
        overlaps = _possible(settings, workers)
        if not overlaps:
            continue
        held = [
            max(costs.resident_counts(settings.model, _layout(at(settings, workers, overlap))))
            for overlap in overlaps
        ]
        sizes = [costs.state_bytes(settings) * count / 1e9 for count in held]
        axes.plot(overlaps, sizes, marker="o", label=f"{workers} workers")
    _powers(axes, overlaps_of(max(32, settings.layout.num_workers)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("overlap")
    axes.set_ylabel("training state of a worker, GB")
    axes.set_title(f"{settings.model.name}: memory")


def _possible(settings: Settings, num_workers: int) -> list[int]:
    """Return the overlaps that leave no worker without an expert."""
    experts = settings.model.num_experts
    return [overlap for overlap in overlaps_of(num_workers) if experts * overlap >= num_workers]


def _powers(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])


def _layout(settings: Settings) -> Layout:
    shape = num_sparse_layers(settings.model), settings.model.num_experts
    return draw_layout(settings.layout, *shape, settings.seed, 1)


def _time(axes: Axes, settings: Settings) -> None:
    workers = settings.layout.num_workers
    lines: dict[str, list[float]] = {}
    for mbps in BANDWIDTHS_MBPS:
        link = replace(settings.costs, up_mbps=mbps, down_mbps=mbps)
        for overlap in _possible(settings, workers)[:-1] or [workers]:
            found = _summary(at(replace(settings, costs=link), workers, overlap))
            lines.setdefault(f"FoMoE, overlap {overlap}", []).append(found["time/run_seconds"])
        lines.setdefault("DiLoCo / Photon", []).append(found["time/diloco_run_seconds"])
        lines.setdefault("data-parallel", []).append(found["time/ddp_run_seconds"])
    for name, seconds in lines.items():
        style = "-" if name.startswith("FoMoE") else "--"
        axes.plot(BANDWIDTHS_MBPS, [s / _DAY for s in seconds], style, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("link of a site, Mb/s")
    axes.set_ylabel("days to the token budget")
    axes.set_title(
        f"{settings.model.name}: {workers} sites, {settings.local.steps} local steps, "
        f"{settings.costs.topology}"
    )


def _ghosts(axes: Axes, settings: Settings) -> None:
    model, length = settings.model, settings.data.sequence_length
    share = costs.token_flops(model, length).expert_share
    ghosts = range(model.num_experts + 1)
    limits = [costs.skip_speedup_limit(share, 1 - number / model.num_experts) for number in ghosts]
    axes.plot(ghosts, limits, label=f"limit; experts are {share:.0%} of the FLOPs")
    axes.set_xlabel(f"ghosts, of {model.num_experts} experts")
    axes.set_ylabel("speed-up of a step")
    axes.set_title(f"{model.name}: what skipping ghosts can save (skip_token)")
