"""The report of a run that goes on: drawn again now and then, for a bounded share of the time."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

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


class LiveReport:
    """Keep a run's report fresh; a report that cannot be drawn never ends a run."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._next = time.monotonic() + _REFRESH_SECONDS

    def refresh(self) -> None:
        """Draw the report again if the last one is old enough."""
        if time.monotonic() >= self._next:
            self._write()

    def finish(self) -> None:
        """Draw the last report."""
        self._write()

    def _write(self) -> None:
        started = time.monotonic()
        try:
            write_report(self._run)
        except Exception as error:
            # Hours of training are worth more than their picture.
            warnings.warn(f"no report this time: {error!r}", stacklevel=2)
        spent = time.monotonic() - started
        self._next = time.monotonic() + max(_REFRESH_SECONDS, spent / _SHARE)
