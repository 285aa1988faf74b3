"""A process without a model, for tests of what happens when one fails."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch

from fomoe_flwr.errors import RunError
from fomoe_flwr.parallel.serve import Job, serve
from fomoe_flwr.parallel.torch_team import TorchTeam


class SomeError(RunError):
    """What a rank raises when it is told to."""


def do(job: Job, team: TorchTeam) -> dict[str, Any]:
    """Do what the job tells this rank; then add up ranks, which takes all processes."""
    what = job["what"].get(str(team.rank))
    if what == "raise":
        raise SomeError(f"rank {team.rank} does not\nwant to")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        print("going home early", flush=True)
        os._exit(7)
    if what == "sleep":
        time.sleep(600)
    return {"sum": float(team.sum(torch.tensor(float(team.rank + 1)))), "team": team.name}


if __name__ == "__main__":
    serve(do)
