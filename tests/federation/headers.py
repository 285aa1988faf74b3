"""A task header with a value in every field."""

from __future__ import annotations

from fomoe_flwr.federation.task_header import TaskHeader

HEADER = TaskHeader(
    settings={"rounds": 2},
    spec_digest="0a" * 8,
    tokenizer_digest="1b" * 32,
    run_key="2c" * 16,
    worker=1,
    server_round=3,
    layout_digest="3d" * 8,
    residents=((0, 2), (1, 3)),
    keep_rounds=[1, 2],
    fragment=-1,
    moments=["exp_avg"],
    pooled_share=[[0.5, 0.5]],
    probe=[[3, 1], [4, 1]],
    continues=True,
    steps=0,
)
