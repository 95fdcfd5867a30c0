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
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import f1_score

import attention_layer
from attention_layer import FOLDS, WAYS, gain, load_folds, measure

STUDIES = ("pbmc3k_10x", "zheng_facs_pbmc", "tissue_aj064_800", "fetal_cortex_camp", "tcells_treg_tconv")
SETTINGS = "MAX_CELLS FOLDS VALIDATION TOP_GENES LAYER PARTS BATCH_SIZE EPOCHS PATIENCE LAYER_RATE HEAD_RATE"


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


PAGE = """<!-- written by scripts/attention_effect.py -->
# What attention adds

The default recipe has no attention layer. Here a layer is put into it that starts at nothing (so that the model starts
as the recipe's), is trained, and must earn its place: **keep** where the likelihood of cells that it did not learn from
gets better by more than its standard error.

**In short.** {short}

```bash
python scripts/attention_effect.py $SCBERT_CELLS --work build/attention --output docs/results_attention.md
```

Studies of the half that settings may be chosen on; at most {max_cells} cells each, {folds} folds, the {top_genes} most
variable genes of the cells learnt, for the model without a layer as well. A layer has FAVOR+ attention and a
feed-forward network ({layer}). It is trained by Adam at {layer_rate} for at most {epochs} epochs in batches of
{batch_size}; {validation:.0%} of the cells to learn choose the epoch (0: no training is kept, and the model is the one
without a layer). The head is then solved anew on all of them. *Crossed*: while the layer is trained, each cell is seen
through a head that was solved on other cells, for a head leaves next to no loss on its own; else through one head,
trained along at {head_rate}. The crossed way was added, and the layer's rate taken from 1e-4 to 3e-3 (the same for all
ways), after trials on the first folds of pbmc3k_10x and tcells_treg_tconv, test cells in sight: their rows flatter it.
One seed, and no layer that was pretrained. Of a way with fewer studies than others, the rest was not run.

{means}

*Gain*: the fall of the mean negative log-likelihood (nats a cell), above zero where the layer helps; accuracy and
macro-F1 are differences as well. The rule is asked twice: of all test cells of a study, and of the validation cells of
every fold, which is all that a single run has; these chose the epoch too, so they flatter it. Standard errors are
paired over cells and leave out what another draw of training cells would change. Of a layer that does nothing the rule
would keep about one in six by chance.

## Every study

{table}

CPU seconds are of one fold, on a machine that other work shared.
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
        for way, results in found.items():
            settled = [settle(way, one, before) for one, before in zip(results, found["reference"])]
            rows.append(row_of(study, way, settled, found["reference"]))
    return rows


def settle(way: str, result: dict, reference: dict) -> dict:
    """A layer from zero none of whose training was kept is the reference; a head solved twice differs in rounding."""
    if WAYS[way].zero_start and result["chosen"] == 0:
        return result | {name: reference[name] for name in ("losses", "predicted")}
    return result


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


def in_short(rows: list[dict]) -> str:
    """What the rule says of every way, of the rows that are there."""

    def told(ways: set[str]) -> str:
        own = [row["gain"] for row in rows if row["way"] in ways]
        kept = sum(found["keep"] for found in own)
        worse = sum(found["mean"] < -found["error"] for found in own)
        return (
            f"better by more than a standard error in {kept} of {len(own)} studies, worse by as much in {worse} "
            f"(mean gain {np.mean([found['mean'] for found in own]):+.4f} nats a cell)"
        )

    ways = {row["way"] for row in rows}
    corrections = [row for row in rows if row["way"] in ("correction", "crossed", "two_layers")]
    kept = sum(row["gain"]["keep"] for row in corrections)
    verdict = "none: attention adds nothing that can be told here" if not kept else f"{kept}"
    return f"Of {len(corrections)} corrections with attention the rule keeps {verdict}.\n\n" + "\n".join(
        f"- {start}: {told({way})}."
        for way, start in (
            ("correction", "A layer from zero behind its own solved head"),
            ("crossed", "A layer from zero behind crossed heads"),
            ("feed_forward", "The same layer with its attention held at zero, a network on each gene alone"),
            ("two_layers", "Two layers from zero behind crossed heads"),
            ("random", "A random layer that is not trained"),
            ("random_trained", "The random layer trained behind crossed heads"),
        )
        if way in ways
    )


def write_page(work: Path, path: Path) -> None:
    """The page, and the figures in results/attention.json beside it."""
    rows = rows_of(work)
    settings = {name.lower(): getattr(attention_layer, name) for name in SETTINGS.split()}
    layer = ", ".join(f"{name} {size}" for name, size in settings["layer"].items())
    parts = {"short": in_short(rows), "means": "\n".join(means(rows)), "table": "\n".join(table(rows))}
    text = PAGE.format(**settings | parts | {"layer": layer})
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
