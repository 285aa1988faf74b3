"""Copies between host and device: the same numbers, whatever lies where."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fomoe_flwr.model import device_copy
from fomoe_flwr.model.device_copy import (
    BUFFER_BYTES,
    copy,
    host_empty,
    pin_host_memory,
    spare_host_memory,
)

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
SIZES = (0, 1, 2**18, 2**18 + 1, BUFFER_BYTES // 2 + 3, 3 * BUFFER_BYTES // 4 + 1)


@pytest.fixture
def pinning(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param:
        pin_host_memory()
    yield
    device_copy._is_pinning = False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (7,), (3, 5, 2), (2**20,)])
def test_host_memory_has_the_shape_and_type_asked_for(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    made = host_empty(*shape, dtype=dtype).zero_()
    assert made.shape == shape
    assert made.dtype is dtype
    assert made.is_contiguous()
    assert not made.any()


def test_a_machine_without_a_gpu_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pin_host_memory()
    assert not host_empty(2**20).is_pinned()


def test_a_process_that_spares_memory_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pin_host_memory()
    assert device_copy._is_pinning
    spare_host_memory()
    assert not device_copy._is_pinning
    pin_host_memory()
    assert not device_copy._is_pinning
    spare_host_memory(False)


@pytest.mark.gpu
@pytest.mark.parametrize("pinning", [False, True], indirect=True)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES[:2] for b in DTYPES[:2]])
@pytest.mark.usefixtures("pinning")
def test_what_goes_up_and_down_is_what_was_sent(
    size: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    first, second = dtypes
    given = host_empty(size, dtype=first).copy_(torch.randn(size))
    there = torch.empty(size, dtype=second, device="cuda")
    copy(there, given)
    assert torch.equal(there.cpu(), given.to(second))
    back = host_empty(size, dtype=first)
    copy(back, there)
    assert torch.equal(back, given.to(second).to(first))
