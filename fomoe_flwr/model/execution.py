"""Execution: how a model computes its steps on a device. What it computes stays the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from fomoe_flwr.config import Settings
from fomoe_flwr.config.execution import is_compiled, is_graphed, is_loss_chunked
from fomoe_flwr.model.attention import attend_to_full_windows, is_causal_only
from fomoe_flwr.model.blocks import moe_blocks
from fomoe_flwr.model.experts import set_core


@dataclass(frozen=True)
class Execution:
    """The settings with every `auto` resolved."""

    experts: str = "auto"
    chunked_loss: bool = False
    compiled: bool = False
    cuda_graph: bool = False
    checkpoint_activations: bool = False

    @classmethod
    def choose(cls, settings: Settings, device: torch.device, num_processes: int = 1) -> Execution:
        """Resolve `auto` by device, vocabulary, precision and processes of a worker."""
        given, kind = settings.execution, device.type
        graph = is_graphed(given, kind, settings.local.precision, num_processes)
        if settings.model.architecture and given.cuda_graph == "auto":
            graph = False  # Nobody knows what its layers ask of the host.
        return cls(
            experts="static" if graph and given.experts == "auto" else given.experts,
            chunked_loss=is_loss_chunked(given, kind, settings.model.vocab_size),
            compiled=is_compiled(given, kind),
            cuda_graph=graph,
            checkpoint_activations=given.checkpoint_activations,
        )

    def prepare(self, model: PreTrainedModel) -> None:
        """Set a model up: the experts' core, compiled parts, activation checkpointing."""
        set_core(model, self.experts)
        has_plain_attention = is_causal_only(model)
        if has_plain_attention:
            attend_to_full_windows(model)
        if self.compiled and has_plain_attention:
            for module in _dense_parts(model):
                module.compile(dynamic=False)
        if self.checkpoint_activations:
            # transformers has renamed it.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _dense_parts(model: PreTrainedModel) -> list[nn.Module]:
    """List attention and norms: what has the same shapes in every step, whatever the data."""
    routed = {
        id(part)
        for block in moe_blocks(model)
        for module in (block.router, block.experts)
        for part in module.modules()
    }
    return [
        child
        for layer in model.base_model.layers  # type: ignore[union-attr]
        for name, child in layer.named_children()
        if id(child) not in routed and ("attn" in name or "norm" in name)
    ]
