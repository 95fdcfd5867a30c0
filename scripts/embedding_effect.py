"""
How well embeddings keep cell types apart and batches mixed, on many studies: a pretrained model's beside log-PCA.

    python scripts/embedding_effect.py CELLS --half choose --output choose.json
    python scripts/embedding_effect.py CELLS --half choose --scvi --output choose.json
    python scripts/embedding_effect.py CELLS --half report --base OTHER/pretrained --output report.json
    python scripts/embedding_effect.py CELLS --table docs/results_embedding.md --output choose.json --output report.json

CELLS is the folder of the labelled .h5ad files; studies and halves are those of evidence.py, whose second half needs a
model pretrained without its cells. Up to 2,000 cells of each study; AvgBIO and AvgBATCH by scIB's definitions
(integration_metrics.py). Log-PCA: 50 components of the 2,000 most variable genes of the study's own log1p CP10k.

With --scvi a file of scores gets scVI's as well (Lopez et al. 2018; scvi-tools must be installed): its published
design, 10 latent dimensions, one hidden layer of 128, zero-inflated negative binomial, trained anew on each study's own
cells and 2,000 most variable genes for as many epochs as scvi-tools takes by itself, its batches given if it has some.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np

from evidence_studies import HALVES, Study, read_study
from integration_metrics import integration_metrics
from integration_study import BEFORE, principal_components
from scbert.inference.embed_cells import KEY, embed
from scbert.protocols.cells import INPUT, LABEL

MOST_CELLS = 2000
VARIABLE_GENES = 2000
MINI, SCVI = "scbert-mini", "scVI"
INTRODUCTION = [
    "`scbert embed` by `scbert-mini`, which was neither fitted to these cells nor pretrained on them (for the half "
    "`report`, pretrained anew without them), beside 50 components of each study's own most variable genes. Log-PCA "
    "keeps types apart better in the mean, and by much in kinds of tissue of which the corpus has few cells; the "
    "pretrained axes are ahead on some blood and brain, and mix batches better. scVI, where it was run, was trained on "
    "each study's own cells. Higher is better.",
    "",
]


def cells_of(study: Study) -> anndata.AnnData:
    """Counts and labels of some of its cells."""
    rows = np.random.default_rng(0).permutation(len(study.labels))[:MOST_CELLS]
    cells = anndata.AnnData(study.matrix[rows], obs={LABEL: study.labels[rows]}, var={"gene": study.genes})
    cells.var_names, cells.obs_names = study.genes, [str(row) for row in rows]
    cells.uns[INPUT] = "counts"
    if study.groups is not None:
        cells.obs["group"] = study.groups[rows]
    return cells


def scores_of(study: Study, base: Path | str) -> dict[str, Any]:
    """Scores of both embeddings."""
    cells = cells_of(study)
    found = {"study": study.name, "cells": cells.n_obs}
    embedded = embed(cells, base, input="counts", force=True, progress=False)
    groups = cells.obs.get("group")
    for name, vectors in (("log-PCA", principal_components(cells, 0)[BEFORE]), (MINI, embedded.obsm[KEY])):
        scores = integration_metrics(vectors, cells.obs[LABEL].astype(str).to_numpy(), groups)
        found[name] = {key: round(float(value), 4) for key, value in scores.items()}
    return found


def scvi_scores(study: Study) -> dict[str, float]:
    """Scores of scVI's latent means."""
    import scanpy
    import scvi

    scvi.settings.seed = 0
    cells = cells_of(study)
    scanpy.pp.filter_genes(cells, min_cells=3)
    scanpy.pp.highly_variable_genes(
        cells, n_top_genes=min(VARIABLE_GENES, cells.n_vars), flavor="seurat_v3", subset=True
    )
    batch = "group" if "group" in cells.obs else None
    scvi.model.SCVI.setup_anndata(cells, batch_key=batch)
    model = scvi.model.SCVI(cells, n_hidden=128, n_latent=10, n_layers=1, gene_likelihood="zinb")
    model.train(accelerator="cpu", enable_progress_bar=False, logger=False)
    labels, groups = cells.obs[LABEL].astype(str).to_numpy(), cells.obs.get("group")
    scores = integration_metrics(model.get_latent_representation(), labels, groups)
    return {key: round(float(value), 4) for key, value in scores.items()}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A row for each study, and the means."""
    ways = [way for way in ("log-PCA", MINI, SCVI) if any(way in row for row in rows)]
    titles = [f"{score} {way}" for score in ("AvgBIO", "AvgBATCH") for way in ways]
    lines = [f"| study | cells | {' | '.join(titles)} |", "|---|---:" + "|---:" * len(titles) + "|"]
    keys = [(way, score) for score in ("avg_bio", "avg_batch") for way in ways]
    values = np.array([[row.get(way, {}).get(score, np.nan) for way, score in keys] for row in rows])
    for row, numbers in zip(rows, values):
        lines.append(f"| {row['study']} | {row['cells']:,} | {' | '.join(map(shown, numbers))} |")
    # a mean over fewer studies than the others' would say nothing
    whole = [all(way in row for row in rows) for way, _ in keys]
    means = [np.nanmean(column) if all_there else np.nan for column, all_there in zip(values.T, whole)]
    return [*lines, f"| mean | | {' | '.join(map(shown, means))} |"]


def shown(number: float) -> str:
    return "" if np.isnan(number) else f"{number:.3f}"


def add_scvi(folder: Path, path: Path) -> None:
    """Give every study of a file of scores those of scVI, and write the file anew after each."""
    found = json.loads(path.read_text())
    rows = {row["study"]: row for row in found["rows"]}
    for study in (read_study(folder, *of) for of in HALVES[found["half"]]):
        row = rows.get(study.name, {SCVI: None})
        if SCVI not in row:
            row[SCVI] = scvi_scores(study)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(study.name, row[SCVI]["avg_bio"], flush=True)


def main() -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="embedding_effect", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("--half", choices=HALVES, default="choose")
    parser.add_argument("--base", type=Path, help="Pretrained model, in place of scbert-mini.")
    parser.add_argument(
        "--scvi",
        action="store_true",
        help="Add scVI to the scores that --output holds, whatever half they are of.",
    )
    parser.add_argument("--output", type=Path, action="append", required=True, help="Scores, JSON.")
    parser.add_argument("--table", type=Path, help="Write the scores there are as a page, and run nothing.")
    options = parser.parse_args()
    if options.table:
        lines = [
            "<!-- written by scripts/embedding_effect.py -->",
            "",
            "# Embeddings beside log-PCA",
            "",
            *INTRODUCTION,
        ]
        for path in options.output:
            found = json.loads(path.read_text())
            lines += [f"Studies of the half `{found['half']}`:", "", *table(found["rows"]), ""]
        options.table.write_text("\n".join(lines), encoding="utf-8")
        return 0
    if options.half == "report" and options.base is None and not options.scvi:
        parser.error("cells of this half are in the corpus of scbert-mini: name another model with --base")
    warnings.filterwarnings("ignore")
    if options.scvi:
        for path in options.output:
            add_scvi(options.cells, path)
        return 0
    rows = []
    for study in HALVES[options.half]:
        rows.append(scores_of(read_study(options.cells, *study), options.base or MINI))
        print(
            rows[-1]["study"], *(f"{rows[-1][way]['avg_bio']:.3f}" for way in ("log-PCA", MINI)), flush=True
        )
    options.output[0].write_text(json.dumps({"half": options.half, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
