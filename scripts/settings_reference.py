#!/usr/bin/env python3
"""Write the page of all settings, `docs/reference/settings.md`, from the code and from `conf/`.

python scripts/settings_reference.py
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from fomoe_flwr.config import conf_dir, load_settings, schema
from fomoe_flwr.config.checks import range_of
from fomoe_flwr.config.paper_rows import ROWS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "settings.md"

_HEAD = """# Settings

<!-- Written by scripts/settings_reference.py from fomoe_flwr/config/ and conf/. -->

Every setting is a Hydra override: `fomoe run KEY=VALUE`, or
`flwr run . --run-config 'overrides="KEY=VALUE"'`. A wrong key or value is refused before anything
starts. A default is the value that `fomoe run` takes without any words.
"""

_PRESETS = """
## Presets

A file of `conf/` sets several keys at once: `fomoe run GROUP=NAME`. The last column says what
differs from the defaults above. In a group of settings, keys stand without the group's name.
`preset` and `experiment` may pick from other groups too. What stands on the command line wins.
"""

_PAPER = """
### `paper`

One preset for each row of the paper's tables 3 to 6: `paper=METHOD-KIND-mM-kK-oeO`, with
`-skip-token` at its end for the same row in the other routing mode. There are {count} of them, from
`{first}` to `{last}`. M is the number of workers, K of local steps, O the overlap.
"""


def reference() -> str:
    """Return the whole page."""
    settings = load_settings()
    parts = [_HEAD, *_section("Run", schema.Settings, settings, "")]
    for item in fields(settings):
        group = getattr(settings, item.name)
        if is_dataclass(group):
            parts += _section(f"`{item.name}`", type(group), group, f"{item.name}.")
    parts += [_PRESETS, *_groups(settings)]
    parts.append(_PAPER.format(count=len(ROWS), first=ROWS[0].name, last=ROWS[-1].name))
    return "".join(parts)


def _section(title: str, kind: type, values: Any, prefix: str) -> Iterator[str]:
    """Yield a heading and the table of a section's own settings."""
    said = _docstrings(kind)
    yield f"\n## {title}\n\n{_flat(inspect.getdoc(kind) or '')}\n\n"
    yield "| setting | default | values | meaning |\n| --- | --- | --- | --- |\n"
    for item in fields(kind):
        value = getattr(values, item.name)
        if not is_dataclass(value):
            cells = (f"`{prefix}{item.name}`", _written(value), _allowed(item, value))
            yield f"| {' | '.join(cells)} | {said.get(item.name, '')} |\n"


def _docstrings(kind: type) -> dict[str, str]:
    """Return what stands below each field of a dataclass in the source."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for before, node in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(before, ast.AnnAssign) or not isinstance(node, ast.Expr):
            continue
        assert isinstance(before.target, ast.Name)
        assert isinstance(node.value, ast.Constant)
        found[before.target.id] = _flat(str(node.value.value))
    return found


def _allowed(item: Field[Any], value: Any) -> str:
    if options := item.metadata.get("options"):
        return ", ".join(_written(option) for option in options)
    kind = {bool: "true, false", int: "integer", float: "number", str: "text"}
    kind |= {list: "list", dict: "mapping"}
    bounds = item.metadata.get("bounds")
    # Annotations are strings; a default such as `1` may be that of a float.
    name = "number" if item.type == "float" else kind[type(value)]
    return f"{name} {range_of(bounds)}" if bounds else name


def _groups(settings: schema.Settings) -> Iterator[str]:
    """Yield a table for each group of `conf/`."""
    for folder in sorted(path for path in conf_dir().iterdir() if path.is_dir()):
        if folder.name == "paper":
            continue
        yield f"\n### `{folder.name}`\n\n| name | what it is | sets |\n| --- | --- | --- |\n"
        for path in sorted(folder.glob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            notes = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
            about = " ".join(note for note in notes if not note.startswith("@package"))
            known = getattr(settings, folder.name)
            usual = set(_words(asdict(known))) if is_dataclass(known) else set()
            found = (word for word in _words(yaml.safe_load(text) or {}) if word not in usual)
            words = ", ".join(f"`{word}`" for word in found)
            yield f"| `{path.stem}` | {_flat(about)} | {words or 'the defaults'} |\n"


def _words(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a preset as overrides, the groups that it picks from first."""
    for entry in node.pop("defaults", []):
        if isinstance(entry, dict):
            yield from (f"{key.split('/')[-1]}={value}" for key, value in entry.items())
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _words(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={_plain(value)}"


def _written(value: Any) -> str:
    return f"`{_plain(value)}`" if value != "" else "empty"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(text: str) -> str:
    """Put text on one line, safe in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")
