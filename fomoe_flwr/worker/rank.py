"""One of the processes in which a node with several GPUs trains; `multi_gpu` starts it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fomoe_flwr.parallel.serve import Job, serve
from fomoe_flwr.parallel.torch_team import TorchTeam
from fomoe_flwr.worker.cache import CACHE
from fomoe_flwr.worker.round import run_round
from fomoe_flwr.worker.task_folder import read_task, write_result


def train_round(job: Job, team: TorchTeam) -> dict[str, Any]:
    """Train the round in the job's folder; the first process leaves its result there."""
    folder = Path(job["folder"])
    task, data = read_task(folder)
    result = run_round(task, partial(CACHE.batches, data), team)
    if team.is_first:
        write_result(result, folder)
    return {"parallel": team.name}


if __name__ == "__main__":
    serve(train_round)
