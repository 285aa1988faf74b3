"""The layer stream and the evaluation of every family of transformers: the whole model's logits,
whatever a layer hands on to the next one and whatever a class does to its logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from registry import VOCABULARY, families, tiny

from fomoe_flwr.data.tokens import TokenBlocks
from fomoe_flwr.errors import InputError
from fomoe_flwr.model.architecture import described_settings
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model, build_skeleton
from fomoe_flwr.model.state import state_of
from fomoe_flwr.run.evaluation import evaluate
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


LOGITS = {
    "logits_scaling": 4.0,
    "logit_scale": 3.0,
    "final_logit_softcapping": 1.5,
    "output_router_logits": True,
}
"""Entries for what a class does to its logits, and one for what it returns beside them."""


@pytest.mark.parametrize("family", families())
def test_an_evaluation_is_of_the_classes_own_logits(family: str) -> None:
    tuned = tiny(family)
    changed = {name: value for name, value in LOGITS.items() if hasattr(tuned, name)}
    for name, value in changed.items():
        setattr(tuned, name, value)
    try:
        shape = described_settings(tuned)
    except InputError as refusal:
        pytest.skip(str(refusal))
    model = build_model(shape, transformers_config(shape, LENGTH), seed=1).eval()
    tokens = np.random.default_rng(0).integers(5, VOCABULARY, 6 * LENGTH + 1).astype(np.uint16)
    blocks = TokenBlocks(tokens, np.zeros(6, np.int16), ("",), LENGTH)
    report = evaluate(model, blocks, np.arange(6), np.ones(VOCABULARY, np.int32), 2, 6)
    windows = torch.from_numpy(blocks.window(np.arange(6)))
    with torch.no_grad():
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
    stock = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert report.loss == pytest.approx(float(stock), abs=1e-5)
