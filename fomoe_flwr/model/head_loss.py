"""Cross entropy of a language-model head, without the logits of all tokens at once.

The gradient of the mean loss is known as soon as the logits are, so the forward pass takes the
tokens in chunks and leaves the gradients of the hidden states and of the head; of [T, V] logits
only a chunk ever exists. The cost is three matrix products, as with whole logits: nothing is
recomputed.

Shape legend: T tokens, D model width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from fomoe_flwr.config.execution import CHUNK_BYTES

try:
    from fomoe_flwr.model.cross_entropy_kernel import cross_entropy_rows as _rows_on_gpu
except ImportError:  # torch for a CPU comes without Triton
    _rows_on_gpu = None  # type: ignore[assignment]

_GPU_COLUMNS = 64
"""Rows of logits start at multiples of so many: a GPU's fast products want aligned rows."""


def head_loss(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, multiplier: float) -> Tensor:
    """Return the mean cross entropy, nats per token, of the logits `multiplier * hidden @ head.T`.

    The matrix products run in hidden_TD's type (autocast's, where that is on), everything else in
    fp32. target_T must hold ids from 0 to V - 1.
    """
    kind = hidden_TD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_TD, head_VD = hidden_TD.to(dtype), head_VD.to(dtype)
    needs_gradient = torch.is_grad_enabled()
    loss: Tensor = _HeadLoss.apply(hidden_TD, head_VD, target_T, multiplier, needs_gradient)
    return loss


def logit_multiplier(model: PreTrainedModel) -> float | None:
    """Return c of a model whose logits are c * hidden @ head.T; None for one whose are not.

    Asks the model for the logits of made-up hidden states with a small head of the same kind, so it
    may lie on the meta device. Families scale, shift or cap their logits, each in its own place.
    """
    head, trunk = model.get_output_embeddings(), model.base_model
    if type(head) is not nn.Linear or trunk is model:
        return None
    generator = torch.Generator().manual_seed(0)
    width = head.in_features
    with torch.device("cpu"):
        # Without an initialisation, which would draw from the caller's random numbers.
        small = nn.utils.skip_init(nn.Linear, width, 4, bias=head.bias is not None)
        hidden_BSD = torch.randn(1, 8, width, generator=generator)
        nn.init.normal_(small.weight, std=4 * width**-0.5, generator=generator)
    if small.bias is not None:
        nn.init.ones_(small.bias)
    model.set_output_embeddings(small)
    try:
        with torch.no_grad():
            answer = MoeModelOutputWithPast(last_hidden_state=hidden_BSD)
            logits = logits_of(model, answer).float()
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
        return None
    finally:
        model.set_output_embeddings(head)
    plain = hidden_BSD @ small.weight.detach().t()
    multiplier = float((logits * plain).sum() / plain.square().sum())
    is_linear = torch.allclose(logits, multiplier * plain, rtol=1e-3, atol=1e-3 * multiplier)
    return multiplier if is_linear else None


def logits_of(model: PreTrainedModel, answer: Any) -> Tensor:
    """Return the logits [B, S, V] that the model's class makes of its trunk's answer."""
    trunk: Any = model.base_model
    hidden_BSD = answer.last_hidden_state
    ids = torch.zeros(hidden_BSD.shape[:2], dtype=torch.long, device=hidden_BSD.device)
    vars(trunk)["forward"] = lambda *_, **__: answer
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        del vars(trunk)["forward"]
    return logits


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        target_T: Tensor,
        multiplier: float,
        needs_gradient: bool,
    ) -> Tensor:
        num_tokens, device = len(hidden_TD), hidden_TD.device
        vocab_size, head_dtype = len(head_VD), head_VD.dtype
        if device.type == "cuda" and vocab_size % _GPU_COLUMNS:
            # Rows of zeros give logits that are zero, and stay so: they add nothing to a gradient.
            head_VD = F.pad(head_VD, (0, 0, 0, -vocab_size % _GPU_COLUMNS))
        losses_T = torch.empty(num_tokens, dtype=torch.float32, device=device)
        hidden_grad_TD = torch.empty_like(hidden_TD) if needs_gradient else None
        head_grad_VD = None
        row_bytes = head_VD.shape[0] * hidden_TD.element_size()
        chunk = max(1, CHUNK_BYTES[device.type] // row_bytes)
        for start in range(0, num_tokens, chunk):
            part = slice(start, start + chunk)
            hidden_CD = hidden_TD[part]
            logits_CV = hidden_CD @ head_VD.t()
            losses_T[part] = _cross_entropy_rows(
                logits_CV[:, :vocab_size],
                target_T[part],
                multiplier,
                multiplier / num_tokens,
                needs_gradient,
            )
            if hidden_grad_TD is None:
                continue
            # From here on logits_CV holds its own gradient.
            torch.mm(logits_CV, head_VD, out=hidden_grad_TD[part])
            if head_grad_VD is None:
                # More than one chunk adds up in fp32, whatever the products' type.
                is_sum = chunk < num_tokens
                dtype = torch.float32 if is_sum else head_VD.dtype
                head_grad_VD = torch.zeros(head_VD.shape, dtype=dtype, device=device)
            _add_product(head_grad_VD, logits_CV.t(), hidden_CD)
        ctx.hidden_grad_TD, ctx.head_dtype = hidden_grad_TD, head_dtype
        ctx.head_grad_VD = None if head_grad_VD is None else head_grad_VD[:vocab_size]
        return losses_T.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        hidden_grad_TD, head_grad_VD = ctx.hidden_grad_TD, ctx.head_grad_VD
        ctx.hidden_grad_TD = ctx.head_grad_VD = None
        return (
            hidden_grad_TD.mul_(gradient.to(hidden_grad_TD.dtype)),
            head_grad_VD.mul_(gradient.to(head_grad_VD.dtype)).to(ctx.head_dtype),
            None,
            None,
            None,
        )


def _cross_entropy_rows(
    logits_CV: Tensor, target_C: Tensor, multiplier: float, grad_scale: float, in_place: bool
) -> Tensor:
    """Return each row's loss; with `in_place` overwrite the logits by their scaled gradient."""
    if logits_CV.is_cuda and _rows_on_gpu is not None:
        losses: Tensor = _rows_on_gpu(logits_CV, target_C, multiplier, grad_scale, in_place)
        return losses
    scaled_CV = logits_CV.float()
    if multiplier != 1.0:
        scaled_CV = scaled_CV * multiplier
    log_CV = F.log_softmax(scaled_CV, -1)
    at_C1 = target_C[:, None]
    losses_C = -log_CV.gather(1, at_C1).squeeze(1)
    if in_place:
        grad_CV = log_CV.exp_()
        grad_CV.scatter_add_(1, at_C1, torch.full_like(losses_C, -1.0)[:, None])
        logits_CV.copy_(grad_CV.mul_(grad_scale))
    return losses_C


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
