"""Several modalities of the same cells in one AnnData, from MuData or from one AnnData each; peaks to a model's panel.

The one AnnData has ``var["feature_types"]`` as 10x writes it and ``uns["genome_build"]``.
"""

import logging

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from ..extras import require
from ..tokenization import InputError
from ..tokenization.cells_scbert import FEATURE_TYPES
from .regions import genome_build, map_regions, parse_regions

logger = logging.getLogger(__name__)

GENES, PEAKS, PROTEINS = FEATURE_TYPES
MODALITY_NAMES = {"rna": GENES, "gex": GENES, "atac": PEAKS, "peaks": PEAKS, "prot": PROTEINS}


def read_mudata(path, genome=None, every_feature=True):
    """Read a MuData .h5mu file as one AnnData: the genes as they stand, or all; see `combine_modalities`."""
    modalities = modalities_of(require("mudata").read_h5mu(path))
    if every_feature or GENES not in modalities:
        return combine_modalities(modalities, genome)
    if len(modalities) > 1:
        logger.warning("Modalities that are left out: %s.", ", ".join(sorted(set(modalities) - {GENES})))
    return modalities[GENES]


def modalities_of(mdata):
    """AnnData objects of a MuData by feature type, with its own columns of obs that they lack; see MODALITY_NAMES."""
    kinds = {name: MODALITY_NAMES.get(name.lower()) for name in mdata.mod}
    known = {kind: mdata[name] for name, kind in kinds.items() if kind}
    if not known:
        raise InputError(
            f"The modalities of this MuData are called {', '.join(mdata.mod)}; names such as "
            f"{', '.join(MODALITY_NAMES)} are needed. Rename them (mdata.mod)."
        )
    if left_out := [name for name, kind in kinds.items() if kind is None]:
        logger.warning("Modalities that are left out: %s.", ", ".join(left_out))
    # columns of a modality may stand there too, under its name
    shared = [name for name in mdata.obs if str(name).partition(":")[0] not in mdata.mod]
    for part in known.values() if mdata.obs_names.is_unique else ():
        part.obs = part.obs.join(mdata.obs[[name for name in shared if name not in part.obs]])
    return known


def combine_modalities(modalities, genome=None):
    """One AnnData of the cells that every modality has.

    `modalities` are AnnData objects by feature type (`FEATURE_TYPES`); cells are paired by name, in the order of the
    first. X is CSR; `obs` that of the first modality, and further columns of the others. `genome` is the build of the
    peaks, if it is known.
    """
    parts = list(modalities.values())
    for kind, part in modalities.items():
        if not part.obs_names.is_unique:
            raise InputError(
                f"The cell names of {kind} are not unique, so cells cannot be paired. Make them unique (obs_names)."
            )
    cells = parts[0].obs_names
    for part in parts[1:]:
        cells = cells[cells.isin(part.obs_names)]
    if not len(cells):
        seen = "; ".join(f"{kind}: {', '.join(part.obs_names[:2])}" for kind, part in modalities.items())
        raise InputError(f"The modalities have no cell name in common ({seen}). Rename them (obs_names).")
    for kind, part in modalities.items():
        if lost := part.n_obs - len(cells):
            logger.warning(
                "%d of %d cells of %s are left out: another modality lacks them.", lost, part.n_obs, kind
            )
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
    return check_modalities(adata, genome)


def check_modalities(adata, genome):
    """Check feature types and coordinates of peaks, and record the genome build."""
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
                "The genome build of the peaks is unknown. Name it (genome=, or --genome), so that models of other "
                "builds can be refused."
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


def map_peaks(adata, gene_panel, feature_modalities, build=None):
    """Cells with their peaks brought to the regions of a panel, by genomic overlap; all other features come first.

    `adata` is of `read_multiomics`; `gene_panel` and `feature_modalities` are of the model's tokenizer, and `build` is
    its genome build, if known. Each region gets the sum of the peaks that overlap it most, and
    ``uns["peak_mapping"]`` counts them. Peaks of another build are refused, and those of which none overlaps the panel.
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
    overlaps = map_regions(parse_regions(adata.var_names[peaks], own or build), parse_regions(regions, build))
    if not overlaps.nnz:
        raise InputError(
            f"No peak overlaps a region of the panel (peaks: {', '.join(adata.var_names[peaks][:2])}; panel: "
            f"{', '.join(regions[:2])}). Is the genome build the same?"
        )
    n_found = int((overlaps.getnnz(axis=0) > 0).sum())
    logger.info(
        "%d of %d peaks overlap %d of the panel's %d regions.",
        *(overlaps.nnz, peaks.sum(), n_found, len(regions)),
    )
    others = adata[:, ~peaks]
    summed = sp.csr_matrix(adata[:, peaks].X) @ overlaps
    matrix = sp.hstack([sp.csr_matrix(others.X), summed], format="csr")
    var = pd.concat([others.var, pd.DataFrame({"feature_types": PEAKS}, index=regions)])
    mapped = anndata.AnnData(matrix, obs=adata.obs.copy(), var=var, uns=dict(adata.uns))
    mapped.uns["peak_mapping"] = {
        "peaks": int(peaks.sum()),
        "mapped": overlaps.nnz,
        "regions": len(regions),
        "regions_found": n_found,
    }
    return mapped
