"""Where a model's shape comes from: our settings, a family of transformers, or a checkpoint.

`model.config` names a family, `model.pretrained` a folder with a `config.json`. Most commands need
neither, so transformers is imported late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from fomoe_flwr.config import FAMILYS_OWN, ModelSettings, Settings, SettingsError

_UPCYCLING = ("upcycle", "upcycle_granularity", "upcycle_noise")
_NOT_DESCRIBED = {"pretrained", "config", "entries", "routing", "name", *_UPCYCLING}


def settle(settings: Settings, given: set[str]) -> Settings:
    """Complete settings whose model is described elsewhere; see `config.load_settings`.

    A preset gives way to the description. Raises SettingsError for fields of `given` that disagree
    with it, all at once, and for a model that cannot be trained here.
    """
    model = settings.model
    own = {key.removeprefix("model.") for key in given if key.startswith("model.")}
    if any(key.startswith("architecture") for key in own):
        raise SettingsError("model.architecture is written by the program: leave it out")
    given_by = [
        f"model.{name}={getattr(model, name)}"
        for name in ("pretrained", "config", "upcycle")
        if getattr(model, name)
    ]
    if len(given_by) > 1:
        raise SettingsError(
            f"{' and '.join(given_by)} contradict each other: each says alone what the model is"
        )
    if model.entries and not model.config:
        raise SettingsError(f"model.entries={model.entries} needs model.config: leave it out")
    if not given_by:
        return settings
    from fomoe_flwr.model.families import quiet

    with quiet():
        described = _described(model, own)
    kept = ("routing", "pretrained", "config", "entries", *_UPCYCLING)
    described = replace(described, **{name: getattr(model, name) for name in kept})
    return replace(settings, model=described)


def _described(model: ModelSettings, own: set[str]) -> ModelSettings:
    """Return the settings of the model that is described elsewhere."""
    if model.upcycle:
        from fomoe_flwr.model.upcycling import upcycled_settings

        return upcycled_settings(model, own)
    if model.config:
        from fomoe_flwr.model.fresh import fresh_settings

        described = fresh_settings(model, own)
    else:
        from fomoe_flwr.model.pretrained import pretrained_settings

        described = pretrained_settings(model)
    _refuse_other(model, described, own)
    return described


def _refuse_other(model: ModelSettings, described: ModelSettings, own: Iterable[str]) -> None:
    """Refuse fields that a person gave and the description contradicts, or has no word for."""
    from fomoe_flwr.model.architecture import unsaid

    silent = unsaid(described)
    names = {field.name for field in fields(ModelSettings)} - _NOT_DESCRIBED
    apart = []
    for name in sorted(names & set(own)):
        ours, theirs = getattr(model, name), getattr(described, name)
        if ours == 0 and ours is not False and (name in FAMILYS_OWN or name in silent):
            continue
        if name == "head_size":  # 0 stands for an even share of the hidden size
            even = described.hidden_size // described.num_heads
            ours, theirs = ours or even, theirs or even
        if name in silent:
            apart.append(f"model.{name}={ours} (it says nothing of it)")
        elif not _agree(ours, theirs):
            apart.append(f"model.{name}={ours} (it has {theirs})")
    if apart:
        source = f"config={model.config}" if model.config else f"pretrained={model.pretrained}"
        raise SettingsError(f"model.{source} contradicts {', '.join(apart)}: leave them out")


def _agree(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return bool(ours == theirs)
