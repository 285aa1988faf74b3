"""Steps of several processes on their own devices, by the benchmark's code; no text, no Flower.

python -m pytest tests/parallel/test_steps.py -m gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.parallel.processes import Processes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VARIANTS = [
    (),
    ("model.routing=partitioned",),
    ("local.precision=bfloat16",),
    ("local.precision=bfloat16_parameters",),
    ("execution.compile=off", "execution.loss=whole", "execution.experts=autograd"),
    ("model=deepseek-v3-tiny", "balance=loss_free"),
    ("model=fomoe-tiny", "execution.checkpoint_activations=true"),
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
            ],
        ),
    ],
)
def teams(request: pytest.FixtureRequest) -> Iterator[tuple[str, Processes, Processes]]:
    """Return a device, one process that uses it, and two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        one, two = Processes("parallel", 1), Processes("parallel", 2)
        yield request.param, one, two
        one.close()
        two.close()


def settings_of(*overrides: str) -> Settings:
    return load_settings(
        [
            "preset=tiny",
            "local.steps=4",
            "local.batch_size=4",
            "local.accumulate=2",
            "local.warmup_steps=0",
            "local.schedule=constant",
            "local.eps=1e-6",
            *overrides,
        ]
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_steps_of_two_processes_are_those_of_one(
    overrides: tuple[str, ...], kind: str, teams: tuple[str, Processes, Processes], tmp_path: Path
) -> None:
    device, one, two = teams
    from parallel import job

    settings = settings_of(*overrides)
    answers: list[dict[str, Any]] = []
    for number, processes in enumerate((one, two)):
        path = str(tmp_path / f"{number}.safetensors")
        answers.append(processes.run(job(settings, device, kind, 0.5, weights=path)))
    want, got = answers
    is_rough = settings.local.precision != "float32"
    assert got["tokens"] == want["tokens"]
    for name in ("loss", "grad_norm", "balance_loss", "ghost_fraction"):
        assert got[name] == pytest.approx(want[name], rel=2e-2 if is_rough else 1e-3)
    before, after = (load_file(tmp_path / f"{number}.safetensors") for number in (0, 1))
    assert before.keys() == after.keys()
    for key, value in before.items():
        # A choice that is a tie in one sum and not in the other moves an expert's weights a little.
        torch.testing.assert_close(
            after[key], value, rtol=0, atol=2e-2 if is_rough else 1e-3, msg=lambda m, k=key: k + m
        )
