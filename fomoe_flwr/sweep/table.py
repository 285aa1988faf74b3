"""The table of a sweep: one row a job, as CSV and as Parquet."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.console import Console
from rich.table import Table

from fomoe_flwr import costs
from fomoe_flwr.config import is_run, read_settings
from fomoe_flwr.files import replace_file
from fomoe_flwr.sweep.directory import SweepDirectory
from fomoe_flwr.sweep.plan import Job
from fomoe_flwr.sweep.queue import advice

_SUMMARY = ("rounds_done", "tokens", "comm/bytes_up", "comm/bytes_down")
_LAST = ("eval/loss", "eval/bits_per_byte", "moe/ghost_fraction", "train/tokens_per_second")
_PREDICTED = ("params/resident", "params/total", "memory/worker_bytes", "ratio/full_replica")


def sweep_rows(sweep: SweepDirectory) -> list[dict[str, Any]]:
    """Return one row a job: how it went, what varied, what it cost and how good it became.

    All rows have the same columns; what a job has no value for is None.
    """
    plan = sweep.plan()
    keys = list(dict.fromkeys(key for job in plan.jobs for key in job.varied))
    return [_row(sweep, job, keys) for job in plan.jobs]


def _row(sweep: SweepDirectory, job: Job, keys: list[str]) -> dict[str, Any]:
    record, run = sweep.record(job), sweep.run(job)
    row: dict[str, Any] = {"job": job.name, "status": record.status, "error": record.error}
    row |= {key: job.varied.get(key) for key in keys}
    summary = run.read_summary()
    row |= {key: summary.get(key) for key in _SUMMARY}
    row["eval/loss_untrained"] = summary.get("eval/loss_untrained")
    rounds = run.read_metrics()
    for key in _LAST:
        row[key] = next((r[key] for r in reversed(rounds) if r.get(key) is not None), None)
    row["train_seconds"] = sum(r["round/seconds"] for r in rounds) if rounds else None
    predicted = costs.summary(read_settings(run.config)) if is_run(run.path) else {}
    row |= {key: predicted.get(key) for key in _PREDICTED}
    row |= {"job_seconds": record.seconds, "attempts": record.attempts}
    row["commit"] = summary.get("environment/commit")
    row["machine"] = summary.get("environment/machine")
    return row


def write_table(sweep: SweepDirectory) -> list[Path]:
    """Write `results.csv` and `results.parquet` atomically; return them."""
    rows = sweep_rows(sweep)
    if not rows:
        return []
    table = pa.Table.from_pylist(rows)
    written = []
    for path, write in (
        (sweep.table, pyarrow.csv.write_csv),
        (sweep.table.with_suffix(".parquet"), pyarrow.parquet.write_table),
    ):
        replace_file(path, partial(write, table))
        written.append(path)
    return written


def print_table(sweep: SweepDirectory) -> None:
    """Print the table, as much of it as a terminal has room for."""
    rows = sweep_rows(sweep)
    keys = list(dict.fromkeys(key for job in sweep.plan().jobs for key in job.varied))
    table = Table(title=f"{sweep.path.name}: every job", title_justify="left")
    for column in ("#", *(key.split(".")[-1] for key in keys), "status"):
        table.add_column(column, no_wrap=True)
    for column in ("loss", "bits/byte", "MiB", "resident", "ghosts", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        sent = (row["comm/bytes_up"] or 0) + (row["comm/bytes_down"] or 0)
        table.add_row(
            str(number),
            *(str(row[key]) for key in keys),
            row["status"],
            _shown(row["eval/loss"], "{:.4f}"),
            _shown(row["eval/bits_per_byte"], "{:.3f}"),
            _shown(sent / 2**20 if sent else None, "{:.1f}"),
            _shown(row["params/resident"], "{:,.0f}"),
            _shown(row["moe/ghost_fraction"], "{:.1%}"),
            _shown(row["job_seconds"] or None, "{:.1f}"),
        )
    console = Console(width=120, highlight=False)
    console.print(table)
    for number, (row, job) in enumerate(zip(rows, sweep.plan().jobs, strict=True)):
        if row["error"]:
            log = f"; see {sweep.log(job)}" if row["status"] == "failed" and sweep.log(job) else ""
            # A path that is folded cannot be copied.
            line = f"#{number} {row['status']}: {row['error']}{log}"
            console.print(line, markup=False, soft_wrap=True)
    if errors := [row["error"] for row in rows if row["status"] == "failed"]:
        console.print(f"go on: {advice(sweep.path, errors)}", markup=False, soft_wrap=True)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
