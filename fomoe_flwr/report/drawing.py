"""The process that draws a report beside its run; `live` starts it and it ends with the run."""

from __future__ import annotations

import os
from pathlib import Path

from fomoe_flwr.parallel.processes import Seat
from fomoe_flwr.report.live import write_report
from fomoe_flwr.run.directory import RunDirectory

if __name__ == "__main__":
    os.nice(10)  # The round comes first.
    seat = Seat()
    try:
        write_report(RunDirectory(Path(seat.next_job()["run"])))
    except Exception as error:  # the run that waits must hear of every error
        seat.fail(error)
    else:
        seat.answer({})
