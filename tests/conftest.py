"""Fixtures for every test: synthetic cells of three types with markers of their own."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

MARKERS = {
    "B cell": "MS4A1 CD79A CD79B CD19 CD22 BANK1 TCL1A FCER2 BLK PAX5 IGHM IGHD IGKC VPREB3 LINC00926".split(),
    "T cell": "CD3D CD3E CD3G CD2 CD5 TRAC TRBC1 TRBC2 IL7R LCK ITK CD27 TCF7 LEF1 CCR7".split(),
    "monocyte": "LYZ CD14 S100A8 S100A9 S100A12 FCN1 VCAN CST3 CTSS TYROBP CSF1R LST1 AIF1 MS4A7 FCGR3A".split(),
}
HOUSEKEEPING = (
    "ACTB ACTG1 GAPDH B2M MALAT1 TMSB4X TMSB10 EEF1A1 EEF2 FTL FTH1 UBA52 FAU TPT1 NACA PTMA HSP90AB1 HSPA8 "
    "MT-CO1 MT-CO2 MT-CO3 MT-ND1 MT-ND2 MT-ND4 MT-ATP6 MT-CYB"
).split()


def make_gene_panel(n_genes=300):
    """Marker, housekeeping and ribosomal symbols, then keratins, histones and the like up to `n_genes`."""
    genes = [gene for markers in MARKERS.values() for gene in markers] + HOUSEKEEPING
    families = [("RPL", 41), ("RPS", 29), ("PSMA", 7), ("PSMB", 10), ("NDUFA", 13), ("COX", 20), ("KRT", 86)]
    families += [("ZNF", 800), ("SLC25A", 53)]
    genes += [f"{family}{i}" for family, last in families for i in range(1, last + 1)]
    return list(dict.fromkeys(genes))[:n_genes]


def make_cells(n_cells=120, n_genes=300, seed=0):
    """Poisson counts of cells in three types; a type's own markers are some ten times as high in it."""
    rng = np.random.default_rng(seed)
    genes = make_gene_panel(n_genes)
    types = np.array(list(MARKERS))[np.arange(n_cells) % len(MARKERS)]
    means = np.tile(rng.lognormal(1.0, 0.8, size=len(genes)), (n_cells, 1))
    for cell_type, markers in MARKERS.items():
        columns = [genes.index(gene) for gene in markers]
        means[:, columns] = np.where((types == cell_type)[:, None], 15.0, 0.3)
    counts = rng.poisson(means * rng.lognormal(0, 0.25, size=(n_cells, 1)))
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(types),
            "donor": pd.Categorical(
                np.array(["donor_1", "donor_2", "donor_3", "donor_4"])[rng.integers(4, size=n_cells)]
            ),
            "batch": pd.Categorical(np.where(np.arange(n_cells) % 2, "run_b", "run_a")),
        },
        index=[f"cell_{i:04d}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=genes)
    return anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


@pytest.fixture
def gene_panel():
    """Names of 300 genes, in order: the columns of `adata`."""
    return make_gene_panel()


@pytest.fixture
def adata():
    """120 cells x 300 genes of whole-number counts (CSR float32), `obs` with cell_type, donor and batch."""
    return make_cells()


@pytest.fixture
def new_cells():
    """Function that makes other such cells: `new_cells(n_cells, n_genes, seed)`."""
    return make_cells
