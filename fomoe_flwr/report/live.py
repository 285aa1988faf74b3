"""The report of a run that goes on: drawn beside the run, for a bounded share of the time."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from fomoe_flwr.errors import reason_of
from fomoe_flwr.events import warn
from fomoe_flwr.parallel.processes import Processes
from fomoe_flwr.run.directory import RunDirectory

_REFRESH_SECONDS = 30.0
_SHARE = 0.05
"""Drawing never takes more than this share of a run's time."""


def write_report(run: RunDirectory) -> list[Path]:
    """Write `report.html` and the plots of a run; return the files."""
    # matplotlib is slow to import, and only a report needs it.
    from fomoe_flwr.report.history import History
    from fomoe_flwr.report.pictures import draw_plots
    from fomoe_flwr.report.run_page import run_page

    history = History.read(run)
    return [run_page(history), *draw_plots(history)]


def draw_beside(run: RunDirectory) -> None:
    """Write a run's report in a process of its own. Raises ProcessesError."""
    processes = Processes("fomoe_flwr.report.drawing", 1)
    try:
        processes.run({"run": str(run.path)})
    finally:
        processes.close()


class LiveReport:
    """Keep a run's report fresh; a report that cannot be drawn never ends a run."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._next = time.monotonic() + _REFRESH_SECONDS
        self._drawing: threading.Thread | None = None

    def refresh(self) -> None:
        """Begin to draw the report again if the last one is old enough; do not wait for it."""
        is_free = self._drawing is None or not self._drawing.is_alive()
        if is_free and time.monotonic() >= self._next:
            self._drawing = threading.Thread(target=self._draw, daemon=True)
            self._drawing.start()

    def finish(self) -> None:
        """Draw the last report, and wait for it."""
        if self._drawing is not None:
            self._drawing.join()
        self._draw()

    def _draw(self) -> None:
        started = time.monotonic()
        try:
            draw_beside(self._run)
        except Exception as error:
            # Hours of training are worth more than their picture.
            warn(f"no report this time: {reason_of(error)}")
        spent = time.monotonic() - started
        self._next = time.monotonic() + max(_REFRESH_SECONDS, spent / _SHARE)
