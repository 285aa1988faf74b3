"""The one error of decoding."""

from __future__ import annotations


class CodecError(ValueError):
    """Bytes that no encoder wrote, or a codec that this machine lacks; the text says which."""
