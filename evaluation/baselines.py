"""
The classifiers that stand beside every score as its baselines, on log1p CP10k.

All have one interface: `fit(adata, label_key)`, `predict_proba(adata)`, `predict(adata)`, `classes_`, and `notes`,
what a reader of the score has to know (convergence, a fallback). All are deterministic.
"""

import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..data.labels import choose_classes, find_labels
from ..data.read import log_normalize
from ..extras import require
from ..tokenization import InputError, align_genes
from .calibration import softmax

C_GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# of the inner cross-validation; fewer where the rarest type has fewer cells (at least 2)
INNER_FOLDS = 3
# of the votes, each lowered where there are fewer
N_NEIGHBORS, N_COMPONENTS, N_GENES = 15, 50, 2000


class Baseline:
    """
    What the classifiers share: cells in, probabilities out, on the training cells' expressed genes.

    `threads` is the upper limit for linear algebra and worker processes.
    """

    def __init__(self, seed: int = 0, threads: int = 1) -> None:
        self.seed, self.threads = seed, threads
        self.notes: list[str] = []

    def fit(self, adata: Any, label_key: str, input: str = "auto") -> "Baseline":
        """Learn from labelled cells; unlabelled ones (missing, "unassigned") are left out. Returns itself."""
        labels = find_labels(adata.obs, label_key, "the cells")
        self.classes_ = np.array(choose_classes(labels.tolist(), label_key)[0])
        labelled = np.flatnonzero([label is not None for label in labels])
        matrix, names = log_normalize(adata, input=input)
        matrix = matrix[labelled]
        seen = np.bincount(matrix.indices, minlength=matrix.shape[1]) > 0
        self.genes = [gene for gene, is_seen in zip(names, seen, strict=True) if is_seen]
        self.notes = []
        with require("threadpoolctl").threadpool_limits(self.threads):
            self._fit(matrix[:, seen], labels[labelled].astype(str))
        return self

    def predict_proba(self, adata: Any, input: str = "auto") -> np.ndarray:
        """Probabilities of cells, float32 [cells, classes], columns as in `classes_`; absent genes are 0."""
        matrix, names = log_normalize(adata, input=input)
        if not set(names) & set(self.genes):
            raise InputError(
                f"None of the {len(names)} genes of the query is among the {len(self.genes)} of the reference; first "
                f"names: {', '.join(names[:3])} against {', '.join(self.genes[:3])}. Give both the same kind of gene "
                "names."
            )
        with require("threadpoolctl").threadpool_limits(self.threads):
            return self._probabilities(matrix, names).astype(np.float32)

    def predict(self, adata: Any, input: str = "auto") -> np.ndarray:
        """Most probable type of every cell, [cells]."""
        return self.classes_[self.predict_proba(adata, input).argmax(axis=1)]

    def _fit(self, matrix: Any, labels: np.ndarray) -> None:
        raise NotImplementedError

    def _probabilities(self, matrix: Any, names: list[str]) -> np.ndarray:
        return self.model.predict_proba(align_genes(names, self.genes).apply(matrix))


class MajorityClass(Baseline):
    """Always the shares of the types among the training cells: what a score owes to imbalance alone."""

    def _fit(self, matrix: Any, labels: np.ndarray) -> None:
        self.model = require("sklearn.dummy").DummyClassifier(strategy="prior").fit(matrix, labels)


