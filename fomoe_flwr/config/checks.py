"""What settings must not be: out of range, or at odds with each other."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from fomoe_flwr.config.outer_checks import check_outer, check_privacy
from fomoe_flwr.config.schema import (
    SHAPED_FAMILIES,
    SHARED_EXPERT_FAMILIES,
    ModelSettings,
    Settings,
)
from fomoe_flwr.errors import SettingsError

PATHS = (
    ("data", "path"),
    ("data", "tokenizer"),
    ("model", "pretrained"),
    ("model", "upcycle"),
    ("layout", "path"),
)
"""Settings, by section, that name a file or folder of this machine."""

LOCAL_STREAMS = ("parquet", "json", "text")
"""Values of `data.dataset` that stream the local files of `data.path`."""


def check(settings: Settings) -> None:
    """Refuse values out of range and values that contradict each other."""
    for key, value, options, bounds in _limits(settings):
        if options is not None and value not in options:
            raise SettingsError(
                f"{key}={value} is not one of {', '.join(options)}{did_you_mean(value, options)}"
            )
        for broken, text in _broken_bounds(value, bounds):
            if broken:
                raise SettingsError(f"{key}={value} is out of range: it must be {text}")
    _check_model(settings.model)
    _check_upcycling(settings.model)
    _check_widths(settings)
    _check_experiment(settings)
    _check_partitioned(settings)
    check_outer(settings)
    _check_balance(settings)
    _check_execution(settings)
    _check_presence(settings)
    check_privacy(settings)
    _check_parallel(settings)
    if settings.data.path and settings.data.dataset not in ("", *LOCAL_STREAMS):
        raise SettingsError(
            f"data.path={settings.data.path} and data.dataset={settings.data.dataset} contradict "
            f"each other: give one of them (data.dataset={'|'.join(LOCAL_STREAMS)} streams a path)"
        )
    if settings.federation.min_workers > settings.layout.num_workers:
        raise SettingsError(
            f"federation.min_workers={settings.federation.min_workers} needs layout.num_workers >= "
            f"{settings.federation.min_workers} (got {settings.layout.num_workers})"
        )


def _check_presence(settings: Settings) -> None:
    layout, start = settings.layout, settings.federation.start_workers
    if start > layout.num_workers:
        raise SettingsError(
            f"federation.start_workers={start} needs layout.num_workers >= {start} "
            f"(got {layout.num_workers})"
        )
    if 0 < start < layout.num_workers:
        if not layout.rehome_after:
            raise SettingsError(
                f"federation.start_workers={start} begins without some workers: "
                "layout.rehome_after=0 must be >= 1, so that others hold their experts"
            )
        if layout.capacity_reported:
            raise SettingsError(
                f"federation.start_workers={start} begins without some workers, but "
                "layout.capacity_reported=True needs the memory of all: use "
                "federation.start_workers=0"
            )


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return a suggestion to end an error with, or nothing."""
    lower = {option.lower(): option for option in options}
    near = difflib.get_close_matches(str(word).lower(), list(lower), n=1)
    return f"; did you mean {lower[near[0]]}?" if near else ""


def _check_upcycling(model: ModelSettings) -> None:
    for name, default in (("upcycle_granularity", 1), ("upcycle_noise", 0)):
        if (value := getattr(model, name)) != default and not model.upcycle:
            raise SettingsError(
                f"model.{name}={value} has no meaning without model.upcycle: leave it out, or name "
                "a dense checkpoint"
            )


