"""Composition: what `conf/` and overrides give, what is refused and in which words."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import choices, refusal

from fomoe_flwr.config import (
    Settings,
    SettingsError,
    load_settings,
    settings_from_dict,
)
from fomoe_flwr.layout import check_layout


@pytest.mark.parametrize("preset", choices("preset"))
@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_preset_goes_with_every_experiment(preset: str, experiment: str) -> None:
    settings = load_settings([f"preset={preset}", f"experiment={experiment}"])
    assert (settings.preset, settings.experiment) == (preset, experiment)
    check_layout(settings.layout, settings.model.num_layers, settings.model.num_experts)
    if experiment in ("diloco", "photon"):
        assert settings.layout.overlap == settings.layout.num_workers
    if experiment == "centralised":
        assert settings.layout.num_workers == 1
    assert settings_from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize("model", choices("model"))
def test_every_model_composes_under_its_own_name(model: str) -> None:
    assert load_settings([f"model={model}"]).model.name == model


def test_the_promised_experiments_are_there() -> None:
    assert {"centralised", "diloco", "photon", "fomoe"} <= set(choices("experiment"))


def test_what_is_on_the_command_line_wins_over_preset_and_experiment() -> None:
    settings = load_settings(
        ["preset=tiny", "experiment=diloco", "outer=average", "local.steps=7", "rounds=3"]
    )
    assert (settings.outer.name, settings.local.steps, settings.rounds) == ("average", 7, 3)


def test_a_full_replica_experiment_follows_the_number_of_workers() -> None:
    settings = load_settings(["preset=tiny", "experiment=photon", "layout.num_workers=6"])
    assert settings.layout.overlap == 6


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("layout.overlp=2", "layout.overlp is not a setting; did you mean layout.overlap?"),
        ("layuot.overlap=2", "layuot.overlap is not a setting; did you mean layout.overlap?"),
        ("Outer.LR=2", "Outer.LR is not a setting; did you mean outer.lr?"),
        ("ROUNDS=2", "ROUNDS is not a setting; did you mean rounds?"),
        ("roundz=2", "roundz is not a setting; did you mean rounds?"),
        ("zzz=2", "zzz is not a setting; see conf/ for all settings"),
        ("zzz.qqq=2", "zzz.qqq is not a setting; see conf/ for all settings"),
        ("+extra=1", "+extra=1: no setting can be added, only set: type extra=1"),
        ("++extra=1", "extra is not a setting; see conf/ for all settings"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(override: str, text: str) -> None:
    assert refusal(override) == text


@pytest.mark.parametrize("group", ["layout", "local", "checkpoint"])
def test_an_unknown_key_like_no_other_is_answered_with_its_neighbours(group: str) -> None:
    names = [each.name for each in fields(getattr(load_settings(), group))]
    text = refusal(f"{group}.qqqqqqqqqqqq=1")
    assert text.startswith(f"{group}.qqqqqqqqqqqq is not a setting; {group} has {names[0]}, ")
    assert all(name in text for name in names[:20])
    assert (f"... ({len(names)} in all)" in text) == (len(names) > 20)


def test_a_key_that_is_added_inside_a_group_is_refused() -> None:
    assert refusal("++layout.extra=1").startswith("layout.extra is not a setting")


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("rounds=abc", "a whole number"),
        ("rounds=1.5", "a whole number"),
        ("rounds=null", "a whole number"),
        ("local.lr=fast", "a number"),
        ("local.threads=true", "a whole number"),
        ("local.keep_inner_state=maybe", "true or false"),
        ("outer.lr=[1]", "a number"),
        ("local.batch_size={a:1}", "a whole number"),
        ("layout.overlap=null", "a whole number"),
        ("output_dir=[a]", "text"),
        ("federation=3", "a group of settings: set one of them"),
    ],
)
def test_a_wrong_type_is_refused_with_the_value_and_the_kind(override: str, kind: str) -> None:
    assert refusal(override) == f"{override} is of the wrong kind: it must be {kind}"


@pytest.mark.parametrize("key", ["resume", "output_dir", "data.path", "layout.path"])
def test_a_path_that_is_empty_or_has_an_unknown_home_is_refused(key: str) -> None:
    assert refusal(f"{key}=") == f"{key}= is empty: give a path, or leave {key} out"
    assert refusal(f"{key}='~nobody-has-it/x'") == (
        f"{key}=~nobody-has-it/x: ~ stands for no folder that is known: write it out"
    )


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("rounds=0", "rounds=0 is out of range: it must be >= 1"),
        ("seed=-1", "seed=-1 is out of range: it must be >= 0 and < 2147483648"),
        ("seed=2147483648", "seed=2147483648 is out of range: it must be >= 0 and < 2147483648"),
        ("local.lr=0", "local.lr=0.0 is out of range: it must be > 0"),
        ("local.lr=nan", "local.lr=nan is out of range: it must be > 0"),
        ("local.lr=inf", "local.lr=inf is out of range: it must be finite and > 0"),
        ("local.beta1=1", "local.beta1=1.0 is out of range: it must be >= 0 and < 1"),
        ("local.beta1=nan", "local.beta1=nan is out of range: it must be >= 0 and < 1"),
        (
            "local.min_lr_ratio=2",
            "local.min_lr_ratio=2.0 is out of range: it must be >= 0 and <= 1",
        ),
        (
            "data.holdout_fraction=0.5",
            "data.holdout_fraction=0.5 is out of range: it must be > 0 and < 0.5",
        ),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(override: str, text: str) -> None:
    assert refusal(override) == text


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_no_learning_rate_passes_that_is_not_finite_and_positive(value: float) -> None:
    settings = Settings().to_dict()
    settings["outer"]["lr"] = value
    if 0 < value < float("inf"):
        assert settings_from_dict(settings).outer.lr == value
    else:
        with pytest.raises(
            SettingsError, match=r"^outer\.lr=.* is out of range: it must be .*> 0$"
        ):
            settings_from_dict(settings)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.routing=skip", "model.routing=skip is not one of skip_token, partitioned"),
        ("engine=flwr", "engine=flwr is not one of in_process, flower; did you mean flower?"),
        ("data.partition=domain", "data.partition=domain is not one of iid, by_domain"),
        ("wire.up=float64", "wire.up=float64 is not one of float32, bfloat16, float16"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_choices(override: str, text: str) -> None:
    assert refusal(override).startswith(text)


@pytest.mark.parametrize("group", ["preset", "experiment", "model", "outer", "layout"])
def test_an_unknown_group_choice_is_refused_with_the_choices(group: str) -> None:
    assert refusal(f"{group}=nothing").startswith(
        f"{group}=nothing is not one of {', '.join(choices(group))}"
    )


def test_a_group_choice_almost_right_gets_a_suggestion() -> None:
    assert refusal("outer=nestrov").endswith("; did you mean nesterov?")


@pytest.mark.parametrize(
    "override", ["rounds", "=3", "local=5", "outer=null", "rounds=1,2", "layout.overlap=[", "~"]
)
def test_what_hydra_cannot_read_is_one_line_too(override: str) -> None:
    assert refusal(override)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["layout.overlap=9"], ["layout.overlap=9", "layout.num_workers >= 9", "got 4"]),
        (
            ["experiment=diloco", "layout.overlap=1"],
            ["experiment=diloco", "layout.overlap=1", "layout.num_workers=4", "experiment=fomoe"],
        ),
        (
            ["experiment=centralised", "layout.num_workers=3"],
            ["experiment=centralised", "layout.num_workers=3", "must be 1"],
        ),
        (["model.top_k=99"], ["model.top_k=99", "model.num_experts >= 99", "got 16"]),
        (["model.num_heads=3"], ["model.hidden_size=256", "model.num_heads", "= 6"]),
        (["model.num_kv_heads=3"], ["model.num_kv_heads=3", "model.num_heads=4"]),
        (
            ["model=mixtral-tiny", "model.norm_topk=false"],
            ["model.norm_topk=False", "must be true", "model.family=mixtral"],
        ),
        (
            ["model=deepseek-v3-tiny", "model.num_kv_heads=1"],
            ["model.num_kv_heads=1", "model.num_heads=2", "deepseek_v3"],
        ),
        (
            ["model=fomoe-tiny", "model.num_kv_heads=1"],
            ["model.num_kv_heads=1", "model.num_heads=2", "fomoe"],
        ),
        (
            ["model.num_shared_experts=1"],
            ["model.num_shared_experts=1", "must be 0", "olmoe", "deepseek_v3, glm4_moe"],
        ),
        (
            [
                "model=glm4-moe-tiny",
                "model.routing=partitioned",
                "layout.num_workers=12",
                "layout.overlap=1",
            ],
            ["model.routing=partitioned", "glm4_moe", "two residents", ">= 2 (got 1)"],
        ),
        (
            ["model=glm4-moe-tiny", "model.num_experts=1", "model.top_k=1"],
            ["model.num_experts=1", ">= 2", "glm4_moe"],
        ),
        (["model.head_size=32"], ["model.head_size=32", "must be 0", "olmoe"]),
        (["model=qwen3-moe-tiny", "model.head_size=7"], ["model.head_size=7", "even"]),
        (
            ["data.path=/x", "data.dataset=some/set"],
            ["data.path=/x", "data.dataset=some/set", "contradict", "parquet|json|text"],
        ),
        (
            ["federation.min_workers=9"],
            ["federation.min_workers=9", "layout.num_workers >= 9", "got 4"],
        ),
    ],
)
def test_values_that_contradict_each_other_are_named_together(
    overrides: list[str], named: list[str]
) -> None:
    text = refusal(*overrides)
    assert [word for word in named if word not in text] == []


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["layout.num_workers=5"],
            ["model.num_experts=16", "layout.overlap=2", "layout.num_workers=5", "allow_uneven"],
        ),
        (
            ["layout.num_workers=40", "layout.overlap=1"],
            ["leave some workers without an expert", "layout.num_workers <= 16"],
        ),
    ],
)
def test_a_layout_that_cannot_be_drawn_is_refused_with_values_that_work(
    overrides: list[str], named: list[str]
) -> None:
    settings = load_settings(overrides)
    with pytest.raises(SettingsError) as caught:
        check_layout(settings.layout, settings.model.num_layers, settings.model.num_experts)
    assert [word for word in named if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["execution.cuda_graph=on"],
            "execution.cuda_graph=on needs local.precision=bfloat16 or bfloat16_parameters "
            "(got float32): in fp32 PyTorch's grouped products wait for the device",
        ),
        (
            ["execution.cuda_graph=on", "local.precision=bfloat16", "execution.experts=fused"],
            "execution.cuda_graph=on needs execution.experts=static or auto (got fused): the "
            "other cores wait for the device",
        ),
        (
            ["execution.loss=half"],
            "execution.loss=half is not one of auto, whole, chunked",
        ),
    ],
)
def test_executions_that_cannot_be(words: list[str], expected: str) -> None:
    assert refusal("preset=tiny", *words).startswith(expected)


@pytest.mark.parametrize(
    ("given", "meant"), [("true", "on"), ("True", "on"), ("false", "off"), ("auto", "auto")]
)
def test_a_graph_may_be_asked_for_in_the_words_of_earlier_versions(given: str, meant: str) -> None:
    words = ["preset=tiny", "local.precision=bfloat16", f"execution.cuda_graph={given}"]
    assert load_settings(words).execution.cuda_graph == meant


def test_a_stored_switch_is_read_as_a_word() -> None:
    fields = load_settings(["preset=tiny"]).to_dict()
    fields["execution"]["cuda_graph"] = False
    assert settings_from_dict(fields).execution.cuda_graph == "off"


@pytest.mark.parametrize(
    ("field", "value", "precision", "step"),
    [
        ("expert_size", 5, "float32", 4),
        ("expert_size", 6, "float32", 4),
        ("expert_size", 12, "bfloat16", 8),
        ("expert_size", 12, "bfloat16_parameters", 8),
        ("hidden_size", 36, "bfloat16", 8),
    ],
)
def test_rows_that_products_of_groups_do_not_take_are_refused(
    field: str, value: int, precision: str, step: int
) -> None:
    heads = (
        "model.num_heads=2",
        "model.num_kv_heads=2",
        "model.head_size=16",
        "model=mixtral-tiny",
    )
    said = refusal("preset=tiny", *heads, f"model.{field}={value}", f"local.precision={precision}")
    assert said == (
        f"model.{field}={value} must be a multiple of {step} for local.precision={precision}: "
        f"change model.{field}"
    )
