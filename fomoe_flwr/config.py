"""The settings of a run: one tree of dataclasses that is schema, defaults and checks in one place.

`conf/` holds the presets that people choose by name, `load_settings` composes and validates them.
A wrong value is refused here, before anything starts, with the value, the allowed range and the
key to change. This module imports neither torch nor Flower.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from fomoe_flwr.errors import InputError
from fomoe_flwr.routing import RoutingMode


class SettingsError(InputError):
    """A setting that cannot be used; the message names value, allowed range and key."""


def _number(
    default: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return field(default=default, metadata={"bounds": bounds})


def _choice(default: str, *options: str) -> Any:
    return field(default=default, metadata={"options": options})


@dataclass
class ModelSettings:
    """Shape of the model; every family of `fomoe_flwr.model.families` takes the same names."""

    name: str = "olmoe-demo"
    family: str = _choice(
        "olmoe", "olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "fomoe"
    )
    routing: str = _choice("skip_token", *(mode.value for mode in RoutingMode))
    num_layers: int = _number(4, at_least=1)
    hidden_size: int = _number(256, at_least=8)
    expert_size: int = _number(256, at_least=1)
    num_heads: int = _number(4, at_least=1)
    num_kv_heads: int = _number(4, at_least=1)
    head_size: int = _number(0, at_least=0)
    """Width of an attention head; 0 means hidden_size / num_heads."""
    num_experts: int = _number(16, at_least=1)
    num_shared_experts: int = _number(0, at_least=0)
    """Experts that every token passes and every worker holds; `deepseek_v3` and `glm4_moe` only."""
    top_k: int = _number(2, at_least=1)
    vocab_size: int = _number(4096, at_least=260)
    tie_embeddings: bool = True
    norm_topk: bool = False
    init_std: float = _number(0.02, above=0)
    pretrained: str = ""
    """Folder of a transformers checkpoint to go on from (continued pre-training)."""
    rope_theta: float = _number(0.0, at_least=0)
    """Base of the rotary angles; 0 means the family's own."""
    norm_eps: float = _number(0.0, at_least=0)
    """0 means the family's own."""
    base_hidden_size: int = _number(256, at_least=1)
    base_num_layers: int = _number(4, at_least=1)
    """Proxy from which CompleteP transfers learning rate and scales; `fomoe` only."""

    @property
    def routing_mode(self) -> RoutingMode:
        return RoutingMode(self.routing)


@dataclass
class DataSettings:
    """Where text comes from. No path and no data set means the embedded corpus."""

    path: str = ""
    dataset: str = ""
    dataset_config: str = ""
    dataset_revision: str = ""
    text_key: str = "text"
    domain_key: str = "domain"
    partition: str = _choice("iid", "iid", "by_domain")
    sequence_length: int = _number(128, at_least=8)
    holdout_fraction: float = _number(0.02, above=0, below=0.5)
    tokenizer: str = ""


@dataclass
class LayoutSettings:
    """Who holds which experts."""

    kind: str = _choice("fixed", "fixed", "random", "rolling", "balanced", "weighted", "explicit")
    num_workers: int = _number(4, at_least=1)
    overlap: int = _number(2, at_least=1)
    draw: str = _choice("per_layer", "per_layer", "same")
    reshuffle_every: int = _number(1, at_least=1)
    warm_rounds: int = _number(0, at_least=0)
    """Rounds of full replicas before the experts are parted."""
    roll_by: int = _number(1, at_least=1)
    """Experts by which `rolling` advances at every reshuffle."""
    tolerance: float = _number(0.1, at_least=0)
    """`balanced` leaves two workers as they are if a swap would narrow the gap between their loads
    by no more than this share of a worker's mean load in a layer."""
    allow_uneven: bool = False
    residents: list[int] = field(default_factory=list)
    """Experts of each layer for each worker, e.g. [12,8,8,4]; they add up to experts * overlap."""
    capacity_gib: list[float] = field(default_factory=list)
    """Memory of each worker for its training state; the numbers of residents follow from it."""
    path: str = ""
    """File of an `explicit` layout."""


