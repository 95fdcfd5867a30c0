"""Scores over folds: means, Wilcoxon tests against the model in question, warnings where a baseline wins."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluation.tables import TextTable
from ..extras import require

SCORES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy"}
NOVELTY = {
    "known_accuracy": "known acc.",
    "novel_accuracy": "novel acc. (union)",
    "auroc_max_probability": "AUROC max prob.",
    "auroc_entropy": "entropy",
    "auroc_energy": "energy",
    "auroc_mahalanobis": "Mahalanobis",
    "auroc_neighbours": "neighbours",
}
# below this a difference of means is rounding
TIE = 5e-4


def wilcoxon_p(first: Sequence[float], second: Sequence[float]) -> float:
    """
    Two-sided p-value of Wilcoxon's signed-rank test over paired folds; 1 where no fold differs.

    With n folds it cannot fall below 2 / 2^n: five folds never reach 0.05.
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    differences = differences[np.isfinite(differences)]
    if not len(differences) or not differences.any():
        return 1.0
    return float(require("scipy.stats").wilcoxon(differences).pvalue)


def summarise_folds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Mean and spread over folds of every method in every setting, in the order of the rows of `scores.fold_scores`.

    The method of the first row is the model in question, and comes first in every setting. Each entry has ``setting,
    model, baseline, folds``, ``NAME`` and ``NAME_sd`` for every score (sd over folds, of n - 1; NaN for one fold),
    ``p_value`` (macro-F1 against the model in question; NaN for itself) and ``beats``: whether it is a baseline whose
    mean macro-F1 is higher.
    """
    names = [*SCORES, "seconds", *(name for name in (*NOVELTY, "ece") if name in rows[0])]
    main, result = rows[0]["model"], []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = [row for row in rows if row["setting"] == setting]
        own = {row["fold"]: row["macro_f1"] for row in here if row["model"] == main}
        for model in dict.fromkeys(row["model"] for row in here):
            mine = [row for row in here if row["model"] == model]
            entry = {"setting": setting, "model": model, "baseline": mine[0]["baseline"], "folds": len(mine)}
            for name in names:
                values = np.array([row.get(name, np.nan) for row in mine], dtype=np.float64)
                entry[name], entry[f"{name}_sd"] = _mean_and_spread(values[np.isfinite(values)])
            if model == main:
                to_beat = entry["macro_f1"] + TIE
            paired = [(row["macro_f1"], own[row["fold"]]) for row in mine]
            entry["p_value"] = float("nan") if model == main else wilcoxon_p(*zip(*paired))
            entry["beats"] = bool(mine[0]["baseline"]) and entry["macro_f1"] > to_beat
            result.append(entry)
    return result


def warnings_of(summary: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for every setting in which a baseline has the higher mean macro-F1."""
    found = []
    for setting in dict.fromkeys(entry["setting"] for entry in summary):
        here = [entry for entry in summary if entry["setting"] == setting]
        winners = [entry for entry in here if entry["beats"]]
        if winners:
            best = max(winners, key=lambda entry: entry["macro_f1"])
            more = f" (and {len(winners) - 1} more)" if len(winners) > 1 else ""
            found.append(
                f"{setting + ': ' if setting else ''}the baseline {best['model']}{more} beats "
                f"{here[0]['model']}: macro-F1 {best['macro_f1']:.3f} against {here[0]['macro_f1']:.3f}."
            )
    return found


def warnings_of_modalities(summary: Sequence[dict[str, Any]]) -> list[str]:
    """
    One sentence for every model and every modality that alone does better than all together (the first setting).

    Examples
    --------
    >>> rows = [{"model": "scBERT", "setting": s, "macro_f1": f} for s, f in [("RNA+ATAC", 0.8), ("RNA alone", 0.9)]]
    >>> warnings_of_modalities(rows)
    ['scBERT: RNA alone beats RNA+ATAC: macro-F1 0.900 against 0.800.']
    """
    together = {
        entry["model"]: entry["macro_f1"] for entry in summary if entry["setting"] == summary[0]["setting"]
    }
    return [
        f"{entry['model']}: {entry['setting']} beats {summary[0]['setting']}: macro-F1 {entry['macro_f1']:.3f} "
        f"against {together[entry['model']]:.3f}."
        for entry in summary
        if entry["macro_f1"] > together.get(entry["model"], np.inf) + TIE
    ]


def score_tables(summary: Sequence[dict[str, Any]], title: str) -> list[TextTable]:
    """The summary as tables: all scores of one setting, or one score over many settings; ⚠ where a baseline wins."""
    settings = list(dict.fromkeys(entry["setting"] for entry in summary))
    if len(settings) > 1:
        return [
            _over_settings(summary, settings, score, f"{title}: {SCORES[score]}")
            for score in ("macro_f1", "accuracy")
        ]
    heading = f"{title}, {settings[0]}" if settings[0] else title
    tables = [_one_setting(summary, heading)]
    if "known_accuracy" in summary[0]:
        rows = [[entry["model"], *(_value(entry, name) for name in NOVELTY)] for entry in summary]
        tables.append(TextTable(f"{heading}: types left out", ["model", *NOVELTY.values()], rows))
    return tables


def _one_setting(summary: Sequence[dict[str, Any]], title: str) -> TextTable:
    rows = [
        [
            ("⚠ " if entry["beats"] else "") + entry["model"],
            *(_value(entry, score) for score in SCORES),
            _number(entry.get("ece", np.nan)),
            "" if np.isnan(entry["p_value"]) else f"{entry['p_value']:.2g}",
            f"{entry['seconds']:.0f}",
        ]
        for entry in summary
    ]
    columns = ["model", *SCORES.values(), "ECE", "p (Wilcoxon)", "s/fold"]
    marked = frozenset(number for number, entry in enumerate(summary) if entry["beats"])
    return TextTable(f"{title} ({_folds(summary)})", columns, rows, marked)


def _over_settings(summary, settings: list[str], score: str, title: str) -> TextTable:
    rows = []
    for model in dict.fromkeys(entry["model"] for entry in summary):
        here = [entry for entry in summary if entry["model"] == model]
        rows.append([model, *(("⚠ " if entry["beats"] else "") + _value(entry, score) for entry in here)])
    marked = frozenset(number for number, row in enumerate(rows) if any("⚠" in cell for cell in row))
    return TextTable(f"{title} ({_folds(summary)})", ["model", *settings], rows, marked)


def _folds(summary: Sequence[dict[str, Any]]) -> str:
    folds = max(entry["folds"] for entry in summary)
    return f"mean ± sd of {folds} folds" if folds > 1 else "one fold"


def _value(entry: dict[str, Any], score: str) -> str:
    spread = entry[f"{score}_sd"]
    return _number(entry[score]) + ("" if np.isnan(spread) else f" ± {spread:.3f}")


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def _mean_and_spread(values: np.ndarray) -> tuple[float, float]:
    mean = float(values.mean()) if len(values) else float("nan")
    return mean, float(values.std(ddof=1)) if len(values) > 1 else float("nan")
