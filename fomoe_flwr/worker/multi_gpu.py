"""A worker's round in several processes: one for each GPU of its node."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import torch

from fomoe_flwr.costs import memory_bytes
from fomoe_flwr.data import DataError
from fomoe_flwr.data.source import NodeData
from fomoe_flwr.parallel.choice import num_processes
from fomoe_flwr.parallel.processes import Processes, ProcessesError
from fomoe_flwr.worker.device import pick_device
from fomoe_flwr.worker.round import LostStateError, RoundResult, RoundTask
from fomoe_flwr.worker.task_folder import read_result, write_task
from fomoe_flwr.worker.trainer import TrainingError

TIMEOUT_SECONDS = 600.0
"""Patience of processes with each other: one may read text or compile while the others wait."""

_KINDS = {kind.__name__: kind for kind in (DataError, LostStateError, TrainingError)}


class NodeProcesses:
    """The processes of a node, kept from round to round: their start takes seconds."""

    def __init__(self, module: str = "fomoe_flwr.worker.rank") -> None:
        self._module = module
        self._processes: Processes | None = None
        self._key: tuple[str, int] | None = None

    @property
    def pids(self) -> list[int]:
        """Return the ids of the processes that wait or work."""
        return self._processes.pids if self._processes else []

    def run_round(self, task: RoundTask, data: NodeData, count: int) -> RoundResult:
        """Train one round in `count` processes; see `worker.round.run_round`.

        Raises what the first process to fail raised, or ProcessesError if one died; none is left
        then, and the next round starts new ones.
        """
        local = task.settings.local
        device = pick_device(local.device).type
        size = task.spec.shared_size + task.spec.experts_size(task.residents)
        task.state_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".task-", dir=task.state_dir))
        try:
            write_task(task, data, folder)
            self._ready(device, count).run(
                {
                    "folder": str(folder),
                    "device": device,
                    "parallel": local.parallel,
                    "state_bytes": memory_bytes(size, local.optimizer, local.precision),
                    "threads": max(1, (local.threads or torch.get_num_threads()) // count),
                    "timeout_seconds": TIMEOUT_SECONDS,
                }
            )
            return read_result(folder)
        except ProcessesError as error:
            self.close()
            if error.kind in _KINDS:
                raise _KINDS[error.kind](str(error)) from error
            raise
        finally:
            # The tensors that were read stay mapped when their files are gone.
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """End the processes."""
        if self._processes is not None:
            self._processes.close()
        self._processes = None

    def _ready(self, device: str, count: int) -> Processes:
        processes = self._processes
        if processes is None or self._key != (device, count) or not processes.is_alive():
            self.close()
            processes = Processes(self._module, count)
            self._processes, self._key = processes, (device, count)
        return processes


NODE_PROCESSES = NodeProcesses()
"""This process's own."""
atexit.register(NODE_PROCESSES.close)


def num_node_processes(task: RoundTask) -> int:
    """Return in how many processes this node trains a task's round. Raises SettingsError."""
    device = pick_device(task.settings.local.device).type
    return num_processes(task.settings, device, torch.cuda.device_count())
