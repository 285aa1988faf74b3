"""The tokenizer: train one, load one, send one to a worker as JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fomoe_flwr.data import DataError, first_line

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
SMALLEST_VOCAB = 256 + 2  # every byte and both special tokens

# Looked for, in this order, where a bare tokenizer.json does not say which token ends a text.
USUAL_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    `<|endoftext|>` is id 0 and `<|pad|>` id 1. Little text gives fewer than `vocab_size` tokens.
    Raises DataError if `vocab_size` cannot hold every byte.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(
            f"model.vocab_size={vocab_size} is too small for a byte-level tokenizer; "
            f"set model.vocab_size to at least {SMALLEST_VOCAB}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, {"eos_token": END_OF_TEXT, "pad_token": PADDING})


def load_tokenizer(path: str | Path, key: str = "data.tokenizer") -> PreTrainedTokenizerFast:
    """Load a Hugging Face tokenizer folder or a single tokenizer.json, never from the hub.

    Raises DataError, which names the setting `key`.
    """
    path = Path(path).expanduser()
    try:
        if path.is_file():
            return _parse(path.read_text(encoding="utf-8"))
        if not path.is_dir():
            raise FileNotFoundError("no such file or folder")
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizers raises no narrower class for a bad file
        raise DataError(
            f"{key}={str(path)!r} has no tokenizer that can be loaded ({first_line(error)}); set "
            "data.tokenizer to a tokenizer.json or a folder that holds one, or leave it empty"
        ) from None
    if len(tokenizer.get_vocab()) < len(tokenizer.all_special_ids) + 2:
        # transformers makes an empty one up for some families when the folder holds a config alone.
        raise DataError(
            f"{key}={str(path)!r} holds no tokenizer; set data.tokenizer to a "
            "folder with a tokenizer.json"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"{key}={str(path)!r} is a slow tokenizer ({type(tokenizer).__name__}); "
            "set data.tokenizer to a folder with a tokenizer.json"
        )
    if tokenizer.eos_token is None:
        tokenizer.eos_token = _usual_end(tokenizer.get_vocab())
    return tokenizer


def tokenizer_json(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the tokenizer as JSON text: its model and the roles of its special tokens."""
    special = tokenizer.special_tokens_map
    roles = {name: token for name, token in special.items() if isinstance(token, str)}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls with padding or truncation leave these set; they are no part of what it is.
    backend["truncation"] = backend["padding"] = None
    return json.dumps({"special_tokens": roles, "tokenizer": backend}, ensure_ascii=False)


def tokenizer_from_json(text: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer from `tokenizer_json` or from the text of a plain tokenizer.json."""
    try:
        return _parse(text)
    except Exception as error:  # tokenizers raises no narrower class for bad text
        raise DataError(
            f"the tokenizer JSON cannot be read ({first_line(error)}); set data.tokenizer"
        ) from None


def tokenizer_digest(text: str) -> str:
    """Return the sha256 hex digest of `tokenizer_json`'s text."""
    return hashlib.sha256(text.encode()).hexdigest()


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> np.ndarray:
    """Return how many UTF-8 bytes each id stands for: int32 [vocab_size], 0 for special ids.

    Exact for byte-level BPE. For other tokenizers it is the length of what the token adds to the
    decoded text, which can differ by a blank at the start of a text.
    Raises DataError if the tokenizer has ids that `vocab_size` cannot hold.
    """
    vocab = tokenizer.get_vocab()
    needed = max(vocab.values()) + 1
    if needed > vocab_size:
        raise DataError(
            f"the tokenizer has {needed} tokens but model.vocab_size={vocab_size}; "
            f"set model.vocab_size to at least {needed} or change data.tokenizer"
        )
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    byte_level = _is_byte_level(tokenizer)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    lengths = np.zeros(vocab_size, dtype=np.int32)
    anchor = next((i for i in sorted(vocab.values()) if _decode(tokenizer, i).isalpha()), None)
    for token, token_id in vocab.items():
        if token_id in special:
            continue
        if token_id in added:
            lengths[token_id] = len(token.encode())
        elif byte_level:
            # One letter of the ByteLevel alphabet stands for one byte.
            lengths[token_id] = sum(1 if c in alphabet else len(c.encode()) for c in token)
        elif BYTE_TOKEN.fullmatch(token):
            lengths[token_id] = 1
        else:
            lengths[token_id] = _added_bytes(tokenizer, anchor, token_id)
    return lengths


def _parse(text: str) -> PreTrainedTokenizerFast:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("a JSON object is needed")
    if "special_tokens" in content and "tokenizer" in content:
        backend = Tokenizer.from_str(json.dumps(content["tokenizer"]))
        return _wrap(backend, dict(content["special_tokens"]))
    backend = Tokenizer.from_str(text)
    end = _usual_end(backend.get_vocab())
    return _wrap(backend, {"eos_token": end} if end else {})


def _usual_end(vocab: Container[str]) -> str | None:
    return next((token for token in USUAL_END_TOKENS if token in vocab), None)


def _wrap(tokenizer: Tokenizer, roles: dict[str, str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles
    )


def _is_byte_level(tokenizer: PreTrainedTokenizerFast) -> bool:
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _added_bytes(tokenizer: PreTrainedTokenizerFast, anchor: int | None, token_id: int) -> int:
    # After an anchor, for many decoders drop the blank before the first word of a text.
    if anchor is None:
        return len(_decode(tokenizer, token_id).encode())
    both = _decode(tokenizer, anchor, token_id)
    return max(0, len(both.encode()) - len(_decode(tokenizer, anchor).encode()))


def _decode(tokenizer: PreTrainedTokenizerFast, *token_ids: int) -> str:
    return str(tokenizer.decode(list(token_ids)))
