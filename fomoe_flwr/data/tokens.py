"""Token blocks: documents as one flat array of ids, cut in blocks of equal length."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from transformers import PreTrainedTokenizerFast

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data import DataError
from fomoe_flwr.data.cache import cached_at
from fomoe_flwr.data.corpus import Document, fingerprint, read_documents
from fomoe_flwr.data.holdout import Split
from fomoe_flwr.data.tokenizer import tokenizer_digest, tokenizer_from_json
from fomoe_flwr.files import replace_file, save_json

# Documents per call of the Rust tokenizer: enough to feed its threads, little memory.
ENCODE_BATCH = 256
UINT16_IDS = 2**16
MOST_DOMAINS = 2**15 - 1
# Part of the cache key: raise it whenever the same documents give other blocks.
PACKING_VERSION = 1


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """A packed split.

    Block i covers `tokens[i*S : i*S+S+1]`: inputs are its first S tokens, targets its last S, so
    neighbours share one token and each token but the first is a target once.

    tokens: flat, uint16 or uint32, perhaps a read-only memmap, at least num_blocks*S + 1 long.
    domain_ids: int16 [num_blocks], the domain of each block's first token.
    domains: the names that `domain_ids` points to, sorted.
    """

    tokens: np.ndarray
    domain_ids: np.ndarray
    domains: tuple[str, ...]
    sequence_length: int

    @property
    def num_blocks(self) -> int:
        """Return how many blocks there are."""
        return len(self.domain_ids)

    def window(self, indices: np.ndarray) -> np.ndarray:
        """Return the blocks at `indices` [B] as int64 [B, S+1]; IndexError if there is none."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_blocks:
            raise IndexError(f"block indices must lie in 0..{self.num_blocks - 1}")
        offsets = indices[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        return np.asarray(self.tokens[offsets], dtype=np.int64)


def encode_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """Return the ids of each text with the end-of-text id after it: uint32 arrays.

    Special tokens that stand in a text as text are encoded as text.
    Raises DataError if the tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the tokenizer has no end-of-text token (eos_token); set data.tokenizer to one that has"
        )
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    # A tokenizer.json may bring its own limits, which would silently cut or fill documents.
    backend.no_truncation()
    backend.no_padding()
    try:
        encoded = backend.encode_batch(texts, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return [np.array([*encoding.ids, end], dtype=np.uint32) for encoding in encoded]


def pack(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, sequence_length: int
) -> TokenBlocks:
    """Concatenate the documents, ordered by domain, with an end-of-text id after each; cut blocks.

    Raises DataError if there is not one block, or more domains than int16 can number.
    """
    domains = tuple(sorted({document.domain for document in documents}))
    if len(domains) > MOST_DOMAINS:
        raise DataError(
            f"the corpus has {len(domains)} domains, at most {MOST_DOMAINS} can be told apart; "
            "change data.domain_key or put files into sub-folders of data.path"
        )
    ordered = sorted(documents, key=lambda document: document.domain)
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < UINT16_IDS else np.uint32
    pieces: list[np.ndarray] = []
    for start in range(0, len(ordered), ENCODE_BATCH):
        texts = [document.text for document in ordered[start : start + ENCODE_BATCH]]
        pieces += [ids.astype(dtype) for ids in encode_documents(texts, tokenizer)]
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=dtype)
    num_blocks = (len(tokens) - 1) // sequence_length
    if num_blocks < 1:
        raise DataError(
            f"the text has {len(tokens)} tokens, one block needs {sequence_length + 1}; "
            "lower data.sequence_length or put more text into data.path"
        )
    ends = np.cumsum([len(piece) for piece in pieces])
    first_tokens = np.arange(num_blocks) * sequence_length
    document_of_block = np.searchsorted(ends, first_tokens, side="right")
    numbers = {domain: number for number, domain in enumerate(domains)}
    domain_of_document = np.array([numbers[document.domain] for document in ordered], np.int16)
    return TokenBlocks(tokens, domain_of_document[document_of_block], domains, sequence_length)


def heldout_windows(blocks: TokenBlocks, max_tokens: int) -> np.ndarray:
    """Return the block indices to evaluate on: int64, sorted, always the same.

    Takes as many blocks as `max_tokens` targets allow, but at least one: the same number from
    every domain (small domains leave their rest to the others), evenly spread over its blocks.
    """
    budget = max(1, max_tokens // blocks.sequence_length)
    if budget >= blocks.num_blocks:
        return np.arange(blocks.num_blocks, dtype=np.int64)
    domains, sizes = np.unique(blocks.domain_ids, return_counts=True)
    quotas = _even_quotas(sizes, budget)
    chosen = []
    for domain, size, quota in zip(domains, sizes, quotas, strict=True):
        # The middles of `quota` equal stretches; distinct, for quota <= size.
        places = ((2 * np.arange(quota) + 1) * size) // (2 * max(quota, 1))
        chosen.append(np.flatnonzero(blocks.domain_ids == domain)[places])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _even_quotas(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Return a quota per domain, at most its size, as equal as can be, `budget` in all."""
    quotas = np.zeros(len(sizes), dtype=np.int64)
    while left := budget - int(quotas.sum()):
        unfilled = np.flatnonzero(quotas < sizes)
        if left < len(unfilled):
            quotas[unfilled[:left]] += 1
            break
        grant = left // len(unfilled)
        quotas[unfilled] += np.minimum(grant, sizes[unfilled] - quotas[unfilled])
    return quotas


def cached_blocks(
    data: DataSettings, split: Split, tokenizer_json_text: str, cache_dir: Path
) -> TokenBlocks:
    """Return the packed split, from the cache below `cache_dir` if it is there and sound.

    The key covers the content of the files, the settings that shape documents, the tokenizer,
    `data.sequence_length` and the split. Processes of one machine that ask for the same at once
    wait for the first. A cache with a missing, short or changed file is built again.
    Raises DataError as `read_documents` and `pack` do, or if the cache cannot be written.
    """
    parts = (
        fingerprint(data),
        tokenizer_digest(tokenizer_json_text),
        str(data.sequence_length),
        split,
        str(PACKING_VERSION),
    )
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    folder = Path(cache_dir) / f"{split}-{key}"
    with cached_at(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            blocks = _load(folder)
            if blocks is None:
                _store(folder, _pack_split(data, split, tokenizer_json_text))
                blocks = _load(folder)
    if blocks is None:
        raise DataError(f"the token cache {folder} does not keep what was written; check the disk")
    return blocks


def _pack_split(data: DataSettings, split: Split, tokenizer_json_text: str) -> TokenBlocks:
    documents = read_documents(data, split)
    try:
        return pack(documents, tokenizer_from_json(tokenizer_json_text), data.sequence_length)
    except DataError as error:
        raise DataError(f"{split} split: {error}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # Closing the file lets the lock go, also when the process dies.


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _store(folder: Path, blocks: TokenBlocks) -> None:
    arrays = {"tokens.npy": blocks.tokens, "domain_ids.npy": blocks.domain_ids}
    for name, array in arrays.items():
        replace_file(folder / name, partial(_save, array))
    index = {
        "domains": list(blocks.domains),
        "sequence_length": blocks.sequence_length,
        "sha256": {name: _digest(folder / name) for name in arrays},
    }
    # The index comes last: with it the cache is whole.
    save_json(index, folder / "index.json")


def _save(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as stream:
        # Not the stream itself: numpy would write to the file past it and not say what went wrong.
        np.save(SimpleNamespace(write=stream.write), array, allow_pickle=False)


def _load(folder: Path) -> TokenBlocks | None:
    """Return what the cache holds, None if it is missing or not what was written."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        # Cheap beside the fingerprint, which reads the several times larger text.
        if any(_digest(folder / name) != digest for name, digest in index["sha256"].items()):
            return None
        return TokenBlocks(
            tokens=np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False),
            domain_ids=np.load(folder / "domain_ids.npy", allow_pickle=False),
            domains=tuple(index["domains"]),
            sequence_length=int(index["sequence_length"]),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
