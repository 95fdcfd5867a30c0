"""
What a layer of attention adds to the default recipe, which has none.

    python scripts/attention_effect.py CELLS --work build/attention --output docs/results_attention.md

CELLS is the folder of the labelled .h5ad files; the studies are of the half that settings may be chosen on. What was
done is kept in the work folder and not done again; the figures also go to results/attention.json beside the page.

The reference is the default recipe. A correction is the same model with a layer that starts at nothing: the last maps
of its two residual branches are zero. A head is solved on four fifths of the cells to learn, the layer is trained on
these by Adam, its epoch is chosen by the likelihood of the other fifth, the start allowed, and then the head is solved
anew on the final states of all cells to learn. A solved head leaves next to no loss on the cells it was solved on, so
there is a second way: each cell is seen through a head that was solved without it ("crossed").
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.metrics import f1_score

import attention_layer
from attention_layer import WAYS, Way, build, gain, losses_of, recipe, solve, train_layers
from evidence import cells_of
from evidence_studies import CHOOSE, folds_of, read_study
from scbert.data.splits import stratified_split
from scbert.training.finetune_data import FinetuneData, load_data
from scbert.training.solved_head import pooled_features

STUDIES = ("pbmc3k_10x", "zheng_facs_pbmc", "tissue_aj064_800", "fetal_cortex_camp", "tcells_treg_tconv")
MAX_CELLS, FOLDS, VALIDATION = 1200, 3, 0.2
SETTINGS = ("TOP_GENES", "LAYER", "PARTS", "BATCH_SIZE", "EPOCHS", "PATIENCE", "LAYER_RATE", "HEAD_RATE")


def load_folds(folder: Path, study: str) -> Iterator[FinetuneData]:
    """The cells of every fold: those to learn, in training and validation, and the fold's own as the test."""
    cells = read_study(folder, *next(entry for entry in CHOOSE if entry[0] == study))
    kept = np.random.default_rng(0).permutation(len(cells.labels))[:MAX_CELLS]
    adata, labels = cells_of(cells.matrix[kept], cells.labels[kept]), cells.labels[kept]
    folds = folds_of(labels, FOLDS, 0)
    for fold in range(FOLDS):
        split, learnt = np.full(len(labels), "test", dtype=object), folds != fold
        split[learnt] = stratified_split(labels[learnt], 0.0, VALIDATION)
        adata.obs["split"] = split.astype(str)
        data, tokenizer, _, seed = recipe(0)
        yield load_data(data, tokenizer, seed, reference=adata)


def measure(way: Way, data: FinetuneData) -> dict:
    """Loss and prediction of every test cell, and how the model came about."""
    began, loaded, report = time.process_time(), build(way, data), {}
    if way.trained:
        report = train_layers(loaded, data, way)
    learnt, test = [data.splits[name] for name in ("train", "validation")], data.splits["test"]
    targets = np.concatenate([part.targets for part in learnt])
    head = solve(
        pooled_features(loaded, sp.vstack([part.bins for part in learnt])), targets, len(data.classes)
    )
    losses, predicted = losses_of(pooled_features(loaded, test.bins), *head, test.targets)
    found = {"losses": losses, "true": test.targets, "predicted": predicted}
    report |= {name: values.tolist() for name, values in found.items()}
    return {**report, "learnt": len(targets), "seconds": time.process_time() - began}


def run_all(folder: Path, work: Path, studies: list[str], ways: list[str]) -> None:
    """Whatever is not there yet."""
    for way in ways:
        for study in studies:
            for fold, data in enumerate(load_folds(folder, study)):
                path = work / way / f"{study}.{fold}.json"
                if path.exists():
                    continue
                found = measure(WAYS[way], data)
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(".partial")
                temporary.write_text(json.dumps(found))
                os.replace(temporary, path)
                print(
                    f"{way} {study} {fold}: {np.mean(found['losses']):.4f}, {found['seconds']:.0f} s",
                    flush=True,
                )


PAGE = """# What attention adds

{means}

{table}
"""


def rows_of(work: Path) -> list[dict]:
    """One for each study and way that all folds are there of: every cell was a test cell once."""
    rows = []
    for study in STUDIES:
        folds = {way: [work / way / f"{study}.{fold}.json" for fold in range(FOLDS)] for way in WAYS}
        found = {
            way: [json.loads(path.read_text()) for path in paths]
            for way, paths in folds.items()
            if all(path.exists() for path in paths)
        }
        rows += [row_of(study, way, results, found["reference"]) for way, results in found.items()]
    return rows


