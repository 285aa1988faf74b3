"""Evaluation of the assembled global model on held-out text: all experts, nothing skipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fomoe_flwr.data.tokens import TokenBlocks
from fomoe_flwr.model.head_loss import logits_of


@dataclass(frozen=True)
class EvalReport:
    """Loss on held-out windows; every token of a window is predicted once."""

    loss: float
    """Mean cross entropy, nats per token."""
    bits_per_byte: float
    """Total bits over the UTF-8 bytes of the predicted tokens: comparable between vocabularies."""
    tokens: int
    domain_bits_per_byte: Mapping[str, float]

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    indices: np.ndarray,
    byte_lengths: np.ndarray,
    batch_size: int,
    rows: int = 0,
) -> EvalReport:
    """Score the blocks `indices`; byte_lengths[v] is the number of bytes token v stands for.

    `rows` windows go through the layers in one call, `batch_size` (the default) through the head.
    """
    device = next(model.parameters()).device
    lengths = torch.from_numpy(byte_lengths)
    nats = torch.zeros(len(blocks.domains), dtype=torch.float64)
    size = torch.zeros(len(blocks.domains), dtype=torch.float64)
    tokens = 0
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(indices), rows or batch_size):
            chosen = indices[start : start + (rows or batch_size)]
            windows = torch.from_numpy(blocks.window(chosen))
            targets = windows[:, 1:]
            loss = _losses(model, windows.to(device), batch_size)
            domains = torch.from_numpy(blocks.domain_ids[chosen].astype(np.int64))
            nats.index_add_(0, domains, loss.sum(1).double().cpu())
            size.index_add_(0, domains, lengths[targets].sum(1).double())
            tokens += targets.numel()
    model.train(was_training)
    return EvalReport(
        loss=float(nats.sum()) / tokens,
        bits_per_byte=float(nats.sum()) / math.log(2) / float(size.sum()),
        tokens=tokens,
        domain_bits_per_byte={
            name: float(nats[i]) / math.log(2) / float(size[i])
            for i, name in enumerate(blocks.domains)
            if size[i] > 0
        },
    )


def _losses(model: PreTrainedModel, windows: Tensor, batch_size: int) -> Tensor:
    """Return the cross entropy of every token of [B, S + 1] windows, [B, S] nats."""
    ids, targets = windows[:, :-1], windows[:, 1:]
    trunk: Any = model.base_model
    answer = trunk(input_ids=ids, use_cache=False)
    hidden = answer.last_hidden_state
    losses = torch.empty(targets.shape, device=windows.device)
    for start in range(0, len(windows), batch_size):
        part = slice(start, start + batch_size)
        # Families scale, shift or cap their logits: the class does it.
        answer.last_hidden_state = hidden[part]
        logits = logits_of(model, answer).flatten(0, 1).float()
        found = F.cross_entropy(logits, targets[part].flatten(), reduction="none")
        losses[part] = found.view_as(targets[part])
    return losses


def unigram_entropy(blocks: TokenBlocks, indices: np.ndarray, vocab_size: int) -> float:
    """Return the entropy of the windows' own token frequencies, nats per token.

    No model that ignores context can score below it on these windows.
    """
    counts = np.bincount(blocks.window(indices)[:, 1:].ravel(), minlength=vocab_size)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    max_tokens: int,
    seed: int,
    temperature: float = 0.8,
) -> str:
    """Continue a prompt by at most `max_tokens` sampled tokens; deterministic in the seed.

    Without a prompt a new text begins. Of a prompt longer than the model's context its end is read.
    """
    start = tokenizer.eos_token_id or 0  # What stands between two texts.
    given = torch.tensor(tokenizer(prompt)["input_ids"] or [start], dtype=torch.long)
    longest = getattr(model.config, "max_position_embeddings", None) or len(given) + max_tokens
    context = max(1, longest - max_tokens)
    ids = given[None, -context:].to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    devices = [ids.device] if ids.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        continued: Any = model.generate
        generate = partial(
            continued,
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=True,
            temperature=temperature,
            top_k=50,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(seed)
        try:
            out = generate()
        except (ValueError, StopIteration):  # no cache for layers that are all linear
            torch.manual_seed(seed)
            out = generate(use_cache=False)
    model.train(was_training)
    whole = torch.cat([given[:-context], out[0].cpu()])
    return str(tokenizer.decode(whole, skip_special_tokens=True))
