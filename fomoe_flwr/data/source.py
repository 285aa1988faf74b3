"""From settings to what server and workers need: a tokenizer, held-out blocks, training batches."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerFast

from fomoe_flwr.config import DataSettings, LocalSettings, Settings
from fomoe_flwr.data import DataError
from fomoe_flwr.data.batches import Batches, BlockBatches, StreamBatches
from fomoe_flwr.data.cache import cache_dir, cached_at
from fomoe_flwr.data.corpus import fingerprint, read_documents
from fomoe_flwr.data.holdout import Split
from fomoe_flwr.data.partition import partition_blocks
from fomoe_flwr.data.stream import heldout_documents, open_stream, row_text
from fomoe_flwr.data.tokenizer import (
    load_tokenizer,
    tokenizer_from_json,
    tokenizer_json,
    train_tokenizer,
)
from fomoe_flwr.data.tokens import TokenBlocks, cached_blocks, pack
from fomoe_flwr.files import save_text

NodeText = tuple[TokenBlocks, list[np.ndarray]]
"""Tokenised text, and for every part of it the indices of its blocks."""
STREAM_HOLDOUT_DOCUMENTS = 1000
"""Held-out documents that an evaluation on a stream reads."""
STREAM_TOKENIZER_DOCUMENTS = 20_000
"""Documents of a stream that a tokenizer is trained on when none is given."""


def prepare_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """Load `data.tokenizer`, else that of the model's folder, else train one on the training text.

    Raises DataError when it has more tokens than `model.vocab_size`.
    """
    data, vocab_size = settings.data, settings.model.vocab_size
    key, given = _given_tokenizer(settings)
    tokenizer = load_tokenizer(given, key) if given else _trained_tokenizer(data, vocab_size)
    folder = settings.model.pretrained or settings.model.upcycle
    if len(tokenizer) > vocab_size:
        raise DataError(
            f"the tokenizer of {key}={given or '(trained)'} has {len(tokenizer)} tokens, "
            f"model.vocab_size={vocab_size} is too small: "
            + ("set data.tokenizer to this model's" if folder else f"set {len(tokenizer)} or more")
        )
    if given != folder and folder and _has_other_words(folder, tokenizer):
        raise DataError(
            f"data.tokenizer={given} has other tokens than the tokenizer of {folder}, whose "
            "embeddings the model begins with: leave data.tokenizer empty"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer of {key}={given} has no end-of-text token to pack with")
    return tokenizer


def _given_tokenizer(settings: Settings) -> tuple[str, str]:
    """Return where the tokenizer lies, after the name of the setting that says so."""
    named = {
        "data.tokenizer": settings.data.tokenizer,
        "model.pretrained": settings.model.pretrained,
        "model.upcycle": settings.model.upcycle,
    }
    return next(((key, given) for key, given in named.items() if given), ("data.tokenizer", ""))


def _has_other_words(folder: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    try:
        own = load_tokenizer(folder)
    except DataError:  # It has none: the given one is the model's.
        return False
    return own.get_vocab() != tokenizer.get_vocab()


def evaluation_blocks(
    settings: Settings, json_text: str, split: Split = "validation"
) -> TokenBlocks:
    """Return the packed held-out text that no worker trains on."""
    data = settings.data
    if data.dataset:
        documents = heldout_documents(data, split, STREAM_HOLDOUT_DOCUMENTS)
        return pack(documents, tokenizer_from_json(json_text), data.sequence_length)
    return cached_blocks(data, split, json_text, cache_dir() / "tokens")


def check_data(settings: Settings) -> None:
    """Read what will be read, before anything starts. Raises DataError.

    The number of blocks is known only after tokenising; every byte-level token is at least one
    byte, so text with fewer bytes than a batch has tokens is refused here already.
    """
    data, local = settings.data, settings.local
    if _given_tokenizer(settings)[1]:
        prepare_tokenizer(settings)
    if data.dataset:
        open_stream(data, 0, settings.layout.num_workers)
        return
    needed = settings.layout.num_workers * local.batch_size * data.sequence_length
    found = sum(len(document.text.encode()) for document in read_documents(data, "train"))
    if found < needed:
        raise DataError(
            f"too small corpus: {found} bytes of training text, layout.num_workers="
            f"{settings.layout.num_workers} * local.batch_size={local.batch_size} * "
            f"data.sequence_length={data.sequence_length} = {needed} tokens are one step; extend "
            f"data.path={data.path or '(embedded corpus)'} or lower one of these"
        )
    read_documents(data, "validation")


@dataclass(frozen=True)
class NodeData:
    """One worker's text: part `part` of `num_parts` equal claims on a source."""

    data: DataSettings
    local: LocalSettings
    seed: int
    worker: int
    part: int
    num_parts: int
    tokenizer_json: str

    def batches(self, position: int, text: NodeText | None = None) -> Batches:
        """Open the worker's batches at batch `position` of the run.

        `text` is what `read` gave before, to save the reading. A stream cannot be entered in the
        middle; it begins at its start and goes on by cursor.
        """
        if self.data.dataset:
            stream = open_stream(self.data, self.part, self.num_parts)
            tokenizer = tokenizer_from_json(self.tokenizer_json)
            return StreamBatches(stream, tokenizer, self.data, self.local.batch_size)
        blocks, parts = text or self.read()
        batches = BlockBatches(
            blocks, parts[self.part], self.local.batch_size, seed=self.seed, worker=self.worker
        )
        batches.restore({"position": position})
        return batches

    def read(self) -> NodeText:
        """Return the tokenised text and the parts of all its readers; not for a stream."""
        blocks = cached_blocks(self.data, "train", self.tokenizer_json, cache_dir() / "tokens")
        if self.num_parts == 1:
            return blocks, [np.arange(blocks.num_blocks)]
        parts = partition_blocks(blocks.domain_ids, self.num_parts, self.data.partition, self.seed)
        return blocks, parts


def _trained_tokenizer(data: DataSettings, vocab_size: int) -> PreTrainedTokenizerFast:
    if data.dataset:
        rows = islice(open_stream(data, 0, 1), STREAM_TOKENIZER_DOCUMENTS)
        return train_tokenizer((row_text(row, data) for row in rows), vocab_size)
    path = cache_dir() / "tokenizers" / f"{fingerprint(data)[:32]}-{vocab_size}.json"
    seal = path.with_suffix(".sha256")
    try:
        if seal.read_text(encoding="ascii") == sha256(path.read_bytes()).hexdigest():
            return load_tokenizer(path)
    except (OSError, ValueError):
        pass  # Absent or damaged: it is made anew.
    texts = [document.text for document in read_documents(data, "train")]
    tokenizer = train_tokenizer(texts, vocab_size)
    text = tokenizer_json(tokenizer)
    with cached_at(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_text(text, path)
        save_text(sha256(text.encode()).hexdigest(), seal)
    return tokenizer
