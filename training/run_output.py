"""The model folder at the end of a run, however many processes held a part of the model."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from ..tokenization import ScBertTokenizer
from .pretrained import quiet_transformers


def whole_weights(trainer: Trainer) -> dict[str, Any]:
    """All weights by name; every process must ask, since under FSDP each holds a part."""
    return trainer.accelerator.get_state_dict(trainer.model)


def write_model(folder: Path, trainer: Trainer, tokenizer: ScBertTokenizer, weights: dict[str, Any]) -> None:
    """Write weights, config, code and tokenizer."""
    with quiet_transformers():
        trainer.model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
