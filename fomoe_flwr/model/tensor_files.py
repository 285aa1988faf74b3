"""Files of tensors: safetensors, whole or absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fomoe_flwr.files import replace_file


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically and durably."""
    replace_file(path, lambda target: save_file(dict(tensors), target, metadata=dict(metadata)))
