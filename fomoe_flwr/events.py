"""What a command tells while it works: lines for people, or one JSON object a line for machines.

Warnings and log records are events as well. In JSON nothing else reaches stdout.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
import warnings
from typing import Any, Literal

VARIABLE = "FOMOE_LOG_FORMAT"
"""Environment variable that carries the format to the processes of a run."""

Format = Literal["text", "json"]

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

_format: Format = "text"


def is_json() -> bool:
    """Tell whether events are JSON."""
    return _format == "json"


def use_format(name: Format) -> None:
    """Choose the format of this process and of the processes that it starts."""
    global _format
    _format = name
    if name == "text":
        os.environ.pop(VARIABLE, None)
        return
    os.environ[VARIABLE] = name
    warnings.showwarning = _tell_warning
    logging.getLogger().handlers = [_Handler(logging.INFO)]
    # Flower's logger brings a console of its own.
    logging.getLogger("flwr").addFilter(_tell_record)


def tell(event: str, text: str = "", /, **fields: Any) -> None:
    """Print an event: its text, or its fields as JSON with `event` and `time` (Unix seconds)."""
    if not is_json():
        print(text, flush=True)
        return
    row = {"event": event, "time": round(time.time(), 3), **(fields or {"text": text})}
    print(json.dumps(_finite(row), default=str), flush=True)


def warn(text: str) -> None:
    """Tell what went wrong and does not end the command: on stderr, or as an event."""
    if is_json():
        tell("warning", text=text)
    else:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def tell_if_json(event: str, text: str = "", /, **fields: Any) -> None:
    """Print an event that is for machines only."""
    if is_json():
        tell(event, text, **fields)


def pass_on(line: str) -> None:
    """Print a line of a process of the run; in JSON one that is no event becomes a `log`."""
    if not is_json() or _is_event(line):
        print(line, flush=True)
    elif text := without_colours(line).strip():
        tell("warning" if text.startswith(("WARNING", "ERROR")) else "log", text)


def without_colours(text: str) -> str:
    """Remove a terminal's escape codes from a text."""
    return _COLOURS.sub("", text)


def _is_event(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and "event" in row


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tell_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    tell("warning", text=str(message), category=category.__name__)


def _tell_record(record: logging.LogRecord) -> bool:
    text = record.getMessage().strip()
    if text and record.levelno >= logging.INFO:
        event = "warning" if record.levelno >= logging.WARNING else "log"
        tell(event, text=text, logger=record.name)
    return False


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _tell_record(record)
