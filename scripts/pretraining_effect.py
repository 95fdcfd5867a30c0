"""
What pretraining does for fine-tuning: few-shot learning with and without it, beside logistic regression.

    python scripts/pretraining_effect.py model_cards/scbert-mini CELLS.h5ad --label-key KEY --work DIR

Runs ``scbert evaluate few-shot`` on five draws of 5, 20 and 100 cells a type (every other cell is the test) and writes
fine_tuning.json and its part of the card into the model's folder.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from make_mini import run, write_card
from scbert.data.labels import find_labels
from scbert.data.read import read_cells
from scbert.model_cards.card import public_metrics
from scbert.modeling_scbert import ScBertForMaskedExpression
from scbert.trained_model.model_folder import load_tokenizer, save_model
from scbert.training.initial_model import load_masked_model

LABEL = "label"
SHOTS, DRAWS = (5, 20, 100), 5
# all weights trained, in as many steps with as without pretraining
RECIPE = Path(__file__).with_name("mini_classifier.json")
PRETRAINED, UNTRAINED = "scbert-mini, pretrained", "the same from random weights"
FASTER = "scbert-mini, pretrained, three times the learning rate"
BASELINES = {"logistic_l1": "logistic regression, L1", "logistic_l2": "logistic regression, L2"}
NAMES = (PRETRAINED, FASTER, UNTRAINED, *BASELINES.values())


def balanced_part(cells: Path, label_key: str, path: Path) -> Path:
    """As many cells of every type as the rarest has, in a file."""
    adata = read_cells(cells)
    labels = find_labels(adata.obs, label_key, str(cells))
    adata, labels = adata[labels != None].copy(), labels[labels != None].astype(str)  # noqa: E711 (elementwise)
    adata.obs[LABEL] = labels
    size = min(Counter(labels).values())
    rng = np.random.default_rng(0)
    rows = [rng.choice(np.flatnonzero(labels == name), size, replace=False) for name in np.unique(labels)]
    adata[np.sort(np.concatenate(rows))].write_h5ad(path, compression="gzip")
    return path


def write_untrained(base: Path, folder: Path) -> None:
    """The base with new weights everywhere."""
    config, tokenizer = load_masked_model(base).config, load_tokenizer(base)
    torch.manual_seed(0)
    save_model(ScBertForMaskedExpression(config), tokenizer, folder)


def measure(base: Path, cells: Path, label_key: str, work: Path) -> dict[str, Any]:
    """The few-shot protocol for the base, and for the same model with random weights beside the baselines."""
    part = work / "balanced.h5ad"
    if not part.exists():
        balanced_part(cells, label_key, part)
    untrained = work / "untrained"
    if not untrained.exists():
        write_untrained(base, untrained)
    results = {}
    for name, folder, slug, more, baselines in (
        (UNTRAINED, untrained, "untrained", {}, ",".join(BASELINES)),
        (PRETRAINED, base, base.name, {}, ""),
        (FASTER, base, f"{base.name}-faster", {"learning_rate": 0.003}, ""),
    ):
        output = work / f"few_shot_{slug}"
        if not output.exists():
            settings = {"base": str(folder), "disable_tqdm": True, **more}
            run(
                "evaluate", "few-shot", part, "--label-key", LABEL, "--recipe", RECIPE,
                "--settings", json.dumps(settings), "--baselines", baselines,
                "--shots", ",".join(map(str, SHOTS)), "--folds", DRAWS, "--output", output,
            )  # fmt: skip
        results[name] = json.loads((output / "results.json").read_text())
    rows = [
        {**row, "model": BASELINES.get(row["model"], name)}
        for name, result in results.items()
        for row in result["rows"]
    ]
    return {**results[PRETRAINED], "rows": rows}


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean and standard deviation of the draws, by model and cells a type."""
    rows = []
    for model in NAMES:
        for shots in SHOTS:
            setting = f"{shots} per type"
            found = [row for row in result["rows"] if row["model"] == model and row["setting"] == setting]
            scores = {metric: [row[metric] for row in found] for metric in ("accuracy", "macro_f1")}
            numbers = {
                f"{metric}_{kind}": float(getattr(np, kind)(values))
                for metric, values in scores.items()
                for kind in ("mean", "std")
            }
            rows.append({"model": model, "cells_per_type": shots, "draws": len(found), **numbers})
    return rows


