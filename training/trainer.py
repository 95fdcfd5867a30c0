"""What every training of cells shares: the Trainer with its callbacks and orders, and a run from start to end."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..modeling_scbert.workload_scbert import expect_work
from ..trained_model.model_folder import quiet_transformers
from .callbacks import (
    CompleteCheckpoints,
    ProgressBar,
    SetEpochCallback,
    StopOnDivergence,
    saving_on_terminate,
)
from .cell_order import EpochSampler


class CellTrainer(Trainer):
    """
    `transformers.Trainer` with an order of cells of its own, checkpoints known to be whole, and one progress bar.

    Without a sampler it is the Trainer's own shuffling; `describe` is that of `ProgressBar`, and what else is given
    goes to the Trainer.
    """

    def __init__(
        self,
        sampler: EpochSampler | None,
        describe: Callable[[dict[str, float]], str],
        callbacks: Sequence[TrainerCallback],
        **options: Any,
    ):
        self.progress = ProgressBar(describe)
        ours = [CompleteCheckpoints(), StopOnDivergence(), self.progress]
        super().__init__(callbacks=[*ours, *callbacks], **options)
        self.sampler, self.work_is_known = sampler, False
        if sampler is not None:
            self.add_callback(SetEpochCallback(sampler))
        for theirs in (ProgressCallback, PrinterCallback):
            self.remove_callback(theirs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        return self.sampler or super()._get_train_sampler(train_dataset)

    def training_step(self, model, inputs, *args, **options):
        if not self.work_is_known:
            # a first batch stands for those to come
            steps = (self.state.max_steps - self.state.global_step) * self.args.gradient_accumulation_steps
            expect_work(self.model.config, steps * inputs["input_ids"].numel(), training=True)
            self.work_is_known = True
        return super().training_step(model, inputs, *args, **options)

    def run(self, checkpoint: Path | None = None) -> None:
        """Train to the end, from a checkpoint if there is one; SIGTERM has one written."""
        if checkpoint:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
            if control.get("should_training_stop"):
                # early stopping had ended it: transformers would forget that, and train for an epoch more
                self.args.num_train_epochs, self.args.max_steps = state.epoch, -1
        try:
            with quiet_transformers(), saving_on_terminate(self):
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.progress.stop()
