"""The demo, shortened: every file is written and agrees with the scores that are printed."""

import json

import anndata
import matplotlib.image
import numpy as np
import pytest

from scbert.commands.cli import main
from scbert.inference.demo import demo_cells, run_demo
from scbert.tokenization import InputError

pytest.importorskip("scanpy")


def test_the_demo_writes_what_it_says(tmp_path, capsys):
    summary = run_demo(tmp_path / "demo")
    folder = tmp_path / "demo"
    annotated = anndata.read_h5ad(folder / "annotated.h5ad")
    assert annotated.n_obs == summary["cells"] == (demo_cells().obs["split"] == "test").sum()
    names = np.asarray(annotated.uns["scbert"]["labels"])
    predicted = names[annotated.obsm["scbert_probabilities"].argmax(axis=1)]
    assert (predicted == annotated.obs["bulk_labels"].astype(str)).mean() == pytest.approx(
        summary["accuracy"]
    )
    metrics = json.loads((folder / "model" / "metrics.json").read_text())
    assert metrics["test_accuracy"] == pytest.approx(summary["accuracy"])
    assert metrics["baseline_test_macro_f1"] == summary["baseline_macro_f1"] > 0.6
    for name in ("umap.png", "confusion.png"):
        assert min(matplotlib.image.imread(folder / name).shape[:2]) > 300
    shown = capsys.readouterr()
    assert f"{summary['accuracy']:.3f}" in shown.err
    assert shown.out == ""


def test_a_file_in_the_way(tmp_path, capsys):
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        run_demo(tmp_path / "demo")
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 1
    assert "is a file" in capsys.readouterr().err
