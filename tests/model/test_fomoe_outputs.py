"""What transformers expects of a causal model, of the paper's block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TextGenerationPipeline,
)

from fomoe_flwr.data.tokenizer import train_tokenizer
from fomoe_flwr.model.fomoe import FomoeConfig, FomoeForCausalLM

IDS = torch.arange(5, 17)[None]


def model_of(**changes: object) -> FomoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_experts": 4}
    config = FomoeConfig(
        **sizes | {"num_experts_per_tok": 2, "moe_intermediate_size": 16} | changes
    )
    return FomoeForCausalLM._from_config(config, attn_implementation="eager").eval()


def test_nothing_is_returned_that_nobody_asked_for() -> None:
    answer = model_of()(input_ids=IDS)
    assert answer.hidden_states is answer.attentions is answer.router_logits is None
    assert answer.past_key_values.get_seq_length() == 12
    assert model_of(use_cache=False)(input_ids=IDS).past_key_values is None


@pytest.mark.parametrize("by_config", [True, False])
def test_hidden_states_attentions_and_router_logits(by_config: bool) -> None:
    names = ("output_hidden_states", "output_attentions", "output_router_logits")
    asked = dict.fromkeys(names, True)
    model = model_of(**asked) if by_config else model_of()
    answer = model(input_ids=IDS, **({} if by_config else asked))
    assert len(answer.hidden_states) == 4
    assert [tuple(each.shape) for each in answer.attentions] == [(1, 4, 12, 12)] * 3
    torch.testing.assert_close(answer.attentions[0].sum(-1), torch.ones(1, 4, 12))
    assert [tuple(each.shape) for each in answer.router_logits] == [(12, 4)] * 3
    logits = model.lm_head(answer.hidden_states[-1]) * model.multiplier
    torch.testing.assert_close(logits, answer.logits)


def test_a_cache_gives_the_same_logits() -> None:
    model = model_of()
    whole = model(input_ids=IDS).logits
    first = model(input_ids=IDS[:, :7])
    rest = model(input_ids=IDS[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpoints in (False, True):
        model = model_of().train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_rotary_parameters_of_the_new_kind() -> None:
    given = {"rope_type": "default", "rope_theta": 500.0}
    assert FomoeConfig(rope_parameters=given).rope_theta == 500.0
    assert FomoeConfig(rope_theta=500.0).rope_parameters == given
    with pytest.raises(ValueError, match="rope_type=yarn is not one of: default"):
        FomoeConfig(rope_parameters={"rope_type": "yarn"})


def test_the_auto_classes_know_it(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    trunk = AutoModel.from_pretrained(tmp_path).eval()
    hidden = model.model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(trunk(input_ids=IDS).last_hidden_state, hidden)
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    assert judge(input_ids=IDS).logits.shape == (1, 3)


def test_a_pipeline_continues_a_text() -> None:
    tokenizer = train_tokenizer(["some text about some things"], 300)
    pipeline = TextGenerationPipeline(model=model_of(), tokenizer=tokenizer)
    said = pipeline("some text", max_new_tokens=4, do_sample=False)
    assert said[0]["generated_text"].startswith("some text")


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": "all-linear"},
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ],
    ids=["attention", "experts"],
)
def test_adapters_are_trained_and_merged(targets: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = model_of()
    before = model(input_ids=IDS).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **targets))
    torch.testing.assert_close(adapted(input_ids=IDS).logits, before)
    optimizer = torch.optim.SGD(adapted.parameters(), 1.0)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    after = adapted.eval()(input_ids=IDS).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, after, rtol=1e-4, atol=1e-4)
