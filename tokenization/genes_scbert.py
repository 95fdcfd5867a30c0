"""Gene panels and gene names: which column of a file is which gene of the model, and what of those it lacks.

Names are matched exactly, case and all, but for the versions of Ensembl ids; nothing is guessed.

What was not measured is no sign that it is not there. A tokenizer may know the level of every gene, its mean bin in the
cells that a model learnt from. Where a gene of the panel is not in a file, cells are given its level in the place of 0,
and the size factor leaves the room that the counts of such genes would have taken. Where less than half of the genes
are there, levels count less: they are those of the cells learnt from, and a cell of another kind must not be made like
them by what was not measured.
"""

import gzip
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from .errors_scbert import InputError
from .expression_scbert import expm1, keep_values, with_data

ENSEMBL_ID = re.compile(r"ENS[A-Z]{0,4}G\d{9,}(\.\d+)?(_PAR_Y)?")
ENSEMBL_VERSION = re.compile(r"(?<=\d)\.\d+")
GENOMIC_REGION = re.compile(r"(chr)?[\w.]+[-:_]\d+[-_]\d+")
LOWER_CASE_SYMBOL = re.compile(r"[A-Z]?[a-z][a-z0-9.-]*")
# where files of the field keep symbols when var_names are Ensembl ids
SYMBOL_COLUMNS = (
    "gene_symbols", "gene_symbol", "feature_name", "gene_name", "gene_names", "symbol", "symbols",
    "hgnc_symbol", "Symbol", "SYMBOL", "GeneSymbol", "gene_short_name", "gene",
)  # fmt: skip
MINIMUM_OVERLAP = 0.3
# levels have as many digits in memory as in their file, so that a model read back bins as it did
LEVEL_FORMAT = "%.3g"


def open_text(path):
    """Open a text file for reading, gzip-compressed or not, past the mark that Excel puts before its UTF-8."""
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; a text file was needed.")
    with open(path, "rb") as handle:
        compressed = handle.read(2) == b"\x1f\x8b"
    return (gzip.open if compressed else open)(path, "rt", encoding="utf-8-sig", newline="")


