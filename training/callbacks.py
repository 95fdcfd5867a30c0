"""What training does between steps that the Trainer does not know of."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator

import torch
from accelerate.utils import reduce
from transformers import Trainer, TrainerCallback

from .numbered_cells import NumberedSampler

logger = logging.getLogger(__name__)


class RedrawFeaturesCallback(TrainerCallback):
    """
    Draws the random features of FAVOR+ anew every `config.feature_redraw_interval` steps; 0 never does.

    The draw is decided by seed and step, so that every process has the same features and a resumed run the
    features of an uninterrupted one. Evaluation uses those of the last step.

    Parameters
    ----------
    seed
        With the number of the draw, decides the features.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        encoder = getattr(model, "module", model).base_model
        interval = encoder.config.feature_redraw_interval
        # at the beginning of a step: a checkpoint holds the features it was made with
        if interval and state.global_step and state.global_step % interval == 0:
            encoder.redraw_features(self.seed * 1_000_003 + state.global_step // interval)


class SetEpochCallback(TrainerCallback):
    """
    Tells a sampler the epoch before every pass.

    accelerate does so too, but not through the wrappers of a run of several processes resumed in mid-epoch.
    """

    def __init__(self, sampler: NumberedSampler):
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
            logger.warning("Saved at step %d; --resume goes on from there.", state.global_step)
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
