"""How an export generates: token ids and settings, of the checkpoint that the run began with."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerFast

from fomoe_flwr.config import Settings
from fomoe_flwr.errors import one_line
from fomoe_flwr.events import tell
from fomoe_flwr.model.families import TOKEN_IDS
from fomoe_flwr.model.stored import config_words

FILE = "generation_config.json"


def first_generation(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Return what the model's folder says of generation; what it leaves open, the tokenizer says.

    A tokenizer of its own (`data.tokenizer`) has other ids: then the folder is not asked.
    """
    source = settings.model.pretrained or settings.model.upcycle
    found = GenerationConfig()
    if source and not settings.data.tokenizer:
        found = _of_folder(Path(source).expanduser())
    for name in TOKEN_IDS:
        if getattr(found, name) is None:
            setattr(found, name, getattr(tokenizer, name))
    return found


def kept_generation(folder: Path, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Return what a run keeps in its tokenizer's folder; runs of before keep nothing."""
    if (folder / FILE).is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def _of_folder(folder: Path) -> GenerationConfig:
    config = config_words(folder)
    ids = {name: config.get(name) for name in TOKEN_IDS}
    if not (folder / FILE).is_file():
        return GenerationConfig(**ids)
    try:
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
        found.validate(strict=True)  # or an export could not be written
    except Exception as error:  # transformers raises no narrower class
        tell("generation_left_out", f"{FILE} is left out: {one_line(error)}")
        return GenerationConfig(**ids)
    for name, token in ids.items():
        if getattr(found, name) is None:
            setattr(found, name, token)
    return found
