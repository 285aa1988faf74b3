"""What is found out about blocks: which module routes, and how it scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from registry import HIDDEN, tiny

from fomoe_flwr.model.blocks import MoeBlock, moe_blocks, score_function
from fomoe_flwr.model.families import class_of


def last_block(family: str, **entries: Any) -> MoeBlock:
    config = tiny(family)
    for name, value in entries.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return list(moe_blocks(class_of(config)._from_config(config)))[-1]


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(
    ("family", "score"),
    [
        ("olmoe", "softmax"),
        ("mixtral", "softmax"),
        ("qwen3_next", "softmax"),
        ("gpt_oss", "softmax"),
        ("deepseek_v3", "sigmoid"),
        ("glm4_moe", "sigmoid"),
        ("minimax_m2", "sigmoid"),
        ("lfm2_moe", "sigmoid"),
    ],
)
def test_a_score_is_told_whatever_the_number_of_choices(
    family: str, score: str, top_k: int
) -> None:
    router = last_block(family, num_experts_per_tok=top_k).router
    assert score_function(router, HIDDEN) == score
    assert getattr(router, "top_k", top_k) == top_k


def test_a_shared_expert_as_wide_as_the_experts_are_many_is_no_router() -> None:
    block = last_block("hunyuan_v1_moe", intermediate_size=8, num_experts=8)
    assert block.router_name == "gate"
