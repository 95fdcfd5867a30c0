"""The baselines reach the plain baselines measured elsewhere on the same real cells (3 folds, macro-F1)."""

import os
from pathlib import Path

import anndata
import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from scbert.evaluation.baselines import LogisticRegressionBaseline
from scbert.evaluation.metrics import classification_metrics

pytestmark = [pytest.mark.shared, pytest.mark.slow]

# macro-F1 of a plain logistic regression on log1p CP10k, as published with the cells
PLAIN = {
    "pbmc3k_10x": 0.907,
    "zheng_facs_pbmc": 0.767,
    "scmixology_celseq_dropseq": 0.985,
    "fetal_cortex_camp": 0.632,
}


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_l1_logistic_regression_reaches_the_plain_baseline(name):
    folder = os.environ.get("SCBERT_CELLS")
    if not folder:
        pytest.skip("SCBERT_CELLS names no folder of real cells")
    cells = anndata.read_h5ad(Path(folder) / f"{name}.h5ad")
    cells = cells[cells.obs["cell_type"] != "unassigned"].copy()
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    predicted = np.empty_like(labels)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    for train, test in folds.split(labels, labels):
        model = LogisticRegressionBaseline(grid=(1.0,)).fit(cells[train], "cell_type")
        predicted[test] = model.predict(cells[test])
    assert classification_metrics(labels, predicted)["macro_f1"] > PLAIN[name] - 0.01
