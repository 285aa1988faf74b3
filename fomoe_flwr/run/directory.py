"""The run directory: what a run leaves behind, and where.

config.yaml      resolved settings            metrics.jsonl   one object a round
summary.json     status and totals            routing.jsonl   one object a round, by layer, worker
tokenizer/       as trained or given          layout.json     round -> layer -> worker -> experts
checkpoints/     see `checkpoint`             samples/        text after each evaluation
plots/, report.html                           workers/        inner state (simulation only)
export/          transformers checkpoint      heartbeat.json  which process is at what
text.json        what text it reads           server/         the server's state, if in files
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fomoe_flwr.config import PATHS, Settings, SettingsError
from fomoe_flwr.errors import check_text
from fomoe_flwr.files import (
    append_line,
    check_folder,
    is_marked,
    mark_folder,
    save_json,
    save_text,
)


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.routing = path / "routing.jsonl"
        self.summary = path / "summary.json"
        self.layout = path / "layout.json"
        self.text = path / "text.json"
        self.heartbeat = path / "heartbeat.json"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer"
        self.plots = path / "plots"
        self.report = path / "report.html"
        self.samples = path / "samples"
        self.export = path / "export"
        self.workers = path / "workers"

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the rounds so far, oldest first; a line cut off by a crash is left out."""
        return _read_lines(self.metrics)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one round."""
        append_line(self.metrics, row)

    def read_routing(self) -> list[dict[str, Any]]:
        """Read the routing tables of the rounds so far, as `read_metrics` does."""
        return _read_lines(self.routing)

    def append_routing(self, row: Mapping[str, Any]) -> None:
        """Add one round's routing tables."""
        append_line(self.routing, row)

    def forget_rounds_after(self, server_round: int) -> None:
        """Drop rounds that a resume will repeat."""
        for path in (self.metrics, self.routing):
            kept = [row for row in _read_lines(path) if row["round"] <= server_round]
            save_text("".join(json.dumps(row) + "\n" for row in kept), path)
        layouts = self.read_layouts()
        save_json({r: v for r, v in layouts.items() if int(r) <= server_round}, self.layout)

    def add_layout(self, server_round: int, residents: Any) -> None:
        """Record who held what in a round: [layer][worker] -> expert ids."""
        save_json(self.read_layouts() | {str(server_round): residents}, self.layout)

    def read_summary(self) -> dict[str, Any]:
        """Read the summary; empty if the run never wrote one."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}
        return summary if isinstance(summary, dict) else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace the summary."""
        save_json(dict(summary), self.summary)

    def read_layouts(self) -> dict[str, Any]:
        """Read round -> [layer][worker] -> expert ids."""
        try:
            layouts = json.loads(self.layout.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}
        return layouts if isinstance(layouts, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def checkpoint_name(server_round: int) -> str:
    """Return the name of a round's folder among the checkpoints."""
    return f"round-{server_round:06d}"


def stored_rounds(folder: Path) -> list[int]:
    """List the rounds of whole checkpoints, oldest first."""
    found = [re.fullmatch(r"round-(\d{6})", item.name) for item in folder.glob("round-*")]
    return sorted(int(name[1]) for name in found if name)


def default_output_dir(settings: Settings, root: Path) -> Path:
    """Name a new run after experiment, preset and time."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return root / f"{stamp}-{settings.experiment}-{settings.preset}"


def absolute(settings: Settings) -> Settings:
    """Make every path absolute, from the working directory of this command."""
    chosen = Path(settings.output_dir) if settings.output_dir else None
    path = chosen or default_output_dir(settings, Path("outputs"))
    settings.output_dir = str(path.expanduser().resolve())
    check_text([settings.output_dir])  # The working directory may have any name.
    for group, key in PATHS:
        if given := getattr(getattr(settings, group), key):
            setattr(getattr(settings, group), key, str(Path(given).expanduser().resolve()))
    return settings


def claim_output_dir(settings: Settings) -> None:
    """Create the output directory and prove that it can be written.

    Raises SettingsError, and InputError if it holds what no run wrote.
    """
    path = Path(settings.output_dir)
    if not path.is_absolute():
        raise SettingsError(f"output_dir={path} must be absolute: processes differ in their cwd")
    taken = RunDirectory(path)
    if not settings.resume and (taken.metrics.exists() or stored_rounds(taken.checkpoints)):
        way_on = f", or resume={path} to go on with it" if stored_rounds(taken.checkpoints) else ""
        raise SettingsError(
            f"output_dir={path} already holds a run: give another output_dir{way_on}"
        )
    if not settings.resume and not is_marked(path):
        check_folder(path, "output_dir=", ())
    try:
        path.mkdir(parents=True, exist_ok=True)
        mark_folder(path)
    except OSError as error:
        raise SettingsError(
            f"output_dir={path} cannot be written: {error.strerror}; give another output_dir"
        ) from error
