"""Labelled cells of a fine-tuning run: read, checked, binned and split."""

import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from ..data.cell_ontology import read_cell_ontology, read_terms
from ..data.label_tree import tree_from_column, tree_from_ontology, tree_from_table
from ..data.labels import cell_notes, choose_classes, find_labels, label_notes
from ..data.read import log_normalize, read_cells
from ..data.splits import stratified_split
from ..tokenization import (
    InputError,
    ScBertTokenizer,
    gene_names_of,
    read_gene_panel,
    select_matrix,
)
from ..tokenization.cells_scbert import feature_modalities
from ..tokenization.expression_scbert import as_csr, is_integer_valued
from ..tokenization.genes_scbert import GeneAlignment
from .finetune_arguments import FinetuneDataArguments
from .initial_model import new_tokenizer
from .principal_axes import most_variable

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


@dataclass
class LabelledCells:
    """
    Cells of one split: sparse expression bins [cells, panel], classes [cells] int64, where they stand in their file
    [cells] int64, and places of the panel's genes that the file lacks.
    """

    bins: sp.csr_matrix
    targets: np.ndarray
    cells: np.ndarray
    absent: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.targets)


@dataclass
class FinetuneData:
    """
    Everything a run learns from.

    The classes are labels in their order; the splits ``train``, ``validation`` and ``test`` may be empty; `sources` are
    the AnnData that each is from, for the baseline, and `input_kinds` what their values are, ``"counts"`` or
    ``"log1p"``. The report says what was left out and why, and how the genes matched. Cell Ontology terms are of the
    classes and of the types above them, and parents lead from child to parent; None without a table of terms, or a
    tree. Unlabelled cells are expression bins [others, panel], sparse; None without such cells.
    """

    tokenizer: ScBertTokenizer
    classes: list[str]
    splits: dict[str, LabelledCells]
    sources: dict[str, AnnData]
    input_kinds: dict[str, str]
    report: dict[str, Any] = field(default_factory=dict)
    term_ids: dict[str, str] | None = None
    parents: dict[str, str] | None = None
    unlabelled: sp.csr_matrix | None = None

    def fingerprint(self) -> int:
        """A checksum of cells, labels and splits: a resumed run must have the same."""
        checksum = zlib.crc32("\n".join([*self.classes, *self.tokenizer.gene_panel]).encode())
        for name in SPLITS:
            part = self.splits[name]
            for array in (part.bins.indptr, part.bins.indices, part.bins.data, part.targets, part.cells):
                checksum = zlib.crc32(np.ascontiguousarray(array).tobytes(), checksum)
        if self.unlabelled is not None:
            checksum = zlib.crc32(np.ascontiguousarray(self.unlabelled.data).tobytes(), checksum)
        return checksum


