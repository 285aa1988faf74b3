"""The routing fields of a reply: they arrive as sent, and malformed ones are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import (
    RecordDict,
)

from fomoe_flwr.federation import wire
from fomoe_flwr.federation.routing_fields import choices_fields, choices_in
from fomoe_flwr.federation.wire import WireError

CHOICES = torch.tensor([[[0, 2], [1, 3], [2, 4]], [[1, 2], [0, 1], [4, 4]]])
"""Two layers, three tokens, two of four experts; 4 stands for no choice."""


def test_choices_survive_the_journey() -> None:
    content = RecordDict({wire.TASK: wire.json_record(choices_fields(CHOICES))})
    back = choices_in(wire.json_in(content, wire.TASK), 2, 3, 2, 4)
    assert back.dtype == torch.int64
    assert torch.equal(back, CHOICES)


@pytest.mark.parametrize(
    "choices",
    [
        None,
        {},
        [],
        [[0] * 6],
        [[0] * 6] * 3,
        [[0] * 6, [0] * 5],
        [[0] * 6, [0] * 7],
        [[0] * 6, [0, 0, 0, 0, 0, 5]],
        [[0] * 6, [0, 0, 0, 0, 0, -1]],
        [[0] * 6, [0, 0, 0, 0, 0, True]],
        [[0] * 6, [0, 0, 0, 0, 0, 1.0]],
        [[0] * 6, [0, 0, 0, 0, 0, 2**70]],
        [[0] * 6, "000000"],
        [[[0, 0]] * 3] * 2,
    ],
)
def test_choices_of_another_shape_or_range_are_refused(choices: Any) -> None:
    with pytest.raises(WireError, match=r"choices must be 2 lists .* 3 \* 2 integers from 0 to 4"):
        choices_in({"choices": choices}, 2, 3, 2, 4)
