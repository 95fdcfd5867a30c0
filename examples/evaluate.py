"""Compare a model with its baselines on the same folds."""

from pathlib import Path

from scbert.protocols import run_benchmark

results = run_benchmark(
    "cross-validation", ["reference.h5ad"], label_key="cell_type", output="compared", folds=2,
    input="log1p", baselines="logistic_l2,majority", overwrite=True,
)  # fmt: skip
print(Path("compared/table.md").read_text())
