"""A process that serves a run whose workers are elsewhere, and tells how much memory that took.

    python server_files_process.py TEXT FOLDER OVERRIDES...

A worker's reply is made of plain bytes when it is pulled, and its task is dropped when it is sent,
as if both went over a network. First a tiny run is served: what it takes is what a server takes
that has nothing to do.
"""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import Array, Message, MessageType, RecordDict

from fomoe_flwr.cli.main import main
from fomoe_flwr.federation import in_process, wire
from fomoe_flwr.federation.client import answer_query
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.federation.replies import REPORTED
from fomoe_flwr.federation.task_header import TaskHeader
from fomoe_flwr.parameters.fragments import PSEUDO_GRADIENT
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.memory import anonymous_bytes

TINY = [
    "preset=tiny",
    "local.threads=1",
    "local.steps=2",
    "local.batch_size=2",
    "eval.max_tokens=256",
    "eval.sample_tokens=0",
    "eval.probe_tokens=0",
    "tracker=none",
    "eval.device=cpu",
]


class RemoteGrid(InProcessGrid):
    """Nodes that keep no memory of this process."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Note the header and the sizes of a task, and drop its numbers."""
        ids = []
        for message in messages:
            (message_id,) = super().push_messages([message])
            ids.append(message_id)
            if message.metadata.message_type == MessageType.TRAIN:
                header = TaskHeader.read(message.content)
                sizes = [len(array.data) // 4 for array in message.content[wire.WEIGHTS].values()]
                light = Message(RecordDict(), message.metadata.dst_node_id, MessageType.TRAIN)
                light.metadata.__dict__["_message_id"] = message_id
                self._waiting[message_id] = light
                self._headers[message_id] = (header, sizes)
        return ids

    def _answer(self, message: Message) -> Message:
        found = self._headers.pop(message.metadata.message_id, None)
        if found is None:
            context = self._contexts[message.metadata.dst_node_id]
            return Message(answer_query(message.content, context), reply_to=message)
        return Message(reply_to(*found), reply_to=message)

    @property
    def _headers(self) -> dict[str, tuple[TaskHeader, list[int]]]:
        return self.__dict__.setdefault("headers", {})


def reply_to(header: TaskHeader, sizes: list[int]) -> RecordDict:
    """Answer as a worker does that found the same small gradient everywhere."""
    value = struct.pack("<f", 1e-4 * (1 + header.worker))
    arrays = [Array("float32", (size,), wire.STYPE, value * size) for size in sizes]
    settings = header.settings
    layers, experts = settings["model"]["num_layers"], settings["model"]["num_experts"]
    answered = {
        "load": [[1] * experts] * layers,
        "ghosts": [0] * layers,
        "all_ghost": [0] * layers,
        "routed_tokens": 8,
        "server_round": header.server_round,
        "worker": header.worker,
        "layout_digest": header.layout_digest,
    }
    return RecordDict(
        {
            wire.METRICS: wire.metrics_record({**dict.fromkeys(REPORTED, 0.5), "tokens": 8.0}),
            wire.TASK: wire.json_record(answered),
            PSEUDO_GRADIENT: wire.arrays_of(*arrays),
        }
    )


def peak_of(work: list[str]) -> int:
    """Return the most anonymous memory while a command runs."""
    peak, is_done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    status = main(work)
    is_done.set()
    thread.join()
    if status:
        sys.exit(status)
    return peak[0]


def measure(text: str, folder: Path, overrides: list[str]) -> None:
    """Print what the run took, and what a tiny one takes, as a line of JSON."""
    in_process.InProcessGrid = RemoteGrid  # type: ignore[misc]
    start = ["run", *TINY, f"data.path={text}"]
    idle = peak_of([*start, *overrides[:1], f"output_dir={folder / 'tiny'}"])
    began = time.monotonic()
    peak = peak_of([*start, *overrides, f"output_dir={folder / 'run'}"])
    rows = RunDirectory(folder / "run").read_metrics()
    summary = RunDirectory(folder / "run").read_summary()
    found = {
        "idle": idle,
        "peak": peak,
        "told": [row["server/peak_bytes"] for row in rows],
        "reply": max(row["comm/bytes_up"] for row in rows) // 4,
        "model": 4 * summary["params/total"],
        "seconds": time.monotonic() - began,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    measure(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
