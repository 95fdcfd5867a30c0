"""MuData files (.h5mu) as one AnnData."""

import logging

from ..extras import how_to_install
from ..tokenization import InputError
from .modalities import FEATURE_TYPES, combine_modalities

logger = logging.getLogger(__name__)

GENES, PEAKS, PROTEINS = FEATURE_TYPES
MODALITY_NAMES = {"rna": GENES, "gex": GENES, "atac": PEAKS, "peaks": PEAKS, "prot": PROTEINS}


def read_mudata(path, genome=None):
    """Read a MuData .h5mu file as one AnnData.

    Parameters
    ----------
    path : str or os.PathLike
        An HDF5 file.
    genome : str, optional
        Genome build of the peaks.

    Returns
    -------
    anndata.AnnData
        See `combine_modalities`.

    Raises
    ------
    InputError
        If mudata is not installed, or as `modalities_of` and `combine_modalities`.
    """
    try:
        import mudata
    except ImportError:
        raise InputError(
            f"Reading {path} needs the library mudata, which is not installed: {how_to_install('mudata')}"
        ) from None
    return combine_modalities(modalities_of(mudata.read_h5mu(path)), genome)


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
            f"The modalities of this MuData are called {', '.join(mdata.mod)}; names such as "
            f"{', '.join(MODALITY_NAMES)} are needed. Rename them (mdata.mod)."
        )
    left_out = [name for name in mdata.mod if name.lower() not in MODALITY_NAMES]
    if left_out:
        logger.warning("Modalities left out: %s.", ", ".join(left_out))
    return known
