"""The models that attention_effect.py compares: a layer, or none, and how it is trained behind a solved head."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from scipy.special import log_softmax
from torch import nn

from evidence import cells_of
from evidence_studies import CHOOSE, folds_of, read_study
from scbert.data.splits import stratified_split
from scbert.trained_model.prediction import LoadedModel
from scbert.training.cell_batches import CellDataset, DataCollatorForCells
from scbert.training.cell_order import LengthGroupedSampler
from scbert.training.finetune_arguments import FINETUNE
from scbert.training.finetune_data import FinetuneData, load_data
from scbert.training.initial_model import new_model
from scbert.training.logistic_head import cross_folds, solve_head
from scbert.training.settings import parse
from scbert.training.solved_head import pooled_features

MAX_CELLS, FOLDS, VALIDATION, TOP_GENES = 1200, 3, 0.2, 1000
LAYER = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "num_random_features": 64}
LAYER |= {"intermediate_size": 128}
PARTS, BATCH_SIZE, EPOCHS, PATIENCE, LAYER_RATE, HEAD_RATE = 3, 16, 8, 3, 3e-4, 3e-5


@dataclass
class Way:
    """A model to compare: its layers, and how they come about."""

    title: str
    layers: int = 1
    zero_start: bool = True
    trained: bool = True
    crossed: bool = True
    attends: bool = True


WAYS = {
    "reference": Way("no layer: the default recipe", layers=0, zero_start=False, trained=False),
    "correction": Way("one layer from zero", crossed=False),
    "crossed": Way("one layer from zero, crossed"),
    "random": Way("one random layer, not trained", zero_start=False, trained=False),
    "random_trained": Way("one random layer, crossed", zero_start=False),
    "feed_forward": Way("one layer from zero, crossed, attention kept at zero", attends=False),
    "two_layers": Way("two layers from zero, crossed", layers=2),
}


def recipe(layers: int) -> tuple:
    """Arguments of the default recipe, with layers; without cell vectors, which tell novelty and not types."""
    given = {
        "reference": "cells",
        "label_key": "label",
        "output": "nowhere",
        "input": "counts",
        "device": "cpu",
    }
    _, data, model, training = parse(FINETUNE, given | {"test_key": "split", "top_genes": TOP_GENES})
    fields = {**model.model, "cell_vector_size": 0, "num_hidden_layers": layers, **(LAYER if layers else {})}
    return data, model.tokenizer, fields, training.seed


def load_folds(folder: Path, study: str) -> Iterator[FinetuneData]:
    """The cells of every fold: those to learn, in training and validation, and the fold's own as the test."""
    cells = read_study(folder, *next(entry for entry in CHOOSE if entry[0] == study))
    kept = np.random.default_rng(0).permutation(len(cells.labels))[:MAX_CELLS]
    adata, labels = cells_of(cells.matrix[kept], cells.labels[kept]), cells.labels[kept]
    folds = folds_of(labels, FOLDS, 0)
    for fold in range(FOLDS):
        split, learnt = np.full(len(labels), "test", dtype=object), folds != fold
        split[learnt] = stratified_split(labels[learnt], 0.0, VALIDATION)
        adata.obs["split"] = split.astype(str)
        data, tokenizer, _, seed = recipe(0)
        yield load_data(data, tokenizer, seed, reference=adata)


@torch.no_grad()
def start_at_zero(model: nn.Module) -> None:
    """Let both residual branches of every layer say nothing, yet learn: their last maps are zero, no others."""
    for layer in model.scbert.layers:
        for last in (layer.attention.o_proj, layer.output):
            last.weight.zero_()
            last.bias.zero_()


def build(way: Way, data: FinetuneData) -> LoadedModel:
    """A new model of this way; what starts from zero is checked to say what the reference says."""
    _, _, fields, seed = recipe(way.layers)
    torch.manual_seed(seed)
    loaded = LoadedModel(new_model(fields, data.tokenizer, data.classes, seed), data.tokenizer)
    if way.zero_start:
        start_at_zero(loaded.model)
        some, reference = data.splits["test"].bins[:50], build(WAYS["reference"], data)
        gap = abs(pooled_features(loaded, some) - pooled_features(reference, some)).max()
        assert gap < 1e-3, f"a start from zero differs from the reference by {gap} bins"
    return loaded