def _check_model(model: ModelSettings) -> None:
    if model.top_k > model.num_experts:
        raise SettingsError(
            f"model.top_k={model.top_k} needs model.num_experts >= {model.top_k} "
            f"(got {model.num_experts})"
        )
    if model.architecture:  # The class of the model has taken all of it.
        return
    if model.config or model.entries:
        raise SettingsError(
            f"model.config={model.config} with model.entries={model.entries} describes no model: "
            "model.entries needs model.config, and both need transformers"
        )
    if model.head_size % 2:
        raise SettingsError(
            f"model.head_size={model.head_size} must be even: rotary embeddings turn pairs"
        )
    if not model.head_size and model.hidden_size % (2 * model.num_heads):
        raise SettingsError(
            f"model.hidden_size={model.hidden_size} must be a multiple of 2 * model.num_heads "
            f"(= {2 * model.num_heads}): rotary embeddings need an even head size"
        )
    if model.num_heads % model.num_kv_heads:
        raise SettingsError(
            f"model.num_kv_heads={model.num_kv_heads} must divide model.num_heads={model.num_heads}"
        )
    _check_family(model)


def _check_widths(settings: Settings) -> None:
    """Refuse experts that products of groups do not take: their rows must be of 16 bytes each."""
    model, precision = settings.model, settings.local.precision
    step = 4 if precision == "float32" else 8
    for name in ("hidden_size", "expert_size"):
        if (value := getattr(model, name)) % step:
            key = "model.upcycle_granularity" if model.upcycle else f"model.{name}"
            raise SettingsError(
                f"model.{name}={value} must be a multiple of {step} for local.precision={precision}"
                f": change {key}"
            )


