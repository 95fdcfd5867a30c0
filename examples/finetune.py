"""Teach a small model the types in reference.h5ad, from random weights, and read its scores."""

from scbert.training.run_finetune import finetune

# eight epochs show that it works; leave `epochs` out for the recipe's own
summary = finetune("reference.h5ad", "cell_type", "my_model", recipe="demo", epochs=8, overwrite=True)

print(f"held-out cells: macro-F1 {summary['test_macro_f1']:.3f}")
print(f"logistic regression on the same cells: {summary['baseline_test_macro_f1']:.3f}")