def load_data(
    data: FinetuneDataArguments,
    tokenizer: ScBertTokenizer | dict[str, Any],
    seed: int,
    reference: AnnData | None = None,
    test: AnnData | None = None,
    unlabelled: Sequence[AnnData | str | Path] = (),
    validate: bool = True,
    learn_levels: bool = False,
) -> FinetuneData:
    """
    Read the reference, choose classes and splits, and bin the cells.

    The tokenizer is the base's, or options for a new one over the panel of the run; it is given the genes' levels in
    the training cells if it shall `learn_levels`, for files that lack some genes. Cells that are given and are no files
    are left as they are. Where none are kept to `validate`, those that a column says are for it are learnt from. Every
    fault of the input that a user can mend is an `InputError`.
    """
    reference = read_cells(data.reference if reference is None else reference, layer=data.layer)
    labels = find_labels(reference.obs, data.label_key, data.reference)
    for note in label_notes(reference.obs[data.label_key], labels):
        logger.warning(note)
    given = _given_splits(reference, data.test_key)
    if given is not None:
        labels[given == ""] = None
    trainable = labels if given is None else np.where(given != "test", labels, None)
    classes, report = choose_classes(trainable, data.label_key)
    report["unlabelled"] = int(sum(label is None for label in labels))
    if given is not None:
        report["test_classes_unknown"] = _unknown_classes(labels[given == "test"], classes)
    term_ids, parents = _terms_and_tree(data, reference, labels, classes)
    # -1 where a cell has no class, or one that is not learnt
    targets = pd.Index(classes, dtype=object).get_indexer(labels)
    assigned = _assign_splits(targets, given, data, seed, validate)
    others = [read_cells(cells, layer=data.layer) for cells in unlabelled]
    if isinstance(tokenizer, dict):
        # genes are not chosen with a look at the test cells
        learnt = np.isin(assigned, ["train", "validation"])
        tokenizer = _tokenizer_of(tokenizer, reference, learnt, data, others)
    report["genes"] = _gene_report(tokenizer, reference, data)
    bins = tokenizer.bin_cells(reference, input=data.input, layer=data.layer)
    expressed = np.diff(bins.indptr) > 0
    report["empty"] = sum(_drop_cells(name, assigned, targets, expressed) for name in ("train", "validation"))
    _drop_low_gene_cells(assigned, targets, reference, tokenizer, data, report)
    splits, sources = {}, dict.fromkeys(SPLITS, reference)
    matrix, source = select_matrix(reference, data.layer)
    names = gene_names_of(source.var, source.var_names, tokenizer.gene_panel)
    for note in cell_notes(names, np.diff(bins.indptr)):
        logger.warning(note)
    if matrix.max() == 1 and is_integer_valued(as_csr(matrix)):
        logger.warning(
            "All values of the reference are 0 or 1: they look like presence or absence, and are taken for counts."
        )
    for name in SPLITS:
        cells = np.flatnonzero(assigned == name)
        splits[name] = LabelledCells(bins[cells], targets[cells], cells)
    _check_training_cells(splits["train"], classes)
    if learn_levels and tokenizer.feature_modalities is None and tokenizer.binning == "floor":
        levels = np.asarray(splits["train"].bins.mean(axis=0)).ravel()
        # a mean of highest bins may be rounded up
        tokenizer.gene_levels = np.minimum(levels, tokenizer.n_bins)
    if data.test:
        sources["test"] = read_cells(data.test if test is None else test, layer=data.layer)
        splits["test"] = _test_cells(sources["test"], data, tokenizer, classes, report)
    report["cells"] = {name: len(splits[name]) for name in SPLITS}
    kinds = {
        name: tokenizer.resolve_input(select_matrix(source, data.layer)[0], data.input)[0]
        for name, source in sources.items()
    }
    stacked = _unlabelled_bins(others, unlabelled, data, tokenizer)
    return FinetuneData(tokenizer, classes, splits, sources, kinds, report, term_ids, parents, stacked)


def _aligned(
    cells: AnnData, name: str | Path, data: FinetuneDataArguments, tokenizer: ScBertTokenizer
) -> GeneAlignment:
    """How the genes of cells go into the panel; an `InputError` that names them if too few do."""
    alignment = tokenizer.align(cells, layer=data.layer)
    try:
        alignment.check(force=None)
    except InputError as problem:
        raise InputError(f"The genes of {name} do not suit the panel. {problem}") from None
    return alignment


def _unlabelled_bins(
    others: list[AnnData],
    given: Sequence[AnnData | str | Path],
    data: FinetuneDataArguments,
    tokenizer: ScBertTokenizer,
) -> sp.csr_matrix | None:
    """Bins of the cells `given` that express something; whatever labels they have are not looked at."""
    if not others:
        return None
    parts = []
    for cells, name in zip(others, given, strict=True):
        _aligned(cells, "the AnnData without labels" if isinstance(name, AnnData) else name, data, tokenizer)
        parts.append(tokenizer.bin_cells(cells, input=data.input, layer=data.layer))
    bins = sp.vstack(parts, format="csr")
    if not bins.nnz:
        raise InputError(
            "None of the cells without labels expresses a gene of the reference. Give cells of the same tissue, or "
            "leave --unlabelled out."
        )
    return bins[np.diff(bins.indptr) > 0]


