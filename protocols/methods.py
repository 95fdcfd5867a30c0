"""What is compared: scBERT as its recipe trains it, its ablations, and the plain baselines."""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from transformers import set_seed

from ..data.labels import UNASSIGNED
from ..evaluation.baselines import BASELINES
from ..modeling_scbert import ScBertForMaskedExpression
from ..tokenization import InputError
from ..trained_model.model_folder import load_model, load_tokenizer, save_model
from ..trained_model.prediction import LoadedModel, predict_cells
from ..training import run_finetune
from ..training.finetune_arguments import FINETUNE
from ..training.finetune_data import LabelledCells
from ..training.initial_model import load_masked_model
from ..training.run_summary import DEFAULT_THRESHOLD, TunedModel
from ..training.settings import parse
from .cells import LABEL, MODALITY, SPLIT, input_of
from .folds import TEST, TRAIN, VALIDATION, Fold

logger = logging.getLogger(__name__)

# few cells are repeated up to this many, or an epoch would be a single step
CELLS_OF_AN_EPOCH = 320
NEIGHBOURS = 15
DEFAULT_BASELINES = ("logistic_l1", "logistic_l2", "knn", "celltypist", "majority")


@dataclass
class Outputs:
    """
    What a method says of a fold's test cells: probabilities [test cells, types learnt].

    `notes` are what a reader of the score has to know.
    """

    classes: list[str]
    probabilities: np.ndarray
    # of training and prediction
    seconds: float
    # of scBERT only, for calibration and novelty; the threshold of "unassigned" as it stands in the model
    logits: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    train_embeddings: np.ndarray | None = None
    train_labels: np.ndarray | None = None
    threshold: float = DEFAULT_THRESHOLD
    notes: list[str] = field(default_factory=list)

    @property
    def predicted(self) -> np.ndarray:
        """Most probable type of every test cell; "unassigned" without expression."""
        best = np.where(self.probabilities.any(axis=1), self.probabilities.argmax(axis=1), -1)
        return np.array([*self.classes, UNASSIGNED], dtype=object)[best]


@dataclass(frozen=True)
class Method:
    """A name in the table and the function that learns a fold: ``run(cells, fold, seed) -> Outputs``."""

    name: str
    run: Callable[[anndata.AnnData, Fold, int], Outputs]
    is_baseline: bool


def baseline(name: str, threads: int = 2) -> Method:
    """One of `evaluation.baselines.BASELINES`; it learns from the training and the validation cells."""

    def run(cells: anndata.AnnData, fold: Fold, seed: int) -> Outputs:
        started = time.perf_counter()
        train, test = cells[np.isin(fold.split, [TRAIN, VALIDATION])], cells[fold.split == TEST]
        # worker processes cost more than they save on few cells
        model = BASELINES[name](seed=seed, threads=threads if train.n_obs > 1000 else 1)
        classes = model.fit(train, LABEL, input=input_of(cells)).classes_.tolist()
        probabilities = model.predict_proba(test, input=input_of(cells))
        return Outputs(classes, probabilities, time.perf_counter() - started, notes=model.notes)

    return Method(name, run, is_baseline=True)


def scbert(name: str, settings: dict[str, Any], work: Path, is_baseline: bool = False) -> Method:
    """Fine-tune with these settings (``recipe``, ``base``, and what goes over the recipe), in a folder for scratch."""

    def run(cells: anndata.AnnData, fold: Fold, seed: int) -> Outputs:
        started = time.perf_counter()
        work.mkdir(parents=True, exist_ok=True)
        try:
            tuned, data = _train(cells, fold, settings, work, seed)
            # asked of the cells as they are: fine-tuning's own test leaves types out that it did not learn
            asked = data.tokenizer.bin_cells(cells[fold.split == TEST], input=data.input_kinds["test"])
            outputs = _outputs(tuned, data, asked)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        outputs.seconds = time.perf_counter() - started
        return outputs

    return Method(name, run, is_baseline)


def _train(cells: anndata.AnnData, fold: Fold, settings: dict[str, Any], work: Path, seed: int):
    """What `scbert finetune` would leave, and the binned cells."""
    options = {"seed": seed, "disable_tqdm": True, **settings}
    if input_of(cells) != "auto":
        options["input"] = input_of(cells)
    fixed = {"reference": "cells of a fold", "label_key": LABEL, "output": work / "model", "test_key": SPLIT}
    _, data_arguments, model_arguments, training = parse(FINETUNE, {**fixed, **options})
    # one that is trained in epochs and has no validation cells is validated on its training cells, repeated
    repeat = not training.solved_head and VALIDATION not in fold.split
    if repeat:
        # validation cells that are copies cannot stop anything
        training.early_stopping_patience = 0
    part = _cells_of(cells, fold, repeat)
    set_seed(training.seed)
    data = run_finetune.load(data_arguments, model_arguments, training, reference=part)
    model = run_finetune.build_model(model_arguments, data, training.seed)
    return run_finetune.train(model, data, training), data


def _cells_of(cells: anndata.AnnData, fold: Fold, repeat: bool) -> anndata.AnnData:
    """The fold's cells; to `repeat` the training cells lets them stand in for validation too."""
    rows = [np.flatnonzero(fold.split == name) for name in (TRAIN, VALIDATION, TEST)]
    if repeat:
        labels = cells.obs[LABEL].to_numpy()[rows[0]]
        names, counts = np.unique(labels, return_counts=True)
        size = CELLS_OF_AN_EPOCH // len(names)
        repeated = [np.resize(rows[0][labels == name], max(size, n)) for name, n in zip(names, counts)]
        rows[1], rows[0] = rows[0], np.concatenate(repeated)
    chosen = np.concatenate(rows)
    split = np.repeat([TRAIN, VALIDATION, TEST], [len(r) for r in rows])
    types = cells.obs[LABEL].astype(str).to_numpy()[chosen]
    obs = pd.DataFrame({LABEL: pd.Categorical(types), SPLIT: pd.Categorical(split)})
    obs.index = obs.index.astype(str)
    columns = [MODALITY] if MODALITY in cells.var else []
    return anndata.AnnData(cells.X[chosen], obs=obs, var=cells.var[columns])


