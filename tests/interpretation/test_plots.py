"""The pictures: which genes they show, in which order, and where the points lie."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scbert.interpretation import plots
from scbert.interpretation.markers import top_genes_table


def test_summary_shows_the_genes_of_largest_mean_absolute_contribution(tmp_path):
    contributions = np.array([[0.1, -2.0, 1.0, 0.0], [0.1, 2.0, 1.0, 0.0]])
    expression = sp.csr_matrix(np.array([[1, 0, 3, 0], [2, 5, 3, 0]]))
    figure = plots.plot_summary(
        contributions, expression, list("ABCD"), tmp_path / "s.png", n_genes=2, title="T"
    )
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["B  (2)", "C  (1)"]
    # low expression first, on the left: gene B is silent in the cell where it speaks against.
    assert axes.collections[0].get_offsets()[:, 0].tolist() == [-2.0, 2.0]
    assert axes.collections[0].get_array().tolist() == [0.0, 1.0]
    assert (tmp_path / "s.png").stat().st_size > 5000


def test_summary_draws_a_sample_of_many_cells(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "MAX_CELLS", 10)
    rng = np.random.default_rng(0)
    contributions, expression = rng.normal(size=(50, 1)), rng.integers(0, 5, (50, 1))
    figure = plots.plot_summary(contributions, expression, ["A"], tmp_path / "s.png", n_genes=1, title="T")
    assert len(figure.axes[0].collections[0].get_offsets()) == 10


def test_swarm_is_symmetric_and_stays_in_its_row():
    offsets = plots._swarm(np.r_[np.zeros(5), 1.0])
    assert sorted(offsets[:5].tolist()) == pytest.approx([-0.4, -0.2, 0, 0.2, 0.4])
    assert offsets[5] == 0
    assert np.abs(plots._swarm(np.random.default_rng(0).normal(size=1000))).max() <= 0.4


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\[cells, 2\]"):
        plots.plot_summary(np.zeros((3, 2)), np.zeros((3, 3)), ["A", "B"], tmp_path / "s.png", 2, "T")


def test_top_genes_picture_draws_a_shared_gene_once(tmp_path):
    scores = pd.DataFrame({"T": [3.0, 1.0, 2.0], "B": [2.0, 1.0, 3.0]}, index=["A", "B", "C"])
    figure = plots.plot_top_genes(top_genes_table(scores), scores, tmp_path / "t.png", n_top=2)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["A", "C"]
    assert (tmp_path / "t.png").stat().st_size > 5000


def test_names_of_types_are_no_formulas(tmp_path):
    scores = pd.DataFrame({r"T$\foo$": [3.0, 1.0, 2.0], "B": [2.0, 1.0, 3.0]}, index=["A", "B", "C"])
    assert plots.plot_top_genes(top_genes_table(scores), scores, tmp_path / "t.png")


def test_names_of_one_type_and_its_legend_stay_within_the_picture(tmp_path):
    name = "CD8-positive, alpha-beta memory T cell, CD45RO-positive"
    scores = pd.DataFrame({name: [3.0, 1.0, 2.0]}, index=["A", "B", "C"])
    figure = plots.plot_top_genes(top_genes_table(scores), scores, tmp_path / "t.png")
    box = figure.get_tightbbox()
    assert (
        box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.get_figwidth() and box.y1 <= figure.get_figheight()
    )
