"""The shapes that are compared, and the settings of each."""

from __future__ import annotations

from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.layout import Layout, draw_layout

TINY = (
    "preset=tiny",
    "rounds=4",
    "local.steps=1",
    "local.warmup_steps=1",
    "local.batch_size=2",
    "eval.every=100",
    "eval.max_tokens=64",
    "eval.sample_tokens=0",
    "eval.probe_tokens=0",
    "layout.num_workers=3",
    "model.num_experts=12",
)

BASE = (
    "model.num_layers=4 model.hidden_size=256 model.expert_size=256 model.num_heads=4 "
    "model.num_kv_heads=4 model.num_experts=16 model.top_k=2 model.vocab_size=4096 "
    "data.sequence_length=128 local.batch_size=8 layout.num_workers=4"
)
PAIR = "preset=tiny model.vocab_size=8192 model.hidden_size=128 layout.num_workers=2"


def settings_of(words: str) -> Settings:
    # Nothing is trained on text here, so that nothing limits the vocabulary.
    return load_settings([*TINY[:1], "local.threads=1", *words.split()])


def first_layout(settings: Settings) -> Layout:
    model = settings.model
    return draw_layout(settings.layout, model.num_layers, model.num_experts, 0, 1)


def label(words: str) -> str:
    """Shorten overrides by what many cases share."""
    return words.replace(BASE, "base").replace(PAIR, "pair")
