"""The GPU's kernels against the CPU's, on a CPU: Triton can interpret them.

Needs the package `triton`, which torch for a CPU comes without; on a GPU `test_experts` compares
the compiled kernels with a float64 reference.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

_SCRIPT = """
import torch
from fomoe_flwr.model import cross_entropy_kernel, head_loss
from fomoe_flwr.model.experts import cpu_kernels, triton_kernels
from fomoe_flwr.model.experts.dispatch import make_dispatch

close = torch.testing.assert_close
torch.manual_seed(0)
cases = [(4, 8, 3, 37, 48, 20), (8, 8, 2, 16, 64, 32), (1, 8, 4, 20, 1100, 600)]
for residents, experts, top_k, tokens, width, inner_width in cases:
    for has_gate in (True, False):
        for host_sync in (True, False):
            slots = torch.rand(tokens, experts).topk(top_k).indices.clamp(max=residents)
            d = make_dispatch(slots, residents, host_sync=host_sync)
            exact = make_dispatch(slots, residents)
            n = exact.num_rows
            x, w = torch.randn(tokens, width), torch.rand(tokens, top_k)
            close(triton_kernels.gather(x, d)[:n], cpu_kernels.gather(x, exact))
            inner = torch.randn(d.num_rows, inner_width * (1 + has_gate))
            back = torch.randn(d.num_rows, inner_width)
            # Nobody wrote these rows: whatever they hold must not matter.
            inner[n:] = torch.nan
            back[n:] = torch.nan
            close(
                triton_kernels.activate(inner, d, has_gate)[:n],
                cpu_kernels.activate(inner[:n], exact, has_gate),
            )
            got = triton_kernels.activate_backward(back, inner, w, d, has_gate)
            want = cpu_kernels.activate_backward(back[:n], inner[:n], w, exact, has_gate)
            close(got[0][:n], want[0])
            close(got[1][:n], want[1])
            close(got[2], want[2])
            y = torch.randn(d.num_rows, width)
            y[n:] = torch.nan
            for weights in (None, w):
                close(
                    triton_kernels.combine(y, d, weights),
                    cpu_kernels.combine(y[:n], exact, weights),
                )
for tokens, vocabulary, multiplier in ((9, 5000, 1.0), (7, 300, 0.5)):
    logits = 5 * torch.randn(tokens, vocabulary)
    target = torch.randint(vocabulary, (tokens,))
    mine = logits.clone()
    scale = multiplier / tokens
    close(
        cross_entropy_kernel.cross_entropy_rows(mine, target, multiplier, scale, True),
        head_loss._cross_entropy_rows(logits, target, multiplier, scale, True),
    )
    close(mine, logits)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_interpreted_kernels_equal_those_of_the_cpu() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"
