"""The form of an expert: what lies between its two matrices, and how they are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation


@dataclass(frozen=True)
class Form:
    """An expert is W2 a(W1 x + b1) + b2."""

    activate: Callable[[Tensor], Tensor] | None = None
    """a, for rows of W1 x + b1. None is SiLU: silu(g) * u with a gate, whose rows come first."""
    has_gate: bool = True
    """Whether a halves the width; a SiLU without gate does not."""
    is_transposed: bool = False
    """Whether W1 is [R, D, F'] and W2 [R, F, D], not [R, F', D] and [R, D, F]."""

    @classmethod
    def of(cls, act: Callable[[Tensor], Tensor], has_gate: bool, is_transposed: bool) -> Form:
        """Return the form of experts that multiply act(gate) by the rest, or have no gate."""
        if act is F.silu or isinstance(act, nn.SiLU | SiLUActivation):
            return cls(None, has_gate, is_transposed)
        return cls(_gated(act) if has_gate else act, has_gate, is_transposed)

    @property
    def function(self) -> Callable[[Tensor], Tensor]:
        """A as a function of PyTorch's, SiLU too."""
        if self.activate is not None:
            return self.activate
        return _gated(F.silu) if self.has_gate else F.silu

    def up(self, up: Tensor) -> Tensor:
        """View W1 as [R, D, F'], the way a product with rows takes it."""
        return up if self.is_transposed else up.transpose(-2, -1)

    def down(self, down: Tensor) -> Tensor:
        """View W2 as [R, F, D]."""
        return down if self.is_transposed else down.transpose(-2, -1)

    def gradient(self, input_ND: Tensor, output_NF: Tensor, ends_R: Tensor) -> Tensor:
        """Return the gradient of a matrix from its products' inputs and output gradients."""
        if self.is_transposed:
            return F.grouped_mm(input_ND.t(), output_NF, offs=ends_R)
        return F.grouped_mm(output_NF.t(), input_ND, offs=ends_R)


def _gated(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a(W1 x) = act(g) * u."""

    def activate(inner_NF: Tensor) -> Tensor:
        gate_NF, up_NF = inner_NF.chunk(2, -1)
        return act(gate_NF) * up_NF

    return activate


def rows_of(bias_RF: Tensor, resident_N: Tensor) -> Tensor:
    """Copy its resident's bias for each row."""
    return bias_RF.index_select(0, resident_N.clamp(max=len(bias_RF) - 1))


def sum_rows(values_NF: Tensor, ends_R: Tensor) -> Tensor:
    """Sum the rows of each resident, always in the same order: the gradient of `rows_of`."""
    # Eight columns of ones: a product of groups wants rows of 16 bytes.
    ones_N8 = values_NF.new_ones(len(values_NF), 8)
    return F.grouped_mm(ones_N8.t(), values_NF, offs=ends_R)[:, 0]
