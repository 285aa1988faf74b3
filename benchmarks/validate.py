"""Compare what the cost model predicts with what is measured: bytes, memory, step and round time.

    python benchmarks/validate.py                        # everything, some minutes on two cores
    python benchmarks/validate.py bytes memory           # parts of it
    python benchmarks/validate.py --to benchmarks/results/validation

Bytes: whole federations in this process, every round held to its prediction, no difference
allowed. Memory: training state tensor by tensor, and the growth of a fresh process (10 %). Steps:
two rates of this machine (FLOP/s, and bytes/s of the optimizer's pass) are measured on some shapes
and predict others (15 %). Rounds: messages cross a link that `tc` holds to 10, 100 and 1000 Mb/s
(15 %). Exit status 1 if anything lies outside.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import Message, MessageType
from link import ShapedLink, is_available, shaped_link

from fomoe_flwr import costs, report
from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.apps import client_app
from fomoe_flwr.federation.in_process import run_in_process
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.federation.server import serve
from fomoe_flwr.layout import Layout, draw_layout
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.router_probe import RouterProbe
from fomoe_flwr.worker.inner_state import InnerState
from fomoe_flwr.worker.training import make_optimizer, train

TINY = (
    "preset=tiny",
    "rounds=4",
    "local.steps=1",
    "local.warmup_steps=1",
    "local.batch_size=2",
    "eval.every=100",
    "eval.max_tokens=64",
    "eval.sample_tokens=0",
    "eval.probe_tokens=0",
    "layout.num_workers=3",
    "model.num_experts=12",
)

BYTES = (
    "layout.overlap=1",
    "layout.overlap=2 model=qwen3-moe-tiny layout.kind=random",
    "layout.overlap=2 model=mixtral-tiny model.routing=partitioned layout.kind=rolling",
    "layout.overlap=2 model=deepseek-v3-tiny layout.kind=balanced",
    "layout.overlap=2 model=glm4-moe-tiny model.routing=partitioned outer=nesterov",
    "layout.overlap=2 model=fomoe-tiny outer=local_adamw layout.kind=random",
    "layout.overlap=2 model=fomoe-tiny model.routing=partitioned outer=des_loc",
    "layout.overlap=2 layout.kind=weighted layout.residents=[12,8,4]",
    "layout.overlap=2 outer.fragments=2 wire.up=bfloat16",
    "layout.overlap=2 outer=local_adamw outer.fragments=2 layout.kind=random "
    "layout.reshuffle_every=2",
    "layout.overlap=2 wire.up=float16 wire.down=bfloat16 layout.warm_rounds=1",
    "layout.overlap=2 model=deepseek-v3-tiny outer=des_loc outer.fragments=2",
    "layout.overlap=3 outer=nesterov wire.up=bfloat16 wire.down=bfloat16",
    "layout.overlap=2 wire.up=int8 wire.down=bfloat16 outer=nesterov",
    "layout.num_workers=5 layout.overlap=2 layout.allow_uneven=true",
    "experiment=centralised layout.num_workers=1",
)

BASE = (
    "model.num_layers=4 model.hidden_size=256 model.expert_size=256 model.num_heads=4 "
    "model.num_kv_heads=4 model.num_experts=16 model.top_k=2 model.vocab_size=4096 "
    "data.sequence_length=128 local.batch_size=8 layout.num_workers=4"
)
CALIBRATION = (
    f"{BASE} layout.overlap=2",
    f"{BASE} layout.overlap=2 model.hidden_size=512 model.num_heads=8 model.num_kv_heads=8 "
    "local.batch_size=4",
    f"{BASE} layout.overlap=1 model.num_layers=6 local.batch_size=16",
    f"{BASE} layout.overlap=4 local.batch_size=2",
)
PREDICTED = (
    f"{BASE} layout.overlap=4",
    f"{BASE} layout.overlap=1",
    f"{BASE} layout.overlap=2 model.num_layers=6 local.batch_size=4",
    f"{BASE} layout.overlap=2 model.hidden_size=384 model.num_heads=6 model.num_kv_heads=6",
    f"{BASE} layout.overlap=2 model=fomoe-demo local.batch_size=8",
    f"{BASE} layout.overlap=2 model.top_k=4 model.routing=partitioned",
    f"{BASE} layout.overlap=2 data.sequence_length=256 local.accumulate=2 local.batch_size=4",
)
MEMORY = (
    f"{BASE} layout.overlap=2 model.hidden_size=512 local.batch_size=1 data.sequence_length=16",
    f"{BASE} layout.overlap=4 model.hidden_size=512 local.batch_size=1 data.sequence_length=16",
    f"{BASE} layout.overlap=2 model=qwen3-moe-demo model.expert_size=1024 local.batch_size=1 "
    "data.sequence_length=16",
    f"{BASE} layout.overlap=2 model=fomoe-demo model.expert_size=1024 local.optimizer=sgd "
    "local.batch_size=1 data.sequence_length=16",
)
PAIR = "preset=tiny model.vocab_size=8192 model.hidden_size=128 layout.num_workers=2"
ROUNDS = (
    f"{PAIR} layout.overlap=1 local.steps=4",
    f"{PAIR} layout.overlap=2 local.steps=2 outer=nesterov",
    f"{PAIR} layout.overlap=1 local.steps=4 model.vocab_size=4096 wire.up=bfloat16 "
    "outer=local_adamw",
)
STEPS = 3
"""Optimizer steps that are timed in one go."""
RATES = (10.0, 100.0, 1000.0)
LATENCY_SECONDS = 0.03
GOODPUT = 1448 / 1514
"""What TCP over Ethernet leaves of a line's rate: payload over frame, in bytes."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    case: str
    """Overrides; those of `BASE` are called base, those of `PAIR` pair."""
    predicted: float
    measured: float
    unit: str
    tolerance: float
    """Largest relative difference; 0 means none at all."""

    @property
    def difference(self) -> float:
        """Relative to what was measured."""
        if self.measured == self.predicted:
            return 0.0
        return (self.predicted - self.measured) / self.measured if self.measured else float("inf")

    @property
    def is_within(self) -> bool:
        """Whether the difference is no larger than allowed."""
        return abs(self.difference) <= self.tolerance


