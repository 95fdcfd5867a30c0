"""The Trainer of a pretraining run: masks, schedule, scores."""

import copy
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from ..data.corpus_stream import StreamOrder
from ..evaluation.per_gene_mode import PerGeneModeBaseline
from ..tokenization import InputError
from .callbacks import RedrawFeaturesCallback
from .cell_batches import DataCollatorForMaskedExpression
from .cell_order import EpochSampler
from .cell_targets import CellTargets
from .masked_metrics import MaskedScores
from .pretrain_arguments import PretrainDataArguments, PretrainTrainingArguments
from .pretrain_data import PretrainData
from .schedules import cosine_restarts
from .trainer import CellTrainer


class MaskedExpressionTrainer(CellTrainer):
    """
    `CellTrainer` for masked expression modelling.

    Every visit to a cell has an index of its own, so that masks and order depend on the seed alone and a resumed run
    repeats an uninterrupted one. Evaluation gathers scores batch by batch and holds no logits of a whole split.

    Beside every score stands that of the baseline; where whole cells are predicted, that of the mean cell, as log
    expression of every gene [genes]. Cells are taken in a `StreamOrder` if they are streamed; else each epoch in an
    order of its own, from anywhere. The options are those of `transformers.Trainer`.
    """

    def __init__(
        self,
        baseline: PerGeneModeBaseline,
        streaming: bool,
        mean_cell: np.ndarray | None,
        **options: Any,
    ):
        args, n_cells = options["args"], len(options["train_dataset"])
        seed = options["data_collator"].seed
        sampler: Any = EpochSampler(n_cells, seed)
        if streaming:
            place = args.process_index, args.world_size, args.dataloader_num_workers
            sampler = StreamOrder(n_cells, args.train_batch_size, seed, *place, numbered=True)
        super().__init__(sampler, _describe, [RedrawFeaturesCallback()], **options)
        self.baseline, self.mean_cell = baseline, mean_cell
        self.streaming = streaming

    def get_train_dataloader(self) -> DataLoader:
        """transformers' own, or for a stream one that knows its process: accelerate must not deal out again."""
        if not self.streaming:
            return super().get_train_dataloader()
        args = self.args
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        """transformers' own; scores are counted cell by cell, so batches are padded however training has them."""
        collator = self.data_collator
        self.data_collator = copy.copy(collator)
        # and every cell is seen whole
        self.data_collator.packing, self.data_collator.thinning = False, 0.0
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        self.indices = inputs.pop("indices")
        return inputs

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """transformers' step; a loss that is no number ends the run and names its cells."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            cells = self.train_dataset
            places = sorted((self.indices % len(cells)).tolist())
            raise InputError(
                f"The loss is {loss.item()} in step {self.state.global_step + 1}, process "
                f"{self.args.process_index}, in the batch of the cells {cells.rows[places].tolist()} (counted in "
                f"the corpus). Nothing of it was learnt. Look at these cells, or lower learning_rate (it is "
                f"{self.args.learning_rate:g}) or set max_grad_norm in the recipe; resume=True (--resume) goes on from "
                f"the last checkpoint."
            )
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The cosine restarts where they are asked for, with an epoch as their unit; else transformers' own."""
        if self.lr_scheduler is None and self.args.cosine_restarts:
            # an epoch's last step may have fewer batches
            per_epoch = -(-len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps)
            self.lr_scheduler = cosine_restarts(
                optimizer or self.optimizer,
                self.args.learning_rate,
                steps_per_unit=per_epoch,
                **self.args.cosine_restarts,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of a batch; its scores are added up, its logits let go."""
        inputs = self._prepare_inputs(inputs)
        filled_up = self._filled_up(len(inputs["labels"]))
        for name in inputs.keys() & {"labels", "cell_targets"}:
            inputs[name] = inputs[name].masked_fill(filled_up, -100)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        parts = (outputs.get("modality_loss"), outputs.get("cell_loss"))
        self.scores.add(outputs.logits, inputs, self.model.config.mask_token_id, *parts)
        return loss.detach(), None, None

    def _filled_up(self, batch_size: int) -> torch.Tensor:
        """Cells of this batch that several processes only repeat to have equally many, [batch, 1] bool."""
        batch = self.batches_seen * self.args.world_size + self.args.process_index
        self.batches_seen += 1
        places = batch * self.args.eval_batch_size + torch.arange(batch_size, device=self.args.device)
        return (places >= self.cells_to_score)[:, None]

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, **kwargs):
        """transformers' loop, with the scores of all processes among its metrics."""
        self.scores = MaskedScores(self.baseline, self.model.config.vocab_size, self.mean_cell)
        self.batches_seen, self.cells_to_score = 0, len(dataloader.dataset)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, **kwargs)
        for name in ("totals", "by_bin"):
            # as objects: some devices have no float64, and float32 holds no large counts exactly
            setattr(self.scores, name, torch.stack(gather_object([getattr(self.scores, name)])).sum(dim=0))
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self.scores.metrics().items()})
        return output


def _describe(metrics: dict[str, float]) -> str:
    """The last validation scores, for the progress bar."""
    return (
        f"validation loss {metrics['eval_loss']:.3f}, masked accuracy {metrics['eval_masked_accuracy']:.3f} "
        f"(baseline {metrics['eval_baseline_masked_accuracy']:.3f})"
    )


def build_pretrainer(
    model: PreTrainedModel,
    data: PretrainData,
    data_arguments: PretrainDataArguments,
    arguments: PretrainTrainingArguments,
) -> MaskedExpressionTrainer:
    """Put model, cells and settings together."""
    whole = model.config.cell_loss_weight > 0
    return MaskedExpressionTrainer(
        PerGeneModeBaseline(data.bin_counts),
        data_arguments.streaming,
        data.mean_cell() if whole else None,
        model=model,
        args=arguments,
        train_dataset=data.train,
        # its indices are the first visits', but of other cells: the masks are the same at every evaluation
        eval_dataset=data.validation,
        data_collator=DataCollatorForMaskedExpression(
            data.tokenizer,
            data_arguments.mlm_probability,
            data_arguments.replace_probability,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            packing=arguments.packing,
            targets=CellTargets(data.tokenizer, data.measured) if whole else None,
            thinning=data_arguments.thinning,
        ),
    )
