"""Tables of text, scores over folds, and the report's HTML."""

import math
import re

import pytest

from scbert.evaluation.report import Section, report_html
from scbert.evaluation.tables import TextTable
from scbert.protocols.comparison import score_tables, summarise_folds, warnings_of, wilcoxon_p


def row(fold, model, macro_f1, baseline=False, setting="", **more):
    scores = {"accuracy": macro_f1, "balanced_accuracy": macro_f1, "seconds": 1.0}
    return {
        "fold": fold,
        "setting": setting,
        "model": model,
        "baseline": baseline,
        "macro_f1": macro_f1,
        **scores,
        **more,
    }


def test_wilcoxon_is_scipys_and_equal_folds_are_equal():
    assert wilcoxon_p([0.9, 0.8, 0.7, 0.6, 0.5], [0.1] * 5) == pytest.approx(2 / 2**5)
    assert wilcoxon_p([0.9, 0.8], [0.9, 0.8]) == 1.0


def test_a_baseline_that_wins_is_marked_and_said():
    rows = [row(str(k), "scBERT", 0.8 + k / 100) for k in range(3)]
    rows += [row(str(k), "logistic_l2", 0.9 + k / 100, baseline=True) for k in range(3)]
    rows += [row(str(k), "scBERT (big)", 0.95) for k in range(3)]
    summary = summarise_folds(rows)
    assert [entry["beats"] for entry in summary] == [False, True, False]
    assert summary[0]["macro_f1"] == pytest.approx(0.81) and summary[0]["macro_f1_sd"] == pytest.approx(0.01)
    assert math.isnan(summary[0]["p_value"]) and summary[1]["p_value"] == 0.25
    assert warnings_of(summary) == ["the baseline logistic_l2 beats scBERT: macro-F1 0.910 against 0.810."]
    (table,) = score_tables(summary, "cross-validation")
    assert table.marked == {1}
    assert "| ⚠ logistic_l2 | 0.910 ± 0.010 |" in table.markdown()


def test_several_settings_are_columns():
    rows = [row("1", model, score, baseline, s) for s in ("1 per type", "16 per type") for model, score, baseline in
            (("scBERT", 0.5, False), ("knn", 0.6, True))]  # fmt: skip
    macro, accuracy = score_tables(summarise_folds(rows), "few-shot")
    assert list(macro.columns) == ["model", "1 per type", "16 per type"]
    assert macro.rows[1] == ["knn", "⚠ 0.600", "⚠ 0.600"]
    assert "accuracy" in accuracy.title
    assert len(warnings_of(summarise_folds(rows))) == 2


def test_a_tie_is_no_win():
    rows = [row("1", "scBERT", 0.8), row("1", "knn", 0.8 + 1e-5, baseline=True)]
    assert not summarise_folds(rows)[1]["beats"]


def test_the_report_is_one_file_and_escapes_text():
    table = TextTable("T <1>", ["type", "n"], [["CD8+/CD45RA+ <T>", "1"]], frozenset({0}))
    page = report_html("A & B", [Section("S", ["<script>"], ["careful"], {"k": "v"}, [table])])
    assert "<script>" not in page and "&lt;script&gt;" in page and "CD8+/CD45RA+ &lt;T&gt;" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "class=marked" in page