@dataclass
class LocalSettings:
    """What a worker does between two synchronisations."""

    steps: int = _number(32, at_least=1)
    optimizer: str = _choice("adamw", "adamw", "sgd")
    lr: float = _number(4e-3, above=0)
    warmup_steps: int = _number(32, at_least=0)
    schedule: str = _choice("cosine", "constant", "cosine", "wsd")
    min_lr_ratio: float = _number(0.1, at_least=0, at_most=1)
    decay_fraction: float = _number(0.2, above=0, at_most=1)
    """Share of the run's steps, at its end, in which `wsd` decays."""
    batch_size: int = _number(8, at_least=1)
    accumulate: int = _number(1, at_least=1)
    beta1: float = _number(0.9, at_least=0, below=1)
    beta2: float = _number(0.95, at_least=0, below=1)
    eps: float = _number(1e-8, above=0)
    weight_decay: float = _number(0.0, at_least=0)
    grad_clip: float = _number(1.0, at_least=0)
    precision: str = _choice("float32", "float32", "bfloat16")
    """bfloat16: autocast over fp32 master weights, on a GPU."""
    fresh_expert_warmup_steps: int = _number(8, at_least=0)
    keep_inner_state: bool = True
    device: str = _choice("auto", "auto", "cpu", "cuda")
    threads: int = _number(0, at_least=0)


@dataclass
class BalanceSettings:
    """What keeps routers from collapsing."""

    loss: float = _number(0.01, at_least=0)
    """Coefficient of E * sum_i f_i P_i (Switch); f_i are shares of assignments, so 1 is balance."""
    form: str = _choice("local", "local", "global")
    """f_i from the micro-batch, or pooled over all workers in the round before."""
    z_loss: float = _number(0.0, at_least=0)
    """Coefficient of the mean squared logsumexp of the router logits."""
    bias_rate: float = _number(0.0, at_least=0)
    """Step of the loss-free selection bias; only for families whose router has one."""


@dataclass
class OuterSettings:
    """What the server does with the averaged pseudo-gradient."""

    name: str = _choice("average", "average", "nesterov", "local_adamw", "des_loc")
    lr: float = _number(1.0, above=0)
    expert_lr: float = _number(0.0, at_least=0)
    """Outer rate of experts; 0 means `lr`."""
    momentum: float = _number(0.0, at_least=0, below=1)
    sqrt_holders: bool = False
    """Multiply every averaged pseudo-gradient by the square root of its replies (DiPaCo)."""
    weighting: str = _choice("tokens", "tokens", "uniform", "routed")
    router_rows: str = _choice("all", "all", "holders")
    """In `skip_token`: average a router row over all workers (paper) or its expert's holders."""
    first_moment_every: int = _number(3, at_least=1)
    second_moment_every: int = _number(6, at_least=1)
    fragments: int = _number(1, at_least=1)


@dataclass
class WireSettings:
    """How numbers travel."""

    up: str = _choice("float32", "float32", "bfloat16", "float16")
    down: str = _choice("float32", "float32", "bfloat16", "float16")


@dataclass
class EvalSettings:
    """Evaluation of the assembled global model on held-out text."""

    every: int = _number(1, at_least=1)
    batch_size: int = _number(16, at_least=1)
    max_tokens: int = _number(32768, at_least=1)
    probe_tokens: int = _number(512, at_least=0)
    """Held-out tokens on which the choices of routers are compared; 0 compares nothing."""
    sample_prompt: str = "The "
    sample_tokens: int = _number(80, at_least=0)


@dataclass
class CheckpointSettings:
    """When the server writes its state, and how much of the past it keeps."""

    every: int = _number(1, at_least=1)
    keep: int = _number(2, at_least=1)


@dataclass
class FederationSettings:
    """Patience, quorum, and what the simulation engine gives each worker."""

    min_workers: int = _number(1, at_least=1)
    cpus_per_worker: int = _number(1, at_least=1)
    gpus_per_worker: float = _number(0.0, at_least=0)
    round_timeout_seconds: float = _number(3600, above=0)
    node_wait_seconds: float = _number(30, at_least=0)


@dataclass
class Settings:
    """Everything a run depends on."""

    preset: str = "demo"
    experiment: str = "fomoe"
    engine: str = _choice("in_process", "in_process", "flower")
    output_dir: str = ""
    resume: str = ""
    seed: int = _number(0, at_least=0, below=2**31)
    rounds: int = _number(8, at_least=1)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    layout: LayoutSettings = field(default_factory=LayoutSettings)
    local: LocalSettings = field(default_factory=LocalSettings)
    balance: BalanceSettings = field(default_factory=BalanceSettings)
    outer: OuterSettings = field(default_factory=OuterSettings)
    wire: WireSettings = field(default_factory=WireSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dictionaries, ready for YAML or JSON."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write the resolved settings as YAML."""
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(self.to_dict())), encoding="utf-8")


