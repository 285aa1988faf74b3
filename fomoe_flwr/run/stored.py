"""A finished or interrupted run, opened again from its directory."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fomoe_flwr.config import find_run, read_settings
from fomoe_flwr.data.inventory import check_inventory
from fomoe_flwr.data.source import evaluation_blocks
from fomoe_flwr.data.tokenizer import load_tokenizer, token_byte_lengths, tokenizer_json
from fomoe_flwr.data.tokens import heldout_windows
from fomoe_flwr.files import check_folder
from fomoe_flwr.run.checkpoint import Checkpoint, load_latest
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.evaluation import evaluate, sample_text
from fomoe_flwr.run.export import SMALL_SHARD, assemble, export_model
from fomoe_flwr.run.generation import kept_generation
from fomoe_flwr.run.model_card import model_card


class StoredRun:
    """Settings, tokenizer and newest weights of a run."""

    def __init__(self, path: Path) -> None:
        self.run = RunDirectory(find_run(path))
        self.settings = read_settings(self.run.config)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The newest checkpoint."""
        return load_latest(self.run.checkpoints)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The run's tokenizer."""
        return load_tokenizer(self.run.tokenizer)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The assembled global model."""
        generation = kept_generation(self.run.tokenizer, self.tokenizer)
        return assemble(self.settings, self.checkpoint.weights, generation)

    def evaluate(
        self, split: Literal["validation", "test"], max_tokens: int | None
    ) -> dict[str, Any]:
        """Score the global model on held-out text. Raises DataError if the text changed."""
        check_inventory(self.run.text, self.settings.data)
        blocks = evaluation_blocks(self.settings, tokenizer_json(self.tokenizer), split)
        result = evaluate(
            self.model,
            blocks,
            heldout_windows(blocks, max_tokens or self.settings.eval.max_tokens),
            token_byte_lengths(self.tokenizer, self.settings.model.vocab_size),
            self.settings.eval.batch_size,
        )
        return {
            "round": self.checkpoint.server_round,
            "split": split,
            "eval/loss": result.loss,
            "eval/perplexity": result.perplexity,
            "eval/bits_per_byte": result.bits_per_byte,
            "eval/tokens": result.tokens,
            "eval/domain_bits_per_byte": dict(result.domain_bits_per_byte),
        }

    def sample(self, prompt: str, max_tokens: int, seed: int) -> str:
        """Continue a prompt."""
        return sample_text(self.model, self.tokenizer, prompt, max_tokens, seed)

    def export(self, target: Path | None = None) -> Path:
        """Write a transformers checkpoint and return its folder."""
        path = (target or self.run.export).expanduser()
        check_folder(path, "--to")
        path = path.resolve()
        shard = SMALL_SHARD if self.checkpoint.slabs else ""
        summary = self.run.read_summary()
        rows = self.run.read_metrics()
        card = model_card(self.settings, self.checkpoint.server_round, rows, summary)
        export_model(self.model, self.tokenizer, path, card, shard)
        return path
