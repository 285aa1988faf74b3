"""What `auto` in the execution settings means on a device; no torch, so that costs can ask too."""

from __future__ import annotations

from fomoe_flwr.config import ExecutionSettings

LARGE_VOCABULARY = 16_384
"""Entries from which on a CPU gains from never holding all logits."""

CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**29}
"""Logits of a chunk. On a CPU small enough for its passes to hit the cache, large enough for fast
products; on a GPU large enough to fill it."""


def is_loss_chunked(settings: ExecutionSettings, device: str, vocab_size: int) -> bool:
    """Tell whether the head's loss takes the tokens in chunks on a device (`cpu` or `cuda`)."""
    is_better = device == "cuda" or vocab_size >= LARGE_VOCABULARY
    return settings.loss == "chunked" or (settings.loss == "auto" and is_better)


def is_heap_held(settings: ExecutionSettings, device: str) -> bool:
    """Tell whether the heap is held during a round: a GPU has an allocator of its own."""
    return settings.hold_heap and device == "cpu"


def is_graphed(
    settings: ExecutionSettings, device: str, precision: str, num_processes: int = 1
) -> bool:
    """Tell whether a step is captured as a CUDA graph and replayed.

    auto: wherever it can be. The host then launches nothing, and never waits for the device.
    """
    if device != "cuda" or settings.cuda_graph == "off":
        return False
    can = precision != "float32" and settings.experts in ("auto", "static") and num_processes == 1
    return can or settings.cuda_graph == "on"


def is_compiled(settings: ExecutionSettings, device: str) -> bool:
    """Tell whether attention, norms and router losses are compiled on a device."""
    return settings.compile == "on" or (settings.compile == "auto" and device == "cuda")
