"""Words that are no overrides: the error says what to type, and what it says to type works."""

from __future__ import annotations

import shlex

import pytest

from fomoe_flwr.cli.main import main
from fomoe_flwr.config import SettingsError, load_settings, parse_overrides, quoted
from fomoe_flwr.errors import InputError
from fomoe_flwr.sweep.plan import plan_sweep


def refusal(*words: str) -> str:
    with pytest.raises(InputError) as caught:
        load_settings(words)
    text = str(caught.value)
    assert "\n" not in text
    for foreign in ("Exception", "EOF", "mismatched", "multirun", "Hydra's grammar"):
        assert foreign not in text
    return text


PATHS = (
    *("/tmp/é", "/tmp/日本", "~", "~/texts", "/tmp/it's", "/tmp/a,b", "/tmp/a=b", "/tmp/[a]"),
    *(
        "/tmp/{a}",
        "/tmp/(a)",
        "/tmp/a#b",
        "/tmp/a;b",
        "/tmp/a&b",
        "/tmp/a!b",
        "a<b",
        "Hello, world",
    ),
    *('it\'s "both"', "back\\slash#", "end#\\", "#\\'", "'open", '"open', "[", "two words, é"),
)


@pytest.mark.parametrize("value", PATHS)
def test_a_value_that_needs_quotes_is_refused_with_the_text_to_type(value: str) -> None:
    text = refusal(f"eval.sample_prompt={value}")
    assert text.startswith(f"eval.sample_prompt={value} ")
    words = shlex.split(text.partition(": type ")[2].partition(" for one text")[0])
    assert load_settings(words).eval.sample_prompt == value
    assert load_settings([f"eval.sample_prompt={quoted(value)}"]).eval.sample_prompt == value


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (("rounds", "=", "2"), "type rounds=2"),
        (("rounds", "=2"), "type rounds=2"),
        (("rounds=", "2"), "type rounds=2"),
        (("rounds:2",), "type rounds=2"),
        (("rounds==2",), "type rounds=2"),
        (("rounds",), "type rounds=VALUE"),
        (("data.path=/tmp/my", "text"), "type 'data.path=\"/tmp/my text\"'"),
        (("=",), "type KEY=VALUE, e.g. rounds=2"),
        (("=2",), "type KEY=VALUE, e.g. rounds=2"),
        (("2",), "type KEY=VALUE, e.g. rounds=2"),
        (("résumé=1",), "type KEY=VALUE, e.g. rounds=2"),
        (("~data",), "type KEY=VALUE"),
        (("seed=1,2",), "fomoe sweep seed=1,2 to train with each"),
        (("seed=choice(1,2)",), "fomoe sweep 'seed=choice(1,2)' to train with each"),
        (("hydra.run.dir=/tmp",), "only fomoe sweep takes settings of Hydra"),
        (("hydra/launcher=joblib",), "only fomoe sweep takes settings of Hydra"),
        (("data.path=a\nb",), "need quotes, for the shell and around the value"),
        (("data.path=\udce9",), "no UTF-8: type the text anew, or rename the file"),
    ],
)
def test_other_words_are_refused_with_the_text_to_type(words: tuple[str, ...], typed: str) -> None:
    assert refusal(*words).endswith(typed)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("--rounds=2", "--rounds=2 is no option, and settings have no dashes: type rounds=2"),
        ("--rounds", "--rounds is no option, and settings have no dashes: type rounds=VALUE"),
        ("-local.lr=1", "-local.lr=1 is no option, and settings have no dashes: type local.lr=1"),
        ("--multirun", "--multirun belongs to fomoe sweep: type fomoe sweep KEY=VALUE,VALUE"),
        ("-m", "-m belongs to fomoe sweep: type fomoe sweep KEY=VALUE,VALUE"),
        ("seed=\udcff", "'seed=\\udcff' holds bytes that are no UTF-8: type the text anew, "),
    ],
)
def test_what_is_no_option_is_refused_in_one_line(
    word: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("run", "costs"):
        assert main([command, word]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith(f"error: {text}")


@pytest.mark.parametrize("word", ["hydra.sweep.dir=/tmp", "hydra.run.dir=/tmp", "hydra.mode=RUN"])
def test_a_sweep_keeps_its_folder_and_its_mode(word: str) -> None:
    with pytest.raises(SettingsError, match="--dir names the folder"):
        plan_sweep(["seed=0,1", word])


def test_a_sweep_takes_a_launcher_and_several_values() -> None:
    words = ["seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert [override.is_hydra_override() for override in parse_overrides(words)] == [0, 1, 1]
    assert plan_sweep(words).launcher == tuple(words[1:])
