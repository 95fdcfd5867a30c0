"""Several modalities of the same cells: paired files to one AnnData, its features to a panel, peaks to a panel's.

The one AnnData has ``var["feature_types"]`` as 10x writes it and ``uns["genome_build"]``; `feature_panel` gives what
`ScBertTokenizer` needs of it, and `map_peaks` brings other data to the panel of a model.
"""

import logging
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from ..extras import how_to_install
from ..tokenization import InputError, ScBertTokenizer
from .output import atomic_write_h5ad, check_output_path
from .read import read_cells
from .read_10x import is_10x_folder, read_10x_folder, read_10x_h5
from .regions import genome_build, map_regions, parse_regions

logger = logging.getLogger(__name__)

# the place of a feature type is its modality id
FEATURE_TYPES = ("Gene Expression", "Peaks", "Antibody Capture")
GENES, PEAKS = FEATURE_TYPES[:2]
MODALITY_NAMES = {"rna": GENES, "gex": GENES, "atac": PEAKS, "peaks": PEAKS, "prot": "Antibody Capture"}


def read_multiomics(path, atac=None, genome=None):
    """Read cells with several modalities.

    Parameters
    ----------
    path : str or os.PathLike
        A 10x multiome .h5 or matrix folder, a MuData .h5mu, or an .h5ad (or .zarr): with
        ``var["feature_types"]``, or of RNA alone if `atac` is given.
    atac : str or os.PathLike, optional
        File of the same cells' peaks, paired by cell name.
    genome : str, optional
        Genome build of the peaks, where the file does not say it.

    Returns
    -------
    anndata.AnnData
        ``var["feature_types"]`` says each feature's modality; ``uns["genome_build"]`` the build, if known.

    Raises
    ------
    InputError

    Examples
    --------
    >>> adata = read_multiomics("multiome.h5mu", genome="GRCh38")  # doctest: +SKIP
    """
    path = Path(path)
    if atac is not None:
        return combine_modalities({GENES: read_cells(path), PEAKS: read_cells(atac)}, genome)
    if path.suffix == ".h5mu":
        return combine_modalities(_read_mudata(path), genome)
    adata = _read_every_feature(path)
    if "feature_types" not in adata.var:
        raise InputError(
            f"{path} has no var['feature_types'], so its features cannot be told apart as genes and peaks. "
            f"Give the peaks as a file of their own, or set the column to {GENES!r} and {PEAKS!r}."
        )
    return _checked(adata, genome)


def _read_every_feature(path):
    if path.is_dir() and is_10x_folder(path):
        return read_10x_folder(path, every_feature=True)
    if path.is_file() and h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            of_10x = "matrix" in file and "obs" not in file
        if of_10x:
            return read_10x_h5(path, every_feature=True)
    return read_cells(path)


def _read_mudata(path):
    try:
        import mudata
    except ImportError:
        raise InputError(
            f"{path} is read by the library mudata, which is not installed: {how_to_install('mudata')}"
        ) from None
    if not h5py.is_hdf5(path):
        raise InputError(f"{path} is no HDF5 file; a MuData .h5mu was needed.")
    return modalities_of(mudata.read_h5mu(path))


