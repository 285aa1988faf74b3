"""A forward and backward pass, captured once as a CUDA graph and replayed.

For models so small that the host cannot launch kernels as fast as the GPU runs them. Gradients add
up in buffers that belong to the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_WARM_PASSES = 3
"""Passes before the capture: compilation, library handles and lazy buffers need them."""


class GraphedPass:
    """Replay `run_pass(windows)`, which must not wait for the device nor look at its results.

    `forget` is called between the warm passes and the first replay: it undoes what they left.
    """

    def __init__(
        self,
        run_pass: Callable[[Tensor], tuple[Tensor, ...]],
        example: Tensor,
        parameters: Iterable[nn.Parameter],
        forget: Callable[[], None],
    ) -> None:
        self._parameters = list(parameters)
        self._windows = example.clone()
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_PASSES):
                run_pass(self._windows)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = run_pass(self._windows)
        self.zero_grad()
        forget()

    def zero_grad(self) -> None:
        """Set the gradients to zero, in place."""
        torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])

    def __call__(self, windows: Tensor) -> tuple[Tensor, ...]:
        """Run one pass; the results are overwritten by the next."""
        self._windows.copy_(windows)
        self._graph.replay()
        return tuple(result.clone() for result in self._results)
