"""Teach a model the types in reference.h5ad, and read its scores."""

import scbert

model = scbert.finetune("reference.h5ad", "cell_type", "my_model", input="log1p", overwrite=True)

print(model)
print(f"cells not learnt from: macro-F1 {model.metrics['cross_validation_macro_f1']:.3f}")
print(f"logistic regression on the same cells: {model.metrics['baseline_cross_validation_macro_f1']:.3f}")
