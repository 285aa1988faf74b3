"""Batches: what a worker trains on next, with a cursor that resumes exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from datasets import IterableDataset
from transformers import PreTrainedTokenizerFast

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data import DataError
from fomoe_flwr.data.stream import STREAM_ERRORS, open_stream, row_text, stream_error
from fomoe_flwr.data.tokens import TokenBlocks, encode_documents

__all__ = ["Batches", "BlockBatches", "StreamBatches", "open_stream"]

# Documents tokenised at once; the tokens of these are what a cursor carries at most.
STREAM_DOCUMENTS = 16


class Batches(Protocol):
    """An endless source of batches whose `state` is JSON and resumes exactly."""

    def next_batch(self) -> torch.Tensor:
        """Return the next batch: int64 [B, S+1], inputs `[:, :-1]`, targets `[:, 1:]`."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the cursor after the latest batch."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue as the one that gave this state would."""
        ...


class BlockBatches:
    """Batches over a worker's blocks, in a new random order each epoch.

    Every block comes once per epoch; a batch may span two epochs.
    """

    def __init__(
        self, blocks: TokenBlocks, indices: np.ndarray, batch_size: int, seed: int, worker: int
    ) -> None:
        """Serve the blocks at `indices`; raise DataError if they do not fill one batch."""
        if batch_size > len(indices):
            raise DataError(
                f"too small corpus: worker {worker} has {len(indices)} blocks of "
                f"{blocks.sequence_length} tokens, local.batch_size={batch_size} needs "
                f"{batch_size}; extend data.path or lower local.batch_size or data.sequence_length"
            )
        self.blocks = blocks
        # Sorted, so that the order in which the caller lists them does not matter.
        self.indices = np.sort(np.asarray(indices, dtype=np.int64))
        self.batch_size = batch_size
        self.seed = seed
        self.worker = worker
        self.position = 0
        self._epoch = -1
        self._order = self.indices

    def batch(self, position: int) -> torch.Tensor:
        """Return batch number `position`, int64 [B, S+1]: always the same for seed and worker."""
        if position < 0:
            raise ValueError(f"position {position} must not be negative")
        num_blocks = len(self.indices)
        epoch, start = divmod(position * self.batch_size, num_blocks)
        chosen = self._epoch_order(epoch)[start : start + self.batch_size]
        if len(chosen) < self.batch_size:
            rest = self._epoch_order(epoch + 1)[: self.batch_size - len(chosen)]
            chosen = np.concatenate([chosen, rest])
        return torch.from_numpy(self.blocks.window(chosen))

    def next_batch(self) -> torch.Tensor:
        """Return the batch at the cursor and move it on."""
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Return the cursor: the number of batches taken."""
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Set the cursor; raise DataError if the state is none of ours."""
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise DataError(
                f"data cursor {state!r} is not {{'position': n}}; resume from another checkpoint"
            )
        self.position = position

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            sequence = np.random.SeedSequence(self.seed, spawn_key=(self.worker, epoch))
            self._order = np.random.default_rng(sequence).permutation(self.indices)
            self._epoch = epoch
        return self._order


class StreamBatches:
    """Batches from a stream, tokenised and packed as they come, in the order of the stream.

    At its end the stream starts again; tokens left over go on into the next pass.
    """

    def __init__(
        self,
        stream: IterableDataset,
        tokenizer: PreTrainedTokenizerFast,
        data: DataSettings,
        batch_size: int,
    ) -> None:
        """Serve `stream`, from `open_stream`, in windows of `data.sequence_length` + 1 tokens."""
        self.stream = stream
        self.tokenizer = tokenizer
        self.data = data
        self.batch_size = batch_size
        self.passes = 0
        self._buffer = np.zeros(0, dtype=np.int64)
        self._rows: Iterator[dict[str, Any]] | None = None
        self._beginning: dict[str, Any] = stream.state_dict()
        self._rows_state = self._beginning  # where `_rows` starts, while it is None
        self._text_in_pass = False

    def next_batch(self) -> torch.Tensor:
        """Return the next batch; raise DataError if the stream breaks or holds no text."""
        length = self.data.sequence_length
        needed = self.batch_size * length + 1
        pieces, num_tokens = [self._buffer], len(self._buffer)
        while num_tokens < needed:
            texts = self._next_texts()
            if texts:
                pieces += encode_documents(texts, self.tokenizer)
                num_tokens += sum(map(len, pieces[-len(texts) :]))
        tokens = np.concatenate(pieces).astype(np.int64)
        offsets = np.arange(self.batch_size)[:, None] * length + np.arange(length + 1)
        self._buffer = tokens[needed - 1 :]
        return torch.from_numpy(tokens[offsets])

    def state(self) -> dict[str, Any]:
        """Return the cursor: JSON with the stream's own state and the tokens not yet served."""
        return {
            "stream": self._rows_state if self._rows is None else self.stream.state_dict(),
            "buffer": self._buffer.tolist(),
            "passes": self.passes,
            "text_in_pass": self._text_in_pass,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set the cursor; raise DataError if the state is none of ours."""
        try:
            self._buffer = np.array(state["buffer"], dtype=np.int64)
            self._rows_state = state["stream"]
            self.passes = int(state["passes"])
            self._text_in_pass = bool(state["text_in_pass"])
        except (KeyError, TypeError, ValueError):
            raise DataError(
                "the data cursor is not one of a stream; resume from another checkpoint"
            ) from None
        self._rows = None

    def _next_texts(self) -> list[str]:
        texts: list[str] = []
        try:
            if self._rows is None:
                self._rows = self._start()
            while len(texts) < STREAM_DOCUMENTS:
                row = next(self._rows, None)
                if row is None:
                    break
                text = row_text(row, self.data)
                if text.strip():
                    texts.append(text)
        except DataError:
            raise
        except STREAM_ERRORS as error:
            raise stream_error(self.data, error) from None
        self._text_in_pass = self._text_in_pass or bool(texts)
        if len(texts) < STREAM_DOCUMENTS:
            self._end_pass()
        return texts

    def _start(self) -> Iterator[dict[str, Any]]:
        # Also for a new pass, or it would start where the latest restored cursor stood. A copy,
        # for the stream may count on in what it is given.
        self.stream.load_state_dict(copy.deepcopy(self._rows_state))
        return iter(self.stream)

    def _end_pass(self) -> None:
        if not self._text_in_pass:
            raise DataError(
                f"data.dataset={self.data.dataset!r} has no text for this worker; check "
                "data.text_key, or lower layout.num_workers or data.holdout_fraction"
            )
        self.passes += 1
        self._text_in_pass = False
        self._rows, self._rows_state = None, self._beginning
