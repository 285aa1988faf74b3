"""One job of a sweep: a run in a process of its own, and the record of how it went."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from fomoe_flwr.config import quoted
from fomoe_flwr.errors import one_line
from fomoe_flwr.files import mark_folder, save_json
from fomoe_flwr.run.directory import RunDirectory, stored_rounds

_RECORD, _LOG = "job.json", "job.log"


@dataclass(frozen=True)
class JobRecord:
    """How a job went."""

    status: str = "waiting"
    """`waiting`, `queued` (by SLURM), `running`, `completed`, `failed`, or `skipped` (refused when
    it was planned)."""
    error: str = ""
    attempts: int = 0
    seconds: float = 0.0
    """Of the last attempt, start of the process included."""
    started: float = 0.0
    """Unix time of the last attempt."""
    host: str = ""
    pid: int = 0


def read_record(folder: Path) -> JobRecord:
    """Read how a job went; `waiting` if it never began."""
    try:
        return JobRecord(**json.loads((folder / _RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return JobRecord()


def write_record(folder: Path, record: JobRecord) -> None:
    """Write down how a job goes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_json(asdict(record), folder / _RECORD)


def run_job(folder: Path, overrides: Sequence[str]) -> JobRecord:
    """Run a job, or what is left of it, and return how it went; never raises for a failed run.

    A process of its own, because a run may be killed for its memory, and because torch and Ray keep
    state in a process. A job that was completed is left alone; one that stopped after a checkpoint
    goes on from there; what an attempt without a checkpoint left is removed.
    """
    before = read_record(folder)
    if is_complete(folder):
        if before.status != "completed":
            before = replace(before, status="completed", error="")
            write_record(folder, before)
        return before
    if stored_rounds(RunDirectory(folder).checkpoints):
        words = [f"resume={quoted(str(folder))}"]
    else:
        _clear(folder)
        words = [*overrides, f"output_dir={quoted(str(folder))}"]
    folder.mkdir(parents=True, exist_ok=True)
    mark_folder(folder)
    with (folder / _LOG).open("ab") as log:
        child = subprocess.Popen(
            run_command(words), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    record = JobRecord(
        "running", "", before.attempts + 1, 0.0, time.time(), os.uname().nodename, child.pid
    )
    write_record(folder, record)
    try:
        status = child.wait()
    except BaseException as error:
        _end(child)
        write_record(folder, replace(record, status="failed", error=_interruption(error), pid=0))
        raise
    seconds = time.time() - record.started
    if status == 0 and is_complete(folder):
        record = replace(record, status="completed", seconds=seconds, pid=0)
    else:
        reason = _reason(folder, status)
        record = replace(record, status="failed", error=reason, seconds=seconds, pid=0)
    write_record(folder, record)
    return record


def run_command(words: Sequence[str]) -> list[str]:
    """Return the command of a run."""
    return [sys.executable, "-m", "fomoe_flwr.cli", "run", *words]


def is_complete(folder: Path) -> bool:
    """Tell whether a run did all its rounds."""
    summary = RunDirectory(folder).read_summary()
    return summary.get("status") == "completed" and summary.get("rounds_done") == summary["rounds"]


def end_if_running(folder: Path) -> None:
    """End a job's process if it still runs on this machine (its launcher may be gone)."""
    record = read_record(folder)
    if record.status != "running" or record.host != os.uname().nodename:
        return
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(record.pid)
        # A number that was given to another process since is not ours to end.
        if process.create_time() <= record.started + 1 and quoted(str(folder)) in " ".join(
            process.cmdline()
        ):
            process.terminate()
            process.wait(timeout=30)
    write_record(folder, replace(record, status="failed", error="interrupted", pid=0))


def job_log(folder: Path) -> Path:
    """Return where the output of a job's run goes."""
    return folder / _LOG


def _interruption(error: BaseException) -> str:
    """Say in one line what came between a run and its end."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return "interrupted: its process was told to end"
    # submitit's word for this is an exception of its own, raised wherever the job just was.
    if "timed-out" in str(error):
        return "TIMEOUT: it met its time limit"
    return one_line(error)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(timeout=30)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _clear(folder: Path) -> None:
    """Remove a run that left no checkpoint; the log of the attempt stays."""
    for item in folder.glob("*"):
        if item.name in (_RECORD, _LOG):
            continue
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()


def _reason(folder: Path, status: int) -> str:
    """Say in one line why a job failed."""
    if status in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return "interrupted: its process was told to end"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    with (folder / _LOG).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
        lines = log.read().decode(errors="replace").splitlines()
    errors = [line.strip() for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    said = [line.strip() for line in lines if line.strip()]
    return f"exit status {status}: {said[-1] if said else 'no output'}"
