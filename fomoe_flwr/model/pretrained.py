"""Pretrained checkpoints: any transformers MoE folder, read into our state keys.

Only what is asked for is read: of an expert that a worker does not hold, not one byte. Nothing is
unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from fomoe_flwr.config import ModelSettings, SettingsError
from fomoe_flwr.model.architecture import ENTRIES_OF, described_settings, entries_of
from fomoe_flwr.model.families import FAMILIES, config_class, text_part, transformers_config
from fomoe_flwr.model.recipes import Recipes
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.state import State, StateSpec
from fomoe_flwr.model.stored import StoredTensors, config_words, made_config, refusal

_SETTING_OF = {
    entry: name
    for name, entries in ENTRIES_OF.items()
    if name not in ("expert_size", "init_std")
    for entry in entries
} | {
    "max_position_embeddings": "max_positions",
    "base_hidden_size": "base_hidden_size",
    "base_num_layers": "base_num_layers",
}
"""Names in a transformers configuration, aliases included, and ours."""

_WITHOUT_EFFECT = {
    *("architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("dtype", "transformers_version", "_name_or_path", "use_cache", "initializer_range"),
    *("max_position_embeddings", "max_window_layers", "attention_dropout", "pretraining_tp"),
    *("router_aux_loss_coef", "output_router_logits", "num_mtp_layers"),
    *("num_nextn_predict_layers", "_experts_implementation", "_attn_implementation"),
}
"""Configuration entries that may differ: they change no logit of a token inside the window."""


def read_pretrained(
    folder: str | Path,
    model: ModelSettings,
    spec: StateSpec,
    residents: Residents | None = None,
) -> dict[str, Tensor]:
    """Read the state that `spec` names from a transformers checkpoint, in fp32.

    With `residents`, expert keys have those rows only, `[R, ...]`, and only those are read.
    `spec` may be a part of a model's (its `shared` or `expert` entries only). Raises
    SettingsError, naming `model.pretrained`, if the checkpoint is not this model.
    """
    folder = Path(folder).expanduser()
    with _opened(folder, model) as recipes:
        state = {e.key: recipes.read(e.key, None, e.shape) for e in spec.shared}
        for entry in spec.expert:
            assert entry.layer is not None
            rows = range(entry.shape[0]) if residents is None else residents[entry.layer]
            state[entry.key] = recipes.read(entry.key, rows, entry.shape)
    return state


def fill_pretrained(
    folder: str | Path, model: ModelSettings, spec: StateSpec, state: State
) -> None:
    """Read a transformers checkpoint into a full state, one expert in memory at a time.

    Raises SettingsError as `read_pretrained` does.
    """
    folder = Path(folder).expanduser()
    with _opened(folder, model) as recipes:
        for entry in spec.shared:
            state[entry.key].copy_(recipes.read(entry.key, None, entry.shape))
        for entry in spec.expert:
            for row in range(entry.shape[0]):
                state[entry.key][row].copy_(recipes.read(entry.key, [row], entry.shape)[0])


def check_weights(model: ModelSettings) -> None:
    """Refuse a checkpoint whose files or tensors are not this model's; reads headers only."""
    folder = Path(model.pretrained).expanduser()
    with _opened(folder, model, headers_only=True) as recipes:
        try:
            recipes.check()
        except SettingsError as error:
            if "text_config" not in config_words(folder):
                raise
            what = "is of pictures and text, and its text part is not found"
            raise refusal(folder, f"{what}: save that part alone ({error})") from error


def pretrained_settings(model: ModelSettings) -> ModelSettings:
    """Return the settings of the model in the folder `model.pretrained`.

    By the fields of `model` where they can name it, else as its stock class describes it. Needs
    `config.json` alone. Raises SettingsError for a model that cannot be trained here.
    """
    folder = Path(model.pretrained).expanduser()
    config = _read_config(folder)
    _check_heads(folder, config)
    if config.model_type in FAMILIES:
        try:
            return ModelSettings(**pretrained_shape(folder), name=config.model_type)
        except SettingsError:
            pass  # The fields do not name all of it; the class does.
    return described_settings(config)


