"""Measure how long commands take that train nothing, as whole processes, in two source trees.

    git worktree add /tmp/before e282b06
    python benchmarks/startup.py --before /tmp/before --json benchmarks/results/startup.json

The two trees take turns (before, after, before, after ...), so other work on the machine disturbs
both alike. Ratios are before over after: of medians, and of the fastest runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from measurement import FOMOE, parser_of, save

from fomoe_flwr.config import load_settings
from fomoe_flwr.report.environment import environment

ROOT = Path(__file__).resolve().parents[1]
SITES = "sites: [{memory_gib: 80, teraflops: 400, up_mbps: 1000, down_mbps: 1000}]\n"


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the commands by name; make the run directory and the sites file that they read."""
    load_settings(["preset=tiny"]).save(folder / "config.yaml")
    sites = folder / "sites.yaml"
    sites.write_text(SITES, encoding="utf-8")
    return {
        "--help": ["--help"],
        "status": ["status", str(folder)],
        "costs": ["costs", "preset=tiny"],
        "plan": ["plan", str(sites), "preset=tiny"],
    }


def seconds(tree: Path, words: list[str], folder: Path) -> float:
    """Time one process from its start to its end."""
    started = time.perf_counter()
    subprocess.run(
        [*FOMOE, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def compare(before: Path, after: Path, words: list[str], folder: Path, repeat: int) -> dict:
    """Time one command in both trees, in turn."""
    trees = {"before": before, "after": after}
    for tree in trees.values():
        seconds(tree, words, folder)  # writes the bytecode
    times: dict[str, list[float]] = {name: [] for name in trees}
    for _ in range(repeat):
        for name, tree in trees.items():
            times[name].append(seconds(tree, words, folder))
    found: dict[str, float] = {}
    for label, of in (("median", statistics.median), ("best", min)):
        values = {name: of(times[name]) for name in trees}
        found |= {f"{name}_{label}_seconds": round(value, 4) for name, value in values.items()}
        found[f"ratio_of_{label}s"] = round(values["before"] / values["after"], 3)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout to compare with")
    parser.add_argument("--after", type=Path, default=ROOT, help="default: this one")
    parser.add_argument("--repeat", type=int, default=7, help="timed pairs, default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trees = options.before.resolve(), options.after.resolve()
        rows = {
            command: compare(*trees, words, folder, options.repeat)
            for command, words in commands(folder).items()
        }
    commits = {
        label: subprocess.run(
            ["git", "-C", str(tree), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for label, tree in zip(("before", "after"), trees, strict=True)
    }
    document = {**environment(), "commits": commits, "repeat": options.repeat, "commands": rows}
    print(json.dumps(document, indent=1))
    save(options.json, document)


if __name__ == "__main__":
    main()
