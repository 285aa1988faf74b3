"""Run FoMoE and its baselines on the same text and number of tokens; print one table.

    python benchmarks/experiments.py --seeds 3 --json benchmarks/results/demo.json rounds=8
    python benchmarks/experiments.py --only photon --only fomoe-half --jobs 2 preset=tiny
    python benchmarks/experiments.py --from-json benchmarks/results/demo.json --readme
    python benchmarks/experiments.py --series layouts --seeds 3 rounds=8
    python benchmarks/experiments.py --series codecs rounds=8 local.steps=8
    python benchmarks/experiments.py --series routing --seeds 3 --plot routing.png rounds=8

Anything after the options is a Hydra override for every run. Runs go to `--root` and are skipped
when they are complete there, so a stopped series goes on. The table gives mean and spread (half of
max - min) over seeds, at equal tokens (the end of the runs) and at equal bytes: the loss of each
method, interpolated between rounds, when it has sent what the cheapest method sent in all. A second
table (and `--plot`) says how stable routing was, the same measures as in a run's own report.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import stable_routing
from measurement import FOMOE, markdown, parser_of, save

from fomoe_flwr.report.environment import environment

PARTITIONED = "model.routing=partitioned"
EXPERIMENTS = {
    # One worker in place of four: four times the batch gives the same tokens in the same steps.
    "centralised": ["experiment=centralised", "local.accumulate=4"],
    "photon": ["experiment=photon"],
    "diloco": ["experiment=diloco"],
    "local-adamw": ["experiment=photon", "outer=local_adamw"],
    "fomoe-half": ["experiment=fomoe", "layout.overlap=2"],
    "fomoe-half-partitioned": ["experiment=fomoe", "layout.overlap=2", PARTITIONED],
    "fomoe-half-local-adamw": ["experiment=fomoe", "layout.overlap=2", "outer=local_adamw"],
    "fomoe-half-random": ["experiment=fomoe", "layout=random", "layout.overlap=2"],
    "fomoe-half-rolling": ["experiment=fomoe", "layout=rolling", "layout.overlap=2"],
    "fomoe-single": ["experiment=fomoe", "layout.overlap=1"],
    "fomoe-single-partitioned": ["experiment=fomoe", "layout.overlap=1", PARTITIONED],
    "fomoe-single-random": ["experiment=fomoe", "layout=random", "layout.overlap=1"],
    "fomoe-single-rolling": ["experiment=fomoe", "layout=rolling", "layout.overlap=1"],
}
CODECS = {
    "up-bfloat16": ["wire.up=bfloat16"],
    "up-int8": ["wire.up=int8"],
    "up-int4": ["wire.up=int4"],
    "up-int4-no-feedback": ["wire.up=int4", "wire.feedback=0"],
    "up-topk-bfloat16": ["wire.up=topk_bfloat16"],
    "up-topk-int2": ["wire.up=topk_int2"],
    "up-topk-int2-no-feedback": ["wire.up=topk_int2", "wire.feedback=0"],
    "both-bfloat16": ["wire.up=bfloat16", "wire.down=bfloat16"],
    "up-int4-down-int8": ["wire.up=int4", "wire.down=int8"],
}
EXPERIMENTS |= {
    name: ["experiment=fomoe", "layout.overlap=2", *words] for name, words in CODECS.items()
}
LAYOUTS = ("", "-random", "-rolling")
SERIES = {
    "baselines": [
        name for name in EXPERIMENTS if name not in CODECS and not name.endswith(LAYOUTS[1:])
    ],
    "codecs": ["fomoe-half", *CODECS],
    "layouts": [f"fomoe-{part}{kind}" for part in ("half", "single") for kind in LAYOUTS],
    "routing": [
        "photon",
        *(f"fomoe-{part}{mode}" for part in ("half", "single") for mode in ("", "-partitioned")),
    ],
}


def run(name: str, seed: int, overrides: Sequence[str], root: Path) -> dict[str, Any]:
    """Train one experiment with one seed, unless it is done; return summary and rounds."""
    folder = (root / f"{name}-seed{seed}").resolve()
    summary = folder / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["status"] != "completed":
        command = [*FOMOE, "run", *EXPERIMENTS[name], *overrides]
        command += [f"seed={seed}", f"output_dir={folder}"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = ("round", "tokens", "eval/loss", "eval/bits_per_byte")
    rounds, moved = [], 0
    for row in map(json.loads, lines):
        moved += row["comm/bytes_up"] + row["comm/bytes_down"]
        measures = stable_routing.kept(row)
        rounds.append({key: row.get(key) for key in kept} | measures | {"bytes": moved})
    print(f"{name} seed {seed}: {rounds[-1]['eval/bits_per_byte']:.4f} bits/byte", flush=True)
    return {
        "experiment": name,
        "seed": seed,
        "summary": json.loads(summary.read_text()),
        "rounds": rounds,
    }


def at_bytes(rounds: Sequence[dict[str, Any]], budget: float) -> float | None:
    """Interpolate bits per byte at a number of bytes; None before the first evaluation."""
    seen = [r for r in rounds if r["eval/bits_per_byte"] is not None]
    for before, after in pairwise(seen):
        if before["bytes"] <= budget <= after["bytes"]:
            part = (budget - before["bytes"]) / (after["bytes"] - before["bytes"])
            step = after["eval/bits_per_byte"] - before["eval/bits_per_byte"]
            return float(before["eval/bits_per_byte"] + part * step)
    return float(seen[-1]["eval/bits_per_byte"]) if seen[-1]["bytes"] <= budget else None


def table(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return one row per experiment: means and spreads over seeds."""
    names = list(dict.fromkeys(result["experiment"] for result in results))
    federated = [r for r in results if r["experiment"] != "centralised"] or list(results)
    budget = min(result["rounds"][-1]["bytes"] for result in federated)

    def spread(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "-"
        return f"{statistics.mean(known):.3f} ± {(max(known) - min(known)) / 2:.3f}"

    rows = []
    for name in names:
        runs = [result for result in results if result["experiment"] == name]
        last = [result["rounds"][-1] for result in runs]
        rows.append(
            {
                "experiment": name,
                "parameters per worker": f"{runs[0]['summary']['params/resident'] / 1e6:.2f}M",
                "MiB in all": f"{last[0]['bytes'] / 2**20:.0f}",
                "ghost share": f"{statistics.mean(row['moe/ghost_fraction'] for row in last):.1%}",
                "loss": spread([row["eval/loss"] for row in last]),
                "bits/byte": spread([row["eval/bits_per_byte"] for row in last]),
                f"bits/byte at {budget / 2**20:.0f} MiB": (
                    "(no network)"
                    if name == "centralised"
                    else spread([at_bytes(result["rounds"], budget) for result in runs])
                ),
            }
        )
    return rows


README = {
    "photon": "Photon (full replicas, average)",
    "diloco": "DiLoCo (full replicas, Nesterov)",
    "local-adamw": "LocalAdamW (full replicas, 3x bytes)",
    "fomoe-half": "**FoMoE, half of the experts**",
    "fomoe-single": "**FoMoE, a quarter of the experts**",
    "centralised": "centralised (no federation)",
}
"""Rows of the README's table, in its order; ours stand out."""


def readme_table(rows: Sequence[dict[str, str]]) -> str:
    """Return the README's table."""
    by_name = {row["experiment"]: row for row in rows}
    budget = next(key for key in rows[0] if " MiB" in key)
    kept = {"parameters per worker": None, "MiB in all": "MiB sent in all", "bits/byte": None}
    titles = ["method", *(title or key for key, title in kept.items()), budget]
    lines = []
    for name, title in README.items():
        cells = [by_name[name][key] for key in (*kept, budget)]
        if name == "centralised":
            # It has no network: what it moves stays in one process.
            cells[1] = cells[3] = "\N{EN DASH}"
        if title.startswith("**"):
            cells = [f"**{cell}**" for cell in cells]
        lines.append([title, *cells])
    return markdown(titles, lines)


def provenance(document: dict[str, Any]) -> str:
    """Return what the numbers must be quoted with: command, commit, machine."""
    found = {r["summary"]["environment/torch"] for r in document["results"]}
    command = " ".join(document["command"])
    return (
        f"commit {document['commit']}, {document['machine']}, torch {', '.join(sorted(found))}: "
        f"python {command}"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--series", choices=SERIES, default="baselines")
    parser.add_argument("--only", action="append", choices=EXPERIMENTS, default=None)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--root", type=Path, default=Path("outputs/experiments"))
    parser.add_argument("--plot", type=Path, default=None, help="draw routing to this file")
    parser.add_argument("--from-json", type=Path, default=None, help="print a stored table")
    parser.add_argument("--readme", action="store_true", help="print the README's table")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.from_json:
        document = json.loads(options.from_json.read_text())
        results = document["results"]
    else:
        jobs = [
            (n, s) for s in range(options.seeds) for n in options.only or SERIES[options.series]
        ]
        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(lambda job: run(*job, options.overrides, options.root), jobs))
        here = environment()
        document = {
            "command": sys.argv,
            "commit": here["environment/commit"],
            "machine": here["environment/machine"],
            "results": results,
        }
    save(options.json, document)
    if options.plot:
        stable_routing.draw(results, options.plot)
    if options.readme:
        print(f"{readme_table(table(results))}\n\n{provenance(document)}")
        return
    for rows in (table(results), stable_routing.routing_table(results)):
        print("\n" + markdown([*rows[0]], [[*row.values()] for row in rows]))


if __name__ == "__main__":
    main()
