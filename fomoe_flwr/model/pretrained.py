"""Pretrained checkpoints: any transformers MoE folder, read into our state keys.

Only what is asked for is read: of an expert that a worker does not hold, not one byte. Nothing is
unpickled: safetensors only. transformers stores experts one by one (`...experts.7.up_proj.weight`)
and stacks them when it loads; both forms are read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from fomoe_flwr.config import ModelSettings, SettingsError
from fomoe_flwr.model.architecture import described_settings
from fomoe_flwr.model.families import FAMILIES, config_class, transformers_config
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, State, StateSpec

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

_SETTING_OF = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_size",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "n_shared_experts": "num_shared_experts",
    "norm_topk_prob": "norm_topk",
    "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "norm_eps",
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

_PER_EXPERT: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "up_proj": ("up_proj",),
}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass
class Checkpoint:
    """The tensors of a folder by name, read when asked for. Use as a context manager."""

    folder: Path
    _files: dict[str, str] = field(init=False)
    _open: dict[str, Any] = field(init=False, default_factory=dict)
    _stack: ExitStack = field(init=False, default_factory=ExitStack)

    def __post_init__(self) -> None:
        self._files = _tensor_files(self.folder)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def rows(self, name: str, wanted: Sequence[int] | None, shape: tuple[int, ...]) -> Tensor:
        """Read `wanted` rows (None = all) of a tensor whose full shape must be `shape`, as fp32.

        Raises SettingsError if the tensor is missing, of another shape, or not of floats.
        """
        if name not in self._files:
            raise _refusal(self.folder, f"has no tensor {name}")
        try:
            view = self._file(self._files[name]).get_slice(name)
            found = tuple(view.get_shape())
            if found != shape:
                raise _refusal(
                    self.folder,
                    f"has {name} of shape {list(found)}, the settings expect {list(shape)}",
                )
            if wanted is None:
                read = view[:] if shape else self._file(self._files[name]).get_tensor(name)
            else:
                parts = [view[start:stop] for start, stop in _runs(wanted)]
                read = torch.cat(parts) if parts else torch.empty(0, *shape[1:])
        except (OSError, SafetensorError) as error:
            raise _refusal(self.folder, f"cannot give {name}: {error}") from error
        if not read.is_floating_point() or read.element_size() < 2:
            raise _refusal(self.folder, f"has {name} of {read.dtype}, too coarse to train")
        return read.float()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            opened = safe_open(self.folder / name, framework="pt")
            self._open[name] = self._stack.enter_context(opened)
        return self._open[name]


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
    check_pretrained(folder, model)
    with Checkpoint(folder) as checkpoint:
        state = {entry.key: _read_shared(checkpoint, model, entry) for entry in spec.shared}
        for entry in spec.expert:
            assert entry.layer is not None
            rows = range(entry.shape[0]) if residents is None else residents[entry.layer]
            state[entry.key] = _read_expert(checkpoint, model, entry, rows)
    return state


def fill_pretrained(
    folder: str | Path, model: ModelSettings, spec: StateSpec, state: State
) -> None:
    """Read a transformers checkpoint into a full state, one expert in memory at a time.

    Raises SettingsError as `read_pretrained` does.
    """
    folder = Path(folder).expanduser()
    check_pretrained(folder, model)
    with Checkpoint(folder) as checkpoint:
        for entry in spec.shared:
            state[entry.key].copy_(_read_shared(checkpoint, model, entry))
        for entry in spec.expert:
            for row in range(entry.shape[0]):
                state[entry.key][row].copy_(_read_expert(checkpoint, model, entry, [row])[0])


def pretrained_settings(model: ModelSettings) -> ModelSettings:
    """Return the settings of the model in the folder `model.pretrained`.

    By the fields of `model` where they can name it, else as its stock class describes it. Needs
    `config.json` alone. Raises SettingsError for a model that cannot be trained here.
    """
    folder = Path(model.pretrained).expanduser()
    config = _read_config(folder)
    if config.model_type in FAMILIES:
        try:
            return ModelSettings(**pretrained_shape(folder), name=config.model_type)
        except SettingsError:
            pass  # The fields do not name all of it; the class does.
    return described_settings(config)


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


def _read_shared(checkpoint: Checkpoint, model: ModelSettings, entry: Entry) -> Tensor:
    wanted = range(entry.start, entry.start + entry.shape[0]) if entry.start else None
    return checkpoint.rows(_stored_name(checkpoint, model, entry.key), wanted, entry.shape)


def _read_expert(
    checkpoint: Checkpoint, model: ModelSettings, entry: Entry, rows: Sequence[int]
) -> Tensor:
    name = _stored_name(checkpoint, model, entry.key)
    prefix, _, leaf = name.rpartition(".experts.")
    if name in checkpoint or not prefix:
        return checkpoint.rows(name, rows, entry.shape)
    parts = _PER_EXPERT[leaf]
    shape = (entry.shape[1] // len(parts), *entry.shape[2:])
    out = torch.empty(len(rows), *entry.shape[1:])
    for place, expert in enumerate(rows):
        for piece, part in zip(out[place].chunk(len(parts)), parts, strict=True):
            stored = _MIXTRAL[part] if model.family == "mixtral" else part
            key = f"{prefix}.experts.{expert}.{stored}.weight"
            piece.copy_(checkpoint.rows(key, None, shape))
    return out


def _stored_name(checkpoint: Checkpoint, model: ModelSettings, key: str) -> str:
    if model.family == "mixtral" and key not in checkpoint:
        return key.replace(".mlp.", ".block_sparse_moe.")
    return key


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Join neighbouring row numbers into (start, stop) ranges, in the given order."""
    start = stop = -1
    for row in rows:
        if row != stop:
            if start >= 0:
                yield start, stop
            start = row
        stop = row + 1
    if start >= 0:
        yield start, stop