def effect(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Macro-F1 with less without pretraining, draw by draw: mean, and in how many draws it is above zero."""
    found = {}
    for shots in SHOTS:
        rows = [row for row in result["rows"] if row["setting"] == f"{shots} per type"]
        score = {(row["model"], row["fold"]): row["macro_f1"] for row in rows}
        gains = [
            score[PRETRAINED, fold] - score[UNTRAINED, fold] for model, fold in score if model == PRETRAINED
        ]
        found[str(shots)] = {"mean": float(np.mean(gains)), "draws_better": int(np.sum(np.array(gains) > 0))}
    return found


def section(record: dict[str, Any]) -> str:
    """The figures as a part of the card."""
    lines = [
        "## What pretraining does for fine-tuning",
        "",
        f"{record['cells']} ({record['label_key']}), no cell of which was pretrained on: {record['draws']} draws of so "
        f"many cells a type to learn from, the others to test on ({record['cells_in_all']} cells, evenly of all). "
        "All weights were trained, in as many steps with as without pretraining (`scripts/mini_classifier.json`). "
        "Mean ± standard deviation of the draws. "
        "The recipe's learning rate was lowered from 0.003 to 0.001 after three "
        "settings: in one of them the random weights diverged. Nothing else was chosen on these cells.",
        "",
    ]
    for metric, title in (("macro_f1", "macro-F1"), ("accuracy", "accuracy")):
        lines += [
            f"| {title} | " + " | ".join(f"{shots} a type" for shots in SHOTS) + " |",
            "|---|" + "---:|" * len(SHOTS),
        ]
        for name in NAMES:
            own = [row for row in record["table"] if row["model"] == name]
            cells = [f"{row[f'{metric}_mean']:.3f} ± {row[f'{metric}_std']:.3f}" for row in own]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    gains = [
        f"{gain['mean']:+.3f} with {shots} cells a type (better in {gain['draws_better']} of {record['draws']} draws)"
        for shots, gain in record["effect"].items()
    ]
    lines += [f"Pretraining, all else equal, changes macro-F1 by {', '.join(gains)}.", ""]
    return "\n".join(
        [*lines, f"Best at each budget: {', '.join(map(best_of, split_by_shots(record['table'])))}.", ""]
    )


def split_by_shots(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of every budget."""
    return [[row for row in rows if row["cells_per_type"] == shots] for shots in SHOTS]


def best_of(rows: list[dict[str, Any]]) -> str:
    """The model with the highest mean macro-F1 of a budget, and the budget."""
    best = max(rows, key=lambda row: row["macro_f1_mean"])
    return f"{best['model']} ({best['cells_per_type']} a type)"


def main() -> None:
    """Measure and write the record and the card."""
    parser = argparse.ArgumentParser(
        prog="pretraining_effect", description=__doc__.strip().partition("\n")[0]
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--label-key", required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    result = measure(options.base, options.cells, options.label_key, options.work)
    record = {
        "cells": options.cells.stem, "label_key": options.label_key, "draws": DRAWS, "recipe": RECIPE.name,
        "cells_in_all": result["cells"], "cells_per_type": result["cells_per_type"],
        "table": table(result), "effect": effect(result),
        "settings": result["settings"], "versions": result["versions"],
    }  # fmt: skip
    text = json.dumps(public_metrics(record), indent=1, ensure_ascii=False)
    (options.base / "fine_tuning.json").write_text(text + "\n")
    (options.base / "card_3_fine_tuning.md").write_text(section(record))
    write_card(options.base)


if __name__ == "__main__":
    main()
