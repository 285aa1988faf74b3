"""Every row of the paper's tables by its name: complete, and with the paper's recipe."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hydra.core.config_store import ConfigStore

from fomoe_flwr import costs
from fomoe_flwr.cli.main import main
from fomoe_flwr.config import SettingsError, load_settings, paper_rows_known
from fomoe_flwr.config.paper_rows import ROWS, PaperRow

TABLES = {  # (method, kind) -> M -> overlaps, as tables 3 to 6 have them
    ("local-adamw", "fixed"): {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 8)},
    ("local-adamw", "random"): {2: (1,), 4: (1, 2), 8: (1, 2, 4)},
    ("diloco", "fixed"): {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 8)},
    ("diloco", "random"): {2: (1,), 4: (1, 2), 8: (1, 2, 4)},
}


def test_the_names_are_those_of_all_rows_in_both_routing_modes() -> None:
    expected = {
        f"{method}-{kind}-m{workers}-k{steps}-oe{overlap}{mode}"
        for (method, kind), table in TABLES.items()
        for workers, overlaps in table.items()
        for overlap in overlaps
        for steps in (32, 64, 128)
        for mode in ("", "-skip-token")
    }
    assert Counter(row.name for row in ROWS) == Counter(expected)
    assert len(ROWS) == 2 * 90
    with paper_rows_known(["paper=any"]):
        stored = {name.removesuffix(".yaml") for name in ConfigStore.instance().list("paper")}
    assert stored == expected
    assert "paper" not in ConfigStore.instance().repo


@pytest.mark.parametrize("row", ROWS[::19], ids=lambda row: row.name)
def test_a_row_has_the_paper_s_recipe(row: PaperRow) -> None:
    check_recipe(row)


@pytest.mark.slow
def test_every_row_has_the_paper_s_recipe() -> None:
    for row in ROWS:
        check_recipe(row)


def check_recipe(row: PaperRow) -> None:
    settings = load_settings([f"paper={row.name}"])
    model, layout, local, outer = settings.model, settings.layout, settings.local, settings.outer
    assert settings.preset == row.name
    counts = costs.parameter_counts(model)
    assert model.name == "paper-54m"
    assert counts.expert == 4 * 8 * 2 * 256 * 128 + (0 if row.skip_token else 4 * 8 * 256)
    assert model.routing == ("skip_token" if row.skip_token else "partitioned")
    # 640 steps of 2,097,152 tokens, 160 of them warm-up, constant afterwards.
    assert settings.rounds * local.steps == 640
    assert settings.rounds == {32: 20, 64: 10, 128: 5}[row.local_steps]
    sequences = local.batch_size * local.accumulate
    assert sequences * layout.num_workers == 1024
    assert settings.data.sequence_length == 2048
    assert 640 * sequences * layout.num_workers * 2048 == 1_342_177_280
    assert (local.schedule, local.warmup_steps, local.lr) == ("constant", 160, 0.01)
    assert (local.optimizer, local.beta1, local.beta2) == ("adamw", 0.9, 0.95)
    assert (local.eps, local.weight_decay, local.keep_inner_state) == (1e-8, 0.0, True)
    assert (settings.balance.loss, settings.balance.z_loss) == (0.0, 0.0)
    assert (layout.kind, layout.reshuffle_every) == (row.kind, 1)
    assert (layout.num_workers, layout.overlap) == (row.num_workers, row.overlap)
    if row.method == "diloco":
        assert (outer.name, outer.lr, outer.momentum) == ("nesterov", 0.7, 0.9)
    else:
        assert (outer.name, outer.lr, outer.momentum) == ("local_adamw", 1.0, 0.0)
    assert settings.data.dataset == "HuggingFaceTB/smollm-corpus"
    assert settings.data.tokenizer == "openai/gpt-oss-120b"
    predicted = costs.summary(settings)
    gain = 1 / (1 - counts.expert / counts.total * (1 - row.overlap / row.num_workers))
    assert predicted["ratio/full_replica"] == pytest.approx(gain)


def test_costs_take_a_row_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["costs", "paper=local-adamw-fixed-m8-k32-oe4", "--json"]) == 0
    small = json.loads(capsys.readouterr().out)
    words = ["costs", "paper=local-adamw-fixed-m8-k32-oe4", "model=paper-2b", "--json"]
    assert main(words) == 0
    large = json.loads(capsys.readouterr().out)
    assert small["ratio/full_replica"] < 1.03 < 1.4 < large["ratio/full_replica"]


def test_the_command_line_wins_over_a_row_and_the_recipe_is_one_of_them() -> None:
    row = load_settings(["paper=diloco-random-m4-k64-oe2", "local.lr=0.02", "layout=rolling"])
    assert (row.local.lr, row.layout.kind, row.local.steps) == (0.02, "rolling", 64)
    recipe = load_settings(["paper=recipe"]).to_dict()
    named = load_settings(["paper=local-adamw-fixed-m8-k32-oe4"]).to_dict()
    assert {**recipe, "preset": ""} == {**named, "preset": ""}


def test_an_unknown_row_is_refused_with_a_near_one() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(["paper=diloco-random-m4-k64-oe8"])
    text = str(caught.value)
    assert "(181 in all); did you mean diloco-random-m4-k64-oe" in text
    assert len(text) < 1200
