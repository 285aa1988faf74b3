"""What people see of a run: lines while it goes, a table, plots and a text sample at its end."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fomoe_flwr import __version__, costs
from fomoe_flwr.config import Settings
from fomoe_flwr.evaluation import EvalReport
from fomoe_flwr.layout import Layout
from fomoe_flwr.run_directory import RunDirectory

_WIDTH = 110


@cache
def environment() -> dict[str, str]:
    """Return what a number must be quoted with: versions, machine, commit."""
    return {
        "environment/fomoe_flwr": __version__,
        "environment/torch": torch.__version__,
        "environment/python": platform.python_version(),
        "environment/machine": (
            f"{platform.machine()}, {_cpu_name()}, {torch.get_num_threads()} threads"
        ),
        "environment/commit": _commit(),
    }


def print_start(settings: Settings, run: RunDirectory, layout: Layout) -> None:
    """Say what is about to run and what it will cost."""
    predicted: dict[str, Any] = dict(costs.summary(settings))
    workers = settings.layout.num_workers
    fewest, most = layout.overlaps
    copies = str(fewest) if fewest == most else f"{fewest} to {most}"
    sent = costs.predict_bytes(settings, layout)
    rows = [
        ("run directory", str(run.path)),
        ("experiment", f"{settings.experiment} (preset {settings.preset}, seed {settings.seed})"),
        (
            "model",
            f"{settings.model.name}: {_count(predicted['params/total'])} parameters, "
            f"{_count(predicted['params/shared'])} shared, {_count(predicted['params/expert'])} "
            f"in experts, {_count(predicted['params/active'])} active per token",
        ),
        (
            "layout",
            f"{workers} workers, every expert on {copies}; "
            f"{settings.layout.kind}, {settings.model.routing}",
        ),
        (
            "per worker",
            f"{_count(predicted['params/resident'])} parameters, "
            f"{_size(predicted['memory/worker_bytes'])} of training state "
            f"(full replica {_size(predicted['memory/full_replica_bytes'])})",
        ),
        (
            "per round",
            f"{_size(sent.up)} up, {_size(sent.down)} down over all "
            f"workers: {predicted['ratio/full_replica']:.2f}x less than full replicas, "
            f"{predicted['ratio/ddp']:.1f}x less than data-parallel",
        ),
        (
            "batch per step",
            f"{predicted['batch/shared_tokens']:.0f} tokens for shared layers, "
            f"{predicted['batch/expert_tokens']:.0f} for an expert on average",
        ),
    ]
    for name, text in rows:
        print(f"{name + ':':<16}{text}", flush=True)


def print_before(result: EvalReport, entropy: float) -> None:
    """Say where the untrained model stands."""
    print(
        f"before training: loss {result.loss:.3f}, {result.bits_per_byte:.3f} bits/byte on "
        f"{result.tokens} held-out tokens; unigram entropy {entropy:.3f}",
        flush=True,
    )


def print_round(row: Mapping[str, Any], rounds: int) -> None:
    """Print one line for a finished round."""
    scores = (
        f"loss {row['eval/loss']:.4f} | ppl {row['eval/perplexity']:8.2f} | "
        f"{row['eval/bits_per_byte']:.3f} bits/byte | "
        if "eval/loss" in row
        else ""
    )
    failed = f", {row['round/workers_failed']} failed" if row["round/workers_failed"] else ""
    print(
        f"round {row['round']:>3}/{rounds} | {scores}train {row['train/loss']:.4f} | "
        f"ghosts {row['moe/ghost_fraction']:.1%} | up {_size(row['comm/bytes_up'])} | "
        f"down {_size(row['comm/bytes_down'])} | {row['round/seconds']:.1f} s | "
        f"{row['train/tokens_per_second']:.0f} tok/s | {row['round/workers_ok']} ok{failed}",
        flush=True,
    )


def print_end(run: RunDirectory) -> None:
    """Print the table of all rounds, a sample of text and where everything is."""
    console = Console(width=_WIDTH, highlight=False)
    table = Table(title=f"{run.path.name}: every round", title_justify="left")
    for column in ("round", "eval loss", "perplexity", "bits/byte", "ghosts", "up", "down"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("seconds", "tokens/s", "workers"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in run.read_metrics():
        table.add_row(
            str(row["round"]),
            _number(row.get("eval/loss"), 4),
            _number(row.get("eval/perplexity"), 2),
            _number(row.get("eval/bits_per_byte"), 3),
            f"{row['moe/ghost_fraction']:.1%}",
            _size(row["comm/bytes_up"]),
            _size(row["comm/bytes_down"]),
            _number(row["round/seconds"], 1),
            _number(row["train/tokens_per_second"], 0),
            str(row["round/workers_ok"]),
        )
    console.print(table)
    _print_routing(console, run)
    summary = run.read_summary()
    if "eval/unigram_entropy" in summary:
        console.print(
            f"held-out loss {summary['eval/loss']['untrained']:.3f} untrained -> "
            f"{summary['eval/loss']['last']:.3f}; unigram entropy of the same text "
            f"{summary['eval/unigram_entropy']:.3f}"
        )
    samples = sorted(run.samples.glob("*.txt"))
    if samples:
        console.print(f"\nsample ({samples[-1].name}):", markup=False)
        console.print(samples[-1].read_text(encoding="utf-8").strip(), markup=False)
    console.print("\nwritten:", markup=False)
    for path in (run.metrics, run.routing, run.summary, run.plots, run.checkpoints, run.export):
        if path.exists():
            console.print(f"  {path}", markup=False, soft_wrap=True)


def _print_routing(console: Console, run: RunDirectory) -> None:
    """Print the routing of the last round, layer by layer."""
    lines = run.read_routing()
    if not lines:
        return
    table = Table(
        title=f"stable routing (round {lines[-1]['round']}; expected: of uniform routing)",
        title_justify="left",
    )
    shown = (
        ("ghosts", "ghost_fraction", "{:.1%}"),
        ("expected", "ghost_expected", "{:.1%}"),
        ("all-ghost", "all_ghost_fraction", "{:.1%}"),
        ("expected", "all_ghost_expected", "{:.1%}"),
        ("entropy", "load_entropy", "{:.3f}"),
        ("MaxVio", "max_vio", "{:.2f}"),
        ("dead", "dead_experts", "{:.1%}"),
        ("churn", "churn", "{:.1%}"),
        ("agreement", "worker_agreement", "{:.1%}"),
        ("drift", "expert_drift", "{:.4f}"),
    )
    for column in ("layer", *(title for title, _, _ in shown)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in lines[-1]["layers"]:
        values = [(row.get(name), form) for _, name, form in shown]
        cells = ["-" if value is None else form.format(value) for value, form in values]
        table.add_row(str(row["layer"]), *cells)
    console.print(table)


def draw_plots(run: RunDirectory, settings: Settings) -> list[Path]:
    """Draw loss against tokens and bytes, the routing, and who held what; return the files."""
    # pyplot is slow to import, and only a finished run needs it.
    from fomoe_flwr.layout_picture import draw_holders
    from fomoe_flwr.routing_picture import draw_routing

    run.plots.mkdir(exist_ok=True)
    written = [draw_loss(run)]
    if lines := run.read_routing():
        path = run.plots / "routing.png"
        draw_routing(lines, path, f"{run.path.name}: stable routing")
        written.append(path)
    layouts = run.read_layouts()
    if layouts:
        last = max(layouts, key=int)
        layout = Layout.from_json(layouts[last])
        path = run.plots / "layout.png"
        draw_holders(layout, path, f"Who holds what (round {last}, {settings.layout.kind} layout)")
        written.append(path)
    return written


def draw_loss(run: RunDirectory) -> Path:
    """Draw held-out and training loss against tokens and against bytes sent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = run.read_metrics()
    summary = run.read_summary()
    untrained = summary.get("eval/loss_untrained")
    start = [(0.0, untrained)] if untrained is not None else []
    tokens: list[float] = []
    sent: list[float] = []
    for row in rows:
        moved = (row["comm/bytes_up"] + row["comm/bytes_down"]) / 2**20
        sent.append(moved + (sent[-1] if sent else 0.0))
        tokens.append(row["tokens"] / 1e6)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, x, label in (
        (left, tokens, "million training tokens, all workers"),
        (right, sent, "MiB on the wire, up and down, all workers"),
    ):
        seen = [(a, row["eval/loss"]) for a, row in zip(x, rows, strict=True) if "eval/loss" in row]
        axis.plot(x, [row["train/loss"] for row in rows], ".--", color="#888888", label="training")
        axis.plot(*zip(*start, *seen, strict=True), "o-", color="#0072B2", label="held out")
        if "eval/unigram_entropy" in summary:
            axis.axhline(
                summary["eval/unigram_entropy"],
                color="#D55E00",
                linestyle=":",
                label="unigram entropy of the held-out text",
            )
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    left.set_ylabel("loss, nats per token")
    left.legend(frameon=False)
    figure.suptitle(f"{run.path.name}: loss of the assembled model")
    path = run.plots / "loss.png"
    figure.savefig(path, dpi=130)
    return path


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _count(number: float) -> str:
    for unit in ("", "k", "M", "B"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.2f}{unit}"
        number /= 1000
    return f"{number:.2f}T"