def combine_files(cells, output, atac=None, genome=None, model=None, overwrite=False):
    """Write the modalities of the same cells as one .h5ad, for every other command to read.

    Parameters
    ----------
    cells, atac, genome
        As for `read_multiomics`, `cells` being its path.
    output : str or os.PathLike
        The .h5ad to write.
    model : str or os.PathLike, optional
        Folder of a model: peaks are mapped to its regions.
    overwrite : bool
        Replace an existing output.

    Returns
    -------
    dict
        Cells, features by type, genome build, and how the peaks were mapped.
    """
    inputs = [source for source in (cells, atac) if source is not None]
    check_output_path(output, overwrite, inputs)
    adata = read_multiomics(cells, atac, genome)
    if model is not None:
        tokenizer = ScBertTokenizer.from_pretrained(model)
        if tokenizer.feature_modalities is None:
            raise InputError(
                f"The model {model} knows one modality only, so there are no regions to map peaks to."
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


def modalities_of(mdata):
    """AnnData objects of a MuData by feature type.

    Parameters
    ----------
    mdata : mudata.MuData
        Its modalities are named rna (or gex), atac (or peaks), prot.

    Returns
    -------
    dict of str to anndata.AnnData
    """
    known = {
        MODALITY_NAMES[name.lower()]: mdata[name] for name in mdata.mod if name.lower() in MODALITY_NAMES
    }
    if not known:
        raise InputError(
            f"The MuData has the modalities {', '.join(mdata.mod)}; none of {', '.join(MODALITY_NAMES)} is among "
            "them. Rename them (mdata.mod)."
        )
    left_out = [name for name in mdata.mod if name.lower() not in MODALITY_NAMES]
    if left_out:
        logger.warning("Modalities left out: %s.", ", ".join(left_out))
    return known


def combine_modalities(modalities, genome=None):
    """One AnnData of the cells that every modality has.

    Parameters
    ----------
    modalities : dict of str to anndata.AnnData
        By feature type (`FEATURE_TYPES`); cells are paired by name, in the order of the first.
    genome : str, optional
        Genome build of the peaks.

    Returns
    -------
    anndata.AnnData
        X CSR; `obs` of the first modality, and further columns of the others.
    """
    parts = list(modalities.values())
    for kind, part in modalities.items():
        if not part.obs_names.is_unique:
            raise InputError(f"The cell names of {kind} repeat, so cells cannot be paired; make them unique.")
    cells = parts[0].obs_names
    for part in parts[1:]:
        cells = cells[cells.isin(part.obs_names)]
    if not len(cells):
        seen = "; ".join(f"{kind}: {', '.join(part.obs_names[:2])}" for kind, part in modalities.items())
        raise InputError(f"The modalities have no cell name in common ({seen}). Rename them (obs_names).")
    for kind, part in modalities.items():
        if len(cells) < part.n_obs:
            logger.warning("%d of %d cells of %s have no partner.", part.n_obs - len(cells), part.n_obs, kind)
    parts = [part[cells] for part in parts]
    obs = parts[0].obs.copy()
    for part in parts[1:]:
        obs = obs.join(part.obs[part.obs.columns.difference(obs.columns, sort=False)])
    kinds = np.repeat(list(modalities), [part.n_vars for part in parts])
    var = pd.concat([part.var for part in parts])
    var["feature_types"] = kinds
    adata = anndata.AnnData(
        sp.hstack([sp.csr_matrix(part.X) for part in parts], format="csr"), obs=obs, var=var
    )
    for part in parts:
        adata.uns |= {name: part.uns[name] for name in ("genome_build", "genome") if name in part.uns}
    return _checked(adata, genome)


def _checked(adata, genome):
    """Feature types known, coordinates sound, the build recorded."""
    kinds = adata.var["feature_types"].astype(str)
    strange = sorted(set(kinds) - set(FEATURE_TYPES))
    if strange:
        raise InputError(
            f"var['feature_types'] holds {', '.join(strange[:5])}; known are {', '.join(FEATURE_TYPES)}. "
            "Rename these, or leave the features out."
        )
    build = genome_build(genome) or _recorded_build(adata)
    peaks = (kinds == PEAKS).to_numpy()
    if peaks.any():
        parse_regions(adata.var_names[peaks], build)
        if build is None:
            logger.warning(
                "The genome build of the peaks is not known; say it, so that a model can refuse others."
            )
    if build is not None:
        adata.uns["genome_build"] = build
    return adata


def _recorded_build(adata):
    for name in ("genome_build", "genome"):
        if isinstance(adata.uns.get(name), str):
            return genome_build(adata.uns[name])
    recorded = {genome_build(name) for name in adata.var.get("genome", []) if isinstance(name, str) and name}
    return recorded.pop() if len(recorded) == 1 else None


def feature_modalities(var):
    """Modality id of every feature, or None where the table names no modality but gene expression.

    Parameters
    ----------
    var : pandas.DataFrame [features]

    Returns
    -------
    numpy.ndarray [features] of int64, or None
    """
    if "feature_types" not in var:
        return None
    ids = var["feature_types"].astype(str).map({kind: i for i, kind in enumerate(FEATURE_TYPES)})
    return ids.to_numpy(dtype=np.int64) if ids.notna().all() and ids.max() > 0 else None


def common_build(paths):
    """The genome build that files record, or None where none does.

    Raises
    ------
    InputError
        If they record several: their regions are not comparable.
    """
    builds = {}
    for path in paths:
        build = read_cells(path, backed=True, check=False).uns.get("genome_build")
        if build:
            builds.setdefault(genome_build(build), str(path))
    if len(builds) > 1:
        found = "; ".join(f"{build}: {path}" for build, path in builds.items())
        raise InputError(
            f"The files are of several genome builds ({found}). Lift all peaks over to one of them."
        )
    return next(iter(builds), None)


def feature_panel(adata, min_cells=1):
    """The features of multi-omic cells as a panel, in the form `ScBertTokenizer` takes.

    Parameters
    ----------
    adata : anndata.AnnData
        Of `read_multiomics`.
    min_cells : int
        Cells a feature must be found in.

    Returns
    -------
    dict
        ``gene_panel`` (genes first, then peaks; of a repeated name the first), ``feature_modalities`` and
        ``genome_build``, to be passed to `ScBertTokenizer` and saved with it.

    Examples
    --------
    >>> cells = anndata.AnnData(np.eye(3, dtype="float32"))
    >>> cells.var_names = ["CD3E", "chr1:1-9", "MS4A1"]
    >>> cells.var["feature_types"] = ["Gene Expression", "Peaks", "Gene Expression"]
    >>> feature_panel(cells)["gene_panel"]
    ['CD3E', 'MS4A1', 'chr1:1-9']
    """
    expressed = np.asarray((sp.csr_matrix(adata.X) > 0).sum(axis=0)).ravel() >= min_cells
    names, kinds = [], []
    seen = set()
    for modality, kind in enumerate(FEATURE_TYPES):
        chosen = expressed & (adata.var["feature_types"] == kind).to_numpy()
        fresh = [name for name in dict.fromkeys(adata.var_names[chosen]) if name not in seen]
        seen.update(fresh)
        names += fresh
        kinds += [modality] * len(fresh)
    return {"gene_panel": names, "feature_modalities": kinds, "genome_build": adata.uns.get("genome_build")}


def map_peaks(adata, gene_panel, feature_modalities, build=None):
    """Bring the peaks of cells to the regions of a panel, by genomic overlap.

    Parameters
    ----------
    adata : anndata.AnnData
        Of `read_multiomics`.
    gene_panel, feature_modalities
        Of the model's tokenizer.
    build : str, optional
        Genome build of the panel (``tokenizer.init_kwargs.get("genome_build")``).

    Returns
    -------
    anndata.AnnData
        Same cells; every feature but the peaks as it was, then the panel's regions, each with the sum of the peaks
        that overlap it most. ``uns["peak_mapping"]`` counts them.

    Raises
    ------
    InputError
        If the builds differ, or no peak overlaps the panel.
    """
    own = adata.uns.get("genome_build")
    if own and build and genome_build(own) != genome_build(build):
        raise InputError(
            f"The peaks are on {genome_build(own)}, the model's regions on {genome_build(build)}. Lift the peaks over "
            "first (UCSC liftOver), or call them on the other build."
        )
    regions = [name for name, kind in zip(gene_panel, feature_modalities) if FEATURE_TYPES[kind] == PEAKS]
    peaks = (adata.var["feature_types"] == PEAKS).to_numpy()
    if not regions or not peaks.any():
        return adata.copy()
    mapping = map_regions(parse_regions(adata.var_names[peaks], own or build), parse_regions(regions, build))
    if not mapping.n_mapped:
        raise InputError(
            f"No peak overlaps a region of the panel (peaks: {', '.join(adata.var_names[peaks][:2])}; panel: "
            f"{', '.join(regions[:2])}). Is the genome build the same?"
        )
    logger.info("%s.", mapping)
    others = adata[:, ~peaks]
    matrix = sp.hstack(
        [sp.csr_matrix(others.X), sp.csr_matrix(adata[:, peaks].X) @ mapping.matrix], format="csr"
    )
    var = pd.concat([others.var, pd.DataFrame({"feature_types": PEAKS}, index=regions)])
    mapped = anndata.AnnData(matrix, obs=adata.obs.copy(), var=var, uns=dict(adata.uns))
    mapped.uns["peak_mapping"] = {
        "peaks": int(peaks.sum()),
        "mapped": mapping.n_mapped,
        "regions": len(regions),
        "regions_found": mapping.n_regions,
    }
    return mapped
