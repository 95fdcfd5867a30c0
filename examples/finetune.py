"""Teach the default model the types in reference.h5ad, and read what cross-validation says of it."""

import scbert

model = scbert.finetune("reference.h5ad", "cell_type", "my_model", overwrite=True)

print(f"cross-validation: macro-F1 {model.metrics['cross_validation_macro_f1']:.3f}")
print(f"logistic regression on the same cells: {model.metrics['baseline_cross_validation_macro_f1']:.3f}")
