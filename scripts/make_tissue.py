"""
Make ``scbert-mini-tissue``, the annotator of human tissue: many studies, each left out in turn, folder and card.

    python scripts/make_tissue.py DATA --work DIR --output model_cards/scbert-mini-tissue

DATA holds the files of LEARNT and TESTED. What stands in DIR already is not made again. Ten fits of the recipe
and of two regressions: half an hour on one core.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import pandas as pd

from annotator_parts import LABEL, fine_tuned, release
from make_mini import CARDS
from studies_left_out import REGRESSIONS, left_out, mean_accuracy, score_table
from study_effects import model_without
from tissue_cells import BY_MARKERS, LEARNT, MOST_CELLS, PANEL_RULE, TABLES, joined, read_study

# files of so few genes that nothing is learnt from them
TESTED = {
    "tissue_aj064_800": "a tissue, 627 genes",
    "pancreas_beta_ductal_3batches": "pancreas, 1,403 genes",
    "brain_allen_acc_v1": "adult cortex, nuclei, 2,023 genes",
    "marrow_blood_triana_250": "marrow and blood, 462 genes",
    "pbmc_symphony_2protocols": "blood, 1,767 genes",
    "pbmc_onek1k_40donors": "blood of 40 donors, 1,000 genes",
    "pbmc_child_sle_subsets": "blood of children, healthy and with lupus, 1,503 genes",
    "tcells_treg_tconv": "sorted T cells, 3,439 genes",
}
# C of the regressions: what cross-validation with all studies chose of 0.03, 0.1, 0.3 and 1
COSTS = {"logistic_l1": 1.0, "logistic_l2": 1.0}
KNOWS = "human tissue and blood, in broad types"


def learn(studies: dict[str, anndata.AnnData], work: Path) -> Path:
    """The annotator, from the cells of all studies."""
    model = work / "annotator"
    return model if model.exists() else fine_tuned(joined(list(studies.values())), work, TABLES / "terms.csv")


def left_out_section(rows: list[dict[str, Any]]) -> str:
    """The scores on studies that a model had no cell of, as a part of the card."""
    wide, narrow = ([row for row in rows if (row["study"] in LEARNT) == learnt] for learnt in (True, False))
    what = {**{name: told for name, (told, _) in LEARNT.items()}, **TESTED}
    return "\n".join([
        "## Studies left out",
        "",
        "Each study in turn is left out (the panel and what studies differ in, which `scbert-mini` knows, are found "
        "without it, too), and all of its cells are asked for whose type the others have. Beside the recipe logistic "
        "regressions taught the same cells and genes (log1p CP10k, "
        f"C = {COSTS['logistic_l1']:g}, which cross-validation with all studies chose of 0.03 to 1). Accuracy without "
        "a threshold (macro-F1 over the study's types in brackets); what share is assigned at the model's threshold, "
        "and how much of that is right.",
        "",
        *score_table(wide, what),
        "",
        "Studies of few genes, by models of all studies above; genes that are not measured are taken at their usual "
        "level (by the regressions, at 0):",
        "",
        *score_table(narrow, what),
        "",
        "- Types that one study alone has (neuron, neural progenitor, plasma cell, mast cell, platelet, hematopoietic "
        "progenitor) cannot be tested in the upper table; the lower one tests all of these but neural progenitors.",
        "- The clusters of tissue_aj064_800 came with shuffled names (all cells of its `mono` express TPSAB1, all of "
        "its `mito` VWF); `labels.csv` has the ones that their genes say, and leaves out `epi`, which is fibroblasts "
        "and mural cells.",
        f"- Labels of {', '.join(by_markers())} are ours: Leiden clusters named by the marker genes of `markers.csv`, "
        "clusters without a clear winner left out. These studies flatter themselves as tests; as lessons they are the "
        "only second source of stromal types. The other labels are the studies' own.",
        "",
    ])  # fmt: skip


def by_markers() -> list[str]:
    """Studies whose labels were made by marker genes."""
    table = pd.read_csv(TABLES / "labels.csv")
    return sorted(table.loc[table["column"] == BY_MARKERS, "file"].unique())


def origin_section(work: Path) -> str:
    """Which cells of which studies were learnt from, as a part of the card."""
    counts = anndata.read_h5ad(work / "cells.h5ad", backed="r").obs.groupby("dataset", observed=True)[LABEL]
    types = {study: found.value_counts() for study, found in counts}
    lines = [
        "## Labelled cells",
        "",
        f"At most {MOST_CELLS} cells of a type in a study; genes with a name of their own (no clones, no LINC or LOC) "
        f"that {PANEL_RULE['min_cells']} cells of at least {PANEL_RULE['min_studies']} studies express. `labels.csv` "
        "says which label of which study is which type, `terms.csv` which type is which term of the Cell Ontology. "
        "Malignant cells count as the type they came from.",
        "",
        "| file | origin | licence of the repository it stood in | cells |",
        "|---|---|---|---|",
    ]
    for study, (origin, licence) in LEARNT.items():
        learnt = ", ".join(f"{name} {count}" for name, count in types[study].items() if count)
        lines.append(f"| {study} | {origin} | {licence} | {learnt} |")
    return "\n".join([*lines, ""])


def about(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `scbert models` shows."""
    wide = [row for row in rows if row["study"] in LEARNT]
    ours, plain = mean_accuracy(wide, "scbert"), max(mean_accuracy(wide, name) for name in REGRESSIONS)
    return {
        "tissue": KNOWS,
        "summary": (
            f"It names the broad types of cells of human tissue, across {len(LEARNT)} studies of blood, breast and "
            f"skin, lymphoma, lung cancer lines, fetal cortex and glioma. Of a study left out {ours:.1%} of the cells "
            f"are named right (mean of {len(wide)} studies), by logistic regression taught the same cells {plain:.1%}."
        ),
        "trained_on": [f"{name}: {origin}" for name, (origin, _) in LEARNT.items()],
        "left_out": {
            row["study"]: {name: row[name]["accuracy"] for name in ("scbert", *REGRESSIONS)} for row in rows
        },
    }


def main() -> None:
    """Make what is missing, and the folder."""
    parser = argparse.ArgumentParser(prog="make_tissue", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=CARDS / "scbert-mini-tissue")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    learnt, tested = ({name: read_study(options.data, name) for name in names} for names in (LEARNT, TESTED))
    trained = learn(learnt, options.work)
    without = partial(model_without, cells=options.data, work=options.work)
    rows = left_out(learnt, tested, options.work / "left_out", COSTS, without)
    sections = {"cells": origin_section(options.work), "left_out": left_out_section(rows)}
    release(trained, options.output, {"annotator": about(rows), "left_out": rows}, sections)


if __name__ == "__main__":
    main()
