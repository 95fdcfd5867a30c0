"""Give every cell of query.h5ad a vector, and make clusters of the vectors."""

import scanpy

import scbert

adata = scbert.embed("query.h5ad", model="my_model", input="log1p")

scanpy.pp.neighbors(adata, use_rep="X_scbert")
scanpy.tl.leiden(adata, flavor="igraph", n_iterations=2)
print(adata.obsm["X_scbert"].shape, adata.obs["leiden"].nunique(), "clusters")
