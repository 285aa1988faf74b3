"""Text in, batches of tokens out: corpus, tokenizer, packed blocks, partitions and batches.

Only `batches` imports torch; nothing here imports Flower.
"""

from __future__ import annotations

from fomoe_flwr.errors import InputError, reason_of


class DataError(InputError):
    """Data that cannot be used; the message is one line: value, what is needed, key to change."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error: our own messages have one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else reason_of(error)