class RandomBatches:
    """Random tokens."""

    def __init__(self, settings: Settings) -> None:
        self._size = (settings.local.batch_size, settings.data.sequence_length + 1)
        self._vocabulary = settings.model.vocab_size
        self._generator = torch.Generator().manual_seed(1)

    def next_batch(self) -> torch.Tensor:
        """Return the next windows."""
        return torch.randint(0, self._vocabulary, self._size, generator=self._generator)

    def state(self) -> dict[str, object]:
        """Return nothing: no two batches depend on each other."""
        return {}

    def restore(self, state: dict[str, object]) -> None:
        """Do nothing."""
        del state


class LocalWorker:
    """One worker's training alone: residents only, the steps that a run takes."""

    def __init__(self, settings: Settings, residents: Sequence[Sequence[int]]) -> None:
        local, model = settings.local, settings.model
        config = transformers_config(model, settings.data.sequence_length)
        self.settings = settings
        self.model = build_model(model, config, residents, seed=0)
        self.optimizer = make_optimizer(self.model, local)
        self.inner = InnerState(self.model, local, model.routing_mode, residents)
        self.batches = RandomBatches(settings)
        self.probe = RouterProbe(self.model, model.num_experts, residents)
        self.gradient_bytes = 0
        self.optimizer.register_step_pre_hook(self._weigh_gradients)

    def _weigh_gradients(self, *_: object) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.gradient_bytes = sum(each.numel() * each.element_size() for each in gradients)

    def train(self) -> None:
        """Train `local.steps` steps."""
        settings = self.settings
        train(
            self.model,
            self.probe,
            self.optimizer,
            self.inner,
            self.batches,
            settings.local,
            balance=settings.balance,
            first_step=0,
            total_steps=100,
            device=torch.device("cpu"),
        )

    def state_bytes(self) -> int:
        """Return the bytes of weights, gradients and moments."""
        tensors = [*self.model.parameters()]
        for state in self.optimizer.state.values():
            # Not the step counts, of which there is one a tensor.
            tensors += [value for key, value in state.items() if key != "step"]
        kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return kept + self.gradient_bytes


def settings_of(words: str) -> Settings:
    # Nothing is trained on text here, so that nothing limits the vocabulary.
    return load_settings([*TINY[:1], "local.threads=1", *words.split()])


