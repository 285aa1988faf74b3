"""A submission that is repeated: the same run goes on, another one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Start

from fomoe_flwr.cli.main import main
from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.federation.deployment import submission
from fomoe_flwr.federation.deployment.submission import SuperLink, run_once
from fomoe_flwr.run.rerun import words_to_go_on


@pytest.fixture
def given(words: list[str], tmp_path: Path) -> list[str]:
    return [*words[1:], f"output_dir={tmp_path / 'run'}", "rounds=2", "engine=flower"]


@pytest.fixture
def settings(start: Start, given: list[str]) -> Settings:
    """Settings of a run that is there; `engine` may change."""
    start("run", "rounds=2")
    return load_settings(given)


GOES_ON = {
    "same": ([], []),
    "more rounds": (["rounds=5"], ["rounds=5"]),
    "text of another place": (["data.path='/a, b'"], ["data.path='/a, b'"]),
    "a shorter grace": (["federation.grace_seconds=7"], ["federation.grace_seconds=7.0"]),
}
"""What is asked for besides, and what is passed on of it."""


@pytest.mark.parametrize("name", GOES_ON)
def test_the_same_run_goes_on_with_what_may_change(
    name: str, settings: Settings, given: list[str]
) -> None:
    changes, wanted = GOES_ON[name]
    asked = load_settings([*given, *changes])
    again = words_to_go_on(asked)
    path = f"'{settings.output_dir}'"
    # The stored run was trained in process.
    assert again == [f"resume={path}", *sorted([*wanted, "engine='flower'"], key=_place)]
    resumed = load_settings(again)
    resumed.resume = ""
    assert resumed == asked


def _place(word: str) -> int:
    order = [item.partition("=")[0] for item in ("engine", "rounds", "data.path", "federation")]
    return next(i for i, key in enumerate(order) if word.startswith(key))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["seed=9"], "seed=9 (there 0)"),
        (["local.lr=0.5", "outer.lr=0.7"], "local.lr=0.5 (there "),
        (["model.routing=partitioned"], "model.routing=partitioned (there skip_token)"),
    ],
)
def test_another_run_is_refused_with_every_difference(
    changes: list[str],
    told: str,
    settings: Settings,
    given: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word for word in given if not word.startswith("engine=")]
    assert main(["federation", "submit", "/nowhere", *words, *changes]) == 2
    error = capsys.readouterr().err
    assert f"output_dir={settings.output_dir} holds a run with other settings: " in error
    assert told in error
    for change in changes:
        assert change in error


def test_nothing_goes_on_where_nothing_is(given: list[str], tmp_path: Path) -> None:
    assert words_to_go_on(load_settings(given)) == []


def test_a_submission_goes_on_and_leaves_a_completed_run_alone(
    settings: Settings,
    given: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[list[str]] = []

    def run_once(link: SuperLink, settings: Settings, words: list[str], say: object) -> bool:
        seen.append(words)
        return True

    monkeypatch.setattr(submission, "run_once", run_once)
    words = ["federation", "submit", "/nowhere", *(w for w in given if "engine" not in w)]
    assert main(words) == 0
    assert seen == []
    assert f"{settings.output_dir} is completed: nothing to do" in capsys.readouterr().out
    assert main([*words, "rounds=3"]) == 0
    (again,) = seen
    assert again[0] == f"resume='{settings.output_dir}'"
    assert "rounds=3" in again


def test_runs_that_are_submitted_side_by_side_share_no_file(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[Path, str] = {}

    def submit(link: SuperLink, run_config: Path) -> str:
        seen[run_config] = run_config.read_text(encoding="utf-8")
        if len(seen) == 1:
            # A second one while the first is being submitted.
            run_once(link, second, [*given, "seed=2"], lambda text: None)
            assert run_config.read_text(encoding="utf-8") == seen[run_config]
        return "1"

    monkeypatch.setattr(SuperLink, "submit", submit)
    monkeypatch.setattr(SuperLink, "follow", lambda link, run_id: "finished:completed")
    first, second = (load_settings([*given, f"seed={seed}"]) for seed in (1, 2))
    link = SuperLink(tmp_path / "flower", "fomoe", tmp_path)
    assert run_once(link, first, [*given, "seed=1"], lambda text: None)
    assert len(seen) == 2
    assert [f"seed={n}" in text for n, text in enumerate(seen.values(), 1)] == [True, True]
    assert not any(path.exists() for path in seen)
    assert not (tmp_path / "run_config.toml").exists()