SHARED_EXPERT_FAMILIES = ("deepseek_v3", "glm4_moe")
"""Families of DeepSeek-V3's block: shared experts, sigmoid scores, group-limited routing."""

BIASED_FAMILIES = ("deepseek_v3", "glm4_moe", "fomoe")
"""Families whose router adds a bias of each expert to its score when it chooses."""

PATHS = (("data", "path"), ("data", "tokenizer"), ("model", "pretrained"), ("layout", "path"))
"""Settings, by section, that name a file or folder of this machine."""

LOCAL_STREAMS = ("parquet", "json", "text")
"""Values of `data.dataset` that stream the local files of `data.path`."""

RESUMABLE_KEYS = (
    "rounds",
    "engine",
    "resume",
    "checkpoint",
    "federation",
    "eval",
    "local.device",
    "local.threads",
)
"""What may change when a run is resumed; everything else is the run's identity."""


def conf_dir() -> Path:
    """Return the folder of Hydra groups: beside the package (checkout, bundle), else inside it."""
    package = Path(__file__).resolve().parent
    for candidate in (package.parent / "conf", package / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise SettingsError(f"no conf/config.yaml beside {package}: reinstall fomoe-flwr")


def load_settings(overrides: Iterable[str] = ()) -> Settings:
    """Compose `conf/` with Hydra overrides and return checked settings.

    Raises SettingsError, one line, for an unknown key, a wrong type, a value out of range or
    values that contradict each other. With `resume=RUN_DIR` the stored settings of that run are
    taken and only `RESUMABLE_KEYS` may be overridden.
    """
    overrides = list(overrides)
    resume = _resume_target(overrides)
    settings = _stored(resume, overrides) if resume else _composed(overrides)
    check(settings)
    return settings


def read_settings(path: Path) -> Settings:
    """Read the settings that a run stored as `config.yaml`."""
    try:
        stored = OmegaConf.load(path)
    except (OSError, YAMLError) as error:
        raise SettingsError(f"cannot read settings from {path}: {one_line(error)}") from error
    return _typed(stored)


def settings_from_dict(fields: Mapping[str, Any]) -> Settings:
    """Rebuild settings that travelled as JSON, with the same checks."""
    settings = _typed(OmegaConf.create(dict(fields)))
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Refuse values out of range and values that contradict each other."""
    for key, value, options, bounds in _limits(settings):
        if options is not None and value not in options:
            raise SettingsError(
                f"{key}={value} is not one of {', '.join(options)}{_did_you_mean(value, options)}"
            )
        for broken, text in _broken_bounds(value, bounds):
            if broken:
                raise SettingsError(f"{key}={value} is out of range: it must be {text}")
    _check_model(settings.model)
    _check_experiment(settings)
    _check_partitioned(settings)
    _check_outer(settings)
    _check_balance(settings)
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


def one_line(error: object) -> str:
    """Fold an error's text into one line."""
    return re.sub(r"\s+", " ", str(error)).strip()


def _check_model(model: ModelSettings) -> None:
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
    if model.top_k > model.num_experts:
        raise SettingsError(
            f"model.top_k={model.top_k} needs model.num_experts >= {model.top_k} "
            f"(got {model.num_experts})"
        )
    _check_family(model)


def _check_family(model: ModelSettings) -> None:
    """Refuse what a family cannot express."""
    family = model.family
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


def _check_partitioned(settings: Settings) -> None:
    """Refuse `partitioned` where a worker's router would have too few rows for its family."""
    model, layout = settings.model, settings.layout
    if model.family not in SHARED_EXPERT_FAMILIES or model.routing != "partitioned":
        return
    even = model.num_experts * layout.overlap // layout.num_workers
    fewest = min(layout.residents, default=even)
    if fewest < 2:
        raise SettingsError(
            f"model.routing=partitioned with model.family={model.family} needs two residents per "
            f"worker, model.num_experts * layout.overlap / layout.num_workers >= 2 (got {fewest}): "
            "its router ranks a group of experts by its best two"
        )


def _check_outer(settings: Settings) -> None:
    outer, local = settings.outer, settings.local
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
        if "float16" in (settings.wire.up, settings.wire.down):
            raise SettingsError(
                f"outer={outer.name} averages Adam's moments, which float16 rounds to 0: use "
                "bfloat16 or float32 for wire.up and wire.down"
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
    if outer.fragments > settings.rounds:
        raise SettingsError(
            f"outer.fragments={outer.fragments} must be <= rounds={settings.rounds}: otherwise "
            "some fragment is never synchronised"
        )


def _check_balance(settings: Settings) -> None:
    if settings.balance.bias_rate and settings.model.family not in BIASED_FAMILIES:
        raise SettingsError(
            f"balance.bias_rate={settings.balance.bias_rate} needs a router with a selection bias: "
            f"model.family={settings.model.family} is not one of {', '.join(BIASED_FAMILIES)}"
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


def _broken_bounds(
    value: Any, bounds: Mapping[str, float | None] | None
) -> Iterable[tuple[bool, str]]:
    if bounds is None:
        return
    text = " and ".join(
        f"{name} {bound}"
        for name, bound in (
            (">=", bounds["at_least"]),
            (">", bounds["above"]),
            ("<=", bounds["at_most"]),
            ("<", bounds["below"]),
        )
        if bound is not None
    )
    low, above, high, below = (bounds[k] for k in ("at_least", "above", "at_most", "below"))
    # Written so that NaN breaks every bound.
    yield low is not None and not value >= low, text
    yield above is not None and not value > above, text
    yield high is not None and not value <= high, text
    yield below is not None and not value < below, text
    yield isinstance(value, float) and not math.isfinite(value), f"finite and {text}"


def _did_you_mean(word: str, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(options), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _known_keys(node: Any, prefix: str = "") -> Iterable[str]:
    for item in fields(node):
        key = prefix + item.name
        yield key
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from _known_keys(value, key + ".")


def _unknown_key(key: str) -> SettingsError:
    known = list(_known_keys(Settings()))
    return SettingsError(
        f"{key} is not a setting{_did_you_mean(key, known) or '; see conf/ for all settings'}"
    )


def _typed(node: Any) -> Settings:
    """Merge a plain config into the schema: unknown keys and wrong types are refused."""
    try:
        # A composed config already carries the schema and would wave `+extra` keys through.
        plain = OmegaConf.to_container(node, resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.create(plain))
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _explain(error) from error
    assert isinstance(settings, Settings)
    return settings


def _explain(error: OmegaConfBaseException) -> SettingsError:
    key = str(getattr(error, "full_key", "") or "")
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(key)
    reason = one_line(str(error).splitlines()[0])
    return SettingsError(f"{key}: {reason}" if key else reason)


def _composed(overrides: list[str]) -> Settings:
    # Flower's simulation actors and in-process runs reuse processes, and Hydra's state is global.
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = compose("config", overrides=overrides)
    except MissingConfigException as error:
        raise _unknown_choice(error) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        # Hydra's own refusal of a group that is no name (`local=5`) is a bare ValueError.
        raise _override_error(error) from error
    finally:
        GlobalHydra.instance().clear()
    return _typed(composed)


def _unknown_choice(error: MissingConfigException) -> SettingsError:
    group, _, choice = str(error.missing_cfg_file).partition("/")
    options = sorted(str(option) for option in error.options or [])
    return SettingsError(
        f"{group}={choice} is not one of {', '.join(options)}{_did_you_mean(choice, options)}"
    )


def _override_error(error: Exception) -> SettingsError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException):
            return _explain(cause)
        cause = cause.__cause__
    found = re.match(r"Could not override '([^']+)'", str(error))
    if found:
        return _unknown_key(found[1])
    return SettingsError(one_line(str(error).split("See https://")[0]))


def _parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise _override_error(error) from error


def _resume_target(overrides: list[str]) -> str:
    targets = [o.value() for o in _parse(overrides) if o.key_or_group == "resume"]
    return str(targets[-1]) if targets and targets[-1] else ""


def _stored(resume: str, overrides: list[str]) -> Settings:
    run_dir = Path(resume).expanduser().resolve()
    if not (run_dir / "config.yaml").is_file():
        raise SettingsError(f"resume={resume} is not a run directory: it has no config.yaml")
    node = OmegaConf.create(read_settings(run_dir / "config.yaml").to_dict())
    for override in _parse(overrides):
        key = override.key_or_group
        if not any(key == k or key.startswith(k + ".") for k in RESUMABLE_KEYS):
            raise SettingsError(
                f"{key} cannot change when a run is resumed; these can: {', '.join(RESUMABLE_KEYS)}"
            )
        OmegaConf.update(node, key, override.value(), force_add=False)
    node.resume = str(run_dir)
    node.output_dir = str(run_dir)
    return _typed(node)


ConfigStore.instance().store(name="settings", node=Settings)
