"""Cells with several modalities: read from any format, and combined into one .h5ad for every other command."""

from pathlib import Path

from ..tokenization import InputError
from .modalities import GENES, PEAKS, check_modalities, combine_modalities, map_peaks, read_mudata
from .paths import check_output_path
from .read import opened_cells, read_cells
from .regions import genome_build
from .write_h5ad import atomic_write_h5ad


def read_multiomics(path, atac=None, genome=None):
    """Read cells with several modalities, as ``var["feature_types"]`` of one AnnData tells them.

    `path` is a 10x multiome .h5 or matrix folder, a MuData .h5mu, or an .h5ad (or .zarr): with
    ``var["feature_types"]``, or of RNA alone where `atac` is a file of the same cells' peaks, paired by cell name.
    `genome` is the build of the peaks where the file does not say it; ``uns["genome_build"]`` holds it, if known.
    """
    path = Path(path)
    if atac is not None:
        return combine_modalities({GENES: read_cells(path), PEAKS: read_cells(atac)}, genome)
    if path.suffix == ".h5mu":
        return read_mudata(path, genome)
    adata = read_cells(path, every_feature=True)
    if "feature_types" not in adata.var:
        raise InputError(
            f"{path} has no var['feature_types'], so genes and peaks cannot be told apart. Set that column to "
            f"{GENES!r} and {PEAKS!r}, or give the peaks as a file of their own (atac=, or --atac)."
        )
    return check_modalities(adata, genome)


def combine_files(cells, output, atac=None, genome=None, model=None, overwrite=False):
    """Write the modalities of the same cells as one .h5ad, for every other command to read.

    `cells`, `atac` and `genome` are those of `read_multiomics`; with the folder of a `model`, peaks are mapped to its
    regions. What comes back counts cells and features by type, and says the build and how peaks were mapped.
    """
    inputs = [source for source in (cells, atac) if source is not None]
    check_output_path(output, overwrite, inputs)
    adata = read_multiomics(cells, atac, genome)
    if model is not None:
        # transformers takes seconds to import
        from ..tokenization import ScBertTokenizer

        tokenizer = ScBertTokenizer.from_pretrained(model)
        if tokenizer.feature_modalities is None:
            raise InputError(
                f"The model {model} was made for one modality, so it has no regions that peaks could be mapped to."
            )
        build = tokenizer.init_kwargs.get("genome_build")
        adata = map_peaks(adata, tokenizer.gene_panel, tokenizer.feature_modalities, build)
    atomic_write_h5ad(adata, output, overwrite, inputs)
    return {
        "output": str(output),
        "cells": adata.n_obs,
        "features": adata.var["feature_types"].value_counts().to_dict(),
        "genome_build": adata.uns.get("genome_build"),
        "peak_mapping": adata.uns.get("peak_mapping"),
    }


def common_build(paths):
    """The genome build that the files name, or None if none of them does; several are refused."""
    builds = {}
    for path in paths:
        with opened_cells(path, check=False) as cells:
            build = cells.uns.get("genome_build")
        if build:
            builds.setdefault(genome_build(build), str(path))
    if len(builds) > 1:
        found = "; ".join(f"{build}: {path}" for build, path in builds.items())
        raise InputError(
            f"The files use different genome builds ({found}). Lift all peaks over to one of them."
        )
    return next(iter(builds), None)
