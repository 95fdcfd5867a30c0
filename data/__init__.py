"""Files to validated cells, and results back to files."""

from .output import atomic_copy_h5ad, atomic_path, atomic_write_h5ad, check_output_path, partial_folder
from .read import iter_cell_chunks, matrix_rows, read_cells, read_gene_names

__all__ = [
    "atomic_copy_h5ad",
    "atomic_path",
    "atomic_write_h5ad",
    "check_output_path",
    "iter_cell_chunks",
    "matrix_rows",
    "partial_folder",
    "read_cells",
    "read_gene_names",
]
