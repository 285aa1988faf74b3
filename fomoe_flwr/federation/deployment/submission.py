"""Submissions: runs that are given to a running SuperLink and followed to their end.

`flwr run --stream` exits 0 even when a run failed, and ends when the SuperLink is away for a
moment. So a submission is followed by its run id, and the SuperLink is asked how it ended.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fomoe_flwr.config import Settings, load_settings, quoted
from fomoe_flwr.errors import RunError
from fomoe_flwr.federation.deployment.app_folder import app_folder
from fomoe_flwr.federation.deployment.launch import is_complete, write_run_config
from fomoe_flwr.federation.deployment.process_family import environment, tool
from fomoe_flwr.run.checkpoint import stored_rounds
from fomoe_flwr.run.directory import RunDirectory

_POLL_SECONDS = 5.0
_CALL_SECONDS = 120.0
_AWAY_SECONDS = 900.0
"""How long a SuperLink may be away while a run is followed."""

_PAUSE_SECONDS = 4.0
_LONGEST_PAUSE_SECONDS = 60.0
"""A node that was killed is let in again after a minute, so an attempt after it may succeed."""

Say = Callable[[str], None]


class SubmissionError(RunError):
    """A run that a SuperLink does not take, or of which it no longer knows."""


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink that Flower's configuration in `home` names; `mark` as in `process_family`."""

    home: Path
    connection: str
    mark: Path

    def submit(self, run_config: Path) -> str:
        """Give a run to the SuperLink; return its id. Raises SubmissionError."""
        if not (self.home / "config.toml").is_file():
            raise SubmissionError(
                f"{self.home} is no federation's folder (it has no config.toml): name another, or "
                f"start one there with fomoe federation up {self.home}"
            )
        with app_folder() as app:
            answer = self._ask("run", str(app), self.connection, "--run-config", str(run_config))
        if not answer.get("success"):
            raise SubmissionError(f"the SuperLink did not take the run: {answer}")
        return str(answer["run-id"])

    def status(self, run_id: str) -> str:
        """Return a run's status, e.g. `running` or `finished:failed`. Raises SubmissionError."""
        answer = self._ask("list", self.connection, "--run-id", run_id)
        runs = answer.get("runs") or []
        if not runs:
            raise SubmissionError(f"the SuperLink knows nothing of run {run_id}: {answer}")
        # Why a run failed; otherwise nothing, or Flower's word for nothing.
        details = runs[0].get("status-details")
        told = f" ({details})" if details and details != "N/A" else ""
        return f"{runs[0]['status']}{told}"

    def follow(self, run_id: str) -> str:
        """Wait for the end of a run, however often the SuperLink goes away; return its status."""
        last_seen = time.monotonic()
        while True:
            try:
                status = self.status(run_id)
                last_seen = time.monotonic()
            except SubmissionError:
                if time.monotonic() - last_seen > _AWAY_SECONDS:
                    raise
                status = "unknown"
            if status.startswith("finished"):
                return status
            time.sleep(_POLL_SECONDS)

    def _ask(self, *words: str) -> dict[str, Any]:
        try:
            done = subprocess.run(
                [tool("flwr"), *words, "--format", "json"],
                env=environment(self.home, self.mark),
                capture_output=True,
                text=True,
                timeout=_CALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise SubmissionError(f"flwr {words[0]} did not answer in time") from error
        begin = done.stdout.find("{")
        try:
            answer = json.loads(done.stdout[begin:]) if begin >= 0 else {}
        except json.JSONDecodeError:
            answer = {}
        if not answer:
            text = re.sub(r"\s+", " ", done.stdout + done.stderr).strip()
            raise SubmissionError(f"flwr {words[0]} failed: {text[-500:]}")
        return dict(answer)


def run_once(
    link: SuperLink, settings: Settings, overrides: Sequence[str], say: Say = print
) -> bool:
    """Submit a run and wait for its end; return whether all rounds were done.

    The ServerApp runs on the SuperLink's machine. If that is this machine, the run's own summary
    decides. If not, the SuperLink's status decides.
    """
    # A folder of its own: runs are submitted side by side.
    with tempfile.TemporaryDirectory(prefix="fomoe-submit-") as folder:
        run_config = Path(folder) / "run_config.toml"
        write_run_config(run_config, settings, overrides)
        run_id = link.submit(run_config)
    say(f"run {run_id} submitted, run directory: {settings.output_dir}")
    status = link.follow(run_id)
    say(f"run {run_id}: {status}")
    here = RunDirectory(Path(settings.output_dir)).summary.exists()
    return is_complete(settings) if here else status.startswith("finished:completed")


def supervise(
    link: SuperLink,
    settings: Settings,
    overrides: Sequence[str],
    most_failures: int,
    say: Say = print,
) -> bool:
    """Submit a run and resume it whenever it ends early; return whether all rounds were done.

    Gives up after `most_failures` attempts in a row that finished no further round. Call it on the
    SuperLink's machine, because it reads the run directory.
    """
    run = RunDirectory(Path(settings.output_dir))
    failures, words = 0, list(overrides)
    while True:
        before = stored_rounds(run.checkpoints)
        if before:
            say(f"resuming {run.path} after round {before[-1]}")
        if before and not settings.resume:
            # All other settings are stored with the run.
            words = [f"resume={quoted(str(run.path))}"]
            settings = load_settings(words)
        try:
            if run_once(link, settings, words, say):
                return True
        except SubmissionError as error:
            say(f"error: {error}")
        after = stored_rounds(run.checkpoints)
        advanced = bool(after) and (not before or after[-1] > before[-1])
        failures = 0 if advanced else failures + 1
        if failures >= most_failures:
            say(f"error: {failures} attempts in a row finished no round: giving up")
            return False
        time.sleep(min(_LONGEST_PAUSE_SECONDS, _PAUSE_SECONDS * 2**failures))
