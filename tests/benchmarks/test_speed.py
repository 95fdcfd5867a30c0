"""The speed benchmark's parts: equal work in every way, fits, tables and the page."""

import pytest
import torch

import speed_report
from performer_attention import performer_attention
from scbert.modeling_scbert import ScBertConfig, favor_scbert
from scbert.modeling_scbert.backends_scbert import is_unwanted, is_wanted
from scbert.modeling_scbert.favor_engine_scbert import FAVOR
from speed import straight_line, summary
from speed_tasks import TASKS, VARIANTS, Variant, running_as


def tiny_config():
    return ScBertConfig(
        hidden_size=8,
        num_attention_heads=2,
        head_dim=4,
        num_random_features=9,
        intermediate_size=12,
        num_hidden_layers=3,
        max_position_embeddings=40,
        num_labels=3,
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_way_does_the_same_work(task):
    """Steps change the weights, so each way starts from a fresh model."""
    exact = TASKS[task](tiny_config(), 2, 40)(VARIANTS[task]["naive"])
    for variant in VARIANTS[task].values():
        found = TASKS[task](tiny_config(), 2, 40)(variant)
        tolerance = 2e-2 if variant.half else 1e-4
        torch.testing.assert_close(found.float(), exact.float(), rtol=tolerance, atol=tolerance)


def test_the_stand_in_computes_the_reference():
    """At batch size 1, where the original's maximum of the keys is the cell's; gradients but for the maxima's share."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 30, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    projection = favor_scbert.draw_projection(20, 8, torch.Generator().manual_seed(0)).double()
    grad = torch.randn(1, 2, 30, 8, dtype=torch.float64)
    found, expected = (
        [output := attention(*tensors, projection, None, 1e-9), *torch.autograd.grad(output, tensors, grad)]
        for attention in (performer_attention, favor_scbert.favor_attention_naive)
    )
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no padding"):
        performer_attention(*tensors, projection, torch.ones(1, 30))


def test_switches_are_put_back():
    with pytest.raises(KeyError), running_as(Variant(naive=True, onednn=True, half=True)):
        assert is_wanted("naive") and FAVOR["naive"].run is performer_attention
        assert torch.is_autocast_enabled("cpu")
        raise KeyError
    assert FAVOR["naive"].run is favor_scbert.favor_attention_naive
    assert not is_wanted("naive") and not is_unwanted("onednn")
    assert not torch.is_autocast_enabled("cpu")


def test_lines_and_ratios():
    line = straight_line([[1000, 1.5], [2000, 2.5], [4000, 4.5], [8000, 8.5]])
    assert line["seconds_per_1000"] == pytest.approx(1.0)
    assert line["intercept"] == pytest.approx(0.5)
    assert line["r_squared"] == pytest.approx(1.0)
    found = summary([1.0, 2.0, 1.0], [6.0, 14.0, 8.0])
    assert (found["median"], found["speedup"]) == (1.0, 7.0)


def results():
    way = {"seconds": [1.0], "median": 1.0, "speedup": 6.5, "peak_gib": 0.4, "relative_error": 2e-6}
    points = [[1000, 0.1], [2000, 0.2], [4000, 0.4]]
    return {
        "machine": {"processor": "a chip", "threads": 2, "torch": "2.13", "load_before": 0.0},
        "settings": {"length": 16907, "n_layers": 6},
        "onednn": "float32 products by oneDNN: kept.",
        "compiled": "compiled blocks: in use.",
        "tasks": {"inference": {"naive": way, "engine": way}},
        "lengths": {"naive": {"points": points, **straight_line(points)}},
        "batches": [{"length": 2000, "cells": 4, "engine": 8.0}],
        "steps": [{"step": "exp2", "float32": 0.1, "bfloat16": 0.2}],
        "minutes": 12.0,
    }


def test_tables_hold_what_was_measured(tmp_path):
    text = speed_report.markdown(results())
    assert (
        text.count("| engine | 1.00 | 6.5x | 0.40 | 2e-06 |")
        == text.count("| exp2 | 0.100 | 0.200 | 0.50x |")
        == 1
    )
    assert len(speed_report.tables(results())) == 4
    speed_report.plot(results(), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000
