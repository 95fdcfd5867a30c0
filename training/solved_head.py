"""The head of a classifier solved for, cross-fitted and calibrated: from an encoder and labelled cells to a model."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.special import softmax
from tqdm.auto import tqdm

from ..tokenization import InputError
from ..tokenization.expression_scbert import floor_values
from ..trained_model.prediction import LoadedModel, predict
from .averaging import some_cells
from .logistic_head import PretrainedAxes, cross_folds, n_fits, solve_head
from .novelty_head import (
    all_centers,
    choose_threshold,
    known_shares,
    novelty_of_cells,
    telling_cells,
    whitened,
)
from .principal_axes import Axes, axes_along, axes_and_products, in_units_of, signal_along


@dataclass
class HeldOut:
    """
    What cross-fitting says of the cells that a head was solved on.

    Probabilities are of every cell, [cells, classes], by fits that it had no part in. The report has shares, penalties
    and temperature of the fits, and how novelty is told where there are cells to tell by.
    """

    probabilities: np.ndarray
    folds: np.ndarray
    report: dict[str, Any] = field(default_factory=dict)


def solve_classifier(
    loaded: LoadedModel,
    bins: sp.csr_matrix,
    targets: np.ndarray,
    seed: int = 0,
    show_progress: bool = False,
    unlabelled: sp.csr_matrix | None = None,
    gene_vectors: np.ndarray | None = None,
    effects: np.ndarray | None = None,
) -> HeldOut:
    """
    Solve for everything above the encoder: output layer (with its temperature), cell vectors, novelty, threshold.

    The classifier's head and the threshold of its config are changed in place, nothing else. Bins are [cells, panel];
    every class occurs among the targets [cells], and one cell of it is enough. Cells without labels, bins
    [others, panel], are learnt from as well. With vectors of the genes by pretraining, [panel, axes] (see
    `initial_model.pretrained_vectors`), one of the regressions goes along these axes. All are kept from leaning on
    `effects`, directions in which studies differ, [n, panel], in units of the cells' scatter (see `principal_axes`). An
    `InputError` if the head has hidden layers: then its output layer does not read the genes.
    """
    config = loaded.model.config
    if config.classifier_hidden_sizes:
        raise InputError(
            "A solved head reads the pooled states: it needs classifier_hidden_sizes [] in the recipe's model."
        )
    features, folds = pooled_features(loaded, bins), cross_folds(targets, seed=seed)
    others = None if unlabelled is None else pooled_features(loaded, unlabelled)
    pretrained = _along_pretrained(loaded, bins, features, gene_vectors)
    if effects is not None:
        effects = in_units_of(features, effects) if _reads_genes(features, bins) else None
    size = config.cell_vector_size
    total = n_fits(folds, pretrained=pretrained)
    if others is not None:
        # read by those who need it only
        from . import unlabelled_cells as teacher

        total += teacher.n_fits(folds)
    with tqdm(total=total, desc="Solving", unit="fit", disable=None if show_progress else True) as bar:
        axes, products = axes_and_products(features, effects, some_cells(targets, targets >= 0))
        given = {"axes": axes, "pretrained": pretrained, "effects": effects}
        given |= {"n_classes": config.num_labels, "folds": folds, "on_fit": bar.update}
        if others is None:
            head, learnt = solve_head(features, targets, **given), {}
        else:
            head, found = teacher.learn_from_all(features, targets, others, **given)
            learnt = {"unlabelled": found}
        # of many cells the last fits end at the penalties that were chosen
        bar.update(total - bar.n)
    report = {"shares": head.shares, "penalties": head.penalties, "temperature": head.temperature} | learnt
    report["signal"] = None if pretrained is None else pretrained.signal
    held_out = HeldOut(softmax(head.logits, axis=1), folds, report)
    _fill(loaded.model.classifier.out_proj, weight=head.weights, bias=head.bias)
    config.unassigned_threshold = None
    if not size:
        return held_out
    told = telling_cells(targets)
    if not told.any():
        _fill_cell_vectors(loaded, axes, targets, size)
        return held_out
    n_axes, distances, odds = novelty_of_cells(axes, products, features, targets, folds, size, told)
    _fill_cell_vectors(loaded, axes, targets, n_axes)
    _tell_novelty(loaded, held_out, distances, odds, targets, told)
    return held_out


def _tell_novelty(loaded, held_out, distances, odds, targets, told) -> None:
    """Put what tells novelty, and the threshold, into the model; novelty counts for the held-out cells, too."""
    largest, right = held_out.probabilities.max(axis=1), held_out.probabilities.argmax(axis=1) == targets
    confidence = largest * known_shares(distances, odds)
    threshold = choose_threshold(confidence[told], right[told])
    # what is kept at least leaves the same cells below the threshold
    held_out.probabilities *= known_shares(distances, odds, threshold)[:, None]
    loaded.model.config.unassigned_threshold = threshold
    _fill(loaded.model.classifier.novelty, odds=odds)
    even, slope = odds.tolist()
    held_out.report["novelty"] = {"cells": int(told.sum()), "even_at": even, "slope": slope}


def _reads_genes(features, bins) -> bool:
    """Whether the head reads one number a gene, and one more."""
    return features.shape[1] == bins.shape[1] + 1


def _along_pretrained(loaded, bins, features, gene_vectors) -> PretrainedAxes | None:
    """The cells along pretrained axes, if the head reads the genes, as the axes do."""
    if gene_vectors is None or not _reads_genes(features, bins):
        return None
    tokenizer, signal = loaded.tokenizer, None
    # bins that are ranks within a cell cannot be thinned
    if tokenizer.binning == "floor":
        values = floor_values(tokenizer.n_bins, tokenizer.bin_width, tokenizer.log_base)
        signal = signal_along(bins, values, gene_vectors)
    return PretrainedAxes(axes_along(features, gene_vectors), signal)


def pooled_features(loaded: LoadedModel, bins: sp.csr_matrix) -> sp.csr_matrix:
    """What the output layer of a head without hidden layers reads, [cells, genes + 1] or [cells, hidden], sparse."""
    rows, parts = [], []
    for batch, found in predict(loaded, bins, ("pooled",)):
        rows.append(batch)
        parts.append(sp.csr_matrix(found["pooled"]))
    return sp.vstack(parts, format="csr")[np.argsort(np.concatenate(rows))]


def _fill_cell_vectors(loaded: LoadedModel, axes: Axes, targets: np.ndarray, n_axes: int) -> None:
    """Put the projection onto cell vectors, of so many axes, and the centers of the types into the head."""
    size = loaded.model.config.cell_vector_size
    vectors, whitener = whitened(axes.coordinates[:, :n_axes], targets)
    coefficients = np.zeros((size, axes.coordinates.shape[1]))
    coefficients[: len(whitener), : len(whitener)] = whitener.T
    projection, offset = axes.gene_weights(coefficients, np.zeros(size))
    centers = np.zeros((loaded.model.config.num_labels + 1, size))
    centers[:, : len(whitener)] = all_centers(vectors, targets)
    novelty = loaded.model.classifier.novelty
    _fill(novelty, projection=projection, offset=offset, centers=centers)


@torch.no_grad()
def _fill(module: torch.nn.Module, **values: np.ndarray) -> None:
    for name, array in values.items():
        getattr(module, name).copy_(torch.from_numpy(np.asarray(array, dtype=np.float32)))
