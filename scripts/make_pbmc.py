"""
Make ``scbert-mini-pbmc``, the annotator that ships: blood of many studies, each left out in turn, folder and card.

    python scripts/make_pbmc.py DATA --work DIR --output model_cards/scbert-mini-pbmc

DATA holds the files of COHORTS, BY_MARKERS, BACKGROUND and OTHER_TISSUE. What stands in DIR already is not made again.
Twelve fits of the recipe and eleven of two regressions: half an hour on one core.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anndata

from annotator_parts import LABEL, fine_tuned, release
from blood_cells import (
    BY_MARKERS,
    COHORTS,
    NOT_BLOOD,
    TABLES,
    background,
    read_by_markers,
    read_cohort,
)
from make_mini import CARDS, run
from studies_left_out import REGRESSIONS, left_out, mean_accuracy, score_table, scores
from study_effects import model_without
from tissue_cells import PANEL_RULE, capped, joined

# of a type in a study
MOST_CELLS = 100
# C of the regressions: what cross-validation with cells of all studies chose of 0.03, 0.1, 0.3 and 1
COSTS = {"logistic_l1": 1.0, "logistic_l2": 0.3}
WHAT = (
    "The recipe of `scbert finetune`: gene and expression embeddings, **no attention layer**, and a head "
    "that was solved for (ridge-penalised multinomial logistic regressions on one number per gene, averaged by what "
    "they are worth on cells they did not see; all labelled cells are learnt from). It is a linear model of binned "
    "expression with calibrated confidence and a probability that a cell is of no type it knows. What attention would "
    "add was measured, and is nothing: see the page of results. It knows human blood, and that other tissue is other."
)
# cells that teach the annotator what is not blood; of the tumour those without a transcript of PTPRC (CD45)
BACKGROUND = {
    "breast_tumor_copykat": ("breast tumour, cells without PTPRC", "GPL-2"),
    "scmixology_celseq_dropseq": ("five lung cancer cell lines, GSE118767", "MIT"),
}
# what it was never shown, and should refuse
OTHER_TISSUE = {
    "fetal_cortex_camp": "fetal cortex",
    "ipsc_cardiac_timecourse": "iPSC and cardiomyocytes",
    "oligodendroglioma_smartseq2": "oligodendroglioma",
    "multiome_chen_hesc_rna": "embryonic stem cells",
}


def reference(studies: list[anndata.AnnData], data: Path) -> anndata.AnnData:
    """Some cells of each type of these studies, and cells that are not blood, over one panel."""
    blood = joined(studies, MOST_CELLS)
    others = [background(data / f"{name}.h5ad", list(blood.var_names)) for name in BACKGROUND]
    others = [cells[capped(cells.obs[LABEL].to_numpy(), MOST_CELLS)] for cells in others]
    return anndata.concat([blood, *others], index_unique="-")


def cohorts_alone(
    studies: dict[str, anndata.AnnData],
    work: Path,
    cell_axes_without: Callable[[Sequence[str]], Path],
    reference_of: Callable[[list], anndata.AnnData],
) -> list[dict[str, Any]]:
    """Scores of the studies named by markers, by a model of the labelled cohorts."""
    file = work / "cohorts_alone.json"
    if not file.exists():
        asked = {name: studies[name] for name in BY_MARKERS}
        reference = reference_of([studies[name] for name in COHORTS])
        found = scores(reference, asked, COSTS, cell_axes_without(list(BY_MARKERS)))
        file.write_text(json.dumps(found, indent=1))
    return json.loads(file.read_text())


def strangers(data: Path, work: Path, model: Path) -> dict[str, dict[str, Any]]:
    """What becomes of the cells of tissues that it was never shown."""
    found = {}
    for name, tissue in OTHER_TISSUE.items():
        output = work / f"annotated_{name}.h5ad"
        if not output.exists():
            run("annotate", data / f"{name}.h5ad", "--model", model, "--output", output)
        called = anndata.read_h5ad(output, backed="r").obs["scbert_cell_type"].astype(str)
        named = called[~called.isin([NOT_BLOOD, "unassigned"])]
        found[name] = {
            "tissue": tissue,
            "cells": len(called),
            "not_blood": float((called == NOT_BLOOD).mean()),
            "unassigned": float((called == "unassigned").mean()),
            "named": len(named) / len(called),
            "commonest_name": None if named.empty else str(named.value_counts().index[0]),
        }
    return found


def left_out_section(rows: list[dict[str, Any]], alone: list[dict[str, Any]]) -> str:
    """The scores on studies that a model had no cell of, as a part of the card."""
    studies = {name: told for name, (told, _) in {**COHORTS, **BY_MARKERS}.items()}
    own, ours = ([row for row in rows if (row["study"] in COHORTS) == labelled] for labelled in (True, False))
    return "\n".join([
        "## Studies left out",
        "",
        "Each study in turn is left out (the panel and what studies differ in, which `scbert-mini` knows, are found "
        "without it, too), and all of its labelled cells are asked for whose type the others have. Beside the recipe "
        "logistic regressions taught the same cells and "
        f"genes (log1p CP10k, C = {COSTS['logistic_l1']:g} for L1 and {COSTS['logistic_l2']:g} for L2, which "
        "cross-validation chose of 0.03 to 1). Accuracy without a threshold (macro-F1 over the study's types in "
        "brackets); what share is assigned at the model's threshold, and how much of that is right. Studies with "
        "labels of their own:",
        "",
        *score_table(own, studies),
        "",
        "Studies whose labels are ours:",
        "",
        *score_table(ours, studies),
        "",
        "Taught by the two labelled cohorts alone, and cells that are not blood:",
        "",
        *score_table(alone, studies),
        "",
        "- Our labels are Leiden clusters, batch by batch, named by the marker genes of `markers.csv`; clusters "
        "without a clear winner are left out, and so are T cells between CD4 and CD8: these studies flatter "
        "themselves as tests. As lessons they have the chemistries that the two labelled cohorts lack.",
        "- Of zheng_facs_pbmc each type was sequenced in a run of its own.",
        "- `dendritic cell`, `platelet` and `CD34+ progenitor` are few in most studies.",
        "",
    ])  # fmt: skip


def stranger_section(found: dict[str, dict[str, Any]]) -> str:
    """What happens to the cells of other tissues, as a part of the card."""
    lines = [
        "## Other tissues",
        "",
        "Files whose cells it was never shown; one of them, oligodendroglioma, is among the 17 that tell `scbert-mini` "
        f"what studies differ in. The cells should be called `{NOT_BLOOD}` or left unassigned.",
        "",
        f"| cells | {NOT_BLOOD} | unassigned | named a blood cell | most often |",
        "|---|---:|---:|---:|---|",
    ]
    for row in found.values():
        shares = " | ".join(f"{row[name]:.0%}" for name in ("not_blood", "unassigned", "named"))
        lines.append(f"| {row['tissue']} ({row['cells']:,}) | {shares} | {row['commonest_name'] or ''} |")
    return "\n".join([*lines, ""])


def origin_section(work: Path) -> str:
    """Where the labelled cells come from, and which they are."""
    counts = anndata.read_h5ad(work / "cells.h5ad", backed="r").obs.groupby("dataset", observed=True)[LABEL]
    types = {study: found.value_counts() for study, found in counts}
    lines = [
        "## What it is",
        "",
        WHAT,
        "",
        "## Labelled cells",
        "",
        f"At most {MOST_CELLS} cells of a type in a study; genes with a name of their own (no clones, no LINC or LOC: "
        f"those change from one annotation of the genome to the next) that {PANEL_RULE['min_cells']} cells of at least "
        f"{PANEL_RULE['min_studies']} studies express. `labels.csv` says which label of a cohort is which type, "
        "`markers.csv` what names the clusters of the others, `terms.csv` which type is which term of the Cell "
        "Ontology.",
        "",
        "| file | origin | labels | licence of the repository it stood in | cells |",
        "|---|---|---|---|---|",
    ]
    for study, (origin, licence) in {**COHORTS, **BY_MARKERS, **BACKGROUND}.items():
        whose = "by markers" if study in BY_MARKERS else "its tissue" if study in BACKGROUND else "its own"
        learnt = ", ".join(f"{name} {count}" for name, count in types[study].items() if count)
        lines.append(f"| {study} | {origin} | {whose} | {licence} | {learnt} |")
    return "\n".join([*lines, ""])


def about(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `scbert models` shows."""
    ours, plain = mean_accuracy(rows, "scbert"), max(mean_accuracy(rows, name) for name in REGRESSIONS)
    return {
        "tissue": "human blood (PBMC)",
        "summary": (
            "It names the cells of human blood, and says of others that they are none. Of a study left out "
            f"{ours:.1%} of the cells are named right (mean of {len(rows)} studies, of {len(BY_MARKERS)} of which the "
            f"labels are clusters named by marker genes), by logistic regression taught the same cells {plain:.1%}."
        ),
        "trained_on": [
            f"{name}: {origin}" for name, (origin, _) in {**COHORTS, **BY_MARKERS, **BACKGROUND}.items()
        ],
        "left_out": {
            row["study"] + ", types by markers" * (row["study"] in BY_MARKERS): {
                name: row[name]["accuracy"] for name in ("scbert", *REGRESSIONS)
            }
            for row in rows
        },
    }


def main() -> None:
    """Make what is missing, and the folder."""
    parser = argparse.ArgumentParser(prog="make_pbmc", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=CARDS / "scbert-mini-pbmc")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    studies = {name: read_cohort(options.data, name) for name in COHORTS}
    studies |= {name: read_by_markers(options.data, name) for name in BY_MARKERS}
    of = partial(reference, data=options.data)
    trained = options.work / "annotator"
    if not trained.exists():
        fine_tuned(of(list(studies.values())), options.work, TABLES / "terms.csv")
    without = partial(model_without, cells=options.data, work=options.work)
    rows = left_out(studies, {}, options.work / "left_out", COSTS, without, of)
    alone = cohorts_alone(studies, options.work, without, of)
    others = strangers(options.data, options.work, trained)
    records = {"annotator": about(rows), "left_out": rows, "cohorts_alone": alone, "strangers": others}
    sections = {
        "cells": origin_section(options.work),
        "left_out": left_out_section(rows, alone),
        "strangers": stranger_section(others),
    }
    release(trained, options.output, records, sections)


if __name__ == "__main__":
    main()
