"""The folder of a run: begun or taken up again, and filled with the model at the end, by however many processes."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments

from ..data.paths import keep_record, partial_folder
from ..tokenization import ScBertTokenizer
from ..trained_model.model_folder import save_model
from .callbacks import last_checkpoint
from .settings import RunDataArguments, comparable

logger = logging.getLogger(__name__)

# settings and a checksum of the cells that a partial folder was begun with
RECORD = "run.json"


@contextlib.contextmanager
def run_folder(
    settings: dict[str, Any], arguments: RunDataArguments, training: TrainingArguments, fingerprint: int
) -> Iterator[tuple[Path, Path | None]]:
    """
    The partial folder of a run, which gets its name when the block ends well, and the checkpoint to go on from, if any.

    A resumed run must have the settings, and the checksum of the cells, of the one it goes on with. Checkpoints lie in
    the folder.
    """
    is_main = training.process_index == 0
    # the folder is the main process's; nobody touches it before it is made
    context = partial_folder(arguments.output, arguments.overwrite, arguments.resume)
    with context if is_main else contextlib.nullcontext():
        folder, checkpoint = Path(training.output_dir).parent, None
        # the others look at what is there already: the first may not have made the folder yet
        if is_main or (arguments.resume and (folder / RECORD).exists()):
            keep_record(folder / RECORD, comparable(settings) | {"cells or labels": fingerprint})
        if arguments.resume:
            checkpoint = last_checkpoint(Path(training.output_dir))
            if is_main and checkpoint is None:
                logger.warning("There is no finished checkpoint in %s: the run starts at step 0.", folder)
            elif is_main:
                step = checkpoint.name.rpartition("-")[2]
                logger.warning("Resuming after step %s, from %s.", step, checkpoint)
        PartialState().wait_for_everyone()
        yield folder, checkpoint


def finish(
    folder: Path,
    checkpoints: str,
    model: PreTrainedModel,
    tokenizer: ScBertTokenizer,
    weights: dict[str, torch.Tensor],
    summary: dict[str, Any],
) -> None:
    """Write weights, config, code, tokenizer and figures; take away what only training needed."""
    save_model(model, tokenizer, folder, weights)
    write_json(folder / "metrics.json", summary)
    logs = Path(checkpoints) / "runs"
    if logs.is_dir():
        # tensorboard's own place for them lies among the checkpoints
        os.replace(logs, folder / "runs")
    shutil.rmtree(checkpoints, ignore_errors=True)
    (folder / RECORD).unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain JSON; what it does not know, as text."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")
