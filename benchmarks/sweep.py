"""Run a sweep unattended, kill one of its jobs on purpose, and keep the table.

    python benchmarks/sweep.py --dir outputs/sweep-tiny --json benchmarks/results/sweep-tiny.json
    python benchmarks/sweep.py --dir outputs/sweep-tiny --n-jobs 2

Three overlaps, two layouts, two routing modes and two seeds of the tiny preset over four workers.
The job in the middle is killed as the kernel kills a process for its memory. The sweep must do all
the others, say that one failed and exit 1; then `fomoe sweep --resume` must do that one and exit 0.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from measurement import FOMOE, parser_of, save

from fomoe_flwr.report.environment import environment
from fomoe_flwr.sweep.directory import SweepDirectory
from fomoe_flwr.sweep.table import sweep_rows

GRID = [
    "preset=tiny",
    "layout.num_workers=4",
    "layout.overlap=1,2,4",
    "layout.kind=fixed,random",
    "model.routing=skip_token,partitioned",
    "seed=0,1",
]


def kill_when_running(
    sweep: SweepDirectory, position: int, running: subprocess.Popen[bytes]
) -> str:
    """Wait until a job runs, kill its process, return its name."""
    while running.poll() is None:
        if sweep.is_sweep:
            job = sweep.plan().jobs[position]
            record = sweep.record(job)
            if record.status == "running":
                os.kill(record.pid, signal.SIGKILL)
                return job.name
            if record.status != "waiting":
                raise SystemExit(f"{job.name} is {record.status}: give an empty --dir")
        time.sleep(0.05)
    raise SystemExit("the sweep ended before the job to kill had begun")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dir", type=Path, default=Path("outputs/sweep-tiny"))
    parser.add_argument("--n-jobs", type=int, default=1, help="above 1: Hydra's joblib launcher")
    options = parser.parse_args()
    sweep = SweepDirectory(options.dir)
    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={options.n_jobs}"]
    start = [*FOMOE, "sweep"]
    first = [*start, "--dir", str(sweep.path), *GRID, *(launcher if options.n_jobs > 1 else [])]
    started = time.monotonic()
    running = subprocess.Popen(first)
    killed = kill_when_running(sweep, 11, running)
    first_status = running.wait()
    first_seconds = time.monotonic() - started
    statuses = [row["status"] for row in sweep_rows(sweep)]
    started = time.monotonic()
    second_status = subprocess.run([*start, "--resume", str(sweep.path)], check=False).returncode
    document = {
        "command": sys.argv,
        "killed": killed,
        "first": {
            "exit_status": first_status,
            "seconds": round(first_seconds, 1),
            "completed": statuses.count("completed"),
            "failed": statuses.count("failed"),
        },
        "resumed": {
            "exit_status": second_status,
            "seconds": round(time.monotonic() - started, 1),
        },
        **environment(),
        "rows": sweep_rows(sweep),
    }
    save(options.json, document)
    print(json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=1))
    if (first_status, second_status, statuses.count("failed")) != (1, 0, 1):
        raise SystemExit("the sweep did not do what it must")


if __name__ == "__main__":
    main()