def _terms_and_tree(
    data: FinetuneDataArguments, reference: AnnData, labels: np.ndarray, classes: list[str]
) -> tuple[dict[str, str] | None, dict[str, str] | None]:
    """Terms of the classes, and the tree above them: of the table or column given, or else of the ontology."""
    terms, parents = None, None
    if data.ontology:
        ontology = read_cell_ontology()
        terms = read_terms(data.ontology, classes, ontology)
        if not (data.label_tree or data.coarse_key):
            parents, terms = tree_from_ontology(terms, ontology, classes)
    if data.label_tree:
        parents = tree_from_table(data.label_tree, classes)
    if data.coarse_key:
        if data.coarse_key not in list(reference.obs):
            raise InputError(
                f"There is no column {data.coarse_key!r} of coarser types in obs; it has: {', '.join(reference.obs)}."
            )
        coarse = find_labels(reference.obs, data.coarse_key, data.reference)
        parents = tree_from_column(labels, coarse, classes, data.coarse_key)
    return terms or None, parents or None


def _check_training_cells(train: LabelledCells, classes: list[str]) -> None:
    """Refuse training cells that lack a class, or express nothing at all; name classes whose cells do."""
    lost = sorted(set(range(len(classes))) - set(train.targets.tolist()))
    if lost:
        raise InputError(
            f"No training cell is there of: {', '.join(classes[i] for i in lost)}. Put cells of every class into the "
            "training split."
        )
    if not train.bins.nnz:
        raise InputError("No training cell expresses a gene of the panel: all its values are zero.")
    empty = sorted(set(train.targets) - set(train.targets[np.diff(train.bins.indptr) > 0]))
    if empty:
        logger.warning(
            "No training cell of %s expresses a gene of the panel, so nothing of it can be learnt.",
            ", ".join(classes[i] for i in empty),
        )


def _unknown_classes(labels: np.ndarray, classes: list[str]) -> list[str]:
    """Classes the model cannot know, which is no mistake of its; to be said, and left out of the scores."""
    return sorted({label for label in labels if label is not None} - set(classes))


def _given_splits(reference: AnnData, test_key: str | None) -> np.ndarray | None:
    """The split of every cell as the column says, "" where it says nothing; None without a column."""
    if test_key is None:
        return None
    if test_key not in list(reference.obs):
        raise InputError(
            f"There is no column {test_key!r} in obs to split by; it has: {', '.join(reference.obs)}."
        )
    column = reference.obs[test_key]
    words = np.where(column.isna(), "", column.astype(str).str.strip().str.lower())
    unknown = sorted(set(words) - {*SPLITS, ""})
    if unknown or not {"train", "test"} <= set(words):
        raise InputError(
            f"The column {test_key!r} must say train, test or (optionally) validation for each cell, and "
            f"have cells of train and of test; it holds: "
            f"{', '.join(sorted(set(words) - {''})[:10]) or 'nothing'}."
        )
    return words


def _tokenizer_of(
    options: dict[str, Any],
    reference: AnnData,
    learnt: np.ndarray,
    data: FinetuneDataArguments,
    others: Sequence[AnnData],
) -> ScBertTokenizer:
    """A tokenizer over the panel file, or the genes that these or other cells express (or the most variable)."""
    if data.genes:
        return new_tokenizer(options, read_gene_panel(data.genes))
    matrix, source = select_matrix(reference, data.layer)
    names = gene_names_of(source.var, source.var_names)
    expressed = _expressed(matrix[np.flatnonzero(learnt)])
    for cells in others:
        of_cells, var = select_matrix(cells, data.layer)
        theirs = np.array(gene_names_of(var.var, var.var_names, names))[_expressed(of_cells)]
        expressed |= np.isin(names, theirs)
    panel = list(dict.fromkeys(name for name, seen in zip(names, expressed, strict=True) if seen))
    if data.top_genes:
        panel = most_variable_genes(reference[learnt], data.top_genes, data.layer, data.input)
    if not panel:
        raise InputError("No gene is expressed in any cell that is learnt from: the matrix holds zeros only.")
    modalities = feature_modalities(source.var)
    if modalities is not None:
        of_feature = dict(zip(names, modalities.tolist(), strict=True))
        modalities = [of_feature[name] for name in panel]
    return new_tokenizer(options, panel, modalities, reference.uns.get("genome_build"))


def _expressed(matrix: Any) -> np.ndarray:
    """Genes that a cell expresses, bool [genes]."""
    return np.asarray((as_csr(matrix) != 0).sum(axis=0)).ravel() > 0


