"""Measure how a released checkpoint is read: by a worker with half of the experts, and by a server.

    python benchmarks/pretrained.py --folder FOLDER --json benchmarks/results/pretrained.json
    python benchmarks/pretrained.py --folder FOLDER --shape tiny

Makes a checkpoint up: random bfloat16 weights of the shape, experts one by one, one file a layer,
as released ones are. The limit is reading the same bytes with `read()`.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from measurement import parser_of, save
from safetensors.torch import save_file

from fomoe_flwr.config import ModelSettings, load_settings
from fomoe_flwr.data.source import prepare_tokenizer
from fomoe_flwr.files import save_json
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.pretrained import read_pretrained
from fomoe_flwr.model.state import StateSpec
from fomoe_flwr.parameters.shapes import layer_groups
from fomoe_flwr.report.environment import environment

SHAPES = {"olmoe-6b9": "model=olmoe-6b9", "tiny": "model=olmoe-tiny"}


def make(model: ModelSettings, folder: Path) -> None:
    """Write the made-up checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    outside, layers = layer_groups(model)
    for number in (-1, *layers.numbers):
        group = outside if number < 0 else replace(layers, numbers=(number,))
        shapes = group.shapes.items() if number < 0 else _of_layer(layers, number)
        tensors = dict(_stored(model, shapes))
        name = f"model-{number + 1:05d}.safetensors"
        save_file(tensors, folder / name)
        files |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": files}
    save_json(index, folder / "model.safetensors.index.json")
    config = transformers_config(model, 2048)
    save_json(config.to_dict() | {"model_type": model.family}, folder / "config.json")


def _of_layer(layers: Any, number: int) -> Any:
    return [(key.replace(".0.", f".{number}.", 1), shape) for key, shape in layers.shapes.items()]


def _stored(model: ModelSettings, shapes: Any) -> Any:
    """Yield names and tensors as `save_pretrained` would write them."""
    for key, shape in shapes:
        prefix, is_expert, leaf = key.rpartition(".experts.")
        if not is_expert:
            yield key, _random(*shape)
            continue
        for expert in range(model.num_experts):
            if leaf == "down_proj":
                yield f"{prefix}.experts.{expert}.down_proj.weight", _random(*shape[1:])
                continue
            for part in ("gate_proj", "up_proj"):
                half = (shape[1] // 2, shape[2])
                yield f"{prefix}.experts.{expert}.{part}.weight", _random(*half)


@cache
def _pool() -> torch.Tensor:
    """Random numbers for all tensors: to draw billions takes minutes."""
    return torch.empty(2**27, dtype=torch.bfloat16).normal_(std=0.02)


def _random(*shape: int) -> torch.Tensor:
    return _pool()[: math.prod(shape)].view(shape).clone()


def measure(model: ModelSettings, folder: Path) -> dict[str, Any]:
    """Read half of the experts, as a worker would; then the same bytes plainly."""
    spec = StateSpec.of(model, transformers_config(model, 2048))
    held = tuple(tuple(range(model.num_experts // 2)) for _ in range(spec.num_layers))
    began = time.perf_counter()
    state = read_pretrained(folder, model, spec, held)
    seconds = time.perf_counter() - began
    wanted = sum(value.numel() for value in state.values()) * 2
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    began, left = time.perf_counter(), wanted
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            while left > 0 and (block := opened.read(min(left, 2**24))):
                left -= len(block)
    return {
        "parameters": sum(value.numel() for value in state.values()),
        "checkpoint_bytes": total,
        "wanted_bytes": wanted,
        "seconds": seconds,
        "gigabytes_per_second": wanted / seconds / 1e9,
        "plain_read_seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-6b9")
    options = parser.parse_args()
    settings = load_settings([SHAPES[options.shape]])
    model = settings.model
    if not (options.folder / "config.json").is_file():
        make(model, options.folder)
        prepare_tokenizer(settings).save_pretrained(options.folder)
    found = environment() | {"shape": options.shape} | measure(model, options.folder)
    print(json.dumps(found, indent=1))
    save(options.json, found)


if __name__ == "__main__":
    main()
