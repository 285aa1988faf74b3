"""The layer stream of every family of transformers: the whole model's logits, whatever a layer
hands on to the next one."""

from __future__ import annotations

import pytest
import torch
from registry import VOCABULARY, families, tiny

from fomoe_flwr.errors import InputError
from fomoe_flwr.model.architecture import described_settings
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model, build_skeleton
from fomoe_flwr.model.state import state_of
from fomoe_flwr.run.layer_stream import LayerStream

CPU, LENGTH = torch.device("cpu"), 20


@pytest.mark.parametrize("family", families())
def test_a_stream_gives_the_whole_models_logits(family: str) -> None:
    try:
        shape = described_settings(tiny(family))
    except InputError as refusal:
        pytest.skip(str(refusal))
    config = transformers_config(shape, LENGTH)
    model = build_model(shape, config, seed=1).eval()
    ids = torch.randint(5, VOCABULARY, (7, LENGTH), generator=torch.Generator().manual_seed(0))
    stream = LayerStream(build_skeleton(shape, config, CPU), state_of(model), CPU, 3)
    with torch.no_grad(), stream.open() as streamed:
        whole = model(input_ids=ids, use_cache=False).logits
        found = streamed(input_ids=ids, use_cache=False).logits
    scale = float(whole.abs().max())
    torch.testing.assert_close(found / scale, whole / scale, rtol=0, atol=1e-4)