def row_of(study: str, way: str, results: list[dict], reference: list[dict]) -> dict:
    """Scores of all folds' test cells together, beside the reference on the same cells."""
    joined = {
        name: np.concatenate([one[name] for one in results]) for name in ("losses", "true", "predicted")
    }
    before = [np.array(one["losses"]) for one in reference]
    row = {"study": study, "way": way, "cells": len(joined["true"]), "nll": float(joined["losses"].mean())}
    row["accuracy"] = float((joined["true"] == joined["predicted"]).mean())
    row["macro_f1"] = float(f1_score(joined["true"], joined["predicted"], average="macro"))
    row["seconds"] = float(np.mean([one["seconds"] for one in results]))
    row["gain"] = gain(np.concatenate(before), joined["losses"])
    row["folds"] = [
        {
            "gain": gain(losses, np.array(one["losses"])),
            **{name: one[name] for name in ("chosen", "validation", "epochs") if name in one},
        }
        for one, losses in zip(results, before)
    ]
    return row


def table(rows: list[dict]) -> list[str]:
    """Every study and way."""
    lines = [
        "| study | cells | model | negative log-likelihood | accuracy | macro-F1 | gain ± standard error | "
        "epochs chosen | rule | CPU s a fold |",
        "|---|---:|---|---:|---:|---:|---:|---|---|---:|",
    ]
    for row in rows:
        change, keep, chosen = "", "", ""
        if row["way"] != "reference":
            change = f"{row['gain']['mean']:+.4f} ± {row['gain']['error']:.4f}"
            keep = "keep" if row["gain"]["keep"] else "leave out"
            chosen = ", ".join(str(fold["chosen"]) for fold in row["folds"] if "chosen" in fold)
        lines.append(
            f"| {row['study']} | {row['cells']} | {WAYS[row['way']].title} | {row['nll']:.4f} | "
            f"{row['accuracy']:.3f} | {row['macro_f1']:.3f} | {change} | {chosen} | {keep} | {row['seconds']:.0f} |"
        )
    return lines


def means(rows: list[dict]) -> list[str]:
    """Over the studies, and how often the rule says keep: on the test cells, and on each fold's validation cells."""
    lines = [
        "| model | studies | gain | accuracy | macro-F1 | keep: studies | keep: folds, by validation cells | "
        "gain of those folds' test cells |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for way in [way for way in WAYS if way != "reference"]:
        own = [row for row in rows if row["way"] == way]
        if not own:
            continue
        same = [
            row for row in rows if row["way"] == "reference" and row["study"] in {x["study"] for x in own}
        ]
        changes = [
            f"{np.mean([x[name] for x in own]) - np.mean([x[name] for x in same]):+.4f}"
            for name in ("accuracy", "macro_f1")
        ]
        folds = [fold for row in own for fold in row["folds"] if "validation" in fold]
        kept = [fold["gain"]["mean"] for fold in folds if fold["validation"]["keep"]]
        lines.append(
            f"| {WAYS[way].title} | {len(own)} | {np.mean([row['gain']['mean'] for row in own]):+.4f} | "
            f"{' | '.join(changes)} | {sum(row['gain']['keep'] for row in own)} of {len(own)} | "
            f"{f'{len(kept)} of {len(folds)}' if folds else ''} | {f'{np.mean(kept):+.4f}' if kept else ''} |"
        )
    return lines


def write_page(work: Path, path: Path) -> None:
    """The page, and the figures in results/attention.json beside it."""
    rows = rows_of(work)
    settings = {name.lower(): getattr(attention_layer, name) for name in SETTINGS}
    settings |= {"max_cells": MAX_CELLS, "folds": FOLDS, "validation": VALIDATION}
    text = PAGE.format(means="\n".join(means(rows)), table="\n".join(table(rows)), **settings)
    record = path.parent / "results" / "attention.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    path.write_text(text, encoding="utf-8")


def main() -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="attention_effect", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="The page to write, of all that is there.")
    parser.add_argument("--studies", default=",".join(STUDIES))
    parser.add_argument("--ways", default=",".join(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    run_all(options.cells, options.work, options.studies.split(","), options.ways.split(","))
    write_page(options.work, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
