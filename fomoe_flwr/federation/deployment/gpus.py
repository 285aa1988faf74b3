"""The GPUs of a machine, dealt out to the nodes that run on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus_of_machine() -> list[str]:
    """List the GPUs that processes of this one may use, without a driver's context.

    The user's own choice in `CUDA_VISIBLE_DEVICES` counts; otherwise all that the driver names.
    """
    chosen = os.environ.get(VISIBLE)
    if chosen is not None:
        return [word.strip() for word in chosen.split(",") if word.strip()]
    question = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            question, capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.split()


def share_of_node(gpus: Sequence[str], node: int, num_nodes: int) -> dict[str, str]:
    """Return the variable that shows a node its GPUs; empty where there is none.

    Every node has GPUs of its own while there are enough; otherwise nodes take turns.
    """
    if not gpus:
        return {}
    own = gpus[node::num_nodes] or [gpus[node % len(gpus)]]
    return {VISIBLE: ",".join(own)}