class LogisticRegressionBaseline(Baseline):
    """
    Logistic regression, L1 (the critics' baseline) or L2, its C chosen by inner cross-validation.

    ``"l1"`` is one classifier per type by liblinear, as in Boiarsky et al. 2024; ``"l2"`` multinomial by L-BFGS,
    stronger on most of the cells we measured. Of the values of C in `grid` the best mean macro-F1 wins, of equal ones
    the smallest. One value: no search.
    """

    def __init__(
        self, penalty: str = "l1", grid: Sequence[float] = C_GRID, seed: int = 0, threads: int = 1
    ) -> None:
        super().__init__(seed, threads)
        self.penalty, self.grid = penalty, tuple(grid)

    def _fit(self, matrix: Any, labels: np.ndarray) -> None:
        self.scores = self._search(matrix, labels) if len(self.grid) > 1 else {self.grid[0]: 0.0}
        self.C = max(self.scores, key=lambda C: (self.scores[C], -C))
        self.model, converged = _fit_logistic(self.penalty, self.C, self.seed, matrix, labels)
        if not converged:
            self.notes.append("logistic regression stopped before it converged")

    def _search(self, matrix: Any, labels: np.ndarray) -> dict[float, float]:
        """Mean macro-F1 of every C over the inner folds."""
        joblib, selection = require("joblib"), require("sklearn.model_selection")
        counts = np.unique(labels, return_counts=True)[1]
        # a type of one cell can't be in both halves: split by the others' frequencies.
        folds = min(INNER_FOLDS, int(counts.min() if counts.min() > 1 else counts.max()))
        if folds < 2:
            # no cell can be held out
            return {1.0: 0.0}
        splitter = selection.StratifiedKFold(folds, shuffle=True, random_state=self.seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")
            splits = [two for two in splitter.split(matrix, labels) if len(set(labels[two[0]])) > 1]
        # processes, not threads: liblinear has one random generator per process.
        tasks = [(C, train, held) for C in self.grid for train, held in splits]
        values = joblib.Parallel(n_jobs=self.threads)(
            joblib.delayed(_score_logistic)(self.penalty, C, self.seed, matrix, labels, train, held)
            for C, train, held in tasks
        )
        means = np.reshape(values, (len(self.grid), len(splits))).mean(axis=1)
        return dict(zip(self.grid, means.tolist(), strict=True))


def _fit_logistic(penalty: str, C: float, seed: int, matrix: Any, labels: np.ndarray) -> tuple[Any, bool]:
    """A fitted classifier, and whether it converged; ten times the iterations when at first it didn't."""
    linear, exceptions = require("sklearn.linear_model"), require("sklearn.exceptions")
    for iterations in (200, 2000):
        if penalty == "l1":
            one = linear.LogisticRegression(
                C=C, l1_ratio=1.0, solver="liblinear", max_iter=iterations, random_state=seed
            )
            model = require("sklearn.multiclass").OneVsRestClassifier(one)
        else:
            model = linear.LogisticRegression(C=C, max_iter=iterations, random_state=seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(matrix, labels)
        if not any(issubclass(warning.category, exceptions.ConvergenceWarning) for warning in caught):
            return model, True
    return model, False


def _score_logistic(penalty, C, seed, matrix, labels, train, held) -> float:
    model, _ = _fit_logistic(penalty, C, seed, matrix[train], labels[train])
    score = require("sklearn.metrics").f1_score
    return float(score(labels[held], model.predict(matrix[held]), average="macro", zero_division=0.0))


class NeighboursBaseline(Baseline):
    """Votes of the nearest training cells on principal components of the genes whose log values vary most."""

    def _fit(self, matrix: Any, labels: np.ndarray) -> None:
        mean = np.asarray(matrix.mean(axis=0)).ravel()
        variance = np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel() - mean**2
        # stable: of genes with equal variance the first in order, whatever the machine.
        chosen = np.sort(np.argsort(-variance, kind="stable")[:N_GENES])
        self.genes = [self.genes[i] for i in chosen]
        kept = matrix[:, chosen]
        components = min(N_COMPONENTS, kept.shape[0] - 1, kept.shape[1])
        dense = require("sklearn.preprocessing").FunctionTransformer(
            lambda kept: kept.toarray(), accept_sparse=True
        )
        pca = require("sklearn.decomposition").PCA(components, svd_solver="covariance_eigh")
        k = min(N_NEIGHBORS, len(labels))
        voters = require("sklearn.neighbors").KNeighborsClassifier(k, weights="distance")
        self.model = require("sklearn.pipeline").make_pipeline(dense, pca, voters).fit(kept, labels)


class CellTypistBaseline(Baseline):
    """
    CellTypist with the model of its defaults, learnt from the same cells.

    Its own training passes scikit-learn an argument that it lacks since 1.8: the same model (one-vs-rest L2 logistic
    regression with C = 1 on standardised genes, clipped at 10) is fitted here, put into its `Model`, and a note says
    so. Probabilities are the softmax of CellTypist's decision scores: its own independent ones reach 1 for several
    types at once, which would leave the choice to their order.
    """

    def _fit(self, matrix: Any, labels: np.ndarray) -> None:
        _quiet_celltypist()
        self.model = _celltypist_model(matrix, labels, np.array(self.genes), self.classes_)
        self.notes.append("CellTypist's model fitted outside its train(), which this scikit-learn refuses")

    def _probabilities(self, matrix: Any, names: list[str]) -> np.ndarray:
        celltypist = _quiet_celltypist()
        # the query's own genes: CellTypist leaves absent ones out instead of reading them as 0.
        query = require("anndata").AnnData(matrix, var=require("pandas").DataFrame(index=names))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = celltypist.annotate(query, model=self.model).decision_matrix
        return softmax(table[list(self.classes_)].to_numpy())


def _celltypist_model(matrix: Any, labels: np.ndarray, genes: np.ndarray, classes: np.ndarray) -> Any:
    """CellTypist's default model of dense standardised cells, one binary regression per type."""
    linear, models = require("sklearn.linear_model"), require("celltypist.models")
    scaler = require("sklearn.preprocessing").StandardScaler()
    scaled = np.minimum(scaler.fit_transform(matrix.toarray()), 10)
    whole = linear.LogisticRegression(C=1.0, max_iter=1000)
    # of two types only the second has a row of coefficients, as in scikit-learn.
    ones = [
        linear.LogisticRegression(C=1.0, max_iter=1000).fit(scaled, labels == label)
        for label in (classes if len(classes) > 2 else classes[1:])
    ]
    whole.coef_ = np.concatenate([one.coef_ for one in ones])
    whole.intercept_ = np.concatenate([one.intercept_ for one in ones])
    whole.classes_, whole.features, whole.n_features_in_ = classes, genes, len(genes)
    return models.Model(whole, scaler, {"number_celltypes": len(classes)})


def _quiet_celltypist() -> Any:
    # importing it sets up the root logger of the whole process: put that back, and silence its progress.
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        celltypist = require("celltypist")
    root.handlers[:] = handlers
    root.setLevel(level)
    require("celltypist.logger").set_level(logging.ERROR)
    return celltypist


BASELINES = {
    "majority": MajorityClass,
    "logistic_l1": LogisticRegressionBaseline,
    "logistic_l2": lambda **options: LogisticRegressionBaseline(
        penalty="l2", grid=(0.01, 0.1, 1.0), **options
    ),
    "knn": NeighboursBaseline,
    "celltypist": CellTypistBaseline,
}


def available_baselines() -> list[str]:
    """Names of the classifiers of `BASELINES` whose libraries are installed."""
    return [name for name in BASELINES if name != "celltypist" or find_spec("celltypist") is not None]
