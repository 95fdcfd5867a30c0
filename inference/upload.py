"""Cells that somebody uploaded: refused if they are too many, annotated, made into what a page shows and sends back."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from ..data.labels import UNASSIGNED
from ..data.paths import atomic_path
from ..data.write_h5ad import atomic_copy_h5ad
from ..extras import require
from ..tokenization import InputError, align_genes
from ..trained_model.model_folder import load_model
from ..trained_model.prediction import LoadedModel
from .annotate_cells import annotate_file
from .assignment import assign, wider_answers
from .expression_pca import log_rows
from .query import opened
from .report import cell_coordinates, write_annotation_report
from .shipped import doubts

OWN_MATRIX = "X"
# of the sample
LABEL_KEY = "bulk_labels"


@dataclass(frozen=True)
class Limits:
    """What an upload may hold at most."""

    cells: int = 50_000
    megabytes: int = 500


@dataclass(frozen=True)
class AnnotatedUpload:
    """Annotated cells, as a page shows them and sends them back."""

    upload: Path
    model: str
    # how its values were read
    layer: str | None
    values: str
    # of `annotate_file`
    summary: dict[str, Any]
    # of every cell: [cells], [cells], [cells, types of the model]
    labels: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray
    # the types of the model
    names: list[str]
    threshold: float
    # the annotated .h5ad
    path: Path

    @property
    def csv(self) -> Path:
        """The .csv beside the annotated cells."""
        return self.path.with_suffix(".csv")


def annotate_upload(
    upload: str | Path,
    model: str | Path,
    folder: str | Path,
    limits: Limits | None = None,
    values: str = "auto",
    layer: str | None = None,
) -> AnnotatedUpload:
    """
    Annotate an uploaded .h5ad or 10x .h5, as `annotate_file` does with `values` as its input.

    A folder for the results is made in `folder`; an upload beyond the limits is refused by an `InputError`.
    """
    upload = Path(upload)
    _check_size(upload, limits or Limits())
    path = Path(tempfile.mkdtemp(prefix="results-", dir=folder)) / f"{upload.stem}_annotated.h5ad"
    summary = annotate_file(upload, loaded_model(str(model)), path, input=values, layer=layer)
    with opened(path, any_matrix=True) as cells:
        about = anndata.io.read_elem(cells.file["uns/scbert"])
        annotated = AnnotatedUpload(
            upload=upload,
            model=str(model),
            layer=layer,
            values=values,
            summary=summary,
            labels=cells.obs["scbert_cell_type"].astype(str).to_numpy(),
            confidence=cells.obs["scbert_confidence"].to_numpy(),
            probabilities=np.asarray(cells.obsm["scbert_probabilities"]),
            names=[str(name) for name in about["labels"]],
            threshold=float(about["threshold"]),
            path=path,
        )
        _write_csv(annotated, cells.obs_names)
    return annotated


def reassigned(annotated: AnnotatedUpload, threshold: float) -> AnnotatedUpload:
    """The same cells with another threshold of "unassigned", and new files of them beside the old."""
    labels, _ = assign(annotated.probabilities, annotated.names, threshold)
    path = annotated.path.with_name(f"{annotated.upload.stem}_annotated_{threshold:.2f}.h5ad")
    with opened(annotated.path, any_matrix=True) as cells:
        about = {**anndata.io.read_elem(cells.file["uns/scbert"]), "threshold": float(threshold)}
        cell_names = cells.obs_names
    config = loaded_model(annotated.model).model.config
    wider = wider_answers(annotated.probabilities, annotated.names, threshold, labels, config)
    obs = {"scbert_cell_type": labels, **wider}
    atomic_copy_h5ad(annotated.path, path, obs=obs, uns={"scbert": about}, overwrite=True)
    labels = labels.astype(str)
    before, now = (doubts(each, annotated.names) for each in (annotated.labels, labels))
    notes = [*(note for note in annotated.summary["notes"] if note not in before), *now]
    summary = {**annotated.summary, "unassigned": int((labels == UNASSIGNED).sum()), "notes": notes}
    changed = replace(annotated, labels=labels, threshold=threshold, summary=summary, path=path)
    _write_csv(changed, cell_names)
    return changed


def _write_csv(annotated: AnnotatedUpload, cell_names: pd.Index) -> None:
    columns = {"scbert_cell_type": annotated.labels, "scbert_confidence": annotated.confidence}
    with atomic_path(annotated.csv, overwrite=True) as temporary:
        pd.DataFrame(columns, index=cell_names).to_csv(temporary, index_label="cell")


def places_of(annotated: AnnotatedUpload) -> tuple:
    """Where the cells are drawn, by their expression: see `cell_coordinates`."""
    with opened(annotated.path, any_matrix=True) as cells:
        return cell_coordinates(cells, annotated.layer, annotated.values)


def drawn_cells(annotated: AnnotatedUpload, places: tuple, gene: str | None = None) -> pd.DataFrame:
    """
    The cells of a picture, one a row: ``UMAP 1, UMAP 2, cell, type, confidence`` and, if asked for, a gene's log1p.
    """
    xy, chosen, _ = places
    with opened(annotated.path, any_matrix=True) as cells:
        table = pd.DataFrame(
            {"UMAP 1": xy[:, 0], "UMAP 2": xy[:, 1], "cell": np.asarray(cells.obs_names)[chosen]}
        )
        table["type"], table["confidence"] = annotated.labels[chosen], annotated.confidence[chosen].round(3)
        if gene:
            values, genes = log_rows(cells, chosen, annotated.layer, annotated.values)
            if gene not in genes:
                raise InputError(
                    f"There is no gene {gene!r} in the file. Its names look like {', '.join(genes[:3])}."
                )
            table[gene] = values[:, genes.index(gene)].toarray().ravel().round(3)
    return table


def write_report(annotated: AnnotatedUpload, places: tuple) -> Path:
    """One HTML file of tables and pictures beside the annotated cells."""
    path = annotated.path.with_suffix(".html")
    with opened(annotated.path, any_matrix=True) as cells:
        obs = {"scbert_cell_type": annotated.labels, "scbert_confidence": annotated.confidence}
        parts = {"obs": obs, "uns": {"scbert": anndata.io.read_elem(cells.file["uns/scbert"])}}
        write_annotation_report(path, cells, parts, annotated.summary, places, overwrite=True)
    return path


def matrices_of(upload: str | Path) -> list[str]:
    """Matrices of a file that values can be read from: X first, if it has one, then ``"raw"`` and layers."""
    with opened(upload, any_matrix=True) as cells:
        own = {OWN_MATRIX: cells.X, "raw": cells.raw}
        return [*(name for name, matrix in own.items() if matrix is not None), *map(str, cells.layers)]


def sample_cells() -> anndata.AnnData:
    """700 blood cells that ship with scanpy: log1p values of 765 genes as X, a UMAP, ``obs["bulk_labels"]``."""
    source = require("scanpy").datasets.pbmc68k_reduced()
    obs, var = source.obs[[LABEL_KEY]].copy(), source.raw.var[[]].copy()
    return anndata.AnnData(source.raw.X.copy(), obs, var, obsm={"X_umap": source.obsm["X_umap"]})


def write_sample(folder: str | Path) -> Path:
    """The sample as a file to try."""
    path = Path(folder) / "sample_700_blood_cells.h5ad"
    if not path.is_file():
        with atomic_path(path) as temporary:
            sample_cells().write_h5ad(temporary)
    return path


def knows_sample(model: str, folder: str | Path) -> bool:
    """Whether the sample holds enough of a model's genes; of one that learnt from thousands, it does not."""
    with opened(write_sample(folder)) as cells:
        return align_genes(list(cells.var_names), loaded_model(model).tokenizer.gene_panel).overlap >= 0.3


def _check_size(upload: Path, limits: Limits) -> None:
    if upload.suffix.lower() not in (".h5ad", ".h5"):
        raise InputError(
            f"{upload.name} is no .h5ad and no .h5 file. Save your cells as .h5ad and upload that."
        )
    megabytes = upload.stat().st_size / 2**20
    if megabytes > limits.megabytes:
        raise InputError(
            f"The file has {megabytes:,.0f} MB; this page takes up to {limits.megabytes:,}. "
            "Upload a part of the cells, or run `scbert annotate` on your own machine."
        )
    with opened(upload, any_matrix=True) as cells:
        n_cells = cells.n_obs
    if n_cells > limits.cells:
        raise InputError(
            f"The file holds {n_cells:,} cells; this page takes up to {limits.cells:,}. "
            "Upload a part of them, or run `scbert annotate` on your own machine."
        )


@functools.lru_cache(maxsize=2)
def loaded_model(model: str) -> LoadedModel:
    """The model, kept for the next upload."""
    return load_model(model)
