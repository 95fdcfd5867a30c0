"""What is looked at first is imported fast: torch and transformers take seconds."""

import subprocess
import sys

import pytest

SLOW = {"torch", "transformers", "scanpy", "datasets", "accelerate"}


def imported_by(*modules):
    """Top-level names of other projects that come along."""
    script = f"""
import sys
before = set(sys.modules)
import {", ".join(modules)}
names = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*(names - set(sys.stdlib_module_names) - {{"scbert"}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_paths_and_errors_need_the_standard_library_alone():
    assert not imported_by("scbert.data.paths", "scbert.tokenization.errors_scbert")


@pytest.mark.parametrize(
    "module", ["data.read", "data.read_backed", "data.write_h5ad", "data.multiomics", "data.corpus_manifest"]
)
def test_files_are_read_without_the_model(module):
    assert not imported_by(f"scbert.{module}") & SLOW


def test_bins_need_numpy_and_scipy():
    modules = ["cells_scbert", "expression_scbert", "gene_table_scbert", "genes_scbert"]
    found = imported_by(*(f"scbert.tokenization.{module}" for module in modules))
    assert not found & (SLOW | {"anndata", "h5py", "pandas"})
