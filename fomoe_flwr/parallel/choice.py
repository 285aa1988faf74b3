"""The choice: how many processes train a worker, and whether each holds all of it."""

from __future__ import annotations

from fomoe_flwr.config import Settings, SettingsError
from fomoe_flwr.parallel.batch_split import BatchSplit, most_processes

COMFORTABLE_SHARE = 0.5
"""Share of a GPU's memory that the training state may take; activations need the rest."""


def choose(state_bytes: int, memory_bytes: int) -> str:
    """Return `ddp` if a replica's training state fits comfortably into one GPU, else `fsdp`."""
    return "ddp" if state_bytes <= COMFORTABLE_SHARE * memory_bytes else "fsdp"


def num_processes(settings: Settings, device: str, num_gpus: int) -> int:
    """Return how many processes train a worker on a node that has these GPUs.

    `local.processes=0` means one for every GPU that gets something to do; without a GPU, and with
    `execution.cuda_graph=on`, which belongs to one process, it means one. Raises SettingsError if
    the node has fewer GPUs than `local.processes`, or if a step cannot be split among so many.
    """
    local = settings.local
    if local.parallel == "none":
        return 1
    if local.processes == 0:
        is_one = device != "cuda" or settings.execution.cuda_graph == "on"
        return 1 if is_one else most_processes(local, max(1, num_gpus))
    if device == "cuda" and local.processes > num_gpus:
        raise SettingsError(
            f"local.processes={local.processes} needs as many GPUs, this node shows {num_gpus}: "
            "use 0 for all that there are"
        )
    return BatchSplit.of(local, local.processes).num_processes
