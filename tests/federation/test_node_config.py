"""What a node says of itself: its data, its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fomoe_flwr.config import SettingsError, load_settings
from fomoe_flwr.federation import client
from fomoe_flwr.federation.client import _node_data, _with_node_overrides
from fomoe_flwr.worker import cache as worker_cache


def context(**words: Any) -> Context:
    named = {key.replace("_", "-"): value for key, value in words.items()}
    return Context(run_id=1, node_id=2, node_config=named, state=RecordDict(), run_config={})


def own(words: Context) -> Any:
    fields = load_settings(["preset=tiny", "data.path=/server/text", "local.device=cpu"]).to_dict()
    return worker_cache.WorkerCache().settings(_with_node_overrides(fields, words))


def test_a_node_that_says_nothing_takes_its_part_of_the_runs_data() -> None:
    settings = own(context(partition_id=1))
    assert (settings.data.path, settings.local.device) == ("/server/text", "cpu")
    data = _node_data(settings, 1, "{}", context(partition_id=1))
    assert (data.part, data.num_parts) == (1, 2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"data_path": "/own"}, ("/own", "", "")),
        ({"dataset": "hub/name", "dataset_config": "en"}, ("", "hub/name", "en")),
        ({"data_path": "/own", "dataset": "parquet"}, ("/own", "parquet", "")),
    ],
)
def test_own_data_takes_the_place_of_the_runs_and_is_not_shared_out(
    words: dict[str, str], expected: tuple[str, str, str]
) -> None:
    settings = own(context(**words))
    data = settings.data
    assert (data.path, data.dataset, data.dataset_config) == expected
    opened = _node_data(settings, 1, "{}", context(**words))
    assert (opened.data, opened.part, opened.num_parts) == (data, 0, 1)


def test_the_nodes_device_wins_and_a_wrong_one_is_refused() -> None:
    assert own(context(device="cuda")).local.device == "cuda"
    with pytest.raises(SettingsError, match=r"local\.device=tpu is not one of"):
        own(context(device="tpu"))


def test_data_never_leaves_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_text: Path
) -> None:
    """An answer to a query has numbers in it, not text."""
    from fomoe_flwr.data.source import prepare_tokenizer
    from fomoe_flwr.data.tokenizer import tokenizer_json
    from fomoe_flwr.federation import wire
    from fomoe_flwr.model.families import transformers_config
    from fomoe_flwr.model.state import StateSpec

    secret = tmp_path / "secret.txt"
    lines = [f"nobody may read line {number}. " * 40 for number in range(200)]
    secret.write_text("\n\n".join(lines), encoding="utf-8")
    settings = load_settings(["preset=tiny", f"data.path={small_text}"])
    config = transformers_config(settings.model, settings.data.sequence_length)
    setup = {
        "version": client.__version__,
        "settings": settings.to_dict(),
        "tokenizer": tokenizer_json(prepare_tokenizer(settings)),
        "spec_digest": StateSpec.of(settings.model, config).digest(),
    }
    content = RecordDict({wire.SETUP: wire.json_record(setup)})
    answer = client.answer_query(content, context(partition_id=0, data_path=str(secret)))
    assert wire.json_in(answer, wire.SETUP) == {"worker": 0}