def read_gene_panel(path):
    """Read an ordered gene panel: one name per line (.txt, .csv, .tsv; first column), gzip or not.

    A file that is not text, is empty, or names a gene twice, is refused.
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
    # a header is told by its name, not by its place: no human gene has the symbol "gene"
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
        raise InputError(f"{source} holds an empty name, or something that is not text.")
    twice = [gene for gene, n in Counter(panel).items() if n > 1]
    if twice:
        raise InputError(
            f"{source} names {len(twice)} gene(s) more than once (first: {', '.join(twice[:5])}); "
            f"a panel names every gene once."
        )


@dataclass
class GeneAlignment:
    """Where the columns of a file go in the panel; made by `align_genes`.

    Counted are the genes of the panel that were found, `n_matched`, and not found, `n_absent`, whose expression is 0
    unless the tokenizer has levels for them; the columns added to another column of the same gene, `n_duplicates`, and
    those not in the panel, `n_unused`.
    """

    # panel index of every column, -1 where it is not in the panel
    target: np.ndarray
    # of the columns
    names: list
    panel: list
    # for `check`, of who knows better than the names what mends a low overlap, such as `raw_hint`
    hint: str = ""

    def __post_init__(self):
        used = self.target[self.target >= 0]
        self.panel_size = len(self.panel)
        self.n_matched = len(np.unique(used))
        self.n_duplicates = len(used) - self.n_matched
        self.n_absent = self.panel_size - self.n_matched
        self.n_unused = len(self.target) - len(used)
        self._identity = np.array_equal(self.target, np.arange(self.panel_size))
        self._in_order = bool((np.diff(used) > 0).all())

    @property
    def overlap(self):
        """Share of the panel found, 0 to 1."""
        return self.n_matched / self.panel_size

    @cached_property
    def absent(self):
        """Panel indices of the genes not found, ascending."""
        return np.setdiff1d(np.arange(self.panel_size), self.target)

    def apply(self, csr):
        """CSR [cells, genes of the file] to CSR [cells, panel]; duplicates summed, absent genes zero."""
        if csr.shape[1] != len(self.target):
            raise InputError(f"Got {csr.shape[1]} columns of expression for {len(self.target)} gene names.")
        if self._identity:
            return csr
        columns = self.target[csr.indices]
        shape = (csr.shape[0], self.panel_size)
        # values of the column -1 go at once
        aligned = keep_values(sp.csr_matrix((csr.data, columns, csr.indptr), shape=shape), columns >= 0)
        if not self._in_order:
            # there and back again is a counting sort: linear, and on some hundred rows five times as fast
            aligned = aligned.tocsc().tocsr()
        if self.n_duplicates:
            if aligned.dtype.itemsize < 4:
                aligned = aligned.astype(np.float32)
            aligned.sum_duplicates()
        return aligned

    def apply_to_logs(self, csr, dtype=np.float64):
        """Like `apply`, for natural log1p values: duplicates are summed as counts, in `dtype`."""
        if not self.n_duplicates:
            return self.apply(csr)
        aligned = self.apply(expm1(csr, dtype))
        return with_data(aligned, np.log1p(aligned.data))

    def notes(self):
        """Sentences on what was done to the genes without being asked, for the user to read.

        Examples
        --------
        >>> align_genes(["CD3E", "MS4A1", "CD3E"], ["MS4A1", "CD3E"]).notes()
        ['1 column(s) repeat the gene name of another (CD3E); the values of columns with one name were summed.']
        """
        if not self.n_duplicates:
            return []
        counts = np.bincount(self.target[self.target >= 0])
        repeated = [self.panel[place] for place in np.flatnonzero(counts > 1)]
        shown = ", ".join(repeated[:5]) + (", ..." if len(repeated) > 5 else "")
        return [
            f"{self.n_duplicates} column(s) repeat the gene name of another ({shown}); the values of columns with "
            f"one name were summed."
        ]

    def check(self, minimum=MINIMUM_OVERLAP, force=False):
        """Refuse a low overlap of the file's genes with the panel: a share of it below `minimum`.

        With `force` any overlap but none is accepted; None for a caller who has no way to force it.
        """
        if self.n_matched and (force or self.overlap >= minimum):
            return
        ours, theirs = ", ".join(self.panel[:5]), ", ".join(self.names[:5])
        needed = max(1, int(np.ceil(minimum * self.panel_size)))
        can_force = self.n_matched and force is not None
        regardless = " To go on regardless: force=True, or --force." if can_force else ""
        raise InputError(
            f"The input has {self.n_matched} of the model's {self.panel_size} genes; at least {needed} are "
            f"needed. First names of the input: {theirs}; of the model: {ours}. "
            f"{self.hint or _name_hint(self.names[:5], self.panel[:5])}{regardless}"
        )


def _name_hint(names, panel):
    if looks_like_ensembl(names) and not looks_like_ensembl(panel):
        return (
            "The genes of the input are named by Ensembl ids: put their symbols in a var column such as "
            "gene_symbols, or give a table of gene names, the HGNC complete set (gene_table=FILE, or "
            "--gene-table FILE)."
        )
    if _most_match(GENOMIC_REGION, names):
        return "The names look like genomic regions (ATAC peaks); this model reads genes."
    if _most_match(LOWER_CASE_SYMBOL, names):
        return (
            "The names look like mouse symbols or lower-case ones, which are never guessed: map them to "
            "human gene symbols (for mouse, orthologues) first."
        )
    return "Check that var_names are human gene symbols, and that this is the right model."


def align_genes(gene_names, panel):
    """Match the columns of a file to a gene panel by exact name, as a `GeneAlignment`.

    An Ensembl id that the panel does not have is matched without its version, the number behind the dot.

    Examples
    --------
    >>> alignment = align_genes(["CD3E", "MS4A1", "CD3E"], ["MS4A1", "CD3E", "NKG7"])
    >>> alignment.n_matched, alignment.n_duplicates, alignment.n_absent
    (2, 1, 1)
    >>> align_genes(["ENSG00000000003.15"], ["ENSG00000000003.7"]).n_matched
    1
    """
    index = {gene: i for i, gene in enumerate(panel)}
    index = {_unversioned(gene): i for gene, i in index.items()} | index
    names = [str(name) for name in gene_names]
    target = np.array(
        [index[name] if name in index else index.get(_unversioned(name), -1) for name in names],
        dtype=np.int32,
    )
    return GeneAlignment(target, names, panel)


def _unversioned(name):
    """An Ensembl id without its version; any other name as it is."""
    return ENSEMBL_VERSION.sub("", name) if ENSEMBL_ID.fullmatch(name) else name


def looks_like_ensembl(names):
    """Whether more than half of the names are Ensembl gene ids."""
    return _most_match(ENSEMBL_ID, names)


def _most_match(pattern, names):
    matches = [bool(pattern.fullmatch(str(name))) for name in names]
    return 2 * sum(matches) > len(matches)


def gene_names_of(var, var_names, panel=None):
    """Gene symbols of an annotated matrix: `var_names`, or a column of `var` if those are Ensembl ids.

    Where a symbol is missing in the column, the Ensembl id stays; all of them do where a `panel` has more of these.
    Proteins and the like (``feature_types``) are called otherwise than genes, even those that the file lacks.
    """
    names = _symbols_of(var, [str(name) for name in var_names], panel)
    if "feature_types" not in var:
        return names
    kinds = [str(kind) for kind in var["feature_types"]]
    genes = {name for name, kind in zip(names, kinds) if kind == "Gene Expression"}
    for place, (name, kind) in enumerate(zip(names, kinds)):
        other = kind.endswith(" Capture") or (kind != "Gene Expression" and name in genes)
        # those of cells that were brought together, as for `evaluate`, are called so already
        if other and not name.endswith(f" ({kind})"):
            names[place] = f"{name} ({kind})"
    return names


def _symbols_of(var, names, panel):
    if not looks_like_ensembl(names):
        return names
    for column in SYMBOL_COLUMNS:
        if column in var:
            symbols = [str(value) for value in var[column]]
            if not looks_like_ensembl(symbols):
                missing = {"", "nan", "None", "<NA>"}
                symbols = [name if s in missing else s for s, name in zip(symbols, names)]
                found = [align_genes(each, panel or ()).n_matched for each in (symbols, names)]
                return names if found[1] > found[0] else symbols
    return names


def read_gene_levels(path):
    """Read a level for every gene of a panel, one number per line; None of None."""
    if path is None:
        return None
    try:
        with open_text(path) as handle:
            return [float(line) for line in handle]
    except ValueError as error:
        raise InputError(f"{path} must hold one number per line: {error}.") from error


def check_gene_levels(levels, tokenizer):
    """Levels as float64 [genes], rounded, refused if they are not a bin for every gene, or the bins of another kind."""
    if tokenizer.binning != "floor" or tokenizer.feature_modalities is not None:
        raise InputError("gene_levels need binning='floor' and features of one modality.")
    levels, n_genes = np.asarray(levels, dtype=np.float64), len(tokenizer.gene_panel)
    if levels.shape != (n_genes,) or not ((levels >= 0) & (levels <= tokenizer.n_bins)).all():
        raise InputError(
            f"gene_levels must hold a number from 0 to {tokenizer.n_bins} for each of the panel's {n_genes} genes."
        )
    return np.array([float(LEVEL_FORMAT % level) for level in levels])


def trust(absent, n_genes):
    """What levels count: 1 down to half of the genes, then twice the share of genes that are there."""
    return min(1.0, 2 * (1 - len(absent) / n_genes))


def measured_share(levels, absent, log_base, bin_width):
    """Share of a cell's counts that genes other than `absent` (panel indices) have, as far as levels are trusted."""
    counts = log_base ** (levels * bin_width) - 1
    missing = counts[absent].sum()
    # where all that the model knows is missing nothing can be said
    return (1 - missing / counts.sum()) ** trust(absent, len(levels)) if missing < counts.sum() else 1.0


def fill_absent(bins, absent, levels):
    """Every cell's bins of the absent genes, which are 0, become their levels, rounded; empty cells stay empty.

    Levels, float64 [genes], are lower where they are trusted less. Absent genes are panel indices, ascending.

    Examples
    --------
    >>> bins = sp.csr_matrix(np.array([[3, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=np.int8))
    >>> fill_absent(bins, np.array([1, 2]), np.array([0.2, 1.8, 0.3, 1.0])).toarray()
    array([[3, 2, 0, 1],
           [1, 2, 0, 0],
           [0, 0, 0, 0]], dtype=int8)
    """
    if not len(absent):
        return bins
    values = np.rint(levels[absent] * trust(absent, len(levels))).astype(bins.dtype)
    absent, values = absent[values > 0], values[values > 0]
    expressed = np.diff(bins.indptr) > 0
    n_cells, starts = expressed.sum(), np.append(0, np.cumsum(expressed)) * len(absent)
    filled = sp.csr_matrix((np.tile(values, n_cells), np.tile(absent, n_cells), starts), shape=bins.shape)
    return bins + filled
