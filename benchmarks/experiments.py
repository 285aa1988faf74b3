"""Run FoMoE and its baselines on the same text, seed and number of tokens; print one table.

    python benchmarks/experiments.py --json results/demo.json rounds=10
    python benchmarks/experiments.py --only photon --only fomoe-overlap-2 preset=tiny

Anything after the options is a Hydra override for every run. Runs go to `outputs/experiments/` and
are skipped when they are already complete there, so a stopped series goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

EXPERIMENTS = {
    # One worker in place of four: four times the batch gives the same tokens in the same steps.
    "centralised": ["experiment=centralised", "local.accumulate=4"],
    "photon": ["experiment=photon"],
    "diloco": ["experiment=diloco"],
    "fomoe-overlap-2": ["experiment=fomoe", "layout.overlap=2"],
    "fomoe-overlap-2-random": ["experiment=fomoe", "layout.overlap=2", "layout.kind=random"],
    "fomoe-overlap-2-partitioned": [
        "experiment=fomoe",
        "layout.overlap=2",
        "model.routing=partitioned",
    ],
    "fomoe-overlap-1": ["experiment=fomoe", "layout.overlap=1"],
}


def run(name: str, overrides: list[str], root: Path) -> dict[str, object]:
    """Train one experiment, unless it is done, and return its row."""
    folder = root / name
    summary_file = folder / "summary.json"
    done = summary_file.is_file() and json.loads(summary_file.read_text())["status"] == "completed"
    if not done:
        command = [
            sys.executable,
            "-m",
            "fomoe_flwr.cli",
            "run",
            *EXPERIMENTS[name],
            *overrides,
            f"output_dir={folder.resolve()}",
        ]
        subprocess.run(command, check=True)
    summary = json.loads(summary_file.read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    return {
        "experiment": name,
        "parameters_per_worker": summary["params/resident"],
        "mib_per_round": round((last["comm/bytes_up"] + last["comm/bytes_down"]) / 2**20, 1),
        "tokens": summary["tokens"],
        "ghost_share": round(last["moe/ghost_fraction"], 3),
        "loss": round(last["eval/loss"], 4),
        "bits_per_byte": round(last["eval/bits_per_byte"], 4),
        "commit": summary["environment/commit"],
        "machine": summary["environment/machine"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=EXPERIMENTS, default=None)
    parser.add_argument("--root", type=Path, default=Path("outputs/experiments"))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    rows = [run(name, options.overrides, options.root) for name in options.only or EXPERIMENTS]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    shown = [key for key in rows[0] if key not in ("commit", "machine")]
    print("| " + " | ".join(shown) + " |\n|" + " --- |" * len(shown))
    for row in rows:
        print("| " + " | ".join(str(row[key]) for key in shown) + " |")


if __name__ == "__main__":
    main()
