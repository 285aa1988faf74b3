"""Memory of a training step beyond the weights: what layers keep for backward, and its peak.

Counted tensor by tensor for the stock classes. Compiled norms keep their input and compute the
rest again. All sizes are bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fomoe_flwr.config import ModelSettings, Settings
from fomoe_flwr.config.execution import CHUNK_BYTES, is_compiled, is_loss_chunked
from fomoe_flwr.costs.counts import parameter_counts
from fomoe_flwr.costs.memory import WEIGHT_BYTES, memory_bytes
from fomoe_flwr.parameters.shapes import head_size, latent_sizes, num_sparse_layers

_FP32, _BF16 = 4, 2
_ID = 2
"""fp32 elements that an int64 takes."""
_TWO_MATRICES = ("fomoe",)
"""Families whose experts have no gate."""
_SEPARATE_OUTPUT = ("fomoe", "glm4_moe", "deepseek_v3")
"""Families whose attention output is copied before its projection."""


@dataclass(frozen=True)
class Step:
    """How one forward and backward pass is computed."""

    batch_size: int
    sequence_length: int
    precision: str = "float32"
    """As `local.precision`."""
    resident_share: float = 1.0
    """Share of assignments that go to residents; ghosts keep nothing."""
    chunk_bytes: int = 0
    """Logits that exist at once; 0: those of all tokens."""
    checkpointed: bool = False
    """Only the inputs of layers are kept."""
    accumulates: bool = False
    """Gradients of earlier micro-batches are there already."""
    compiled: bool = False
    """Norms and attention are compiled, as they are on a GPU."""
    flash_attention: bool = True
    """False: attention keeps its probabilities, as latent attention does on a CPU."""

    @property
    def num_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch_size * self.sequence_length


def step_of(settings: Settings, resident_share: float, device: str) -> Step:
    """Return how a worker's passes are computed on a device, `cpu` or `cuda`."""
    model, local, execution = settings.model, settings.local, settings.execution
    is_chunked = is_loss_chunked(execution, device, model.vocab_size)
    return Step(
        local.batch_size,
        settings.data.sequence_length,
        local.precision,
        resident_share,
        CHUNK_BYTES[device] if is_chunked else 0,
        execution.checkpoint_activations,
        local.accumulate > 1,
        is_compiled(execution, device),
        flash_attention=device == "cuda" or not _is_latent(model),
    )


def received_bytes(num_parameters: int, device: str) -> int:
    """Return the bytes of the received weights beside the model; they lie on the host."""
    return _FP32 * num_parameters if device == "cpu" else 0


@dataclass(frozen=True)
class _Kept:
    """Elements a token that one layer keeps: of the model's type, and always fp32 ones."""

    typed: float
    fp32: float

    def bytes(self, precision: str) -> float:
        size = _FP32 if precision == "float32" else _BF16
        return size * self.typed + _FP32 * self.fp32


def kept_bytes(model: ModelSettings, step: Step) -> float:
    """Return what a forward pass keeps for backward, without the loss."""
    hidden = _FP32 * model.hidden_size
    layer = hidden if step.checkpointed else _layer(model, step).bytes(step.precision)
    # The final norm keeps its input and the normalised input, the head its output.
    top = 2 * hidden + _Kept(model.hidden_size, 1 + _ID).bytes(step.precision)
    if model.family == "fomoe":
        top += 2 * hidden + _FP32
    rotary = 2 * _FP32 * _rotary_size(model) * step.sequence_length
    return step.num_tokens * (model.num_layers * layer + top) + rotary


def peak_bytes(model: ModelSettings, optimizer: str, num_parameters: int, step: Step) -> int:
    """Return the most memory that training takes: state, and activations on top.

    A step has its peak where backward begins, with all that layers kept and the logits, or where it
    ends, with all gradients. `num_parameters` are those that the worker holds.
    """
    state = memory_bytes(num_parameters, optimizer, step.precision)
    weight = WEIGHT_BYTES[step.precision]
    gradients = weight * num_parameters
    kept = kept_bytes(model, step)
    held = state if step.accumulates else state - gradients
    if step.precision == "bfloat16":
        # Autocast's copies of the weights live as long as the pass.
        held += _BF16 * num_parameters
    head = weight * model.vocab_size * model.hidden_size
    deepest = _layer_work(model, step)
    # In the first layer, the last that backward comes to, with all gradients but its experts'.
    missing = (gradients - weight * parameter_counts(model).shared) / num_sparse_layers(model)
    if step.checkpointed:  # its activations, computed again, are in `deepest`
        first = state - missing + deepest
    else:
        layer = step.num_tokens * _layer(model, step).bytes(step.precision)
        first = state - missing + layer + deepest
    moments = (
        first,
        held + kept + _head_work(model, step),
        held + kept + (0 if step.accumulates else head) + deepest,
        # The embedding's gradient is made whole before it is added to a tied head's.
        state + (head if model.tie_embeddings or step.accumulates else 0),
        state + _FP32 * 3 * step.num_tokens * model.hidden_size,
    )
    return math.ceil(max(moments))


