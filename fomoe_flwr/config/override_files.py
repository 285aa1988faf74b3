"""Files of overrides, as `fomoe plan` writes them, on a command line between other overrides."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

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
