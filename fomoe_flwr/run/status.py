"""The state of a run, read from its directory: for a person on call, or as JSON."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fomoe_flwr.config import find_run, read_settings
from fomoe_flwr.files import held_bytes
from fomoe_flwr.run.directory import RunDirectory, checkpoint_name, stored_rounds
from fomoe_flwr.run.heartbeat import BEAT_SECONDS
from fomoe_flwr.run.phases import largest, phases_around, phases_of
from fomoe_flwr.run.turnout import turnout

_RECENT_ROUNDS = 10
_PHASES = {
    "start": "start_seconds",
    "last round": "last_round_seconds",
    "end": "end_seconds",
}
_SILENT_SECONDS = 6 * BEAT_SECONDS
"""Without a heartbeat for so long, a run that says it runs is taken for dead."""


def run_status(path: Path, now: float | None = None) -> dict[str, Any]:
    """Return the state of a run as one JSON-able object. Raises SettingsError for no run."""
    run = RunDirectory(find_run(path))
    now = time.time() if now is None else now
    settings = read_settings(run.config)
    summary, rows = run.read_summary(), run.read_metrics()
    beat = _read(run.heartbeat)
    silent = now - beat["time"] if "time" in beat else None
    state = summary.get("status", "unknown")
    if state == "running" and (silent is None or silent > _SILENT_SECONDS):
        state = "silent"
    is_on = state in ("running", "unknown")
    workers = settings.layout.num_workers
    left = settings.rounds - len(rows)
    seen: set[int] = set()  # What a checkpoint names counts there, and not in `server` again.
    seconds = [row["round/seconds"] for row in rows[-_RECENT_ROUNDS:]]
    return {
        "run": str(run.path),
        "state": state,
        "error": summary.get("error"),
        "round": rows[-1]["round"] if rows else 0,
        "rounds": settings.rounds,
        "phase": beat.get("phase"),
        "host": beat.get("host"),
        "pid": beat.get("pid"),
        "seconds_since_heartbeat": silent,
        "seconds_left": left * statistics.median(seconds) if seconds and left and is_on else None,
        "eval/loss": next((r["eval/loss"] for r in reversed(rows) if "eval/loss" in r), None),
        "start_seconds": phases_around(summary, "start"),
        "last_round_seconds": phases_of(rows[-1]) if rows else {},
        "end_seconds": phases_around(summary, "end"),
        "awaited": [
            {"worker": each["worker"], "for": each["for"], "seconds": now - each["since"]}
            for each in (beat.get("awaited", []) if state == "running" else [])
        ],
        # Of a run that is over nobody is missing: what counted is told.
        "missing": _missing(rows, workers, now) if is_on else [],
        "workers": [asdict(each) for each in turnout(rows, workers)],
        "late_replies": sum(row.get("round/late_replies", 0) for row in rows),
        "bytes_up": sum(row["comm/bytes_up"] for row in rows),
        "bytes_down": sum(row["comm/bytes_down"] for row in rows),
        "disk_bytes": {
            item.name: held_bytes(item, seen)
            for item in sorted(run.path.iterdir())
            if item.is_dir()
        },
        "checkpoints": [checkpoint_name(each) for each in stored_rounds(run.checkpoints)],
    }


def show_status(status: Mapping[str, Any]) -> str:
    """Return the state as text."""
    is_over = status["state"] in ("completed", "failed")
    lines = [
        f"run          {status['run']}",
        f"state        {status['state']}, round {status['round']} of {status['rounds']}"
        + (f", {_duration(status['seconds_left'])} to go" if status["seconds_left"] else ""),
    ]
    if status["error"]:
        lines.append(f"error        {status['error']}")
    since = status["seconds_since_heartbeat"]
    if since is not None:
        lines.append(
            f"ended        {_duration(since)} ago, on {status['host']}"
            if is_over
            else f"heartbeat    {_duration(since)} ago, at `{status['phase']}`, "
            f"pid {status['pid']} on {status['host']}"
        )
    if status["eval/loss"] is not None:
        lines.append(f"loss         {status['eval/loss']:.4f}")
    for gone in status["missing"]:
        ago = "" if gone["seconds"] is None else f" ({_duration(gone['seconds'])})"
        last = f"since round {gone['since_round']}{ago}"
        lines.append(f"missing      worker {gone['worker']} {last}: {gone['reason']}")
    if status["state"] == "running" and not status["missing"] and status["round"]:
        lines.append(f"missing      nobody in round {status['round']}")
    for each in status["awaited"]:
        what = "a node" if each["for"] == "node" else "the reply"
        lines.append(
            f"waits for    {what} of worker {each['worker']}, for {_duration(each['seconds'])}"
        )
    lines += [f"took part    {line}" for line in _took_part(status)]
    for name, key in _PHASES.items():
        if seconds := status[key]:
            lines.append(f"{name:<12} {largest(seconds)}")
    lines.append(
        f"sent         {_mib(status['bytes_up'])} up, {_mib(status['bytes_down'])} down, "
        f"{status['late_replies']} replies too late"
    )
    disk = status["disk_bytes"]
    parts = ", ".join(f"{name} {_mib(size)}" for name, size in disk.items())
    lines.append(f"disk         {_mib(sum(disk.values()))}: {parts}")
    kept = ", ".join(status["checkpoints"]) or "none"
    lines.append(f"checkpoints  {kept}")
    if status["state"] in ("failed", "silent"):
        lines.append(
            f"go on with   fomoe run resume={status['run']}"
            if status["checkpoints"]
            else "go on with   a new run: this one has no checkpoint to resume from"
        )
    return "\n".join(lines)


def _took_part(status: Mapping[str, Any]) -> Iterator[str]:
    if not status["round"]:
        return
    absent = [each for each in status["workers"] if each["missed"]]
    if len(absent) < len(status["workers"]):
        yield f"{'all others' if absent else 'all workers'} in every round"
    for each in absent:
        rounds = each["counted"] + each["missed"]
        yield (
            f"worker {each['worker']} in {each['counted']} of {rounds} rounds, not in the others "
            f"mostly because: {each['reason']}"
        )


def _missing(
    rows: Sequence[Mapping[str, Any]], num_workers: int, now: float
) -> list[dict[str, Any]]:
    """List the workers that were not in the last round: since which round, and why."""
    if not rows:
        return []
    found = []
    for worker in range(num_workers):
        absent = 0
        for row in reversed(rows):
            if worker in row.get("round/participants", []):
                break
            absent += 1
        if not absent:
            continue
        last = rows[-absent - 1] if absent < len(rows) else None
        ended = None if last is None else last.get("round/ended_unix_seconds")
        found.append(
            {
                "worker": worker,
                "since_round": rows[-absent]["round"],
                "seconds": None if ended is None else now - ended,
                "reason": rows[-1].get("round/failures", {}).get(str(worker), "unknown"),
            }
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
