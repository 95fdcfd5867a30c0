"""What training does between steps that the Trainer does not know of, and its progress bar."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import reduce
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback

from ..tokenization import InputError
from .cell_order import EpochSampler

logger = logging.getLogger(__name__)

# an empty file: whatever stands beside it was written to the end
COMPLETE = "complete"


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once all its files are written: a process may be killed in the middle."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    checkpoints = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class StopOnDivergence(TrainerCallback):
    """Ends a run whose loss is no longer a number: nothing good can come of it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = [value for name, value in (logs or {}).items() if name in ("loss", "eval_loss", "grad_norm")]
        if not all(np.isfinite(value) for value in losses):
            raise InputError(
                f"Training diverged at step {state.global_step}: the loss is not a number any more. Lower "
                f"learning_rate (it is {args.learning_rate:g}), or set max_grad_norm, in the recipe."
            )


class RedrawFeaturesCallback(TrainerCallback):
    """
    Draws the random features of FAVOR+ anew every `config.feature_redraw_interval` training batches; 0 never does.

    As the original, it counts each of the batches that a step accumulates; features are drawn at the beginning of a
    step. The draw is decided by seed and step, so that every process has the same features and a resumed run the
    features of an uninterrupted one. Evaluation uses those of the last step.
    """

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        encoder = getattr(model, "module", model).base_model
        interval = encoder.config.feature_redraw_interval
        batches = state.global_step * args.gradient_accumulation_steps
        # at the beginning of a step: a checkpoint holds the features it was made with
        if interval and batches and batches % interval < args.gradient_accumulation_steps:
            encoder.redraw_features(args.seed * 1_000_003 + batches // interval)


class SetEpochCallback(TrainerCallback):
    """
    Tells a sampler the epoch before every pass.

    accelerate does so too, but not through the wrappers of a run of several processes resumed in mid-epoch.
    """

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        # a float: whole at an epoch's begin, a fraction where a run is resumed
        self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class SaveOnTerminate(TrainerCallback):
    """After SIGTERM in any process, ends the step, has a checkpoint written, and leaves with exit code 143."""

    def __init__(self):
        self.asked = False

    def receive(self, signum, frame):
        """Note the signal; the second one that a launcher may pass on changes nothing."""
        if not self.asked:
            logger.warning("SIGTERM: a checkpoint is written after this step.")
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # the signal may reach the processes in different steps: all stop after the same one
            asked = torch.tensor([float(self.asked)], device=args.device)
            self.asked = bool(reduce(asked, "sum").item())
        if self.asked:
            control.should_save = True
            control.should_evaluate = False
        return control

    def on_save(self, args, state, control, **kwargs):
        if self.asked:
            logger.warning("Saved at step %d; resume=True (--resume) goes on from there.", state.global_step)
            raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def saving_on_terminate(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM save a checkpoint while `trainer` trains; see `SaveOnTerminate`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    callback = SaveOnTerminate()
    # the last one, so that a checkpoint is marked as complete before it acts
    trainer.add_callback(callback)
    previous = signal.signal(signal.SIGTERM, callback.receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        trainer.remove_callback(callback)


class ProgressBar(TrainerCallback):
    """
    One bar over all steps on stderr, where that is a terminal, with the time that is left and the last scores.

    `describe` makes a text of the metrics of an evaluation.
    """

    def __init__(self, describe: Callable[[dict[str, float]], str]):
        self.describe = describe
        console = Console(stderr=True)
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
        self.progress = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
        )
        self.task = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not args.disable_tqdm:
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.task is not None:
            text = f"epoch {state.epoch:.0f}, {self.describe(metrics)}"
            self.progress.update(self.task, description=text)

    def stop(self) -> None:
        """Take the bar down; after an error too, or it would go on drawing over the message."""
        self.progress.stop()
