"""Upcycling: a MoE made of a dense checkpoint, with the dense model's outputs at the start.

Every expert is a copy of the dense feed-forward block (arXiv 2212.05055), and routers are new. With
a granularity of G a copy is cut into G experts of 1/G of its width, whose router rows are alike: a
token that chooses one of them chooses all (virtual groups, arXiv 2410.07524). Their outputs are
weighted by 1/G, so what leaves them is multiplied by G.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomoe_flwr.config import ModelSettings, SettingsError
from fomoe_flwr.model.architecture import described_settings
from fomoe_flwr.model.families import config_class
from fomoe_flwr.model.state import State, StateSpec
from fomoe_flwr.model.stored import StoredTensors, config_words, made_config, refusal
from fomoe_flwr.parameters.keys import is_any_expert_key, is_router_key

_SETTING = "model.upcycle"
_MOE_OF = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Dense families, and the MoE family whose attention and norms are theirs."""

_COPIED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "sliding_window"),
    *("max_position_embeddings", "tie_word_embeddings", "initializer_range", "attention_bias"),
    *("use_sliding_window", "max_window_layers", "layer_types"),
)


def upcycled_settings(model: ModelSettings, own: Iterable[str]) -> ModelSettings:
    """Return the settings of the MoE that `model.upcycle` becomes; needs `config.json` alone.

    Raises SettingsError for a folder that cannot become one, and for fields that are not to choose.
    """
    folder, free = Path(model.upcycle).expanduser(), {"num_experts", "top_k", "routing", "name"}
    strange = sorted(n for n in set(own) - free if not n.startswith("upcycle"))
    if strange:
        raise _refusal(folder, f"takes its shape with it: leave out model.{strange[0]}")
    dense = _dense_config(folder)
    parts, copies = model.upcycle_granularity, model.num_experts // model.upcycle_granularity
    width = dense.intermediate_size
    if width % parts or model.num_experts % parts or model.top_k % parts or copies < 1:
        raise _refusal(
            folder,
            f"cannot be cut: model.upcycle_granularity={parts} must divide its width {width}, "
            f"model.num_experts={model.num_experts} and model.top_k={model.top_k}",
        )
    kind = config_class(_MOE_OF[dense.model_type])
    entries = {name: getattr(dense, name) for name in _COPIED if hasattr(dense, name)}
    sizes = {"num_experts_per_tok": model.top_k, "intermediate_size": width // parts}
    if kind.model_type == "mixtral":
        sizes |= {"num_local_experts": model.num_experts}
    else:
        sizes |= {"num_experts": model.num_experts, "moe_intermediate_size": width // parts}
        entries |= {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}
    return described_settings(kind(**entries, **sizes))


def fill_upcycled(model: ModelSettings, spec: StateSpec, state: State, seed: int) -> None:
    """Write a dense checkpoint into the state of a MoE, one expert in memory at a time."""
    parts = model.upcycle_granularity
    generator = torch.Generator().manual_seed(seed)
    with dense_tensors(model) as stored:
        for entry in (*spec.shared, *spec.expert):
            target = state[entry.key]
            if is_router_key(entry.key):
                # Fresh, as it is; the parts of a copy share a row.
                target.copy_(target[::parts].repeat_interleave(parts, 0))
            elif not is_any_expert_key(entry.key):
                target.copy_(stored.rows(entry.key, None))
            else:
                _fill_experts(model, stored, entry.key, target, generator)


def _fill_experts(
    model: ModelSettings, stored: StoredTensors, key: str, target: Tensor, source: torch.Generator
) -> None:
    prefix, _, leaf = key.partition("experts.")
    parts = model.upcycle_granularity
    if leaf == "down_proj":
        pieces = [p * parts for p in stored.rows(f"{prefix}down_proj.weight", None).chunk(parts, 1)]
    else:
        names = ("gate_proj", "up_proj")
        halves = [stored.rows(f"{prefix}{name}.weight", None).chunk(parts) for name in names]
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
    return made_config(folder, words, _SETTING)


def dense_tensors(model: ModelSettings) -> StoredTensors:
    """Open the dense checkpoint. Raises SettingsError if a file is missing or damaged."""
    return StoredTensors(Path(model.upcycle).expanduser(), _SETTING)


def _refusal(folder: Path, what: str) -> SettingsError:
    return refusal(folder, what, _SETTING)
