"""Quantities as people read them."""

from __future__ import annotations

import math


def number(value: float | None, digits: int) -> str:
    """Write a number, or a dash for none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def size(num_bytes: float) -> str:
    """Write bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def count(amount: float) -> str:
    """Write a count with a decimal unit."""
    for unit in ("", "k", "M", "B"):
        if amount < 1000:
            return f"{amount:.0f}" if not unit else f"{amount:.2f}{unit}"
        amount /= 1000
    return f"{amount:.2f}T"


def duration(seconds: float) -> str:
    """Write a time with the unit that fits."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
