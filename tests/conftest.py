"""Shared by all tests: one thread, a small text, and nothing in the user's cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

# Before torch is imported: tiny tensors gain nothing from threads that fight over a few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from fomoe_flwr.config import DataSettings, ModelSettings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden",
        action="store_true",
        help="write tests/golden/ anew instead of comparing with it",
    )


@pytest.fixture(scope="session", autouse=True)
def _absl_on_the_real_stderr() -> None:
    """Keep absl, which TensorBoard brings, from closing what pytest captures.

    Its handler takes the stderr of its first import, and closes it when logging is configured anew
    (Hydra does that) unless it is the process's own.
    """
    from absl import logging

    logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the whole session, subprocesses included, one cache folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text file of 80,000 characters, tokenised in no time."""
    from fomoe_flwr.data.corpus import read_documents

    path = tmp_path_factory.mktemp("text") / "some.txt"
    text = "\n\n".join(document.text for document in read_documents(DataSettings(), "validation"))
    path.write_text(text[:80_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def of_family() -> Callable[[ModelSettings, str], ModelSettings]:
    """Return a function that gives a shape the nearest form that a family can express."""

    def adapt(shape: ModelSettings, family: str) -> ModelSettings:
        return replace(
            shape,
            family=family,
            norm_topk=shape.norm_topk or family == "mixtral",
            num_kv_heads=(
                shape.num_heads if family in ("deepseek_v3", "fomoe") else shape.num_kv_heads
            ),
            num_shared_experts=int(family == "deepseek_v3"),
            # Twice as wide and as deep as its proxy, so that every multiplier differs from 1.
            base_hidden_size=shape.hidden_size // 2,
            base_num_layers=max(1, shape.num_layers // 2),
        )

    return adapt
