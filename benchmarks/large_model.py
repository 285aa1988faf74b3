"""Train a model that no process holds: OLMoE-1B-7B's shape, four workers, on one 80 GB GPU.

    python benchmarks/large_model.py --folder FOLDER --json benchmarks/results/large-model.json
    python benchmarks/large_model.py --folder FOLDER model.pretrained=CHECKPOINT
    python benchmarks/large_model.py --shape tiny --folder FOLDER      # on a CPU, to try it

1. A run of full replicas must be refused before it starts.
2. Two rounds in one process, every expert on one worker, the server's state in files.
3. The export is loaded by stock transformers, in a process without this package.

FOLDER needs the room that is printed first, 100 GB at the full shape. Workers begin every round
with fresh moments. With local.keep_inner_state=true these take 67 GB more, in memory and in FOLDER.

Server and workers share the process. The server's memory is what is anonymous outside of a worker's
turn, without the inner states that workers keep in host memory, above what a run of the tiny shape
takes. A worker's memory is the most that its turn allocates on the GPU; without one, the growth of
the process. Bounds: the server holds one reply and 0.5 GB; a worker fits where a replica does not.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from measurement import FOMOE, markdown, parser_of, save

from fomoe_flwr import costs, report
from fomoe_flwr.cli.main import main as fomoe
from fomoe_flwr.config import load_settings
from fomoe_flwr.federation import in_process
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.memory import anonymous_bytes
from fomoe_flwr.worker.state_store import STATES

COMMON = (
    *("layout.num_workers=4", "layout.overlap=1", "layout.kind=fixed", "rounds=2"),
    *("eval.sample_tokens=0", "checkpoint.every=1000", "checkpoint.keep=1"),
    *("tracker=none", "eval.probe_tokens=0", "local.keep_inner_state=false"),
    "execution.hold_heap=false",  # or the heap of a worker would count as the server's
)
SHAPES = {
    "olmoe-6b9": (
        *("model=olmoe-6b9", "data.sequence_length=1024", "local.batch_size=2", "local.steps=4"),
        *("local.warmup_steps=4", "local.precision=bfloat16", "local.device=cuda"),
        *("eval.max_tokens=8192", "eval.batch_size=4"),
    ),
    "tiny": ("preset=tiny", "local.steps=2", "local.warmup_steps=2", "local.device=cpu"),
}
FILES = "checkpoint.server_state=files"
SLACK = 2**29
_TOLD = ("params/", "memory/", "disk/")
LOADS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

device = "cuda" if torch.cuda.is_available() else "cpu"
model, loading = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.bfloat16, output_loading_info=True
)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The quick brown fox jumps over the lazy dog", return_tensors="pt")["input_ids"]
with torch.no_grad():
    loss = model.to(device).eval()(input_ids=ids.to(device), labels=ids.to(device)).loss
print(json.dumps({
    "class": type(model).__name__,
    "parameters": model.num_parameters(),
    "missing": sorted(map(str, loading["missing_keys"])),
    "unexpected": sorted(map(str, loading["unexpected_keys"])),
    "loss": float(loss),
    "ours": [name for name in sys.modules if name.startswith("fomoe")],
}))
"""


class Watch:
    """The memory of this process, parted into the server's and the workers'."""

    def __init__(self) -> None:
        self.server = self.process = self.worker = 0
        self._turn = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Note what is held now."""
        with self._lock:
            now = anonymous_bytes()
            self.process = max(self.process, now)
            if not self._turn:
                self.server = max(self.server, now - STATES.host_bytes())

    def forget(self) -> None:
        """Begin anew."""
        self.server = self.process = self.worker = 0

    @contextmanager
    def turn(self) -> Any:
        """Mark a worker's turn."""
        before = anonymous_bytes()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with self._lock:
            self._turn = True
        self.process = 0 if not torch.cuda.is_available() else self.process
        try:
            yield
        finally:
            self.look()
            grown = self.process - before
            on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
            self.worker = max(self.worker, on_gpu or grown)
            with self._lock:
                self._turn = False

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.look()


WATCH = Watch()


class WatchedGrid(InProcessGrid):
    """Tells when it is a worker's turn."""

    def _answer(self, message: Message) -> Message:
        with WATCH.turn():
            return super()._answer(message)