def _check_family(model: ModelSettings) -> None:
    """Refuse what a family cannot express."""
    family = model.family
    if family not in SHAPED_FAMILIES:
        raise SettingsError(
            f"model.family={family} is not one of {', '.join(SHAPED_FAMILIES)}"
            f"{did_you_mean(family, SHAPED_FAMILIES)}; any other family of transformers comes by "
            f"model.config={family}"
        )
    if family in ("deepseek_v3", "fomoe") and model.num_kv_heads != model.num_heads:
        raise SettingsError(
            f"model.num_kv_heads={model.num_kv_heads} must equal model.num_heads="
            f"{model.num_heads}: in {family} every head has keys and values of its own"
        )
    if family == "mixtral" and not model.norm_topk:
        raise SettingsError(
            "model.norm_topk=False must be true for model.family=mixtral: its router always "
            "renormalises the chosen scores"
        )
    if model.num_shared_experts and family not in SHARED_EXPERT_FAMILIES:
        raise SettingsError(
            f"model.num_shared_experts={model.num_shared_experts} must be 0 for model.family="
            f"{family}; these have shared experts: {', '.join(SHARED_EXPERT_FAMILIES)}"
        )
    if family == "olmoe" and model.head_size not in (0, model.hidden_size // model.num_heads):
        raise SettingsError(
            f"model.head_size={model.head_size} must be 0 for model.family=olmoe: it normalises "
            "queries over the hidden size"
        )
    if family in SHARED_EXPERT_FAMILIES and model.num_experts < 2:
        raise SettingsError(
            f"model.num_experts={model.num_experts} must be >= 2 for model.family={family}: its "
            "router ranks a group of experts by its best two"
        )


def fewest_residents(settings: Settings) -> int:
    """Return how many experts of a layer the worker with the fewest holds, as far as is known."""
    layout = settings.layout
    even = settings.model.num_experts * layout.overlap // layout.num_workers
    return min(layout.residents, default=even)


def _check_partitioned(settings: Settings) -> None:
    """Refuse `partitioned` where a worker's router would have too few rows for its family."""
    model = settings.model
    if model.family not in SHARED_EXPERT_FAMILIES or model.routing != "partitioned":
        return
    fewest = fewest_residents(settings)
    if fewest < 2:
        raise SettingsError(
            f"model.routing=partitioned with model.family={model.family} needs two residents per "
            f"worker, model.num_experts * layout.overlap / layout.num_workers >= 2 (got {fewest}): "
            "its router ranks a group of experts by its best two"
        )


def _check_balance(settings: Settings) -> None:
    if settings.balance.bias_rate and not settings.model.has_selection_bias:
        raise SettingsError(
            f"balance.bias_rate={settings.balance.bias_rate} needs a router with a selection bias: "
            f"the router of model.family={settings.model.family} has none"
        )


def _check_execution(settings: Settings) -> None:
    execution, precision = settings.execution, settings.local.precision
    if execution.cuda_graph == "on" and precision == "float32":
        raise SettingsError(
            "execution.cuda_graph=on needs local.precision=bfloat16 or bfloat16_parameters (got "
            "float32): in fp32 PyTorch's grouped products wait for the device"
        )
    if execution.cuda_graph == "on" and execution.experts not in ("auto", "static"):
        raise SettingsError(
            f"execution.cuda_graph=on needs execution.experts=static or auto (got "
            f"{execution.experts}): the other cores wait for the device"
        )


def _check_parallel(settings: Settings) -> None:
    local = settings.local
    if local.parallel == "none" and local.processes > 1:
        raise SettingsError(
            f"local.processes={local.processes} contradicts local.parallel=none: use 0 or 1, or "
            "local.parallel=auto"
        )
    is_split = local.processes > 1 or local.parallel in ("ddp", "fsdp")
    if settings.execution.cuda_graph == "on" and is_split:
        raise SettingsError(
            f"execution.cuda_graph=on belongs to one process: local.parallel={local.parallel} "
            f"and local.processes={local.processes} must be none or auto, and 0 or 1"
        )


def _check_experiment(settings: Settings) -> None:
    workers, overlap = settings.layout.num_workers, settings.layout.overlap
    if overlap > workers:
        raise SettingsError(
            f"layout.overlap={overlap} needs layout.num_workers >= {overlap} (got {workers})"
        )
    if settings.experiment in ("diloco", "photon") and overlap != workers:
        raise SettingsError(
            f"experiment={settings.experiment} is a full-replica method: layout.overlap={overlap} "
            f"must equal layout.num_workers={workers}; use experiment=fomoe for partial replicas"
        )
    if settings.experiment in ("diloco", "photon") and settings.layout.kind == "explicit":
        raise SettingsError(
            f"experiment={settings.experiment} is a full-replica method: layout.kind=explicit must "
            "be another kind; use experiment=fomoe for partial replicas"
        )
    if settings.experiment == "centralised" and workers != 1:
        raise SettingsError(
            f"experiment=centralised has one worker: layout.num_workers={workers} must be 1; "
            "use experiment=photon or diloco for several full replicas"
        )


def _limits(
    node: Any, prefix: str = ""
) -> Iterable[tuple[str, Any, tuple[str, ...] | None, Mapping[str, float | None] | None]]:
    for item in fields(node):
        value, key = getattr(node, item.name), prefix + item.name
        if is_dataclass(value):
            yield from _limits(value, key + ".")
        elif item.metadata:
            yield key, value, item.metadata.get("options"), item.metadata.get("bounds")


def range_of(bounds: Mapping[str, float | None]) -> str:
    """Write the range of a number, e.g. `>= 0 and < 1`."""
    return " and ".join(
        f"{name} {bound}"
        for name, bound in (
            (">=", bounds["at_least"]),
            (">", bounds["above"]),
            ("<=", bounds["at_most"]),
            ("<", bounds["below"]),
        )
        if bound is not None
    )


def _broken_bounds(
    value: Any, bounds: Mapping[str, float | None] | None
) -> Iterable[tuple[bool, str]]:
    if bounds is None:
        return
    text = range_of(bounds)
    low, above, high, below = (bounds[k] for k in ("at_least", "above", "at_most", "below"))
    # Written so that NaN breaks every bound.
    yield low is not None and not value >= low, text
    yield above is not None and not value > above, text
    yield high is not None and not value <= high, text
    yield below is not None and not value < below, text
    yield isinstance(value, float) and not math.isfinite(value), f"finite and {text}"
