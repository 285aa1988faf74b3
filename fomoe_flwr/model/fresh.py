"""A new model of any family: its defaults, with the fields and entries that a person gave."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

from fomoe_flwr.config import FAMILYS_OWN, ModelSettings, SettingsError, did_you_mean
from fomoe_flwr.errors import one_line
from fomoe_flwr.model.architecture import ENTRIES_OF, OF_A_FILE, described_settings
from fomoe_flwr.model.families import config_class, text_part


def fresh_settings(model: ModelSettings, own: Iterable[str]) -> ModelSettings:
    """Return the settings of a new model of the family `model.config`.

    `own` are the fields of `model` that count; the rest is the family's default.
    """
    kind = config_class(model.config, "model.config")
    kind = type(text_part(_made(model.config, kind, {})))
    known = _known_entries(kind)
    given = _given(model, set(own), known)
    _refuse_contradictions(kind, given)
    # A family's own token may lie outside of a smaller vocabulary, and training pads nothing.
    entries = {"pad_token_id": None} | {entry: value for entry, (_, value) in given.items()}
    if "head_size" in own and not model.head_size and "head_dim" in known:
        shape: Any = _made(model.config, kind, entries)
        entries["head_dim"] = shape.hidden_size // shape.num_attention_heads
    described = described_settings(_made(model.config, kind, entries))
    # Some classes read entries that they do not list: then the model is another one with them.
    strange = []
    for entry in sorted(given.keys() - known):
        others = {name: value for name, value in entries.items() if name != entry}
        without = described_settings(_made(model.config, kind, others))
        if without.architecture["groups"] == described.architecture["groups"]:
            strange.append(_word(entry, given, known))
    if strange:
        raise SettingsError(
            f"{', '.join(strange)} has no meaning for model.config={model.config}: leave it out"
        )
    return described


Given = dict[str, tuple[str, Any]]
"""Entries of a configuration: as a person named them, and their values."""


def _given(model: ModelSettings, own: set[str], known: set[str]) -> Given:
    """Return the entries that were given, by their own names or by ours."""
    given: Given = {}
    for name in sorted(own & {*ENTRIES_OF, "rope_theta"}):
        value = getattr(model, name)
        if value == 0 and name in ("head_size", *FAMILYS_OWN):
            continue
        names = ENTRIES_OF.get(name, ("rope_theta",))
        entry = next((each for each in names if each in known), names[0])
        given[entry] = f"model.{name}", value
    for entry, value in model.entries.items():
        named = f"model.entries.{entry}"
        if entry in given and given[entry][1] != value:
            raise _contradiction((given[entry], (named, value)))
        _check_value(named, value, model.config)
        given[entry] = named, value
    return given


def _check_value(named: str, value: Any, family: str) -> None:
    """Refuse what nothing can be computed with, and what would draw at random in training."""
    if value != value:
        raise SettingsError(f"{named}={value} must be a number: leave it out")
    # One family bounds by such an entry what its router chooses.
    is_noise = "jitter" in named and family != "phimoe"
    if value and ("dropout" in named or is_noise):
        raise SettingsError(f"{named}={value} must be 0: training draws nothing at random")


def _refuse_contradictions(kind: type[PreTrainedConfig], given: Given) -> None:
    """Refuse two names of one entry with different values."""
    seen: Given = {}
    for entry, said in given.items():
        first = seen.setdefault(kind.attribute_map.get(entry, entry), said)
        if first is not said and first[1] != said[1]:
            raise _contradiction((first, said))


def _contradiction(both: Iterable[tuple[str, Any]]) -> SettingsError:
    words = " and ".join(f"{name}={value}" for name, value in both)
    return SettingsError(f"{words} contradict each other: leave one of them out")


def _word(entry: str, given: Given, known: set[str]) -> str:
    name, value = given[entry]
    near = did_you_mean(entry, known) if name.startswith("model.entries.") else ""
    return f"{name}={value}{f' ({near[2:]})' if near else ''}"


def _made(family: str, kind: type[PreTrainedConfig], entries: dict[str, Any]) -> PreTrainedConfig:
    try:
        return kind(**entries)
    except Exception as error:  # each family refuses in its own way
        raise SettingsError(f"model.config={family} cannot be made: {one_line(error)}") from error


def _known_entries(kind: type[PreTrainedConfig]) -> set[str]:
    """Return the entries that a configuration class takes, its aliases included."""
    names = {name for name in vars(kind()) if not name.startswith("_")}
    taken = set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
    known = names | taken | set(kind.attribute_map)
    if "rope_parameters" in known:
        known.add("rope_theta")
    return known - OF_A_FILE - {"model_type"}
