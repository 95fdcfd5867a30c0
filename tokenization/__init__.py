"""Cells to ids: expression bins, gene panels and the tokenizer."""

from .cells_scbert import select_matrix
from .expression_scbert import (
    InputError,
    bin_floor,
    bin_quantile,
    detect_input_kind,
    normalize_expression,
    to_counts_scale,
)
from .gene_table_scbert import GeneMapping, GeneTable, map_genes
from .genes_scbert import GeneAlignment, align_genes, gene_names_of, read_gene_panel, write_gene_panel
from .tokenization_scbert import ScBertTokenizer

# a saved tokenizer carries this code, so that it loads where the package is not installed
ScBertTokenizer.register_for_auto_class("AutoTokenizer")

__all__ = [
    "GeneAlignment",
    "GeneMapping",
    "GeneTable",
    "InputError",
    "ScBertTokenizer",
    "align_genes",
    "bin_floor",
    "bin_quantile",
    "detect_input_kind",
    "gene_names_of",
    "map_genes",
    "normalize_expression",
    "read_gene_panel",
    "select_matrix",
    "to_counts_scale",
    "write_gene_panel",
]
