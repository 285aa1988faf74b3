"""A forward and backward pass, captured as a CUDA graph and replayed.

A host that launches hundreds of kernels a step is often slower than the GPU that runs them, the
more so the more work ghosts save. A replay costs the host one call. Gradients lie in the graph's
own memory: the first pass of a step writes them, further ones add to them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RunPass = Callable[[Tensor], tuple[Tensor, ...]]
"""From [B, S + 1] windows to results; leaves gradients in the parameters."""

_WARM_PASSES = 3
"""Passes before the capture: compilation, library handles and lazy buffers need them."""


class GraphedPass:
    """Replays of `run_pass`, which must not wait for the device nor look at its results.

    `forget` is called before the first replay: it undoes what the warm passes left behind.
    """

    def __init__(
        self,
        run_pass: RunPass,
        windows: Tensor,
        parameters: Sequence[nn.Parameter],
        forget: Callable[[], None],
    ) -> None:
        self._run_pass, self._parameters = run_pass, parameters
        self._windows = windows.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_PASSES):
                self._drop_gradients()
                run_pass(self._windows)
        torch.cuda.current_stream().wait_stream(stream)
        self._drop_gradients()
        # Gradients that do not exist yet are allocated inside the capture, and overwritten by
        # every replay: nobody has to set them to zero.
        self._first, self._first_results = self._capture()
        self._gradients = [parameter.grad for parameter in parameters]
        forget()
        self._further: torch.cuda.CUDAGraph | None = None
        self._further_results: tuple[Tensor, ...] = ()

    def __call__(self, windows: Tensor, is_first: bool) -> tuple[Tensor, ...]:
        """Run one pass; with `is_first` gradients begin anew, else they add up."""
        self._windows.copy_(windows)
        if is_first:
            self._first.replay()
            return tuple(result.clone() for result in self._first_results)
        if self._further is None:
            # Capturing runs nothing, so the gradients that are added to stay as they are.
            self._further, self._further_results = self._capture(self._first)
        self._further.replay()
        return tuple(result.clone() for result in self._further_results)

    def lend_gradients(self) -> None:
        """Give the parameters the graph's gradients, if they were dropped."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _capture(
        self, beside: torch.cuda.CUDAGraph | None = None
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        """Capture a pass, in the memory of another graph that never runs at the same time."""
        graph = torch.cuda.CUDAGraph()
        pool = beside.pool() if beside else None
        # Other threads may write a state down meanwhile.
        capture = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
        with _no_collection(), capture:
            results = self._run_pass(self._windows)
        return graph, results

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now and none meanwhile: an old graph that goes would end the capture."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
