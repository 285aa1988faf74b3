"""What SLURM says of jobs, with or without its accounting."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection

from fomoe_flwr.config import SettingsError
from fomoe_flwr.errors import RunError, one_line
from fomoe_flwr.sweep.queue import UNKNOWN, Look

_PROGRAMS = ("sbatch", "squeue", "srun")
_SECONDS = 60
"""A controller that has not answered by then does not answer."""


class NoAnswerError(RunError):
    """SLURM could not be asked; says nothing about the jobs."""


def check_programs() -> None:
    """Refuse a machine without SLURM's commands. Raises SettingsError."""
    absent = [name for name in _PROGRAMS if not shutil.which(name)]
    if absent:
        raise SettingsError(
            f"hydra/launcher=submitit_slurm: {', '.join(absent)} not found on PATH; run this where "
            "SLURM's commands are, or choose hydra/launcher=basic, joblib or submitit_local"
        )


def look(ids: Collection[str]) -> dict[str, Look]:
    """Ask SLURM about jobs, array tasks as `JOB_TASK`; a job that it forgot is UNKNOWN.

    Raises NoAnswerError if the controller is not there.
    """
    # squeue lists what ended a short while ago too, so it does without accounting. It is asked for
    # all jobs of the user: a list with an id that SLURM forgot would be an error.
    said = _ask(
        [
            *("squeue", "--noheader", "--array", "--states=all"),
            *(f"--user={os.getuid()}", "--format=%i|%T|%r|%l|%N"),
        ]
    )
    found = {}
    for line in said.splitlines():
        number, state, reason, limit, node = line.strip().split("|", 4)
        if number in ids:
            found[number] = Look(state, "" if reason == "None" else reason, limit, node)
    if forgotten := [number for number in ids if number not in found]:
        found |= _remembered(forgotten)
    return found


def _remembered(ids: Collection[str]) -> dict[str, Look]:
    """Ask the accounting, which most clusters have, about jobs that have left the queue."""
    from submitit.slurm.slurm import SlurmInfoWatcher

    jobs = ",".join(sorted({number.partition("_")[0] for number in ids}))
    try:
        said = _ask(["sacct", "--parsable2", "--format=JobID,State,NodeList,Timelimit", "-j", jobs])
    except NoAnswerError:
        said = ""
    rows = SlurmInfoWatcher().read_info(said)
    found = {}
    for number in ids:
        row = rows.get(number, {})
        # `CANCELLED by 1000`
        state = (row.get("State") or UNKNOWN).split()[0]
        found[number] = Look(state, "", row.get("Timelimit", ""), row.get("NodeList", ""))
    return found


def _ask(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswerError(one_line(error)) from error
    if done.returncode:
        raise NoAnswerError(one_line(done.stderr) or f"{command[0]}: exit status {done.returncode}")
    return done.stdout