def solve(features: sp.csr_matrix, targets: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [classes, genes + 1] and bias [classes] of the recipe's head."""
    head = solve_head(features, targets, n_classes, cross_folds(targets))
    return head.weights, head.bias


def losses_of(features, weights, bias, targets) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of every cell's type, and the likeliest type of every cell, [cells]."""
    logits = features @ weights.T.astype(np.float64) + bias
    return -log_softmax(logits, axis=1)[np.arange(len(targets)), targets], logits.argmax(axis=1)


def gain(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """What a cell's loss falls by in the mean, with its standard error, paired over cells; and what the rule says."""
    falls = before - after
    mean, error = float(falls.mean()), float(falls.std(ddof=1) / len(falls) ** 0.5)
    return {"mean": mean, "error": error, "keep": mean > error}


class Heads(nn.Module):
    """A head for every part of the training cells, solved on the other parts; or one for all, solved on all."""

    def __init__(self, features: sp.csr_matrix, targets: np.ndarray, n_classes: int, crossed: bool):
        super().__init__()
        self.parts = cross_folds(targets, PARTS, seed=1) if crossed else np.zeros(len(targets), dtype=int)
        seen = [self.parts != part if crossed else self.parts == part for part in np.unique(self.parts)]
        solved = [solve(features[cells], targets[cells], n_classes) for cells in seen]
        weights, bias = (torch.from_numpy(np.stack(values)) for values in zip(*solved))
        # what was solved without a cell must not hear of it by gradients
        self.weights = nn.Parameter(weights, requires_grad=not crossed)
        self.bias = nn.Parameter(bias, requires_grad=not crossed)

    def forward(self, pooled: torch.Tensor, cells: np.ndarray) -> torch.Tensor:
        parts = torch.from_numpy(self.parts[cells])
        return torch.einsum("bg,bcg->bc", pooled, self.weights[parts]) + self.bias[parts]

    def losses(self, loaded: LoadedModel, cells) -> np.ndarray:
        """Of cells that none was solved on, by the mean head."""
        weights, bias = (values.detach().mean(dim=0).numpy() for values in (self.weights, self.bias))
        return losses_of(pooled_features(loaded, cells.bins), weights, bias, cells.targets)[0]


def train_layers(loaded: LoadedModel, data: FinetuneData, way: Way) -> dict:
    """Train to the best validation likelihood, the start's allowed; says what every epoch gave."""
    model, train, validation = loaded.model, data.splits["train"], data.splits["validation"]
    heads = Heads(pooled_features(loaded, train.bins), train.targets, len(data.classes), way.crossed)
    model.requires_grad_(False)
    for layer in model.scbert.layers.requires_grad_(True):
        layer.attention.requires_grad_(way.attends)
    groups = [(model.scbert.layers, LAYER_RATE), (heads, HEAD_RATE)]
    learnt = [
        {"params": [x for x in part.parameters() if x.requires_grad], "lr": rate} for part, rate in groups
    ]
    optimizer = torch.optim.Adam(learnt)
    order = LengthGroupedSampler(np.diff(train.bins.indptr), BATCH_SIZE)
    start = best = heads.losses(loaded, validation)
    chosen, state, epochs = 0, copy_of(model), [{"validation": float(start.mean())}]
    while len(epochs) <= min(EPOCHS, chosen + PATIENCE):
        order.set_epoch(len(epochs))
        loss = train_epoch(model, heads, optimizer, data, np.array(list(order)))
        found = heads.losses(loaded, validation)
        if found.mean() < best.mean():
            best, chosen, state = found, len(epochs), copy_of(model)
        epochs.append({"train": loss, "validation": float(found.mean())})
    model.load_state_dict(state)
    return {"epochs": epochs, "chosen": chosen, "validation": gain(start, best)}


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def train_epoch(model, heads, optimizer, data: FinetuneData, order: np.ndarray) -> float:
    """One pass over the training cells; their mean loss on the way."""
    train, collate, total = data.splits["train"], DataCollatorForCells(data.tokenizer), 0.0
    dataset = CellDataset(train.bins, train.targets)
    for cells in np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE)):
        batch = collate(dataset.__getitems__(cells))
        labels = batch.pop("labels")
        states = model.scbert(**batch).last_hidden_state
        pooled = model.classifier.pool(states, batch["attention_mask"], batch["gene_ids"])
        loss = nn.functional.cross_entropy(heads(pooled, cells), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(cells)
    return total / len(order)


def measure(way: Way, data: FinetuneData) -> dict:
    """Loss and prediction of every test cell, and how the model came about."""
    began, loaded, report = time.process_time(), build(way, data), {}
    if way.trained:
        report = train_layers(loaded, data, way)
    learnt, test = [data.splits[name] for name in ("train", "validation")], data.splits["test"]
    targets = np.concatenate([part.targets for part in learnt])
    head = solve(
        pooled_features(loaded, sp.vstack([part.bins for part in learnt])), targets, len(data.classes)
    )
    losses, predicted = losses_of(pooled_features(loaded, test.bins), *head, test.targets)
    found = {"losses": losses, "true": test.targets, "predicted": predicted}
    report |= {name: values.tolist() for name, values in found.items()}
    return {**report, "learnt": len(targets), "seconds": time.process_time() - began}