def activation_bytes(model: ModelSettings, optimizer: str, num_parameters: int, step: Step) -> int:
    """Return what the peak adds to `memory_bytes`, the state with all gradients."""
    peak = peak_bytes(model, optimizer, num_parameters, step)
    return peak - memory_bytes(num_parameters, optimizer, step.precision)


def _layer(model: ModelSettings, step: Step) -> _Kept:
    hidden, experts, top_k = model.hidden_size, model.num_experts, model.top_k
    attention = _latent_attention(model, step) if _is_latent(model) else _attention(model, step)
    rows = top_k * step.resident_share
    inner = model.expert_size * (1 if model.family in _TWO_MATRICES else 2)
    # Gate, up, activation and product of shared experts.
    shared = 4 * model.expert_size * model.num_shared_experts
    norms = 2
    post_norms = 2 if model.family == "fomoe" else 0
    # Scores, and probabilities and logits for the balance losses; choices and weights; dispatch.
    router = 3 * experts + (_ID + 2) * top_k + 2 + (_ID + 1) * top_k + _ID * rows
    copies = 1 if step.compiled else 2
    return _Kept(
        typed=attention.typed + rows * inner + shared + norms * hidden,
        fp32=attention.fp32 + (norms + post_norms) * (copies * hidden + 1) + router,
    )


def _attention(model: ModelSettings, step: Step) -> _Kept:
    head = head_size(model)
    query, key = model.num_heads * head, model.num_kv_heads * head
    outputs = 2 if model.family in _SEPARATE_OUTPUT else 1
    # Of norms of queries and keys: what they keep, and one number for each vector they scale.
    vectors = {"olmoe": 2, "qwen3_moe": model.num_heads + model.num_kv_heads}.get(model.family, 0)
    normed = (query + key) if vectors else 0
    scores = model.num_heads * (1 if step.flash_attention else step.sequence_length)
    return _Kept(
        typed=query + 2 * key + outputs * query + (normed if step.compiled else 0),
        fp32=vectors + (0 if step.compiled else 2 * normed) + scores,
    )


def _latent_attention(model: ModelSettings, step: Step) -> _Kept:
    sizes, heads = latent_sizes(model), model.num_heads
    keys = heads * (sizes.head + sizes.rotary)
    values = heads * sizes.head
    scores = heads * (1 if step.flash_attention else step.sequence_length)
    compressed = 3 * sizes.query_rank + 3 * sizes.key_value_rank + sizes.rotary + 2
    return _Kept(typed=2 * keys + 2 * values, fp32=compressed + scores)


def _head_work(model: ModelSettings, step: Step) -> float:
    """Return what the loss takes where backward begins."""
    if not step.chunk_bytes:
        # Log-probabilities, their gradient and the logits'.
        return 3.0 * _FP32 * step.num_tokens * model.vocab_size
    size = _FP32 if step.precision == "float32" else _BF16
    logits = min(step.chunk_bytes, size * step.num_tokens * model.vocab_size)
    gradients = size * step.num_tokens * model.hidden_size + (
        _FP32 * model.vocab_size * model.hidden_size
    )
    return 2 * logits + gradients


def _layer_work(model: ModelSettings, step: Step) -> float:
    """Return what one layer takes in backward, besides what it kept."""
    inner = model.expert_size * (1 if model.family in _TWO_MATRICES else 2)
    rows = model.top_k * step.resident_share
    # Gradients of rows: of the sum, of both sides of the activation, and the activation again.
    experts = rows * (model.hidden_size + 2 * model.expert_size + inner)
    again = _layer(model, step).bytes(step.precision) if step.checkpointed else 0.0
    return step.num_tokens * (_FP32 * (experts + 2 * model.hidden_size) + again)


def _is_latent(model: ModelSettings) -> bool:
    return model.family == "deepseek_v3"


def _rotary_size(model: ModelSettings) -> int:
    if _is_latent(model):
        return latent_sizes(model).rotary
    return head_size(model) // (2 if model.family == "glm4_moe" else 1)
