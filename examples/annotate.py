"""Annotate query.h5ad with my_model, and compare with the types it came with."""

import scbert

# said here because 765 of the genes are too few to recognise log1p of counts per 10,000 by its row sums
annotated = scbert.annotate("query.h5ad", model="my_model", input="log1p")

print(annotated.obs[["scbert_cell_type", "scbert_confidence"]].head())
print("labels of the probabilities:", list(annotated.uns["scbert"]["labels"]))
sure = annotated.obs[annotated.obs["scbert_cell_type"] != "unassigned"]
agree = (sure["scbert_cell_type"].astype(str) == sure["cell_type"].astype(str)).sum()
print(f"{len(sure)} of {annotated.n_obs} cells are assigned, {agree} of them to the type they came with")
