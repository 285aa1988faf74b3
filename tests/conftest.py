"""Shared by all tests: one thread, a small text, and nothing in the user's cache."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: tiny tensors gain nothing from threads that fight over a few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test needs a hub. Without one, libraries ask again and again before they give up.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import hypothesis
import pytest
from hydra.core.override_parser.types import Override

from fomoe_flwr.config import DataSettings, ModelSettings, Settings, compose

if TYPE_CHECKING:
    from fomoe_flwr.run.directory import RunDirectory


# A machine with other work must not fail a test by its time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


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


@pytest.fixture(scope="session", autouse=True)
def _compose_once() -> Iterator[None]:
    """Compose each list of overrides once: Hydra takes 0.1 s for the same result."""
    plain, known = compose._composed, dict[tuple[str, ...], Settings]()

    def once(overrides: Sequence[Override]) -> Settings:
        words = tuple(str(override.input_line) for override in overrides)
        if words not in known:
            known[words] = plain(overrides)
        return deepcopy(known[words])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "_composed", once)
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


@pytest.fixture
def words(small_text: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the command of a small run, without what takes longer than it."""
    from fomoe_flwr import files
    from fomoe_flwr.report import live

    monkeypatch.setattr(live, "draw_beside", lambda run: None)
    # No power cut is expected here.
    monkeypatch.setattr(files, "_flush", lambda path: None)
    return [
        "run",
        "preset=tiny",
        f"data.path={small_text}",
        "local.threads=1",
        "local.steps=2",
        "local.batch_size=2",
        "eval.max_tokens=512",
        "eval.sample_tokens=4",
    ]


@pytest.fixture
def start(words: list[str], tmp_path: Path) -> Callable[..., RunDirectory]:
    """Return a function that does a whole run under `tmp_path`."""
    from fomoe_flwr.cli.main import main
    from fomoe_flwr.run.directory import RunDirectory

    def run(name: str, *overrides: str) -> RunDirectory:
        assert main([*words, f"output_dir={tmp_path / name}", *overrides]) == 0
        return RunDirectory(tmp_path / name)

    return run


def pytest_collection_finish() -> None:
    """Keep the garbage collector off what imports made: going through it is a tenth of all time."""
    gc.collect()
    gc.freeze()