def _tensor_files(folder: Path) -> dict[str, str]:
    """Return which file holds which tensor."""
    try:
        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            files: Mapping[str, str] = index["weight_map"]
            for name in sorted(set(files.values())):
                if Path(name).name != name or not (folder / name).is_file():
                    raise _refusal(folder, f"has no file {name}, which its {_INDEX} names")
            return dict(files)
        if (folder / _WEIGHTS).is_file():
            with safe_open(folder / _WEIGHTS, framework="pt") as stored:
                return dict.fromkeys(stored.keys(), _WEIGHTS)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise _refusal(folder, f"is damaged: {error}") from error
    raise _refusal(
        folder, f"has neither {_WEIGHTS} nor {_INDEX}: other formats are not read, convert it first"
    )


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = stored.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise _refusal(folder, f"has no readable config.json: {error}") from error
    try:
        known = config_class(str(kind))
    except SettingsError:
        raise _refusal(
            folder,
            f"has model_type={kind}, which transformers {transformers.__version__} does not know",
        ) from None
    if stored.get("quantization_config"):
        raise _refusal(folder, "is quantised: its weights cannot train")
    return known.from_dict(stored)


def check_pretrained(folder: Path, model: ModelSettings) -> None:
    """Refuse a checkpoint whose configuration computes something else than the settings do."""
    theirs, ours = _read_config(folder), transformers_config(model, 0)
    if model.architecture:
        _check_described(folder, theirs, model)
        return
    if theirs.model_type != model.family:
        raise _refusal(
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
        raise _refusal(folder, f"has {key}={found}, the settings expect {expected}{advice}")


def _check_described(folder: Path, theirs: PreTrainedConfig, model: ModelSettings) -> None:
    """Refuse a folder whose configuration is not the one that the settings hold."""
    if described_settings(theirs).architecture != model.architecture:
        raise _refusal(folder, "has another config.json than the run began with")


def _rope_theta(config: PreTrainedConfig) -> float:
    parameters = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def _without_theta(parameters: Any) -> Any:
    if not isinstance(parameters, dict):
        return parameters
    return {key: value for key, value in parameters.items() if key != "rope_theta"}


def _refusal(folder: Path, what: str) -> SettingsError:
    return SettingsError(f"model.pretrained={folder} {what}")