def _outputs(tuned: TunedModel, data: Any, asked: Any) -> Outputs:
    train = data.splits[TRAIN]
    loaded = LoadedModel(tuned.model, data.tokenizer)
    found = predict_cells(loaded, asked, ("logits", "embeddings"))
    nowhere = np.zeros(asked.shape[0], dtype=np.int64)
    threshold = tuned.model.config.unassigned_threshold
    return Outputs(
        classes=data.classes,
        probabilities=tuned.probabilities_of(LabelledCells(asked, nowhere, nowhere)),
        seconds=0.0,
        logits=found["logits"],
        embeddings=found["embeddings"],
        train_embeddings=predict_cells(loaded, train.bins, ("embeddings",))["embeddings"],
        train_labels=np.array(data.classes, dtype=object)[train.targets],
        threshold=DEFAULT_THRESHOLD if threshold is None else threshold,
    )


def frozen_neighbours(name: str, folder: Path, is_baseline: bool = False) -> Method:
    """Zero-shot: votes of the nearest training cells in the embeddings of a model that nothing was taught."""

    def run(cells: anndata.AnnData, fold: Fold, seed: int) -> Outputs:
        from sklearn.neighbors import KNeighborsClassifier

        started = time.perf_counter()
        loaded = load_model(folder, "embedding", dtype="float32")
        bins = loaded.tokenizer.bin_cells(cells, input=input_of(cells))
        embeddings = predict_cells(loaded, bins, ("embeddings",))["embeddings"]
        train, test = np.isin(fold.split, [TRAIN, VALIDATION]), fold.split == TEST
        voters = KNeighborsClassifier(min(NEIGHBOURS, int(train.sum())), weights="distance")
        voters.fit(embeddings[train], cells.obs[LABEL].to_numpy()[train].astype(str))
        probabilities = voters.predict_proba(embeddings[test])
        return Outputs([str(c) for c in voters.classes_], probabilities, time.perf_counter() - started)

    return Method(name, run, is_baseline)


def write_ablation(base: str | Path, folder: Path, kind: str, seed: int) -> Path:
    """
    Write a base with a part taken away as a model folder; returns the folder.

    ``"no pretraining"``: new weights, the gene table kept; ``"random genes"``: a random gene table of the same
    spread, the other weights kept; ``"nothing learnt"``: both new.
    """
    model = load_masked_model(base)
    genes = model.base_model.embeddings.gene_embeddings.weight
    kept = genes.detach().clone()
    if kind in ("no pretraining", "nothing learnt"):
        torch.manual_seed(seed)
        model = ScBertForMaskedExpression(model.config)
        genes = model.base_model.embeddings.gene_embeddings.weight
    with torch.no_grad():
        if kind == "no pretraining":
            genes.copy_(kept)
        elif kind == "random genes":
            drawn = torch.randn(kept.shape, generator=torch.Generator().manual_seed(seed))
            genes[:-1] = (drawn * kept[:-1].std() + kept[:-1].mean())[:-1]
    save_model(model, load_tokenizer(base), folder)
    return folder


def all_methods(
    protocol: str,
    recipes: list[str],
    base: str | None,
    settings: dict[str, Any],
    variants: dict[str, dict[str, Any]],
    baselines: list[str],
    work: Path,
    seed: int,
) -> list[Method]:
    """
    Everything that runs on every fold, the model in question (of the first recipe) first; see `run_benchmark`.

    ``"zero-shot"`` compares models that are not trained; `work` is a folder for scratch, `seed` that of the ablations.
    """
    found = []
    if protocol == "zero-shot":
        if not base:
            raise InputError("The zero-shot protocol compares embeddings of a pretrained model: give --base.")
        found.append(frozen_neighbours("scBERT embeddings, kNN", Path(base)))
        untrained = write_ablation(base, work / "untrained", "nothing learnt", seed)
        found.append(frozen_neighbours("untrained embeddings, kNN", untrained, True))
    else:
        common = {**settings, "base": base} if base else settings
        for recipe in recipes:
            name = "scBERT" if len(recipes) == 1 else f"scBERT ({Path(recipe).stem})"
            found.append(scbert(name, {"recipe": recipe, **common}, work / "run"))
        first = {"recipe": recipes[0], **common}
        for name, more in variants.items():
            found.append(scbert(name, _merged(first, more), work / "run"))
        if base:
            untrained = str(write_ablation(base, work / "untrained", "no pretraining", seed))
            shuffled = str(write_ablation(base, work / "shuffled", "random genes", seed))
            # frozen random weights would be no fair baseline: all of them are trained
            new = {**first, "base": untrained, "train_all": True}
            found.append(scbert("scBERT, no pretraining", new, work / "run", True))
            found.append(scbert("scBERT, random genes", {**first, "base": shuffled}, work / "run", True))
    return found + [baseline(name) for name in baselines]


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`more` over `settings`, within ``model`` and ``tokenizer`` field by field."""
    nested = {name: settings.get(name, {}) | more[name] for name in ("model", "tokenizer") if name in more}
    return settings | more | nested
