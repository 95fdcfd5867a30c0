"""Write reference.h5ad (two thirds, labelled) and query.h5ad (one third): 700 PBMCs that ship with scanpy."""

import numpy as np
import scanpy

# natural logarithms of counts per 10,000, 765 genes
cells = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
cells.obs["cell_type"] = cells.obs["bulk_labels"]

in_query = np.arange(cells.n_obs) % 3 == 0
cells[~in_query].write_h5ad("reference.h5ad")
cells[in_query].write_h5ad("query.h5ad")