def train(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run in this process; return what it took."""
    shutil.rmtree(folder, ignore_errors=True)
    WATCH.forget()
    started = time.perf_counter()
    status = fomoe(["run", *words, f"output_dir={folder}"])
    if status:
        sys.exit(status)
    rows = RunDirectory(folder).read_metrics()
    return {
        "server_bytes": WATCH.server,
        "process_bytes": WATCH.process,
        "worker_bytes": WATCH.worker,
        "reply_bytes": max(row["comm/bytes_up"] for row in rows) // 4,
        "seconds": time.perf_counter() - started,
        "round_seconds": [row["round/seconds"] for row in rows],
        "checkpoint_seconds": [row["round/checkpoint_seconds"] for row in rows],
        "eval_seconds": [row["round/eval_seconds"] for row in rows],
        "losses": [row["eval/loss"] for row in rows],
        "told_peak_bytes": [row["server/peak_bytes"] for row in rows],
    }


def loaded(export: Path) -> dict[str, Any]:
    """Load an export where this package is not known, and compute a loss."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(export)],
        capture_output=True, text=True, check=False, cwd=export,
    )  # fmt: skip
    if done.returncode:
        return {"error": done.stderr.splitlines()[-1:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def refused(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Start the run of full replicas; return its status and what it said."""
    replicas = ["layout.overlap=4", "rounds=1", f"output_dir={folder}"]
    started = time.perf_counter()
    done = subprocess.run(
        [*FOMOE, "run", *words, *replicas], capture_output=True, text=True, check=False
    )
    shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - started
    return {"status": done.returncode, "said": done.stderr.splitlines()[-1:], "seconds": seconds}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="olmoe-6b9")
    parser.add_argument("--folder", type=Path, required=True, help="where runs are written")
    parser.add_argument("--without-replica", action="store_true", help="leave out step 1")
    parser.add_argument("overrides", nargs="*", help="further settings, such as outer=nesterov")
    options = parser.parse_args()
    folder = options.folder.resolve()
    words = [*SHAPES[options.shape], *COMMON, FILES, *options.overrides]
    figures = costs.summary(load_settings(words))
    print(f"disk: {figures['disk/server_bytes'] / 1e9:.1f} GB for the server's files", flush=True)
    found: dict[str, Any] = {
        **report.environment(),
        "shape": options.shape,
        "overrides": options.overrides,
        "costs": {k: v for k, v in figures.items() if k.startswith(_TOLD)},
    }
    if not options.without_replica:
        found["full_replica"] = refused(words, folder / "full")
        print(" ".join(found["full_replica"]["said"]), flush=True)
    in_process.InProcessGrid = WatchedGrid  # type: ignore[misc]
    idle = train([*SHAPES["tiny"], *COMMON, FILES], folder / "idle")
    found |= train(words, folder / "run")
    found["idle_bytes"] = idle["server_bytes"]
    found["allowed_bytes"] = found["reply_bytes"] + SLACK
    save(options.json, found)
    found["export"] = loaded(folder / "run" / "export")
    save(options.json, found)
    gb = 1e9
    rows = [
        ("parameters", f"{figures['params/total'] / gb:.2f}B"),
        ("model, fp32", f"{4 * figures['params/total'] / gb:.2f} GB"),
        ("server, above an idle one", f"{(found['server_bytes'] - idle['server_bytes']) / gb:.2f}"),
        ("allowed: one reply + 0.5", f"{found['allowed_bytes'] / gb:.2f}"),
        ("worker, measured", f"{found['worker_bytes'] / gb:.2f}"),
        ("worker, predicted state", f"{figures['memory/worker_bytes'] / gb:.2f}"),
        ("full replica, state", f"{figures['memory/full_replica_bytes'] / gb:.2f}"),
        ("seconds of a round", ", ".join(f"{s:.1f}" for s in found["round_seconds"])),
        ("export loads as", str(found["export"].get("class", found["export"]))),
    ]
    if not options.without_replica:
        rows.append(("full replicas", f"status {found['full_replica']['status']}"))
        rows.append(("", " ".join(found["full_replica"]["said"])))
    print(markdown(("figure", "GB"), rows))


if __name__ == "__main__":
    main()
