"""What the scripts that make the shipped annotators have in common: cells under common names, training, the folder."""

import json
import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

import scbert
from make_mini import save_small, write_card
from scbert.model_cards.card import public_metrics
from scbert.tokenization.expression_scbert import as_csr
from scbert.trained_model.model_folder import load_model

LABEL, STUDY = "label", "dataset"
# clones and loci without a name are called otherwise in each annotation of the genome
NAMELESS = re.compile(r"\.\d+$|^(LINC|LOC|ENSG)\d")


def named_genes(genes: list[str]) -> list[str]:
    """
    Genes without those that bear the name of a clone or locus.

    Examples
    --------
    >>> named_genes(["CD3D", "AC012345.1", "RP11-34P13.7", "LINC00115", "HLA-A"])
    ['CD3D', 'HLA-A']
    """
    return [gene for gene in genes if NAMELESS.search(gene) is None]


def named_cells(cells: anndata.AnnData, given: np.ndarray, names: pd.Series, study: str) -> anndata.AnnData:
    """
    The cells that have a label, under common names in ``obs["label"]``, their study in ``obs["dataset"]``.

    Parameters
    ----------
    cells
        Counts.
    given
        Labels as the study has them, None without one, [cells].
    names
        The common name by the study's; cells of other labels are left out.
    """
    labels = pd.Series(given, dtype=object).map(names)
    kept = np.flatnonzero(labels.notna())
    index = [f"{study}:{name}" for name in cells.obs_names[kept]]
    obs = pd.DataFrame({LABEL: labels.to_numpy()[kept], STUDY: study}, index=index)
    return anndata.AnnData(as_csr(cells.X)[kept], obs=obs, var=pd.DataFrame(index=cells.var_names))


def fine_tuned(cells: anndata.AnnData, work: Path, terms: Path) -> Path:
    """The recipe taught with these cells, their terms and the tree of the terms; in the work folder."""
    model, file = work / "annotator", work / "cells.h5ad"
    cells.write_h5ad(file, compression="gzip")
    scbert.finetune(file, LABEL, output=model, ontology=terms)
    return model


def release(
    trained: Path,
    output: Path,
    records: dict[str, Any],
    sections: dict[str, str],
    threshold: float | None = None,
) -> None:
    """
    The annotator's folder as it ships.

    Parameters
    ----------
    trained
        The fine-tuned model.
    output
        The folder to write; its tables of labels and terms stand there already.
    records
        What is kept as ``NAME.json``; ``"annotator"`` is what `scbert models` shows.
    sections
        Parts of the card by name, in their order.
    threshold
        Confidence below which cells are left unassigned, where it is not what fine-tuning chose.
    """
    loaded = load_model(trained, device="cpu", dtype="float32")
    if threshold is not None:
        loaded.model.config.unassigned_threshold = threshold
    save_small(loaded.model, loaded.tokenizer, output)
    metrics = public_metrics(json.loads((trained / "metrics.json").read_text()))
    for name, content in {"metrics": metrics, **records}.items():
        (output / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    for number, (name, text) in enumerate(sections.items(), 1):
        (output / f"card_{number}_{name}.md").write_text(text)
    (output / "confusion.png").write_bytes((trained / "confusion.png").read_bytes())
    write_card(output)