def most_variable_genes(cells: AnnData, n_genes: int, layer: str | None, input: str) -> list[str]:
    """
    The genes whose log1p CP10k values vary the most, in the order of the columns; of equal ones the first.

    Examples
    --------
    >>> cells = AnnData(np.array([[1, 0, 8], [1, 9, 8]]), var={"gene": ["A", "B", "C"]})
    >>> cells.var_names = ["A", "B", "C"]
    >>> most_variable_genes(cells, 1, None, "counts")
    ['B']
    """
    values, names = log_normalize(cells, layer, input)
    return [names[i] for i in most_variable(values, n_genes)]


def _gene_report(
    tokenizer: ScBertTokenizer, reference: AnnData, data: FinetuneDataArguments
) -> dict[str, Any]:
    alignment = _aligned(reference, data.reference, data, tokenizer)
    return {
        "panel": alignment.panel_size,
        "matched": alignment.n_matched,
        "duplicates": alignment.n_duplicates,
        "absent": alignment.n_absent,
        "unused": alignment.n_unused,
    }


def _assign_splits(
    targets: np.ndarray, given: np.ndarray | None, data: FinetuneDataArguments, seed: int, validate: bool
) -> np.ndarray:
    """Name of the split of every cell, "" for those of no class."""
    assigned = np.full(len(targets), "", dtype=object)
    validation = data.validation_fraction if validate else 0.0
    if given is None:
        chosen = np.flatnonzero(targets >= 0)
        test = 0.0 if data.test else data.test_fraction
        assigned[chosen] = stratified_split(targets[chosen], test, validation, seed=seed)
        return assigned
    assigned[targets >= 0] = given[targets >= 0]
    if not validate:
        assigned[assigned == "validation"] = "train"
    elif "validation" not in set(assigned):
        training = np.flatnonzero(assigned == "train")
        assigned[training] = stratified_split(targets[training], 0.0, validation, seed=seed)
    return assigned


def _drop_low_gene_cells(
    assigned: np.ndarray,
    targets: np.ndarray,
    reference: AnnData,
    tokenizer: ScBertTokenizer,
    data: FinetuneDataArguments,
    report: dict[str, Any],
) -> None:
    """Take training cells with too few expressed genes out of `assigned`."""
    report["min_genes"] = {"minimum": data.min_genes, "left_out": 0}
    if not data.min_genes:
        return
    matrix, alignment = select_matrix(reference, data.layer)[0], tokenizer.align(reference, layer=data.layer)
    cells, enough = np.flatnonzero(assigned == "train"), np.zeros(len(assigned), dtype=bool)
    enough[cells] = alignment.apply(as_csr(matrix[cells])).getnnz(axis=1) >= data.min_genes
    report["min_genes"]["left_out"] = _drop_cells("train", assigned, targets, enough)


def _drop_cells(split: str, assigned: np.ndarray, targets: np.ndarray, enough: np.ndarray) -> int:
    """Take the cells of a split without `enough` out of `assigned`, but for classes that have no others; how many."""
    low = (assigned == split) & ~enough
    low &= np.isin(targets, targets[(assigned == split) & enough])
    assigned[low] = ""
    return int(low.sum())


def _test_cells(
    test: AnnData,
    data: FinetuneDataArguments,
    tokenizer: ScBertTokenizer,
    classes: list[str],
    report: dict[str, Any],
) -> LabelledCells:
    """Cells to test on whose class is among those learnt."""
    alignment = _aligned(test, data.test, data, tokenizer)
    labels = find_labels(test.obs, data.label_key, data.test)
    targets = pd.Index(classes, dtype=object).get_indexer(labels)
    cells = np.flatnonzero(targets >= 0)
    if not len(cells):
        raise InputError(
            f"No cell of the test file {Path(data.test).name} has one of the classes learnt: {', '.join(classes)}."
        )
    report["test_classes_unknown"] = _unknown_classes(labels, classes)
    bins = tokenizer.bin_cells(test, input=data.input, layer=data.layer)[cells]
    return LabelledCells(bins, targets[cells], cells, alignment.absent)
