"""What an outer step, its delays and its privacy cannot be combined with."""

from __future__ import annotations

import math

from fomoe_flwr.config.schema import Settings
from fomoe_flwr.errors import SettingsError

EXACT_ENOUGH = ("bfloat16", "float32")
"""Codecs with the exponents of fp32, so that small numbers beside large ones are not lost."""


def check_outer(settings: Settings) -> None:
    """Refuse what an outer step cannot do. Raises SettingsError."""
    outer, local = settings.outer, settings.local
    if outer.robust != "none" and outer.weighting != "uniform":
        raise SettingsError(
            f"outer.robust={outer.robust} weighs all replies alike: outer.weighting="
            f"{outer.weighting} must be uniform"
        )
    if 0 < outer.clip_to_median < 1:
        raise SettingsError(
            f"outer.clip_to_median={outer.clip_to_median} must be 0 or >= 1: "
            "below 1 it would shrink the median reply itself"
        )
    if outer.name in ("local_adamw", "des_loc"):
        if local.optimizer != "adamw":
            raise SettingsError(
                f"outer={outer.name} averages Adam's moments: local.optimizer={local.optimizer} "
                "must be adamw"
            )
        if not local.keep_inner_state:
            raise SettingsError(
                f"outer={outer.name} averages Adam's moments: local.keep_inner_state must be true"
            )
        wire = settings.wire
        for key in ("up", "up_experts", "down", "down_experts"):
            if (name := getattr(wire, key)) not in ("", *EXACT_ENOUGH):
                raise SettingsError(
                    f"outer={outer.name} averages Adam's moments, which {name} rounds to 0: use "
                    f"{' or '.join(EXACT_ENOUGH)} for wire.{key}"
                )
    if outer.momentum and outer.name != "nesterov":
        raise SettingsError(
            f"outer.momentum={outer.momentum} has no meaning for outer={outer.name}: use "
            "outer=nesterov or outer.momentum=0"
        )
    if outer.fragments > settings.model.num_layers:
        raise SettingsError(
            f"outer.fragments={outer.fragments} must be <= model.num_layers="
            f"{settings.model.num_layers}: a fragment is made of whole layers"
        )
    if outer.delay_steps >= settings.local.steps:
        raise SettingsError(
            f"outer.delay_steps={outer.delay_steps} must be < local.steps={settings.local.steps}: "
            "an answer must be there before the next pseudo-gradient is taken"
        )
    if outer.delay_steps and not settings.local.keep_inner_state:
        raise SettingsError(
            f"outer.delay_steps={outer.delay_steps} needs local.keep_inner_state=true: the delayed "
            "steps go on with the optimizer's state"
        )
    if outer.late_replies == "use":
        _check_late(settings)
    _check_pace(settings)
    for words in (script := settings.federation.late_script):
        workers = settings.layout.num_workers
        is_row = isinstance(words, list) and [type(word) for word in words] == [int] * 3
        if not is_row or min(words[0], words[2]) < 1 or not 0 <= words[1] < workers:
            raise SettingsError(
                f"federation.late_script={script} must list [round, worker, rounds late], from 1, "
                f"from 0 to {workers - 1}, and from 1"
            )
    if outer.fragments > settings.rounds:
        raise SettingsError(
            f"outer.fragments={outer.fragments} must be <= rounds={settings.rounds}: otherwise "
            "some fragment is never synchronised"
        )


def _check_pace(settings: Settings) -> None:
    local, workers = settings.local, settings.layout.num_workers
    if local.round_seconds and settings.outer.delay_steps:
        raise SettingsError(
            f"local.round_seconds={local.round_seconds} needs outer.delay_steps=0 (got "
            f"{settings.outer.delay_steps}): a delay counts steps, of which all take as many"
        )
    if not local.speeds:
        return
    if not local.round_seconds:
        raise SettingsError(f"local.speeds={local.speeds} needs local.round_seconds > 0")
    known = [isinstance(s, int | float) and 0 < s < math.inf for s in local.speeds]
    if len(known) != workers or not all(known):
        raise SettingsError(
            f"local.speeds={local.speeds} must be layout.num_workers={workers} numbers > 0"
        )


def _check_late(settings: Settings) -> None:
    """Refuse what a reply of an earlier round has no place in."""
    outer = settings.outer
    _require(
        "outer.late_replies=use",
        ("outer.name", outer.name, ("average", "nesterov")),
        ("outer.fragments", outer.fragments, (1,)),
        ("outer.robust", outer.robust, ("none",)),
        ("privacy.clip_norm", settings.privacy.clip_norm, (0,)),
    )


def _require(who: str, *needs: tuple[str, object, tuple[object, ...]], why: str = "") -> None:
    """Refuse a value that is not one of those that a setting needs: key, value, allowed."""
    for key, value, allowed in needs:
        if value not in allowed:
            words = " or ".join(map(str, allowed))
            raise SettingsError(f"{who} needs {key} to be {words} (got {value}){why}")


def check_privacy(settings: Settings) -> None:
    """Refuse what would let an update out by another way than the noisy mean."""
    privacy = settings.privacy
    if privacy.noise_multiplier and not privacy.clip_norm:
        raise SettingsError(
            f"privacy.noise_multiplier={privacy.noise_multiplier} is in units of privacy.clip_norm="
            f"{privacy.clip_norm}, which must be > 0"
        )
    if not privacy.clip_norm:
        return
    _require(
        f"privacy.clip_norm={privacy.clip_norm}",
        ("outer.weighting", settings.outer.weighting, ("uniform",)),
        ("outer.name", settings.outer.name, ("average", "nesterov")),
        ("balance.form", settings.balance.form, ("local",)),
        why=": what it takes from workers is not clipped",
    )
    if settings.outer.robust != "none":
        raise SettingsError(
            f"outer.robust={settings.outer.robust} must be none with privacy.clip_norm="
            f"{privacy.clip_norm}: the noise is made for a mean"
        )
    if settings.outer.clip_to_median:
        raise SettingsError(
            f"outer.clip_to_median={settings.outer.clip_to_median} must be 0 with "
            f"privacy.clip_norm={privacy.clip_norm}: medians of unclipped replies would leak"
        )
    if settings.layout.kind == "balanced":
        raise SettingsError(
            f"privacy.clip_norm={privacy.clip_norm} needs another layout.kind than balanced: "
            "measured loads are not clipped"
        )
