"""Overrides, the words of a command line: read from files, parsed by Hydra's grammar, quoted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from fomoe_flwr.config.literals import literal
from fomoe_flwr.config.schema import Settings
from fomoe_flwr.errors import SettingsError, check_text, one_line

_PATHS = ("resume", "output_dir", "data.path", "layout.path")

_KEY = r"[~+]*[A-Za-z_][\w./@:-]*"


def expand_files(words: Iterable[str]) -> list[str]:
    """Put the overrides of a file in the place of its name, which ends in .yaml and has no `=`.

    Raises SettingsError, one line, for a file without a list `overrides` of words.
    """
    expanded: list[str] = []
    for word in words:
        if "=" in word or not word.endswith((".yaml", ".yml")):
            expanded.append(word)
            continue
        try:
            document = yaml.safe_load(Path(word).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SettingsError(f"cannot read overrides from {word}: {one_line(error)}") from error
        found = document.get("overrides") if isinstance(document, dict) else None
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise SettingsError(
                f'{word} has no list `overrides` of words such as "layout.overlap=2"'
            )
        expanded += found
    return expanded


def parse_overrides(words: Iterable[str]) -> list[Override]:
    """Parse words by Hydra's grammar. Raises SettingsError, one line, with what to type instead."""
    words, parser = list(words), OverridesParser.create()
    check_text(words)
    parsed = []
    for place, word in enumerate(words):
        try:
            override = parser.parse_override(word)
        except (HydraException, ValueError) as error:
            raise SettingsError(_advice(words, place)) from error
        if not override.key_or_group:
            raise SettingsError(_advice(words, place))
        parsed.append(override)
    return parsed


def parse_values(words: Iterable[str]) -> list[Override]:
    """Parse words that give each setting one value. Raises SettingsError, one line."""
    parsed = parse_overrides(words)
    for override in parsed:
        word = str(override.input_line)
        key, _, value = word.partition("=")
        if override.is_hydra_override():
            raise SettingsError(f"{word} is no setting: only fomoe sweep takes settings of Hydra")
        if override.is_delete():
            raise SettingsError(f"{word}: no setting can be removed, only set: type KEY=VALUE")
        if word.startswith("+") and not word.startswith("++"):
            typed = _plain(key[1:], value)
            raise SettingsError(f"{word}: no setting can be added, only set: type {typed}")
        if override.value() == "???":
            raise SettingsError(f"{word}: ??? stands for no value: give another")
        if override.is_sweep_override():
            listed = "" if "(" in value else f"{shlex.quote(f'{key}=[{value}]')} for a list, "
            raise SettingsError(
                f"{word} holds several values: type {_typed(key, value)} for one text, {listed}"
                f"or fomoe sweep {shlex.quote(word)} to train with each"
            )
    return parsed


def check_paths(overrides: Iterable[Override]) -> None:
    """Refuse a path that is empty, or that begins with an unknown `~`. Raises SettingsError.

    A path that is quoted for Hydra may be empty: it stands for none.
    """
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if key not in _PATHS:
            continue
        if not str(override.input_line).partition("=")[2].strip():
            raise SettingsError(f"{key}= is empty: give a path, or leave {key} out")
        try:
            Path(str(value)).expanduser()
        except RuntimeError:
            raise SettingsError(
                f"{key}={value}: ~ stands for no folder that is known: write it out"
            ) from None


def refuse_reference(override: Override) -> SettingsError:
    """Return the refusal of a `${name}` that stands for nothing, with how to type it as text."""
    word = str(override.input_line)
    key, _, value = word.partition("=")
    typed = shlex.quote(f"{key}={quoted(_without_quotes(value))}")
    return SettingsError(
        f"{word}: ${{...}} stands for another setting, and this one does not exist: type {typed} "
        "for the text itself"
    )


def refuse_option(word: str) -> None:
    """Refuse a setting that was typed as an option; do nothing about other words that begin with -.

    Raises SettingsError, one line.
    """
    if word in ("-m", "--multirun"):
        raise SettingsError(f"{word} belongs to fomoe sweep: type fomoe sweep KEY=VALUE,VALUE")
    name, equals, value = word.lstrip("-").partition("=")
    if equals or "." in name or name in {item.name for item in fields(Settings)}:
        typed = _plain(name, value or "VALUE")
        raise SettingsError(f"{word} is no option, and settings have no dashes: type {typed}")


def _advice(words: list[str], place: int) -> str:
    """Say what is wrong with a word that Hydra's grammar refuses, and what to type."""
    word = words[place]
    key, equals, value = word.partition("=")
    before, after = words[:place], words[place + 1 :]
    if not equals:
        if after and after[0].startswith("="):
            value = "".join(after[:2] if after[0] == "=" else after[:1])[1:]
            return f"{word} stands apart from its value: type {_plain(word, value)}"
        if before and "=" in before[-1]:
            key, _, value = before[-1].partition("=")
            return (
                f"{word} has no = and no key: if it belongs to {before[-1]}, "
                f"type {_typed(key, f'{value} {word}') if value else _plain(key, word)}"
            )
        key, colon, value = word.partition(":")
        if re.fullmatch(_KEY, key, re.ASCII):
            return f"{word} has no =: type {_plain(key, value if colon and value else 'VALUE')}"
    if not re.fullmatch(_KEY, key, re.ASCII):
        return (
            f"{word or repr(word)}: {key!r} is no name of a setting: type KEY=VALUE, e.g. rounds=2"
        )
    if not word.isprintable():
        return f"{word!r}: line breaks and tabs need quotes, for the shell and around the value"
    if value.startswith("="):
        return f"{word} has more than one =: type {_plain(key, value.lstrip('='))}"
    return f"{word} needs quotes around its value: type {_typed(key, value)}"


def _plain(key: str, value: str) -> str:
    """Return what to type for a value that may need no quotes."""
    return f"{key}={value}" if re.fullmatch(r"[\w./:-]*", value, re.ASCII) else _typed(key, value)


def _typed(key: str, value: str) -> str:
    """Return what to type in a shell for a value that is text: quotes for it, and for Hydra."""
    value = _without_quotes(value)
    word = f"{key}={_enclosed(value)}" if '"' in value or "\\" in value else f'{key}="{value}"'
    return shlex.quote(word)


def _without_quotes(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value


def quoted(value: object) -> str:
    """Write a value for Hydra's grammar: text is text, so that a path may hold anything."""
    return _enclosed(literal(value)) if isinstance(value, str) else str(value)


def _enclosed(value: str) -> str:
    # Only before a quote, or at the end, is a backslash more than itself.
    escaped = re.sub(r"\\+(?='|\Z)", lambda found: found[0] * 2, value)
    return "'" + escaped.replace("'", "\\'") + "'"
