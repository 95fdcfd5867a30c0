"""Cells on a plane: one colour per label in every panel, one legend for all."""

import numpy as np

from scbert.evaluation.embedding_plot import plot_embedding


def test_panels_share_colours_and_the_legend_names_every_label(tmp_path):
    xy = np.random.default_rng(0).normal(size=(30, 2))
    truth = [f"type {i % 14}" for i in range(30)]
    prediction = ["unassigned", "a" * 60, *truth[2:]]
    figure = plot_embedding(xy, {"truth": truth, "prediction": prediction}, tmp_path / "umap.png", xy[:5])
    assert (tmp_path / "umap.png").stat().st_size > 5000
    handles = figure.legends[0].legend_handles
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(shown) == 14 + 2
    assert shown[-1] == "unassigned"
    assert all(len(text) <= 30 for text in shown)
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == len(handles)
    left, right = (
        {_style(dots) for dots in axes.collections if len(dots.get_offsets())} for axes in figure.axes
    )
    assert left <= right


def test_the_legend_of_many_types_stays_within_the_picture():
    labels = [f"a type of a long name {i}" for i in range(40)]
    figure = plot_embedding(np.random.default_rng(0).normal(size=(40, 2)), {"type": labels})
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width and 0 <= box.y0 < box.y1 <= figure.bbox.height


def _style(dots):
    return tuple(dots.get_facecolor()[0]), tuple(map(tuple, dots.get_paths()[0].vertices.round(3)))
