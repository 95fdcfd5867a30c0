"""Gene panels and gene names: which column of a file is which gene of the model.

Names are matched exactly, case and all; nothing is guessed.
"""

import gzip
import os
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from .expression_scbert import InputError

ENSEMBL_ID = re.compile(r"ENS[A-Z]{0,4}G\d{9,}(\.\d+)?(_PAR_Y)?")
GENOMIC_REGION = re.compile(r"(chr)?[\w.]+[-:_]\d+[-_]\d+")
LOWER_CASE_SYMBOL = re.compile(r"[A-Z]?[a-z][a-z0-9.-]*")
# where files of the field keep symbols when var_names are Ensembl ids
SYMBOL_COLUMNS = (
    "gene_symbols", "gene_symbol", "feature_name", "gene_name", "gene_names", "symbol", "symbols",
    "hgnc_symbol", "Symbol", "SYMBOL", "GeneSymbol", "gene_short_name", "gene",
)  # fmt: skip
MINIMUM_OVERLAP = 0.3


def open_text(path):
    """Open a text file for reading, gzip-compressed or not."""
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; a text file was needed.")
    with open(path, "rb") as handle:
        compressed = handle.read(2) == b"\x1f\x8b"
    return (gzip.open if compressed else open)(path, "rt", encoding="utf-8", newline="")


def read_gene_panel(path):
    """Read an ordered gene panel: one name per line (.txt, .csv, .tsv; first column), gzip or not.

    Parameters
    ----------
    path : str or os.PathLike

    Returns
    -------
    list of str

    Raises
    ------
    InputError
        If the file is no text, is empty, or names a gene twice.
    """
    return [row[0] for row in read_panel_rows(path)]


def read_panel_rows(path):
    """Rows of a panel file: ``[name]`` or ``[name, modality]``, checked."""
    try:
        with open_text(path) as handle:
            lines = [line.strip() for line in handle]
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is not a readable text file of gene names ({error}).") from error
    separator = "\t" if any("\t" in line for line in lines[:50]) else ","
    rows = [[cell.strip().strip('"') for cell in line.split(separator)] for line in lines if line]
    # a header is told by its name, not by its place: "gene" is no human gene symbol
    if rows and rows[0][0].lower() in {"", "gene", "genes", "symbol", *(c.lower() for c in SYMBOL_COLUMNS)}:
        rows = rows[1:]
    check_gene_panel([row[0] for row in rows], path)
    return rows


def write_gene_panel(path, panel, modalities=None):
    """Write a gene panel, one name per line, with the modality in a second column where there are several."""
    lines = panel if modalities is None else [f"{gene}\t{m}" for gene, m in zip(panel, modalities)]
    with open(path, "w", encoding="utf-8", newline="\n") as handle:
        handle.write("\n".join(lines) + "\n")


def check_gene_panel(panel, source="the gene panel"):
    """Refuse a panel that is empty, names a gene twice, or holds an empty name."""
    if len(panel) == 0:
        raise InputError(f"{source} holds no gene names; one name per line was needed.")
    if not all(isinstance(gene, str) and gene for gene in panel):
        raise InputError(f"{source} holds an empty name or something that is no text.")
    twice = [gene for gene, n in Counter(panel).items() if n > 1]
    if twice:
        raise InputError(
            f"{source} names {len(twice)} gene(s) more than once (first: {', '.join(twice[:5])}); "
            f"every gene may stand in a panel once."
        )


