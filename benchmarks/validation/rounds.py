"""Seconds of a round whose messages cross links of a known rate."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flwr.app import Message, MessageType

from fomoe_flwr import costs
from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.apps import client_app
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.federation.server import serve
from fomoe_flwr.run.directory import RunDirectory
from validation.cases import PAIR, TINY, first_layout, label
from validation.comparison import Row
from validation.link import ShapedLink, is_available, shaped_link
from validation.payload import silence

ROUNDS = (
    f"{PAIR} layout.overlap=1 local.steps=4",
    f"{PAIR} layout.overlap=2 local.steps=2 outer=nesterov",
    f"{PAIR} layout.overlap=1 local.steps=4 model.vocab_size=4096 wire.up=bfloat16 "
    "outer=local_adamw",
)
RATES = (10.0, 100.0, 1000.0)
LATENCY_SECONDS = 0.03
GOODPUT = 1448 / 1514
"""What TCP over Ethernet leaves of a line's rate: payload over frame, in bytes."""


class LinkedGrid(InProcessGrid):
    """An in-process grid whose messages cross shaped links, one for each node, all at once.

    The nodes share this machine, so they train one after the other.
    """

    def __init__(self, links: Sequence[ShapedLink], state_dir: Path) -> None:
        super().__init__(client_app, len(links), state_dir)
        self._links = dict(zip(self.get_node_ids(), links, strict=True))
        self._replies: dict[str, Message] = {}
        self.answer_seconds: list[float] = []
        """Of each round: what all workers took to answer, one after the other."""
        self.cross_seconds: list[float] = []
        """Of each round: down and up."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take tasks over the links, answer them, and take the replies back."""
        messages = list(messages)
        started = time.perf_counter()
        crossing = self._cross(messages, ShapedLink.send)
        ids = list(super().push_messages(messages))
        for message_id, reply in zip(ids, super().pull_messages(ids), strict=True):
            self._replies[message_id] = reply
        answered = time.perf_counter() - started - crossing
        replies = [self._replies[message_id] for message_id in ids]
        crossing += self._cross(replies, ShapedLink.receive, is_reply=True)
        if messages[0].metadata.message_type == MessageType.TRAIN:
            self.answer_seconds.append(answered)
            self.cross_seconds.append(crossing)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return replies that have arrived."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def _cross(
        self,
        messages: Sequence[Message],
        way: Callable[[ShapedLink, int], float],
        is_reply: bool = False,
    ) -> float:
        """Move all messages at once; return the seconds until the last has arrived."""
        started = time.perf_counter()

        def move(message: Message) -> float:
            ends = message.metadata
            link = self._links[ends.src_node_id if is_reply else ends.dst_node_id]
            return way(link, wire.payload_bytes(message.content))

        with ThreadPoolExecutor(len(self._links)) as pool:
            list(pool.map(move, (m for m in messages if m.metadata.message_type == "train")))
        return time.perf_counter() - started


def check_rounds() -> Iterable[Row]:
    if not is_available():
        print("no namespaces or no tc here: rounds are left out (needs root)", flush=True)
        return
    for words in ROUNDS:
        base = load_settings(
            [*TINY[:1], "rounds=4", "eval.every=100", "eval.max_tokens=64", "eval.sample_tokens=0",
             "eval.probe_tokens=0", "local.threads=1", *words.split()]
        )  # fmt: skip
        for rate in RATES:
            yield from timed_rounds(base, words, rate)


def timed_rounds(settings: Settings, words: str, mbps: float) -> Iterable[Row]:
    """Compare the median of rounds whose messages cross links of a rate.

    What workers take to answer is measured: that is the step's prediction, not the link's.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings.output_dir = str(folder / "run")
        workers = settings.layout.num_workers
        links = [
            stack.enter_context(shaped_link(mbps, LATENCY_SECONDS, index))
            for index in range(workers)
        ]
        with silence():
            grid = LinkedGrid(links, folder / "workers")
            serve(settings, lambda run: grid)
        rows = RunDirectory(folder / "run").read_metrics()
    layout = first_layout(settings)
    site = costs.Site(1.0, 1e6 * mbps * GOODPUT, 1e6 * mbps * GOODPUT, LATENCY_SECONDS)
    told, crossing, rounds = [], [], []
    for row, answered in zip(rows, grid.answer_seconds, strict=True):
        sent = costs.predict_round(settings, layout, row["round"])
        ours = costs.star_seconds(
            [site] * workers, sent.down_per_worker, sent.up_per_worker, [answered] * workers
        )
        told.append(ours.total)
        crossing.append(ours.down + ours.up)
        rounds.append(
            row["round/send_seconds"] + row["round/train_seconds"] + row["round/outer_seconds"]
        )
    # The first round pays for imports and empty caches.
    case = f"{label(words)}, {mbps:g} Mb/s"
    for what, first, second in (
        ("down and up", crossing, grid.cross_seconds),
        ("round", told, rounds),
    ):
        ends = statistics.median(first[1:]), statistics.median(second[1:])
        yield Row(what, case, *ends, "s", 0.15)
