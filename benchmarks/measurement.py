"""What the benchmarks share: a command line, timings, a process's memory, tables and files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOMOE = (sys.executable, "-m", "fomoe_flwr.cli")
"""The command `fomoe`, of the package that this process imports."""


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that says the first line of a script's docstring and takes `--json`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    return parser


def save(path: Path | None, document: Mapping[str, Any]) -> None:
    """Write figures as JSON; do nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def markdown(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def best_seconds(work: Callable[[], object], repeat: int) -> float:
    """Return the shortest of some timings."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def process_bytes(key: str = "VmHWM") -> int:
    """Return this process's memory: `VmHWM` is its highest resident set, `VmRSS` the present one.

    Raises KeyError if the kernel does not tell it.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def forget_peak() -> None:
    """Let `VmHWM` begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