@dataclass
class GeneAlignment:
    """Where the columns of a file go in the panel; made by `align_genes`.

    Attributes
    ----------
    target : numpy.ndarray [genes of the file]
        Panel index of every column, -1 where it is not in the panel.
    panel_size : int
    n_matched : int
        Genes of the panel found.
    n_duplicates : int
        Columns added to another column of the same gene.
    n_absent : int
        Genes of the panel not found; their expression is 0.
    n_unused : int
        Columns of the file not in the panel.
    """

    target: np.ndarray
    panel_size: int
    first_names: list = field(default_factory=list)
    first_panel: list = field(default_factory=list)

    def __post_init__(self):
        used = self.target[self.target >= 0]
        self.n_matched = len(np.unique(used))
        self.n_duplicates = len(used) - self.n_matched
        self.n_absent = self.panel_size - self.n_matched
        self.n_unused = len(self.target) - len(used)
        self._identity = len(self.target) == self.panel_size and bool(
            (self.target == np.arange(self.panel_size)).all()
        )
        self._in_order = bool((np.diff(used) > 0).all())

    @property
    def overlap(self):
        """Share of the panel found, 0 to 1."""
        return self.n_matched / self.panel_size

    def apply(self, csr):
        """Columns of `csr` brought into panel order; duplicates summed, absent genes zero.

        Parameters
        ----------
        csr : scipy.sparse.csr_matrix [cells, genes of the file]

        Returns
        -------
        scipy.sparse.csr_matrix [cells, panel]
        """
        if csr.shape[1] != len(self.target):
            raise InputError(f"Got {csr.shape[1]} columns of expression for {len(self.target)} gene names.")
        if self._identity:
            return csr
        columns = self.target[csr.indices]
        kept = columns >= 0
        # row starts after dropping: how many values are kept before each old start
        indptr = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])[csr.indptr]
        data = csr.data[kept]
        if self.n_duplicates and data.dtype.kind in "buif" and data.dtype.itemsize < 4:
            data = data.astype(np.float32)
        aligned = sp.csr_matrix((data, columns[kept], indptr), shape=(csr.shape[0], self.panel_size))
        if self.n_duplicates:
            aligned.sum_duplicates()
        elif not self._in_order:
            aligned.sort_indices()
        return aligned

    def check(self, minimum=MINIMUM_OVERLAP, force=False):
        """Refuse a low overlap between the file's genes and the panel.

        Parameters
        ----------
        minimum : float
            Smallest share of the panel that has to be found.
        force : bool
            Accept any overlap but none.

        Raises
        ------
        InputError
            Showing the first names of both sides and what they look like.
        """
        if self.n_matched and (force or self.overlap >= minimum):
            return
        ours, theirs = ", ".join(self.first_panel), ", ".join(self.first_names)
        needed = max(1, int(np.ceil(minimum * self.panel_size)))
        raise InputError(
            f"The input has {self.n_matched} of the model's {self.panel_size} genes; at least {needed} are "
            f"needed. First names of the input: {theirs}; of the model: {ours}. "
            f"{_name_hint(self.first_names, self.first_panel)}"
            + (" Use --force to go on all the same." if self.n_matched else "")
        )


def _name_hint(names, panel):
    if looks_like_ensembl(names) and not looks_like_ensembl(panel):
        return (
            "The input is named by Ensembl ids: put gene symbols in a var column such as gene_symbols, or "
            "give a table of gene names with --gene-table FILE (the HGNC complete set)."
        )
    if sum(bool(GENOMIC_REGION.fullmatch(name)) for name in names) * 2 > len(names):
        return "The names look like genomic regions (ATAC peaks); this model reads genes."
    if sum(bool(LOWER_CASE_SYMBOL.fullmatch(name)) for name in names) * 2 > len(names):
        return (
            "The names look like mouse symbols or lower-case ones, which are never guessed: map them to "
            "human gene symbols (orthologs for mouse) first."
        )
    return "Check that var_names are human gene symbols, and that this is the right model."


def align_genes(gene_names, panel):
    """Match the columns of a file to a gene panel by exact name.

    Parameters
    ----------
    gene_names : sequence of str
        Names of the file's columns.
    panel : sequence of str
        The model's genes, in order.

    Returns
    -------
    GeneAlignment

    Examples
    --------
    >>> alignment = align_genes(["CD3E", "MS4A1", "CD3E"], ["MS4A1", "CD3E", "NKG7"])
    >>> alignment.n_matched, alignment.n_duplicates, alignment.n_absent
    (2, 1, 1)
    """
    index = {gene: i for i, gene in enumerate(panel)}
    names = [str(name) for name in gene_names]
    target = np.fromiter((index.get(name, -1) for name in names), dtype=np.int32, count=len(names))
    return GeneAlignment(target, len(panel), names[:5], list(panel[:5]))


def looks_like_ensembl(names):
    """Whether more than half of the names are Ensembl gene ids."""
    names = list(names)
    return sum(bool(ENSEMBL_ID.fullmatch(str(name))) for name in names) * 2 > len(names) > 0


def gene_names_of(var, var_names):
    """Gene symbols of an annotated matrix: `var_names`, or a column of `var` if those are Ensembl ids.

    Parameters
    ----------
    var : mapping of columns (a DataFrame)
    var_names : sequence of str

    Returns
    -------
    list of str
        Where a symbol is missing in the column, the Ensembl id stays.
    """
    names = [str(name) for name in var_names]
    if not looks_like_ensembl(names):
        return names
    for column in SYMBOL_COLUMNS:
        if column in var:
            symbols = [str(value) for value in var[column]]
            if not looks_like_ensembl(symbols):
                missing = {"", "nan", "None", "<NA>"}
                return [name if s in missing else s for s, name in zip(symbols, names)]
    return names