def first_layout(settings: Settings) -> Layout:
    model = settings.model
    return draw_layout(settings.layout, model.num_layers, model.num_experts, 0, 1)


def check_bytes() -> Iterable[Row]:
    for words in BYTES:
        with tempfile.TemporaryDirectory() as folder:
            settings = load_settings([*TINY, *words.split(), f"output_dir={folder}/run"])
            with silence():
                assert run_in_process(settings)
            rows = [json.loads(line) for line in lines_of(Path(folder) / "run/metrics.jsonl")]
            layouts = json.loads((Path(folder) / "run/layout.json").read_text())
        before = None
        for row in rows:
            layout = Layout.from_json(layouts[str(row["round"])])
            told = costs.predict_round(settings, layout, row["round"], before)
            before = layout
            for way in ("up", "down"):
                name = f"{words}, round {row['round']} {way}"
                found = row[f"comm/bytes_{way}"]
                yield Row("bytes", name, getattr(told, way), found, "B", 0.0)


def check_memory() -> Iterable[Row]:
    for words in MEMORY:
        settings = settings_of(f"{words} local.steps=1")
        layout = first_layout(settings)
        held = costs.resident_counts(settings.model, layout)[0]
        told = costs.memory_bytes(held, settings.local.optimizer, settings.local.precision)
        found = json.loads(
            subprocess.run(
                [sys.executable, __file__, "--measure-memory", words],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "MALLOC_ARENA_MAX": "1"},
            ).stdout.splitlines()[-1]
        )
        yield Row("training state", label(words), told, found["state"], "B", 0.0)
        yield Row("growth of the process", label(words), told, found["growth"], "B", 0.10)


