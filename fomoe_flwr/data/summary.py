"""The summary: how much text a run reads, split by split, and what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data import DataError
from fomoe_flwr.data.cache import cache_dir
from fomoe_flwr.data.corpus import read_splits
from fomoe_flwr.data.holdout import SPLITS, Split
from fomoe_flwr.data.stream import LOCAL_BUILDERS, files_to_stream
from fomoe_flwr.data.text_files import survey_files, told_left_out
from fomoe_flwr.data.tokens import cached_blocks


@dataclass(frozen=True)
class SplitSize:
    """What there is of a split; it has no tokens if it is shorter than a window."""

    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class TextSummary:
    """What a run reads."""

    files: int
    """Files of the user's; of the embedded corpus and of a data set on the hub there are none."""
    splits: dict[Split, SplitSize]
    """Empty for a stream, which nobody has read yet."""
    left_out: str
    """Files that are not read, with the reasons; may be empty."""
    topped_up: tuple[Split, ...]
    """Splits for which there was so little text that a document had to be chosen by rank."""


def summarise_text(data: DataSettings, tokenizer_json: str) -> TextSummary:
    """Count what the settings stand for. Raises DataError."""
    survey = survey_files(data.path) if data.path else None
    left_out = told_left_out(survey.left_out).removeprefix("; left out: ") if survey else ""
    if data.dataset:
        files = len(files_to_stream(data)) if data.dataset in LOCAL_BUILDERS else 0
        return TextSummary(files, {}, left_out, ())
    parts, topped_up = read_splits(data)
    splits = {
        split: SplitSize(
            len(parts[split]),
            sum(len(document.text.encode()) for document in parts[split]),
            _tokens(data, split, tokenizer_json),
        )
        for split in SPLITS
    }
    return TextSummary(len(survey.files) if survey else 0, splits, left_out, topped_up)


def _tokens(data: DataSettings, split: Split, tokenizer_json: str) -> int:
    try:
        return len(cached_blocks(data, split, tokenizer_json, cache_dir() / "tokens").tokens)
    except DataError:
        return 0  # Who needs the split says why it cannot be used.
