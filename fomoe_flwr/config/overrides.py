"""Overrides, the words of a command line: read from files, parsed by Hydra's grammar, quoted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from fomoe_flwr.config.checks import SettingsError
from fomoe_flwr.errors import one_line


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
    """Parse words by Hydra's grammar. Raises SettingsError, one line."""
    try:
        return OverridesParser.create().parse_overrides(list(words))
    except HydraException as error:
        raise SettingsError(one_line(str(error).split("See https://")[0])) from error


def quoted(value: object) -> str:
    """Write a value for Hydra's grammar: text is quoted, so that a path may hold anything."""
    if not isinstance(value, str):
        return str(value)
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
