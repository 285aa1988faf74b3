"""Shared by the data tests: the embedded text, and a small tokenizer of it."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from transformers import PreTrainedTokenizerFast

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data.corpus import Document, read_documents
from fomoe_flwr.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def embedded_train() -> list[Document]:
    return read_documents(DataSettings(), "train")


@pytest.fixture(scope="session")
def tokenizer(embedded_train: list[Document]) -> PreTrainedTokenizerFast:
    return train_tokenizer([d.text for d in embedded_train[::20]], 600)
