"""The jobs that benchmarks/speed.py times, and the ways to do them: a naive stand-in for the original, and ours."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from performer_attention import performer_attention
from scbert.modeling_scbert import ScBertConfig, ScBertForCellClassification, ScBertForMaskedExpression
from scbert.modeling_scbert.backends_scbert import Backend, favor_backend
from scbert.modeling_scbert.cpu_matmul_scbert import restore_matmul
from scbert.modeling_scbert.favor_engine_scbert import FAVOR
from scbert.training.frozen_layer_cache import FrozenLayerCache

# one token per gene of the original's panel, and the trailing one
FULL_LENGTH = 16_907


@dataclass(frozen=True)
class Variant:
    """
    A way to run the model.

    Attributes
    ----------
    naive
        Features of the whole sequence at once, in the operations of `performer_attention`, as the original does; a
        layer keeps all it computes.
    onednn
        Float32 products by oneDNN.
    half
        Under bfloat16 autocast.
    in_chunks
        Train whole blocks in chunks; None leaves it to the model.
    cached
        Keep what the frozen layers put out.
    compiled
        Blocks by the operators of compiled_layer_scbert.
    attention
        ``attention_type`` of the model.
    """

    naive: bool = False
    onednn: bool = False
    half: bool = False
    in_chunks: bool | None = None
    cached: bool = False
    compiled: bool = False
    attention: str = "favor"


VARIANTS = {
    "inference": {
        "naive": Variant(naive=True),
        "naive, oneDNN": Variant(naive=True, onednn=True),
        "engine": Variant(),
        "engine, oneDNN": Variant(onednn=True),
        "engine, bfloat16": Variant(onednn=True, half=True),
        "compiled": Variant(onednn=True, compiled=True),
        "compiled, bfloat16": Variant(onednn=True, half=True, compiled=True),
    },
    "pretraining step": {
        "naive": Variant(naive=True),
        "engine": Variant(in_chunks=False),
        "engine, oneDNN": Variant(onednn=True, in_chunks=False),
        "engine in chunks": Variant(in_chunks=True),
        "engine in chunks, oneDNN": Variant(onednn=True, in_chunks=True),
        "engine in chunks, bfloat16": Variant(onednn=True, half=True, in_chunks=True),
        "compiled": Variant(onednn=True, compiled=True),
        "compiled, bfloat16": Variant(onednn=True, half=True, compiled=True),
    },
    "fine-tuning step": {
        "naive": Variant(naive=True),
        "engine": Variant(),
        "engine, oneDNN": Variant(onednn=True),
        "engine, cache": Variant(cached=True),
        "engine, oneDNN, cache": Variant(onednn=True, cached=True),
        "engine, bfloat16, cache": Variant(onednn=True, half=True, cached=True),
        "compiled": Variant(onednn=True, compiled=True),
        "compiled, cache": Variant(onednn=True, cached=True, compiled=True),
        "compiled, bfloat16, cache": Variant(onednn=True, half=True, cached=True, compiled=True),
    },
}


@contextlib.contextmanager
def running_as(variant: Variant) -> Iterator[None]:
    """Choose the backends that a variant asks for, and put back what was."""
    if variant.naive:
        names = ("naive",)
    elif variant.compiled:
        names = ("compiled",)
    elif variant.in_chunks is not None:
        names = ("chunked",) if variant.in_chunks else ("plain",)
    else:
        names = ("-compiled",)
    autocast = torch.autocast("cpu", torch.bfloat16) if variant.half else contextlib.nullcontext()
    naive, FAVOR["naive"] = FAVOR["naive"], Backend(lambda *_: None, performer_attention)
    if variant.onednn:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with favor_backend(*names, "-onednn"), autocast:
            yield
    finally:
        restore_matmul()
        FAVOR["naive"] = naive


def build_config(n_layers: int, length: int, attention: str = "favor") -> ScBertConfig:
    """The published model, with as many layers and positions as asked for."""
    return ScBertConfig(
        num_hidden_layers=n_layers, max_position_embeddings=length, attention_type=attention, num_labels=11
    )


def cells(n_cells: int, length: int, seed: int = 0) -> torch.Tensor:
    """Expression bins of cells in which one gene in ten is expressed."""
    generator = torch.Generator().manual_seed(seed)
    bins = torch.randint(1, 6, (n_cells, length), generator=generator)
    return bins * (torch.rand(n_cells, length, generator=generator) < 0.1)


def inference(config: ScBertConfig, n_cells: int, length: int) -> Callable[[Variant], torch.Tensor]:
    """A function that encodes a batch the way a variant does; one model for all of them."""
    torch.manual_seed(0)
    model = ScBertForMaskedExpression(config).eval()
    input_ids = cells(n_cells, length)

    def run(variant: Variant) -> torch.Tensor:
        with running_as(variant), torch.no_grad():
            return model.scbert(input_ids).last_hidden_state

    return run


def pretraining_step(config: ScBertConfig, n_cells: int, length: int) -> Callable[[Variant], torch.Tensor]:
    """Forward, backward and Adam of masked expression modelling."""
    torch.manual_seed(0)
    model = ScBertForMaskedExpression(config).train()
    input_ids = cells(n_cells, length)
    labels = torch.where((input_ids > 0) & (torch.rand(input_ids.shape) < 0.15), input_ids, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    return _stepper(model, optimizer, {"input_ids": input_ids, "labels": labels})


def finetuning_step(config: ScBertConfig, n_cells: int, length: int) -> Callable[[Variant], torch.Tensor]:
    """Forward, backward and Adam of cell-type annotation, all frozen but what the original trains."""
    # imported here: with the Trainer, its imports are most of what the other jobs' processes would do
    from scbert.training.initial_model import freeze_for_finetuning

    torch.manual_seed(0)
    model = ScBertForCellClassification(config).train()
    freeze_for_finetuning(model)
    batch = {"input_ids": cells(n_cells, length), "labels": torch.arange(n_cells) % config.num_labels}
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    return _stepper(model, optimizer, batch)


def _stepper(model, optimizer, batch) -> Callable[[Variant], torch.Tensor]:
    caches = {}

    def run(variant: Variant) -> torch.Tensor:
        if variant.cached and variant not in caches:
            caches[variant] = FrozenLayerCache(model.scbert)
        model.scbert.prefix = caches.get(variant)
        optimizer.zero_grad()
        # the original decodes every token; so does its stand-in
        model.config.sparse_prediction = not variant.naive
        with running_as(variant):
            loss = model(**batch).loss
        # products of the backward are asked for in the same way, but autocast ends with the forward
        with running_as(Variant(onednn=variant.onednn, compiled=variant.compiled)):
            loss.backward()
        optimizer.step()
        return loss.detach()

    return run


TASKS = {
    "inference": inference,
    "pretraining step": pretraining_step,
    "fine-tuning step": finetuning_step,
}
