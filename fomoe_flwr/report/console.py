"""The console: lines while a run goes, a table and a sample of text at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fomoe_flwr import costs
from fomoe_flwr.config import Settings
from fomoe_flwr.events import is_json, tell
from fomoe_flwr.layout import Layout
from fomoe_flwr.report.units import count, number, size
from fomoe_flwr.run.directory import RunDirectory

if TYPE_CHECKING:
    from fomoe_flwr.data.summary import TextSummary
    from fomoe_flwr.run.evaluation import EvalReport

_WIDTH = 110


def print_start(
    settings: Settings, run: RunDirectory, layout: Layout, text: TextSummary, server_state: str
) -> None:
    """Say what is about to run and what it will cost."""
    predicted: dict[str, Any] = dict(costs.summary(settings))
    workers = settings.layout.num_workers
    fewest, most = layout.overlaps
    copies = str(fewest) if fewest == most else f"{fewest} to {most}"
    sent = costs.predict_bytes(settings, layout)
    rows = [
        ("run directory", str(run.path)),
        ("experiment", f"{settings.experiment} (preset {settings.preset}, seed {settings.seed})"),
        *_text_rows(settings, text),
        (
            "model",
            f"{settings.model.name}: {count(predicted['params/total'])} parameters, "
            f"{count(predicted['params/shared'])} shared, {count(predicted['params/expert'])} "
            f"in experts, {count(predicted['params/active'])} active per token",
        ),
        (
            "layout",
            f"{workers} workers, every expert on {copies}; "
            f"{settings.layout.kind}, {settings.model.routing}",
        ),
        (
            "per worker",
            f"{count(predicted['params/resident'])} parameters, "
            f"{size(predicted['memory/worker_bytes'])} of training state "
            f"(full replica {size(predicted['memory/full_replica_bytes'])})",
        ),
        (
            "per round",
            f"{size(sent.up)} up, {size(sent.down)} down over all "
            f"workers: {predicted['ratio/full_replica']:.2f}x less than full replicas, "
            f"{predicted['ratio/ddp']:.1f}x less than data-parallel",
        ),
        (
            "batch per step",
            f"{predicted['batch/shared_tokens']:.0f} tokens for shared layers, "
            f"{predicted['batch/expert_tokens']:.0f} for an expert on average",
        ),
    ]
    rows.append(("server state", server_state))
    tell(
        "start",
        "\n".join(f"{name + ':':<16}{value}" for name, value in rows),
        **{name.strip().replace(" ", "_"): value for name, value in rows},
        **predicted,
        **{
            f"text/{split}/{key}": value
            for split, found in text.splits.items()
            for key, value in asdict(found).items()
        },
    )


def _text_rows(settings: Settings, text: TextSummary) -> Iterator[tuple[str, str]]:
    data = settings.data
    source = data.path or data.dataset or "embedded corpus"
    files = f", {text.files} file{'s' * (text.files != 1)}" if text.files else ""
    yield "text", f"{source}{files}{', streamed' if data.dataset else ''}"
    for split, found in text.splits.items():
        tokens = f"{count(found.tokens)} tokens" if found.tokens else "too short for a window"
        number = f"{found.documents} document{'s' * (found.documents != 1)}"
        note = " (little text: chosen by rank)" if split in text.topped_up else ""
        yield f"  {split}", f"{number}, {size(found.bytes)}, {tokens}{note}"
    if text.left_out:
        yield "  left out", text.left_out


def print_before(result: EvalReport, entropy: float) -> None:
    """Say where the untrained model stands."""
    tell(
        "before",
        f"before training: loss {result.loss:.3f}, {result.bits_per_byte:.3f} bits/byte on "
        f"{result.tokens} held-out tokens; unigram entropy {entropy:.3f}",
        **{
            "eval/loss": result.loss,
            "eval/bits_per_byte": result.bits_per_byte,
            "eval/tokens": result.tokens,
            "eval/unigram_entropy": entropy,
        },
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
    tell(
        "round",
        f"round {row['round']:>3}/{rounds} | {scores}train {row['train/loss']:.4f} | "
        f"ghosts {row['moe/ghost_fraction']:.1%} | up {size(row['comm/bytes_up'])} | "
        f"down {size(row['comm/bytes_down'])} | {row['round/seconds']:.1f} s | "
        f"{row['train/tokens_per_second']:.0f} tok/s | {row['round/workers_ok']} ok{failed}",
        rounds=rounds,
        **row,
    )


def print_end(run: RunDirectory) -> None:
    """Print the table of all rounds, a sample of text and where everything is."""
    if is_json():
        return tell("summary", **run.read_summary())
    console = Console(width=_WIDTH, highlight=False)
    table = Table(title=f"{run.path.name}: every round", title_justify="left")
    for column in ("round", "eval loss", "perplexity", "bits/byte", "ghosts", "up", "down"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("seconds", "tokens/s", "workers"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in run.read_metrics():
        table.add_row(
            str(row["round"]),
            number(row.get("eval/loss"), 4),
            number(row.get("eval/perplexity"), 2),
            number(row.get("eval/bits_per_byte"), 3),
            f"{row['moe/ghost_fraction']:.1%}",
            size(row["comm/bytes_up"]),
            size(row["comm/bytes_down"]),
            number(row["round/seconds"], 1),
            number(row["train/tokens_per_second"], 0),
            str(row["round/workers_ok"]),
        )
    console.print(table)
    summary = run.read_summary()
    _print_turnout(console, summary)
    _print_routing(console, run)
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
    for path in (run.report, run.metrics, run.routing, run.plots, run.checkpoints, run.export):
        if path.exists():
            console.print(f"  {path}", markup=False, soft_wrap=True)


def _print_turnout(console: Console, summary: Mapping[str, Any]) -> None:
    """Print how many rounds of each worker counted."""
    workers = summary.get("workers", [])
    if not any(each["missed"] for each in workers):
        console.print(f"all {len(workers)} workers counted in every round", markup=False)
        return
    table = Table(title="workers: rounds that counted", title_justify="left")
    for column in ("worker", "counted", "did not"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("mostly because")
    for each in workers:
        table.add_row(*(str(each[key]) for key in ("worker", "counted", "missed", "reason")))
    console.print(table)


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
