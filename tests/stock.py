"""References that know nothing of this package: stock `transformers` models and `torch.optim`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from micro import SEQUENCE
from torch import Tensor, nn
from transformers import PreTrainedModel

from fomoe_flwr.config import LocalSettings, ModelSettings
from fomoe_flwr.model.families import model_class, transformers_config


def stock(model: ModelSettings, weights: dict[str, Tensor]) -> PreTrainedModel:
    """Return the stock model of a family with these weights, in training mode."""
    config = transformers_config(model, SEQUENCE)
    built = model_class(model.family)._from_config(config, experts_implementation="eager")
    missing, unexpected = built.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.tie_embeddings else [])
    return built.train()


def stock_adamw(model: nn.Module, local: LocalSettings) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        matrix = "_proj" in name
        (decayed if matrix else plain).append(parameter)
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": local.weight_decay}, {"params": plain}],
        lr=local.lr,
        betas=(local.beta1, local.beta2),
        eps=local.eps,
        weight_decay=0.0,
    )


def stock_loss(
    model: PreTrainedModel, windows: Tensor, shape: ModelSettings, balance_loss: float
) -> Tensor:
    """Return cross-entropy plus `balance_loss` times the Switch loss, a mean over layers."""
    out = model(input_ids=windows[:, :-1], use_cache=False, output_router_logits=True)
    loss = F.cross_entropy(out.logits.flatten(0, 1), windows[:, 1:].flatten())
    balance = torch.zeros(())
    for logits in out.router_logits:
        probability = logits.softmax(-1)
        chosen = F.one_hot(probability.topk(shape.top_k).indices, shape.num_experts)
        share = chosen.sum(1).float().mean(0) / shape.top_k
        balance = balance + shape.num_experts * (share * probability.mean(0)).sum()
    return loss + balance_loss * balance / shape.num_layers
