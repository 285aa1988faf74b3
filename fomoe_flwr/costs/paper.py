"""The paper's own accounting, for comparison: its block, its bytes and FLOPs (arXiv 2606.19025).

Where it differs from ours, `docs/cost-model.md` says why. Sizes of the two parts of a model,
`shared` and `expert`, may be in parameters or in bytes: results are in the same unit.
"""

from __future__ import annotations

from fomoe_flwr.costs.counts import ParameterCounts

PAPER_STATE_BYTES = 18
"""Its bytes a parameter: 2 of bf16 weights, 4 of fp32 ones, 8 of moments, 4 of gradients."""


def paper_counts(
    hidden_size: int,
    num_layers: int,
    num_experts: int,
    expert_size: int,
    top_k: int,
    vocab_size: int,
) -> ParameterCounts:
    """Count the paper's own block: two-matrix experts, tied embeddings, no norms (section 3.1).

    Router rows count as expert parameters, as in its default, `partitioned` routing.
    """
    shared = vocab_size * hidden_size + num_layers * 4 * hidden_size**2
    weights = 2 * hidden_size * expert_size
    expert = num_layers * num_experts * (weights + hidden_size)
    return ParameterCounts(
        total=shared + expert,
        active=shared + expert - num_layers * (num_experts - top_k) * weights,
        shared=shared,
        expert=expert,
        router=num_layers * num_experts * hidden_size,
        per_expert_per_layer=weights + hidden_size,
    )


def paper_memory_bytes(shared: float, expert: float, num_workers: int, overlap: int) -> float:
    """Return the training state of a worker, from parameter counts."""
    return PAPER_STATE_BYTES * (shared + overlap / num_workers * expert)


def paper_token_flops(
    active: float, num_layers: int, hidden_size: int, sequence_length: int
) -> float:
    """Return training FLOPs of a token: 6 an active parameter, and attention over all positions."""
    return 6 * active + 12 * num_layers * hidden_size * sequence_length
