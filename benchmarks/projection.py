"""Project training time to models and sites that nobody has here, and say when FoMoE is worth it.

    python benchmarks/projection.py --to benchmarks/results/projection
    python benchmarks/projection.py --picture docs/images/projection.png

Everything comes from `fomoe_flwr.costs`; the assumptions stand at the top of what it writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measurement import markdown, save

from fomoe_flwr import costs
from fomoe_flwr.config import Settings, load_settings

BATCH = 1024
"""Sequences of 2048 tokens in a step over all sites, as in the paper."""
MODELS: dict[str, tuple[tuple[str, ...], float, int, float]] = {
    # name: (overrides, tokens, H100s of a site, GB of each)
    "2B": (("model=paper-2b",), 4e10, 8, 80),
    "13B": (("model=paper-13b",), 3e11, 64, 80),
    "100B": (("model=paper-100b",), 2e12, 512, 80),
    "415B": (
        (
            "model=paper-100b",
            "model.name=paper-415b",
            "model.hidden_size=8192",
            "model.num_heads=128",
            "model.num_kv_heads=128",
            "model.num_experts=256",
            "model.top_k=64",
        ),
        8e12,
        2048,
        80,
    ),
}
SITES = (4, 8, 32)
LINKS_MBPS = (100.0, 1_000.0, 10_000.0, 100_000.0)
H100_TERAFLOPS, MFU, HEADROOM = 989.0, 0.4, 0.2
ASSUMPTIONS = (
    f"H100 at {H100_TERAFLOPS:g} TFLOP/s in bf16, of which training reaches {MFU:.0%}; a site is "
    "one fast machine, nothing is lost inside it",
    "8, 64, 512 and 2048 H100 a site for 2B, 13B, 100B and 415B; 40 B, 300 B, 2 T and 8 T tokens",
    f"{BATCH} sequences of 2048 tokens a step over all sites, whatever their number",
    "a star with a server that holds nobody up; both ways the same link; 50 ms; bf16 on the wire",
    "32 local steps, plain outer step, skip_token at uniform load, overlap 4 (2 of 4 sites)",
    "data-parallel training synchronises bf16 gradients through the same star at every step",
    "16 bytes of training state a parameter; a fifth of the memory is left to activations",
    "nothing overlaps with communication, nobody is late, nobody fails",
)
_DAY = 86_400


def settings_of(name: str, workers: int) -> Settings:
    words, tokens, gpus, _ = MODELS[name]
    return load_settings(
        [
            *words,
            "model.routing=skip_token",
            "data.sequence_length=2048",
            f"local.batch_size={BATCH // workers}",
            "local.steps=32",
            f"layout.num_workers={workers}",
            f"layout.overlap={min(4, workers // 2)}",
            "wire.up=bfloat16",
            "wire.down=bfloat16",
            f"costs.tokens={tokens:g}",
            f"costs.site_teraflops={gpus * H100_TERAFLOPS:g}",
            f"costs.mfu={MFU}",
        ]
    )


def project(names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield one row a model, number of sites and link."""
    for name in names:
        _, _, gpus, gigabytes = MODELS[name]
        for workers in SITES:
            settings = settings_of(name, workers)
            for mbps in LINKS_MBPS:
                link = replace(settings.costs, up_mbps=mbps, down_mbps=mbps)
                found = dict(costs.summary(replace(settings, costs=link)))
                memory = (1 - HEADROOM) * gpus * gigabytes * 1e9
                yield {
                    "model": name,
                    "sites": workers,
                    "overlap": settings.layout.overlap,
                    "mbps": mbps,
                    "fomoe_days": found["time/run_seconds"] / _DAY,
                    "diloco_days": found["time/diloco_run_seconds"] / _DAY,
                    "ddp_days": found["time/ddp_run_seconds"] / _DAY,
                    "over_diloco": found["speedup/diloco"],
                    "over_ddp": found["speedup/ddp"],
                    "worker_gb": found["memory/worker_bytes"] / 1e9,
                    "full_replica_gb": found["memory/full_replica_bytes"] / 1e9,
                    "site_gb": gpus * gigabytes,
                    "full_replica_fits": found["memory/full_replica_bytes"] <= memory,
                    "computing_share": found["time/compute_seconds"] / found["time/round_seconds"],
                }


def table(rows: list[dict[str, Any]]) -> str:
    """Write rows as Markdown."""
    titles = ("model", "sites", "overlap", "link", "FoMoE", "DiLoCo", "DDP", "over DiLoCo")
    titles += ("over DDP", "training's share", "state: part, whole")
    lines = []
    for row in rows:
        link = f"{row['mbps'] / 1000:g} Gb/s" if row["mbps"] >= 1000 else f"{row['mbps']:g} Mb/s"
        lines.append(
            [
                *(row[key] for key in ("model", "sites", "overlap")),
                link,
                *(_days(row[f"{method}_days"]) for method in ("fomoe", "diloco", "ddp")),
                f"{row['over_diloco']:.2f}x",
                f"{row['over_ddp']:.1f}x",
                f"{row['computing_share']:.0%}",
                f"{row['worker_gb']:,.0f}, {row['full_replica_gb']:,.0f} GB",
            ]
        )
    return markdown(titles, lines)


def _days(number: float) -> str:
    return f"{number:,.0f} d" if number >= 100 else f"{number:.3g} d"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the gain over DiLoCo against the link, a panel a number of sites."""
    figure = Figure(figsize=(10, 3.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(SITES), sharey=True)
    for axes, workers in zip(panels, SITES, strict=True):
        for name in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if (row["model"], row["sites"]) == (name, workers)]
            gains = [row["over_diloco"] for row in mine]
            axes.plot([row["mbps"] for row in mine], gains, marker="o", label=name)
        axes.set_xscale("log")
        axes.set_title(f"{workers} sites, overlap {mine[0]['overlap']}")
        axes.set_xlabel("link of a site, Mb/s")
        axes.axhline(1, color="#888888", lw=1)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("DiLoCo's time over FoMoE's")
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS, default=None)
    parser.add_argument("--to", type=Path, default=None, help="write FILE.json and FILE.md")
    parser.add_argument("--picture", type=Path, default=None)
    options = parser.parse_args()
    rows = list(project(options.model or list(MODELS)))
    print(table(rows))
    if options.to:
        save(options.to.with_suffix(".json"), {"assumptions": ASSUMPTIONS, "rows": rows})
        assumed = "\n".join(f"- {line}" for line in ASSUMPTIONS)
        options.to.with_suffix(".md").write_text(
            f"# Projection\n\n`python benchmarks/projection.py`\n\n{assumed}\n\n{table(rows)}\n"
        )
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
