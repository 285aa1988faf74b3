"""Explicit layouts: what a file may say, and in which words the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fomoe_flwr import costs
from fomoe_flwr.config import LayoutSettings, SettingsError, load_settings
from fomoe_flwr.layout import Layout, LayoutContext, check_layout, draw_layout

LAYERS = [[[0, 1, 2], [2, 3]], [[0, 1], [1, 2, 3]]]


def settings_for(path: Path | str, num_workers: int = 2) -> LayoutSettings:
    return LayoutSettings(kind="explicit", num_workers=num_workers, path=str(path))


def drawn(path: Path, num_layers: int = 2, server_round: int = 1, **context: Any) -> Layout:
    return draw_layout(settings_for(path), num_layers, 4, 0, server_round, LayoutContext(**context))


@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.yml"])
def test_a_layout_is_what_the_file_says(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(LAYERS))
    layout = drawn(path)
    assert layout.to_json() == LAYERS
    assert layout.overlaps == (1, 2)


def test_what_to_json_wrote_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    layout = draw_layout(LayoutSettings(num_workers=2, overlap=1), 2, 4, 0, 1)
    path.write_text(json.dumps(layout.to_json()))
    assert drawn(path) == layout


def test_one_layer_stands_for_all_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("- - [2, 0, 1]\n  - [3, 2]\n")
    assert drawn(path, 3).residents == (((0, 1, 2), (2, 3)),) * 3


def test_the_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(LAYERS))
    first = drawn(path)
    path.unlink()
    assert drawn(path, server_round=2, previous=first) == first


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"1": LAYERS}, " must hold lists: [layer][worker] -> expert ids, or one layer for all"),
        ([], " must hold lists: [layer][worker] -> expert ids, or one layer for all"),
        (
            LAYERS * 2,
            " has 4 layers, model.num_layers=2 needs 2 (or 1 for all layers)",
        ),
        (
            [[[0, 1], [2], [3]]],
            ": layer 0 has 3 workers, layout.num_workers=2 needs 2",
        ),
        ([3], ": layer 0 has no list of workers, layout.num_workers=2 needs 2"),
        (
            [LAYERS[0], [[0, 1, 2], []]],
            ": worker 1 of layer 1 must be a list of at least one expert id",
        ),
        ([[[0, 1], "23"]], ": worker 1 of layer 0 must be a list of at least one expert id"),
        (
            [[[0, 1], [2, 4]]],
            ": worker 1 of layer 0 holds expert 4: it must be an integer from 0 to "
            "model.num_experts-1=3",
        ),
        (
            [[[0, 1], [2, True]]],
            ": worker 1 of layer 0 holds expert True: it must be an integer from 0 to "
            "model.num_experts-1=3",
        ),
        ([[[0, 1, 0], [2, 3]]], ": worker 0 of layer 0 holds expert 0 twice"),
        (
            [LAYERS[0], [[0, 1], [1, 3]]],
            ": expert 2 of layer 1 has no holder; every expert from 0 to model.num_experts-1=3 "
            "needs one",
        ),
    ],
)
def test_what_is_no_layout_is_refused_with_the_place(tmp_path: Path, data: Any, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SettingsError) as caught:
        check_layout(settings_for(path), 2, 4)
    assert str(caught.value) == f"layout.path={path}{text}"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("", "", "layout.kind=explicit needs layout.path: a .json or .yaml file, "),
        ("a.txt", "", "a.txt is not a .json, .yaml or .yml file"),
        ("a.json", None, "a.json cannot be read: No such file or directory"),
        ("a.json", "[", "a.json cannot be read: Expecting value"),
        ("a.yaml", "[", "a.yaml cannot be read: while parsing"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: str | None, text: str
) -> None:
    path = tmp_path / name
    if name and content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError) as caught:
        check_layout(settings_for(path if name else ""), 2, 4)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cost_model_reports_the_fewest_and_most_holders(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([[list(range(12)), [0, 1]]]))
    overrides = [
        "preset=tiny",
        "layout=explicit",
        f"layout.path={path}",
        "model.num_experts=12",
        "layout.num_workers=2",
    ]
    summary = costs.summary(load_settings(overrides))
    assert (summary["layout/overlap_min"], summary["layout/overlap_max"]) == (1, 2)
    with pytest.raises(SettingsError, match=r"full-replica method: layout.kind=explicit"):
        load_settings([*overrides, "experiment=diloco"])
