"""The folder of a run: begun or taken up again, and filled with the model at the end, by however many processes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer, TrainingArguments

from ..data.write_output import partial_folder
from ..tokenization import ScBertTokenizer
from .finetune_trainer import last_checkpoint
from .pretrained import quiet_transformers
from .run_record import check_run_record, write_run_record


@contextlib.contextmanager
def run_folder(
    settings: dict[str, Any], arguments: Any, training: TrainingArguments, data: Any
) -> Iterator[tuple[Path, Path | None]]:
    """
    The partial folder of a run, which gets its name when the block ends well.

    Parameters
    ----------
    settings, data
        What a resumed run must have in common with the one it goes on with.
    arguments
        Their `output`, `overwrite` and `resume` are asked for.
    training
        Its checkpoints lie in the folder.

    Yields
    ------
    The folder, and the checkpoint to go on from, if any.
    """
    is_main = training.process_index == 0
    # the folder is the main process's; nobody touches it before it is made
    context = partial_folder(arguments.output, arguments.overwrite, arguments.resume)
    with context if is_main else contextlib.nullcontext():
        folder, checkpoint = Path(training.output_dir).parent, None
        if arguments.resume:
            check_run_record(folder, settings, data)
            checkpoint = last_checkpoint(Path(training.output_dir))
        if is_main:
            write_run_record(folder, settings, data)
        PartialState().wait_for_everyone()
        yield folder, checkpoint


def whole_weights(trainer: Trainer) -> dict[str, Any]:
    """All weights by name; every process must ask, since under FSDP each holds a part."""
    return trainer.accelerator.get_state_dict(trainer.model)


def write_model(folder: Path, trainer: Trainer, tokenizer: ScBertTokenizer, weights: dict[str, Any]) -> None:
    """Write weights, config, code and tokenizer."""
    with quiet_transformers():
        trainer.model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
