"""
A head that is solved for and not stepped towards: penalised logistic regression on what the frozen encoder puts out.

Of a few thousand cells and ten thousand genes the best weights are found exactly in seconds. An L1 penalty keeps a
weight for the genes that matter and none for the rest, which carries over to other cohorts better.
"""

import logging
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from ..evaluation.baselines import LogisticRegressionBaseline
from ..tokenization import InputError
from ..trained_model.loaded_model import LoadedModel
from ..trained_model.prediction import predict

logger = logging.getLogger(__name__)


def pooled_features(loaded: LoadedModel, bins: sp.csr_matrix) -> sp.csr_matrix:
    """
    What the head's output layer reads of every cell, [cells, genes + 1] or [cells, hidden], sparse.

    Parameters
    ----------
    loaded
        A classifier without hidden layers in its head, and its tokenizer.
    bins
        Expression bins [cells, panel].
    """
    rows, parts = [], []
    for batch, found in predict(loaded, bins, ("pooled",)):
        rows.append(batch)
        parts.append(sp.csr_matrix(found["pooled"]))
    return sp.vstack(parts, format="csr")[np.argsort(np.concatenate(rows))]


def solve_head(
    loaded: LoadedModel, bins: sp.csr_matrix, targets: np.ndarray, penalty: str, seed: int = 0
) -> float:
    """
    Put the weights of a logistic regression into the head's output layer.

    Features are brought to a mean of 1 (of those above 0) for the fit: the strengths tried are meant for such.

    Parameters
    ----------
    loaded
        A classifier; its output layer is changed in place, nothing else.
    bins
        See `pooled_features`.
    targets
        Classes of the cells, [cells]; every class occurs.
    penalty
        ``"l1"`` (one class against the rest) or ``"l2"`` (multinomial); its strength is chosen by inner
        cross-validation.
    seed
        Of the folds.

    Returns
    -------
    float
        C, the inverse strength.

    Raises
    ------
    InputError
        If the head has hidden layers: then its output layer does not read the genes.
    """
    if loaded.model.config.classifier_hidden_sizes:
        raise InputError(
            "A solved head reads the pooled states: it needs classifier_hidden_sizes [] in the recipe's model."
        )
    features = pooled_features(loaded, bins)
    scale = float(features.data.mean()) if features.nnz else 1.0
    solver = LogisticRegressionBaseline(penalty, seed=seed)
    solver._fit(features / scale, targets)
    weights, bias = _rows(solver.model)
    weights /= scale
    layer = loaded.model.classifier.out_proj
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights))
        layer.bias.copy_(torch.from_numpy(bias))
    used = int((weights != 0).any(axis=0).sum())
    logger.info(
        "The head was solved for with C = %g; %d of %d inputs have a weight.",
        solver.C,
        used,
        weights.shape[1],
    )
    return solver.C


def _rows(fitted: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weights [classes, features] and biases [classes] of a fitted classifier, two classes included."""
    models = getattr(fitted, "estimators_", [fitted])
    weights = np.concatenate([model.coef_ for model in models])
    bias = np.concatenate([model.intercept_ for model in models])
    if len(weights) == 1:
        # the logit of the second class against the first
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return weights, bias
