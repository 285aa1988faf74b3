"""The assembled global model: scored, sampled and probed on the best device there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from fomoe_flwr.config import Settings
from fomoe_flwr.data.tokens import TokenBlocks
from fomoe_flwr.events import tell
from fomoe_flwr.model.device_copy import has_room
from fomoe_flwr.model.residency import build_skeleton
from fomoe_flwr.model.router_probe import chosen_experts
from fomoe_flwr.model.state import State
from fomoe_flwr.run.evaluation import EvalReport, evaluate, sample_text
from fomoe_flwr.run.layer_stream import LayerStream
from fomoe_flwr.worker.cache import CACHE
from fomoe_flwr.worker.device import pick_device

_T = TypeVar("_T")


class AssembledModel:
    """All experts, nothing skipped, in host memory; a GPU takes them layer by layer.

    `model` holds `state` and computes where there is no GPU or too little room on it.
    """

    def __init__(
        self, settings: Settings, config: PreTrainedConfig, model: PreTrainedModel, state: State
    ) -> None:
        self.settings, self.model, self.state = settings, model, state
        self.device = pick_device(settings.eval.device)
        self._stream: LayerStream | None = None
        if self.device.type == "cuda":
            skeleton = build_skeleton(settings.model, config, self.device)
            batch = settings.eval.batch_size
            self._stream = LayerStream(skeleton, state, self.device, batch)
        self._has_told = False
        self._whole: PreTrainedModel | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the weights on the device meanwhile, if all of them fit: they travel once."""
        if self._stream is None or not _has_room(self.device, 2 * self._size()):
            yield
            return
        with self._stream.whole() as self._whole:
            try:
                yield
            finally:
                self._whole = None

    def evaluate(
        self, blocks: TokenBlocks, indices: np.ndarray, byte_lengths: np.ndarray
    ) -> EvalReport:
        """Score the blocks `indices`; see `evaluation.evaluate`."""
        batch = self.settings.eval.batch_size

        def score(model: PreTrainedModel, rows: int) -> EvalReport:
            return evaluate(model, blocks, indices, byte_lengths, batch, rows)

        return self._compute(score, len(indices), blocks.sequence_length)

    def choices(self, probe: Tensor) -> Tensor:
        """Return the experts chosen for [windows, tokens] ids; see `router_probe`."""
        shape = self.settings.model

        def choose(model: PreTrainedModel, rows: int) -> Tensor:
            return chosen_experts(model, probe, shape.num_experts, shape.top_k, batch_size=rows)

        return self._compute(choose, *probe.shape)

    def sample(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """Continue `eval.sample_prompt`; on the GPU where the whole model fits there."""
        settings = self.settings.eval
        words = (settings.sample_prompt, settings.sample_tokens, self.settings.seed)
        if self._whole is not None:
            return sample_text(self._whole, tokenizer, *words)
        if self._stream is None or not _has_room(self.device, self._size()):
            return sample_text(self.model, tokenizer, *words)
        with self._stream.whole() as model:
            return sample_text(model, tokenizer, *words)

    def _compute(
        self, work: Callable[[PreTrainedModel, int], _T], num_windows: int, num_tokens: int
    ) -> _T:
        """Return `work(model, windows of a call)` on the device, or here if there is no room."""
        if self._whole is not None:
            return work(self._whole, self.settings.eval.batch_size)
        if self._stream is not None:
            needed = self._stream.resident_bytes(num_windows, num_tokens)
            if _has_room(self.device, needed):
                with self._stream.open() as model:
                    return work(model, self._stream.rows(num_tokens))
            self._tell(needed)
        return work(self.model, self.settings.eval.batch_size)

    def _size(self) -> int:
        return sum(value.nbytes for value in self.state.values())

    def _tell(self, needed: int) -> None:
        if not self._has_told:
            self._has_told = True
            tell(
                "evaluation_device",
                f"evaluation runs on the CPU: it needs {needed / 2**30:.1f} GiB on {self.device}, "
                f"{torch.cuda.mem_get_info(self.device)[0] / 2**30:.1f} are free; "
                "lower eval.batch_size, or set eval.device=cpu",
                needed_bytes=needed,
            )


def _has_room(device: torch.device, needed: int) -> bool:
    """Tell whether so many bytes can be had on a GPU.

    If not, what waits there for the next round is given back first.
    """
    if not has_room(device, needed):
        CACHE.drop_model()
        torch.cuda.empty_cache()
    return has_room(device, needed)
