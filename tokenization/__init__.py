"""Cells to ids: expression bins, gene panels and the tokenizer.

A name is imported when it is first used: the tokenizer needs transformers, which takes seconds to import, and the
error needs nothing.
"""

from importlib import import_module

_HOME = {
    "GeneAlignment": "genes_scbert",
    "GeneMapping": "gene_table_scbert",
    "GeneTable": "gene_table_scbert",
    "InputError": "errors_scbert",
    "ScBertTokenizer": "tokenization_scbert",
    "align_genes": "genes_scbert",
    "bin_floor": "expression_scbert",
    "bin_quantile": "expression_scbert",
    "detect_input_kind": "expression_scbert",
    "gene_names_of": "genes_scbert",
    "map_genes": "gene_table_scbert",
    "normalize_expression": "expression_scbert",
    "read_gene_panel": "genes_scbert",
    "select_matrix": "cells_scbert",
    "write_gene_panel": "genes_scbert",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
