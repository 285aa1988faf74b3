"""What each process of a team runs: join the others, then do one job after the other."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fomoe_flwr.parallel.choice import choose
from fomoe_flwr.parallel.processes import Seat
from fomoe_flwr.parallel.torch_team import TorchTeam

Job = Mapping[str, Any]


def serve(do: Callable[[Job, TorchTeam], Mapping[str, Any]]) -> None:
    """Do the jobs of the starter until it ends. An error ends this process, and so all of them.

    A job names `device` (`cpu` or `cuda`), `parallel` (`auto`, `ddp` or `fsdp`), `state_bytes` of
    the worker, `threads` of a process (0 = as torch has it) and `timeout_seconds` of whatever the
    processes do together; the first job's device and timeout hold for all.
    """
    seat, teams = Seat(), dict[str, TorchTeam]()
    while True:
        job = seat.next_job()
        try:
            device = _join(seat, job)
            name = job["parallel"]
            if name == "auto":
                name = choose(job["state_bytes"], _least_memory(device))
            if name not in teams:
                teams[name] = TorchTeam(name, device)
            answer = do(job, teams[name])
        except BaseException as error:
            traceback.print_exc()
            seat.fail(error)
            # A normal exit may wait for the other processes, and they wait for this one.
            os._exit(1)
        seat.answer(answer)


def _join(seat: Seat, job: Job) -> torch.device:
    is_gpu = job["device"] == "cuda"
    device = torch.device("cuda", seat.rank) if is_gpu else torch.device("cpu")
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    if not dist.is_initialized():
        if is_gpu:
            torch.cuda.set_device(device)
        # A file in the starter's private folder: no port that others could find or take.
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            init_method=f"file://{seat.folder / 'meeting'}",
            rank=seat.rank,
            world_size=seat.size,
            timeout=timedelta(seconds=job["timeout_seconds"]),
            device_id=device if is_gpu else None,
        )
    return device


def _least_memory(device: torch.device) -> int:
    """Return the bytes of the smallest GPU of the team; on a CPU a process's part of the memory."""
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device).total_memory
    else:
        own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // dist.get_world_size()
    least = torch.tensor(own, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)