def _check_heads(folder: Path, config: Any) -> None:
    """Refuse heads that the stock class builds and cannot run."""
    if config.model_type != "olmoe":
        return
    head, width = getattr(config, "head_dim", None), config.hidden_size
    if head not in (None, fitting := width // config.num_attention_heads):
        raise refusal(
            folder,
            f"has head_dim={head}, it must be {fitting}: the olmoe class normalises queries over "
            f"hidden_size={width}",
        )


def pretrained_shape(folder: str | Path) -> dict[str, Any]:
    """Return the fields of `ModelSettings` that describe a checkpoint's model.

    Raises SettingsError if no family of ours can express it.
    """
    folder = Path(folder).expanduser()
    config = _read_config(folder)
    fields: dict[str, Any] = {"family": config.model_type, "norm_topk": True}
    for theirs, ours in _SETTING_OF.items():
        value = getattr(config, theirs, None)
        if value is not None:
            fields[ours] = value
    if config.model_type in ("olmoe", "deepseek_v3"):
        fields.pop("head_size", None)
    if config.model_type == "deepseek_v3":
        fields["head_size"] = config.v_head_dim
    is_narrow = hasattr(config, "moe_intermediate_size")
    fields["expert_size"] = config.moe_intermediate_size if is_narrow else config.intermediate_size
    fields["rope_theta"] = _rope_theta(config)
    check_pretrained(folder, ModelSettings(**fields))
    return fields


@contextmanager
def _opened(folder: Path, model: ModelSettings, *, headers_only: bool = False) -> Iterator[Recipes]:
    """Open a checkpoint that must be this model's."""
    check_pretrained(folder, model)
    whole = build_model(model, transformers_config(model, 0), device="meta")
    block = _block(folder, config_words(folder).get("quantization_config"))
    with StoredTensors(folder, block=block, headers_only=headers_only) as stored:
        yield Recipes(whole, stored)


def _block(folder: Path, quantised: Any) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale in a checkpoint of 8 bits."""
    found = (quantised or {}).get("weight_block_size", [128, 128])
    if found is None:
        return None
    if isinstance(found, list) and [type(n) is int and n >= 1 for n in found] == [True, True]:
        return found[0], found[1]
    raise refusal(folder, f"has weight_block_size={found}, which must be null or two sizes >= 1")


def _read_config(folder: Path) -> PreTrainedConfig:
    words = config_words(folder)
    kind = words.get("model_type")
    try:
        config_class(str(kind))
    except SettingsError:
        raise refusal(
            folder,
            f"has model_type={kind}, which transformers {transformers.__version__} does not know",
        ) from None
    quantised = words.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if quantised and method != "fp8":
        raise refusal(
            folder,
            f"is quantised with {method}: store it in bfloat16 first (fp8 with scales is read)",
        )
    _block(folder, quantised)
    return text_part(made_config(folder, words))


def check_pretrained(folder: Path, model: ModelSettings) -> None:
    """Refuse a checkpoint whose configuration computes something else than the settings do."""
    theirs, ours = _read_config(folder), transformers_config(model, 0)
    if model.architecture:
        _check_described(folder, theirs, model)
        return
    if theirs.model_type != model.family:
        raise refusal(
            folder,
            f"has model_type={theirs.model_type}, the settings have model.family={model.family}",
        )
    their_words, our_words = theirs.to_dict(), ours.to_dict()
    # An entry that the class does not know has no effect; a dense width has none either.
    known = set(type(ours)().to_dict()) - _WITHOUT_EFFECT
    if hasattr(ours, "moe_intermediate_size"):
        known.discard("intermediate_size")
    for key in sorted(known):
        found, expected = their_words.get(key), our_words.get(key)
        if key == "head_dim" and found is None:
            found = theirs.hidden_size // theirs.num_attention_heads
        if found == expected:
            continue
        alias = {v: k for k, v in ours.attribute_map.items()}.get(key, key)
        setting = _SETTING_OF.get(key) or _SETTING_OF.get(alias)
        if key in ("intermediate_size", "moe_intermediate_size"):
            setting = "expert_size"
        if key == "rope_parameters" and _without_theta(found) == _without_theta(expected):
            setting = "rope_theta"
        advice = f"; set model.{setting}" if setting else ": no setting expresses it"
        raise refusal(folder, f"has {key}={found}, the settings expect {expected}{advice}")


def _check_described(folder: Path, theirs: PreTrainedConfig, model: ModelSettings) -> None:
    """Refuse a folder whose configuration is not the one that the settings hold."""
    if entries_of(theirs) != model.architecture["config"]:
        raise refusal(folder, "has another config.json than the run began with")


def _rope_theta(config: PreTrainedConfig) -> float:
    parameters = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def _without_theta(parameters: Any) -> Any:
    if not isinstance(parameters, dict):
        return parameters
    return {key: value for key, value in parameters.items() if key != "rope_theta"}