def measure_memory(words: str) -> None:
    """Print the training state and the growth of this process while it trains."""
    # Libraries and their buffers come first. What this frees would be used again, so it is tiny.
    warm = settings_of("layout.overlap=1 local.steps=1")
    LocalWorker(warm, first_layout(warm).of_worker(0)).train()
    settings = settings_of(f"{words} local.steps=2")
    residents = first_layout(settings).of_worker(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    worker = LocalWorker(settings, residents)
    worker.train()
    print(json.dumps({"state": worker.state_bytes(), "growth": status("VmHWM") - before}))


def status(key: str) -> int:
    for line in lines_of(Path("/proc/self/status")):
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


@dataclass(frozen=True)
class TimedCase:
    """A worker to time, with the work of its step."""

    words: str
    worker: LocalWorker
    flops: float
    state_bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def check_steps(repeats: int) -> Iterable[Row]:
    """Time all cases in turn, so that a machine whose speed drifts does so for all of them.

    With one thread the CPU's time is the time that a step takes where nobody else works.
    """
    cases = [timed_case(words) for words in (*CALIBRATION, *PREDICTED)]
    for _ in range(repeats):
        for case in cases:
            started = time.process_time()
            case.worker.train()
            case.seconds.append((time.process_time() - started) / STEPS)
    rates = calibrate(cases[: len(CALIBRATION)])
    print(
        f"calibrated: {rates.flops_per_second / 1e9:.4g} GFLOP/s, optimizer "
        f"{rates.state_bytes_per_second / 1e9:.4g} GB/s",
        flush=True,
    )
    for number, case in enumerate(cases):
        what = "step" if number >= len(CALIBRATION) else "step (calibration)"
        told = rates.step_seconds(case.flops, case.state_bytes)
        yield Row(what, label(case.words), told, case.median, "s", 0.15)


def calibrate(cases: Sequence[TimedCase]) -> costs.Site:
    """Return the two rates of this machine that fit these steps best, relatively."""
    system = [[case.flops / case.median, case.state_bytes / case.median] for case in cases]
    ones = torch.ones(len(cases), 1, dtype=torch.float64)
    found = torch.linalg.lstsq(torch.tensor(system, dtype=torch.float64), ones).solution
    per_flop, per_byte = (float(value) for value in found.flatten())
    if per_byte <= 0:
        per_flop = statistics.mean(case.median / case.flops for case in cases)
    return costs.Site(1 / per_flop, 1.0, 1.0, 0.0, 1 / per_byte if per_byte > 0 else math.inf)


def timed_case(words: str) -> TimedCase:
    """Return a warmed-up worker."""
    settings = settings_of(f"{words} local.steps={STEPS}")
    worker = LocalWorker(settings, first_layout(settings).of_worker(0))
    worker.train()
    model, local = settings.model, settings.local
    executed = costs.executed_experts(model, first_layout(settings))[0]
    if model.routing == "skip_token":
        # Untrained routers are not even; the model takes the measured share of residents.
        executed = model.top_k * (1 - worker.probe.counts.ghost_fraction)
    tokens = local.batch_size * local.accumulate * settings.data.sequence_length
    flops = tokens * costs.token_flops(model, settings.data.sequence_length, executed).train
    return TimedCase(words, worker, flops, worker.state_bytes())


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
        rows = [json.loads(line) for line in lines_of(folder / "run/metrics.jsonl")]
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


@contextlib.contextmanager
def silence() -> Iterable[None]:
    """Keep a run's own lines out of the table."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
    logging.disable(logging.NOTSET)


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def label(words: str) -> str:
    """Shorten overrides by what many cases share."""
    return words.replace(BASE, "base").replace(PAIR, "pair")


def table(rows: Sequence[Row]) -> str:
    """Write rows as Markdown; bytes only as a sum, for they differ nowhere or the run failed."""
    shown = [row for row in rows if row.what != "bytes" or not row.is_within]
    text = [
        "| what | case | predicted | measured | difference | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    exact = [row for row in rows if row.what == "bytes"]
    if exact:
        cases = len({row.case.rpartition(", round")[0] for row in exact})
        text.append(
            f"| bytes | {cases} federations, {len(exact)} sums of a round | "
            f"{sum(row.predicted for row in exact):,.0f} B | "
            f"{sum(row.measured for row in exact):,.0f} B | "
            f"{sum(row.predicted != row.measured for row in exact)} differ | |"
        )
    for row in shown:
        number = ",.0f" if row.unit == "B" else ".4g"
        text.append(
            f"| {row.what} | `{row.case}` | {row.predicted:{number}} {row.unit} | "
            f"{row.measured:{number}} {row.unit} | {row.difference:+.1%} | "
            f"{'' if row.is_within else 'outside'} |"
        )
    return "\n".join(text)


def main() -> int:
    parts = ("bytes", "memory", "steps", "rounds")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help=f"default: {parts}")
    parser.add_argument("--repeats", type=int, default=7, help="of a timed step")
    parser.add_argument("--to", type=Path, default=None, help="write FILE.json and FILE.md")
    parser.add_argument("--measure-memory", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure_memory:
        measure_memory(options.measure_memory)
        return 0
    rows: list[Row] = []
    for part in options.parts or parts:
        found: Iterable[Row] = {
            "bytes": check_bytes,
            "memory": check_memory,
            "steps": lambda: check_steps(options.repeats),
            "rounds": check_rounds,
        }[part]()
        for row in found:
            rows.append(row)
            if row.what != "bytes" or not row.is_within:
                print(
                    f"{row.what:<22}{row.predicted:>16,.5g}{row.measured:>16,.5g} {row.unit} "
                    f"{row.difference:>+8.1%} {'' if row.is_within else 'OUTSIDE'} {row.case}",
                    flush=True,
                )
    outside = [row for row in rows if not row.is_within]
    print(f"\n{table(rows)}\n\n{len(rows)} comparisons, {len(outside)} outside their bounds")
    if options.to:
        where = report.environment()
        options.to.parent.mkdir(parents=True, exist_ok=True)
        document = {**where, "rows": [{**vars(row), "difference": row.difference} for row in rows]}
        options.to.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        head = "\n".join(f"- {key.rpartition('/')[2]}: {value}" for key, value in where.items())
        load = f"- load: {os.getloadavg()[2]:.1f} processes wanted to run, mean of 15 minutes"
        head += f"\n{load}"
        options.to.with_suffix(".md").write_text(
            "# Predicted and measured\n\n"
            f"`python benchmarks/validate.py --to {options.to}`\n\n{head}\n- base: `{BASE}`\n"
            f"- pair: `{PAIR}`\n\n{table(rows)}\n"
        )
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
