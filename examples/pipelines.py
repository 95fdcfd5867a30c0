"""The model as transformers' own pipelines; with `trust_remote_code=True` this runs without the package too."""

import anndata
from transformers import pipeline

import scbert  # noqa: F401 - makes the two tasks known

adata = anndata.read_h5ad("query.h5ad")[:8]

annotator = pipeline("cell-type-annotation", model="my_model")
for cell, types in zip(adata.obs_names, annotator(adata, input="log1p", top_k=2), strict=True):
    print(cell, types)

embedder = pipeline("cell-embedding", model="my_model")
print(embedder(adata, input="log1p")[0].shape)
