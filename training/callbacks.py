"""What training does between steps that the Trainer does not know of."""

from transformers import TrainerCallback

from .numbered_cells import NumberedSampler


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
