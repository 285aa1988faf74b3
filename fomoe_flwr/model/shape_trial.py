"""A forward pass without memory: whether the shapes inside a model fit each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from fomoe_flwr.errors import one_line
from fomoe_flwr.model.blocks import FamilyError

WITHOUT_WORK = "fomoe_shapes"
"""Name of an experts implementation that computes nothing."""

_TOKENS = 8


class _Answered(TorchDispatchMode):
    """Answers questions about values, which a model without memory has not."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return func(*args, **(kwargs or {}))


def check_shapes(model: PreTrainedModel) -> None:
    """Send some tokens through a model on the meta device. Raises FamilyError if it cannot.

    A model with sizes that depend on values is taken as it is.
    """
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), torch.device("meta"), _Answered():
            model.eval()(input_ids=ids, use_cache=False)
    except NotImplementedError:
        return
    except Exception as error:  # each family fails in its own way
        reason = one_line(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise FamilyError(f"its sizes do not fit each other: {reason}") from error


def _outputs(module: object, x_TD: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(x_TD)


ExpertsInterface.register(WITHOUT_WORK, _outputs)
