"""Upcycling: a MoE made of a dense checkpoint, with the dense model's outputs at the start.

Every expert is a copy of the dense feed-forward block (arXiv 2212.05055), and routers are new. With
a granularity of G a copy is cut into G experts of 1/G of its width, whose router rows are alike: a
token that chooses one of them chooses all (virtual groups, arXiv 2410.07524). Their outputs are
weighted by 1/G, so what leaves them is multiplied by G.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomoe_flwr.config import ModelSettings, SettingsError
from fomoe_flwr.model.architecture import described_settings
from fomoe_flwr.model.families import class_of, config_class
from fomoe_flwr.model.recipes import Recipes
from fomoe_flwr.model.state import State, StateSpec
from fomoe_flwr.model.stored import StoredTensors, config_words, made_config, refusal
from fomoe_flwr.parameters.keys import is_any_expert_key, is_router_key

_SETTING = "model.upcycle"
_MOE_OF = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Dense families, and the MoE family whose attention and norms are theirs."""

_COPIED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters"),
    *("max_position_embeddings", "tie_word_embeddings", "initializer_range", "attention_bias"),
)


def upcycled_settings(model: ModelSettings, own: Iterable[str]) -> ModelSettings:
    """Return the settings of the MoE that `model.upcycle` becomes; needs `config.json` alone.

    Raises SettingsError for a folder that cannot become one, and for fields that are not to choose.
    """
    folder = Path(model.upcycle).expanduser()
    dense = _dense_config(folder)
    _check_cut(folder, model, dense.intermediate_size)
    described = _described(model, dense)
    free = {"num_experts", "top_k", "routing", "name"}
    names = {key.split(".")[0] for key in own if not key.startswith("upcycle")} - free
    apart = [
        f"model.{name}={getattr(model, name)} (it has {getattr(described, name)})"
        for name in sorted(names)
        if getattr(model, name) != getattr(described, name)
    ]
    if apart:
        raise _refusal(folder, f"contradicts {', '.join(apart)}: leave them out")
    return described


def _check_cut(folder: Path, model: ModelSettings, width: int) -> None:
    parts = model.upcycle_granularity
    if parts < 1:
        raise SettingsError(f"model.upcycle_granularity={parts} is out of range: it must be >= 1")
    if width % parts or model.num_experts % parts or model.top_k % parts or model.num_experts < 1:
        raise _refusal(
            folder,
            f"cannot be cut: model.upcycle_granularity={parts} must divide its width {width}, "
            f"model.num_experts={model.num_experts} and model.top_k={model.top_k}",
        )


def _described(model: ModelSettings, dense: Any) -> ModelSettings:
    width = dense.intermediate_size // model.upcycle_granularity
    kind = config_class(_MOE_OF[dense.model_type])
    entries = {name: getattr(dense, name) for name in _COPIED if hasattr(dense, name)}
    entries["sliding_window"] = window = _window(dense)
    sizes = {"num_experts_per_tok": model.top_k, "intermediate_size": width}
    if kind.model_type == "mixtral":
        sizes |= {"num_local_experts": model.num_experts}
    else:
        sizes |= {"num_experts": model.num_experts, "moe_intermediate_size": width}
        entries |= {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}
        entries["use_sliding_window"] = window is not None
    return described_settings(kind(**entries, **sizes))


def _window(dense: Any) -> int | None:
    """Return the window of all layers; Llama has none, whatever its `config.json` says."""
    is_full = dense.model_type == "qwen3" and "sliding_attention" not in dense.layer_types
    if is_full or dense.model_type == "llama":
        return None
    found: int | None = dense.sliding_window
    return found


def fill_upcycled(model: ModelSettings, spec: StateSpec, state: State, seed: int) -> None:
    """Write a dense checkpoint into the state of a MoE, one expert in memory at a time."""
    parts = model.upcycle_granularity
    generator = torch.Generator().manual_seed(seed)
    with _opened(model) as dense:
        for entry in (*spec.shared, *spec.expert):
            target = state[entry.key]
            if is_router_key(entry.key):
                # Fresh, as it is; the parts of a copy share a row.
                target.copy_(target[::parts].repeat_interleave(parts, 0))
            elif not is_any_expert_key(entry.key):
                target.copy_(_read(dense, entry.key))
            else:
                _fill_experts(model, dense, entry.key, target, generator)


def _fill_experts(
    model: ModelSettings, dense: Recipes, key: str, target: Tensor, source: torch.Generator
) -> None:
    prefix, _, leaf = key.partition("experts.")
    parts = model.upcycle_granularity
    if leaf == "down_proj":
        pieces = [p * parts for p in _read(dense, f"{prefix}down_proj.weight").chunk(parts, 1)]
    else:
        names = ("gate_proj", "up_proj")
        halves = [_read(dense, f"{prefix}{name}.weight").chunk(parts) for name in names]
        pieces = [torch.cat(both) for both in zip(*halves, strict=True)]
    for row in range(len(target)):
        piece = pieces[row % parts]
        target[row].copy_(piece)
        if model.upcycle_noise:
            noise = torch.randn(piece.shape, generator=source)
            target[row].add_(noise, alpha=model.upcycle_noise * float(piece.std()))


def _dense_config(folder: Path) -> Any:
    words = config_words(folder, _SETTING)
    kind = words.get("model_type")
    if kind not in _MOE_OF:
        known = ", ".join(_MOE_OF)
        raise _refusal(folder, f"has model_type={kind}, which is not one of {known}")
    if words.get("quantization_config"):
        raise _refusal(folder, "is quantised: store it in bfloat16 first")
    if words.get("mlp_bias") or (words.get("attention_bias") and kind != "qwen3"):
        raise _refusal(folder, "has biases, which the MoE family lacks")
    config: Any = made_config(folder, words, _SETTING)
    if kind == "qwen3" and len(set(config.layer_types)) > 1:
        raise _refusal(
            folder,
            f"mixes kinds of attention (layer_types), {_MOE_OF[kind]} has one for all layers",
        )
    return config


def check_dense(model: ModelSettings) -> None:
    """Refuse a dense checkpoint whose files or tensors do not fit; reads headers only."""
    with _opened(model, headers_only=True) as dense:
        dense.check()


@contextmanager
def _opened(model: ModelSettings, *, headers_only: bool = False) -> Iterator[Recipes]:
    folder = Path(model.upcycle).expanduser()
    config = _dense_config(folder)
    with torch.device("meta"):
        whole = class_of(config)._from_config(config)
    with StoredTensors(folder, _SETTING, headers_only=headers_only) as stored:
        yield Recipes(whole, stored)


def _read(dense: Recipes, key: str) -> Tensor:
    return dense.read(key, None, tuple(dense.model.get_parameter(key).shape))


def _refusal(folder: Path, what: str) -> SettingsError:
    return refusal(folder, what, _SETTING)
