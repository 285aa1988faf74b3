"""Where a model's shape comes from: our settings, a family of transformers, or a checkpoint.

`model.config` names a family, `model.pretrained` a folder with a `config.json`. Most commands need
neither, so transformers is imported late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from fomoe_flwr.config import ModelSettings, Settings, SettingsError

_UPCYCLING = ("upcycle", "upcycle_granularity", "upcycle_noise")


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
    if model.pretrained:
        from fomoe_flwr.model.pretrained import pretrained_settings

        described = pretrained_settings(model)
        _refuse_other(model, described, own)
    elif model.config:
        from fomoe_flwr.model.architecture import fresh_settings

        described = fresh_settings(model, own)
    elif model.upcycle:
        from fomoe_flwr.model.upcycling import upcycled_settings

        described = upcycled_settings(model, own)
    else:
        return settings
    kept = ("routing", "pretrained", "config", "entries", *_UPCYCLING)
    described = replace(described, **{name: getattr(model, name) for name in kept})
    return replace(settings, model=described)


def _refuse_other(model: ModelSettings, described: ModelSettings, own: Iterable[str]) -> None:
    """Refuse fields that a person gave and the checkpoint contradicts."""
    names = {field.name for field in fields(ModelSettings)} - {"pretrained", "routing", "name"}
    apart = [
        f"model.{name}={getattr(model, name)} (it has {getattr(described, name)})"
        for name in sorted(names & set(own))
        if not _agree(getattr(model, name), getattr(described, name))
    ]
    if apart:
        raise SettingsError(
            f"model.pretrained={model.pretrained} contradicts {', '.join(apart)}: leave them out"
        )


def _agree(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return bool(ours == theirs)
