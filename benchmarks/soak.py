"""Soak test: a secure loopback federation trains on while its processes are killed at random.

    python benchmarks/soak.py --folder /tmp/soak --json benchmarks/results/soak.json

A keeper starts killed processes again and a supervisor resumes the run when its server dies, as
systemd does it in docs/deploy.md. Afterwards every round must have its record, every layout must
hold every expert, and the last loss must lie within the spread of undisturbed runs of other seeds.
Exit status 0 if all of that holds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from measurement import FOMOE, parser_of, save

from fomoe_flwr import report
from fomoe_flwr.config import load_settings
from fomoe_flwr.federation.deployment.loopback import Loopback
from fomoe_flwr.federation.deployment.process_family import family
from fomoe_flwr.federation.deployment.submission import supervise
from fomoe_flwr.layout import Layout
from fomoe_flwr.run.checkpoint import load_latest
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.preflight import preflight

FAULTS = {
    "SuperLink killed": 5,
    "ServerApp killed": 3,
    "SuperExec killed": 1,
    "SuperNode killed": 2,
    "SuperNode terminated": 1,
    "ClientApp killed": 3,
    "warm worker killed": 3,
}
"""How often each fault is injected."""

WORDS = (
    "preset=tiny",
    "layout.num_workers=3",
    "layout.overlap=2",
    "layout.kind=random",
    "layout.reshuffle_every=4",
    "local.threads=1",
    "outer=nesterov",
    "outer.lr=0.7",
    "outer.momentum=0.5",
    "local.schedule=constant",
    "checkpoint.every=2",
)
PATIENCE = (
    "federation.min_workers=2",
    "federation.grace_seconds=8",
    "federation.round_timeout_seconds=150",
    "federation.node_wait_seconds=90",
)
MARGIN = 3.0
"""Standard deviations of the undisturbed runs."""


class Injector(threading.Thread):
    """Kills something every few rounds, chosen by a seed."""

    def __init__(self, federation: Loopback, run: RunDirectory, rounds: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.federation, self.run_directory = federation, run
        self.random = random.Random(seed)
        kinds = [kind for kind, count in FAULTS.items() for _ in range(count)]
        self.random.shuffle(kinds)
        step = (rounds - 4) / len(kinds)
        self.plan = [(2 + int(step * i), kind) for i, kind in enumerate(kinds)]
        self.done: list[dict[str, Any]] = []
        self.stop = threading.Event()

    def run(self) -> None:
        """Wait for each planned round, then for a random moment in it, and kill."""
        for due, kind in self.plan:
            while self._rounds() < due:
                if self.stop.wait(0.3):
                    return
            self.stop.wait(self.random.uniform(0, 6))
            deadline = time.monotonic() + 40
            while not self._inject(kind) and time.monotonic() < deadline:
                if self.stop.wait(0.05):
                    return

    def _rounds(self) -> int:
        return len(self.run_directory.read_metrics())

    def _inject(self, kind: str) -> bool:
        number = signal.SIGTERM if kind.endswith("terminated") else signal.SIGKILL
        targets = self._targets(kind)
        if not targets:
            return False
        name, pid = self.random.choice(targets)
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        fault = {"time": time.time(), "after_round": self._rounds(), "kind": kind, "who": name}
        self.done.append(fault)
        print(f"--- {kind}: {name} (pid {pid}) after round {fault['after_round']}", flush=True)
        return True

    def _targets(self, kind: str) -> list[tuple[str, int]]:
        daemons = self.federation.pids()
        if kind.startswith(("SuperLink", "SuperExec")):
            name = kind.split()[0].lower()
            return [(name, daemons[name])]
        if kind.startswith("SuperNode"):
            return [(name, pid) for name, pid in daemons.items() if name.startswith("node-")]
        word = {"ServerApp": "flwr-serverapp", "ClientApp": "flwr-clientapp"}.get(kind.split()[0])
        found = []
        for process in family(self.federation.folder):
            try:
                line = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            is_warm = line[1:4] == ["-m", "fomoe_flwr.cli", "worker"]
            if any(word in part for part in line[:3]) if word else is_warm:
                found.append((word or Path(line[4]).name, process.pid))
        return found


def undisturbed(folder: Path, words: Sequence[str], seed: int) -> float:
    """Train the same run in one process without any fault; return its last held-out loss."""
    out = folder / f"undisturbed-{seed}"
    command = [*FOMOE, "run", *words, f"seed={seed}"]
    subprocess.run(
        [*command, f"output_dir={out}"], check=True, stdout=subprocess.DEVNULL, timeout=1800
    )
    return float(RunDirectory(out).read_metrics()[-1]["eval/loss"])


def verdict(run: RunDirectory, rounds: int, references: Sequence[float]) -> dict[str, Any]:
    """Check what the run left behind."""
    rows, layouts = run.read_metrics(), run.read_layouts()
    checkpoint = load_latest(run.checkpoints)
    finite = all(bool(value.isfinite().all()) for value in checkpoint.weights.values())
    covered = all(
        min(Layout.from_json(layouts[str(r)]).overlaps) >= 1 for r in range(1, rounds + 1)
    )
    loss = rows[-1]["eval/loss"]
    mean, spread = statistics.mean(references), statistics.stdev(references)
    return {
        "all rounds done": run.read_summary().get("status") == "completed",
        "every round has one record": [row["round"] for row in rows] == list(range(1, rounds + 1)),
        "every layout holds every expert": covered,
        "all weights are finite": finite,
        "loss within noise": abs(loss - mean) <= MARGIN * spread,
        "eval/loss": loss,
        "undisturbed eval/loss": list(references),
        "undisturbed mean": mean,
        "undisturbed standard deviation": spread,
    }


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="empty; everything goes there")
    parser.add_argument("--rounds", type=int, default=52)
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the faults")
    parser.add_argument(
        "--references", type=int, default=3, help="undisturbed runs to compare with"
    )
    options = parser.parse_args()
    folder = options.folder.expanduser().resolve()
    run = RunDirectory(folder / "run")
    words = [*WORDS, f"rounds={options.rounds}"]
    own = [*words, *PATIENCE, f"seed={options.seed}", "engine=flower", f"output_dir={run.path}"]
    settings = load_settings(own)
    preflight(settings)
    federation = Loopback(folder / "federation", [""] * settings.layout.num_workers)
    injector = Injector(federation, run, options.rounds, options.seed)
    stop, started, notes = threading.Event(), time.monotonic(), []

    def say(text: str) -> None:
        notes.append(text)
        print(text, flush=True)

    # So that `finally` runs, and no process is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    federation.up()
    keeper = threading.Thread(target=federation.keep, args=[stop], daemon=True)
    keeper.start()
    injector.start()
    try:
        done = supervise(federation.link, settings, own, 5, say)
    finally:
        injector.stop.set()
        stop.set()
        keeper.join()
        federation.end()
    seconds = time.monotonic() - started
    left = len(family(federation.folder))
    references = [undisturbed(folder, words, options.seed + i) for i in range(options.references)]
    checks = verdict(run, options.rounds, references)
    rows = run.read_metrics()
    result = {
        "command": "python benchmarks/soak.py " + " ".join(sys.argv[1:]),
        **report.environment(),
        "seconds": seconds,
        "rounds": len(rows),
        "faults": dict(Counter(fault["kind"] for fault in injector.done)),
        "faults injected": len(injector.done),
        "server resumed": sum("submitted" in note for note in notes) - 1,
        "log": notes,
        "process starts": dict(
            Counter(
                event["process"]
                for event in map(
                    json.loads, (federation.folder / "events.jsonl").read_text().splitlines()
                )
                if event["event"] == "started"
            )
        ),
        "processes left behind": left,
        "rounds without somebody": sum(row["round/workers_failed"] > 0 for row in rows),
        "replies folded": sum(row["round/workers_ok"] for row in rows),
        "replies too late": sum(row["round/late_replies"] for row in rows),
        "workers rejoined": sum(len(row["round/rejoined"]) for row in rows),
        "of these with a fresh inner state": sum(row["round/rejoined_fresh"] for row in rows),
        "experts nobody returned": sum(row["moe/missing_experts"] for row in rows),
        "checks": checks,
        "injected": injector.done,
    }
    print(json.dumps(result, indent=2))
    save(options.json, result)
    passed = done and not left and all(v for v in checks.values() if isinstance(v, bool))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
