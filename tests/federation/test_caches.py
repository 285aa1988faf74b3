"""Whatever the project caches is made anew when it was damaged: same files, same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.data.source import evaluation_blocks, prepare_tokenizer
from fomoe_flwr.data.tokenizer import tokenizer_json
from fomoe_flwr.federation import client, wire
from fomoe_flwr.files import save_text
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.state import StateSpec
from fomoe_flwr.worker.cache import CACHE


def _other(whole: bytes) -> bytes:
    return whole[:-9] + bytes(255 - byte for byte in whole[-9:])


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda whole: None,
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "other bytes": _other,
    "of something else": lambda whole: b'{"version": 1}\n',
}
CACHED = (
    "tokenizers/trained.json",
    "tokenizers/trained.sha256",
    "tokenizers/of-the-run.json",
    *(f"tokens/{split}/{name}" for split in ("train", "validation") for name in ("tokens.npy",)),
    *(f"tokens/{split}/domain_ids.npy" for split in ("train", "validation")),
    *(f"tokens/{split}/index.json" for split in ("train", "validation")),
)


def _use(settings: Settings) -> None:
    """Do what a server and a node do with caches before the first round."""
    CACHE.clear()
    text = tokenizer_json(prepare_tokenizer(settings))
    evaluation_blocks(settings, text)
    config = transformers_config(settings.model, settings.data.sequence_length)
    setup = {
        "version": client.__version__,
        "settings": settings.to_dict(),
        "tokenizer": text,
        "spec_digest": StateSpec.of(settings.model, config).digest(),
    }
    content = RecordDict({wire.SETUP: wire.json_record(setup)})
    node = Context(1, 2, {"partition-id": 0}, RecordDict(), {})
    client.answer_query(content, node)


def _files(folder: Path) -> dict[str, Path]:
    """Return what a cache holds by names without digests."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "lock":
            if path.parent.name == "tokenizers":
                role = "of-the-run" if len(path.stem) == 64 else "trained"
                found[f"tokenizers/{role}{path.suffix}"] = path
            else:
                found[f"tokens/{path.parent.name.partition('-')[0]}/{path.name}"] = path
    return found


@pytest.fixture
def settings(small_text: Path) -> Settings:
    return load_settings(["preset=tiny", f"data.path={small_text}"])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _use(settings)
    return tmp_path


def test_the_table_has_every_cached_file(cache: Path) -> None:
    assert _files(cache).keys() == {*CACHED}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", CACHED)
def test_a_damaged_cache_is_made_anew(
    name: str, damage: Callable[[bytes], bytes | None], cache: Path, settings: Settings
) -> None:
    before = {path: path.read_bytes() for path in _files(cache).values()}
    path = _files(cache)[name]
    left = damage(before[path])
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    _use(settings)
    assert {path: path.read_bytes() for path in _files(cache).values()} == before


def test_a_node_never_trains_with_a_damaged_tokenizer(cache: Path) -> None:
    path = _files(cache)["tokenizers/of-the-run.json"]
    save_text(path.read_text(encoding="utf-8").replace("a", "b"), path)
    with pytest.raises(wire.WireError, match="it must be queried"):
        client._tokenizer_text(path.stem)
