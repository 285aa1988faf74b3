"""The card of an exported model: what it is, what it was trained on, and by which code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fomoe_flwr.config import PATHS, Settings
from fomoe_flwr.costs import parameter_counts


def model_card(
    settings: Settings,
    rounds: int,
    rows: Iterable[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> str:
    """Return the card as Markdown, with the head that the hub reads.

    `rows` are the run's metrics, `facts` its versions and commit.
    """
    losses = [row["eval/loss"] for row in rows if row["round"] == rounds]
    model, layout, local = settings.model, settings.layout, settings.local
    source = model.pretrained or model.upcycle
    begun = f"`{Path(source).name}`" if source else "new weights"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [moe, federated-learning, fomoe]",
        "---",
        "",
        f"# {model.name}",
        "",
        "Trained by FoMoE on Flower (arXiv 2606.19025): every site kept the shared layers and "
        "some of the experts.",
        "",
        "| | |",
        "|---|---|",
        f"| family | `{model.family}` |",
        f"| parameters | {parameter_counts(model).total:,} |",
        f"| experts | {model.num_experts}, {model.top_k} a token |",
        f"| begun with | {begun} |",
        f"| text | {_text(settings)} |",
        f"| sites | {layout.num_workers}, every expert on {layout.overlap} |",
        f"| rounds | {rounds} of {local.steps} steps, {local.batch_size} windows of "
        f"{settings.data.sequence_length} tokens |",
        *(f"| held-out loss | {loss:.4f} |" for loss in losses),
        *(f"| {name} | {facts[key]} |" for name, key in _FACTS.items() if key in facts),
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(_public(settings), indent=1, sort_keys=True),
        "```",
    ]
    return "\n".join(lines) + "\n"


_FACTS = {
    "code": "environment/commit",
    "fomoe-flwr": "environment/fomoe_flwr",
    "torch": "environment/torch",
}


def _public(settings: Settings) -> dict[str, Any]:
    """Return the settings without the folders of a machine: an export may be given away."""
    found = settings.to_dict()
    for key in ("output_dir", "resume", "tracker"):
        found.pop(key, None)
    found["model"].pop("architecture")  # The config.json beside the card has it.
    for section, key in PATHS:
        found[section][key] = Path(found[section][key]).name
    return found


def _text(settings: Settings) -> str:
    data = settings.data
    if data.dataset:
        name = " ".join(filter(None, (data.dataset, data.dataset_config, data.dataset_revision)))
        return f"data set {name}"
    return f"`{Path(data.path).name}`" if data.path else "the corpus that comes with fomoe-flwr"
