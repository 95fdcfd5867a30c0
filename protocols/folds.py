"""The protocols: which cells are learnt from and which are tested, in every fold of every setting."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from ..data.read import log_normalize
from ..data.splits import read_split, stratified_folds, stratified_split, write_split
from ..tokenization import InputError
from ..tokenization.cells_scbert import FEATURE_TYPES
from .cells import LABEL, MODALITY, input_of

TRAIN, VALIDATION, TEST = "train", "validation", "test"
VALIDATION_SHARE = 0.1
SHOTS = (1, 2, 4, 8, 16)
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
DELETED = (0.0, 0.1, 0.5, 1.0)
CLASS_SIZES = (10_000, 100, 10_000, 100)
MARKERS_PER_TYPE = 20
MODALITIES = dict(zip(FEATURE_TYPES, ("RNA", "ATAC", "protein")))


@dataclass(frozen=True)
class Fold:
    """
    One experiment: ``"train"``, ``"validation"``, ``"test"`` or ``""`` for every cell, [cells].

    The name is the same in all settings that share its test cells. The setting is what is varied, such as ``"16 per
    type"``: the columns of the table. `novel` is the type left out of training, in the novel-type protocol; `deleted`
    are genes set to zero in all cells.
    """

    name: str
    split: np.ndarray
    setting: str = ""
    novel: str | None = None
    deleted: tuple[str, ...] = field(default=(), repr=False)

    @property
    def file(self) -> str:
        """Name of its split file."""
        text = f"{self.setting}-{self.name}" if self.setting else self.name
        return "".join(c if c.isalnum() or c in "-_." else "_" for c in text) + ".csv"


@dataclass(frozen=True)
class ProtocolOptions:
    """What the protocols can be told; each reads what concerns it."""

    group_key: str | None = None
    n_folds: int = 5
    seed: int = 0
    validate_on_group: bool = False
    markers: tuple[str, ...] = ()
    shots: tuple[int, ...] = SHOTS


def cross_validation(cells: anndata.AnnData, options: ProtocolOptions) -> list[Fold]:
    """Stratified folds; each is the test once."""
    labels = cells.obs[LABEL].to_numpy()
    folds = stratified_folds(labels, options.n_folds, options.seed)
    return [
        Fold(f"fold {k + 1}", _split(labels, folds == k, options.seed + k)) for k in range(options.n_folds)
    ]


def leave_one_out(cells: anndata.AnnData, options: ProtocolOptions) -> list[Fold]:
    """Each group (dataset, donor, organ) is the test once; types that no other group has are not tested."""
    labels, groups = cells.obs[LABEL].to_numpy(), groups_of(cells, options.group_key)
    folds = []
    for number, name in enumerate(np.unique(groups)):
        test = groups == name
        split = _split(labels, test, options.seed + number)
        if options.validate_on_group:
            _validate_on_a_group(split, groups, labels)
        folds.append(Fold(f"{options.group_key} {name}", split))
    return folds


def reference_size(cells: anndata.AnnData, options: ProtocolOptions) -> list[Fold]:
    """
    10 to 90% of the cells as the reference, the same test for all of them; nested, over several draws.

    The test is the last tenth of the types that the smallest reference has enough cells of.
    """
    labels, folds = cells.obs[LABEL].to_numpy(), []
    for k in range(options.n_folds):
        place = _places(labels, options.seed + k)
        test = place >= 0.9
        for share in SHARES:
            split = _split(labels, test, options.seed + k, among=(place < share) | test)
            # a type that only larger references have would be tested there only
            test &= split == TEST
            folds.append(Fold(f"draw {k + 1}", split, f"{share:.0%}"))
    return folds


def few_shot(cells: anndata.AnnData, options: ProtocolOptions) -> list[Fold]:
    """So many cells of each type, nested, over several draws; every cell outside the largest shot is the test."""
    labels, folds = cells.obs[LABEL].to_numpy(), []
    for k in range(options.n_folds):
        rank = _ranks(labels, options.seed + k)
        for shots in options.shots:
            split = np.full(len(labels), "", dtype=object)
            split[rank < shots], split[rank >= max(options.shots)] = TRAIN, TEST
            if TEST not in split:
                raise InputError(
                    f"No cell is left to test on: no type has more than {max(options.shots)} cells. Ask for fewer "
                    "cells of a type (shots=, or --shots)."
                )
            folds.append(Fold(f"draw {k + 1}", split, f"{shots} per type"))
    return folds


def zero_shot(cells: anndata.AnnData, options: ProtocolOptions) -> list[Fold]:
    """Leave one group out (or cross-validation without a group) for models that are not trained at all."""
    return (leave_one_out if options.group_key else cross_validation)(cells, options)


def class_imbalance(cells: anndata.AnnData, options: ProtocolOptions) -> list[Fold]:
    """
    10,000 / 100 / 10,000 / 100 cells of the four commonest types, scaled to the cells there are.

    The rare ones are the second and fourth commonest. Half of a type's other cells are the test.
    """
    labels = cells.obs[LABEL].to_numpy()
    counts = pd.Series(labels).value_counts()
    if len(counts) < 4:
        raise InputError(f"Class imbalance needs four types; there are {len(counts)}.")
    four = counts.index[:4]
    scale = min(1.0, min(int(counts[name] * 0.7) / size for name, size in zip(four, CLASS_SIZES)))
    sizes = {name: max(3, round(size * scale)) for name, size in zip(four, CLASS_SIZES)}
    # as many test cells of every type
    spare = min(int(counts[name]) - sizes[name] for name in four)
    setting, folds = "/".join(map(str, sizes.values())), []
    for k in range(options.n_folds):
        rank = _ranks(labels, options.seed + k)
        split = np.full(len(labels), "", dtype=object)
        for name, size in sizes.items():
            here = labels == name
            split[here & (rank < size)] = TRAIN
            split[here & (rank >= size) & (rank < size + spare)] = TEST
        training = split == TRAIN
        split[training] = stratified_split(labels[training], 0.0, VALIDATION_SHARE, options.seed + k)
        folds.append(Fold(f"draw {k + 1}", split, setting))
    return folds


def novel_types(cells: anndata.AnnData, options: ProtocolOptions) -> list[Fold]:
    """Leave one type out of training; a fifth of every type, its own too, is the test."""
    labels, folds = cells.obs[LABEL].to_numpy(), []
    place = _places(labels, options.seed)
    for number, name in enumerate(np.unique(labels)):
        split = _split(labels, place >= 0.8, options.seed + number)
        split[(labels == name) & (place < 0.8)] = ""
        folds.append(Fold(f"without {name}", split, novel=str(name)))
    if len(folds) < 3:
        raise InputError(f"Leaving one type out needs three types; there are {len(folds)}.")
    return folds


def marker_deletion(cells: anndata.AnnData, options: ProtocolOptions) -> list[Fold]:
    """
    0, 10, 50 and 100% of the marker genes set to zero in every cell, learnt from and tested.

    Markers are `options.markers`, or per type the 20 genes whose mean log value in the fold's training cells
    exceeds that of all other types the most.
    """
    folds = []
    given = [gene for gene in options.markers if gene in cells.var_names]
    if options.markers and not given:
        raise InputError(
            f"The cells have none of the {len(options.markers)} marker genes, such as {options.markers[0]}; their "
            f"genes are called {', '.join(cells.var_names[:3])}, ..."
        )
    for fold in cross_validation(cells, options):
        markers = given or _markers(cells, fold.split != TEST)
        order = np.random.default_rng(options.seed).permutation(len(markers))
        for share in DELETED:
            deleted = tuple(markers[i] for i in order[: round(share * len(markers))])
            folds.append(
                Fold(fold.name, fold.split, f"{share:.0%} of {len(markers)} deleted", deleted=deleted)
            )
    return folds


def modalities(cells: anndata.AnnData, options: ProtocolOptions) -> list[Fold]:
    """All modalities together and each alone, on the folds of cross-validation; needs ``var["feature_types"]``."""
    kinds = cells.var.get(MODALITY, pd.Series(FEATURE_TYPES[0], index=cells.var_names)).to_numpy()
    found = [kind for kind in FEATURE_TYPES if (kinds == kind).any()]
    if len(found) < 2:
        raise InputError(
            f"Comparing modalities needs cells with several; these have {found[0]} only. "
            "`scbert combine-modalities` brings RNA and ATAC of the same cells into one file."
        )
    settings = {"+".join(MODALITIES[kind] for kind in found): found}
    settings |= {f"{MODALITIES[kind]} alone": [kind] for kind in found}
    deleted = {
        name: tuple(cells.var_names[~np.isin(kinds, kept)].astype(str)) for name, kept in settings.items()
    }
    return [
        Fold(fold.name, fold.split, name, deleted=genes)
        for fold in cross_validation(cells, options)
        for name, genes in deleted.items()
    ]


PROTOCOLS: dict[str, Callable[[anndata.AnnData, ProtocolOptions], list[Fold]]] = {
    "cross-validation": cross_validation,
    "leave-one-out": leave_one_out,
    "reference-size": reference_size,
    "few-shot": few_shot,
    "zero-shot": zero_shot,
    "class-imbalance": class_imbalance,
    "novel-types": novel_types,
    "marker-deletion": marker_deletion,
    "modalities": modalities,
    # the models vary here, not the cells
    "hyperparameters": zero_shot,
}


def write_folds(folder: Path, cells: anndata.AnnData, folds: Sequence[Fold]) -> None:
    """One CSV of cell and split for every fold, for others to run on the same cells."""
    folder.mkdir(parents=True)
    for fold, name in zip(folds, _files_of(folds), strict=True):
        write_split(str(folder / name), cells.obs_names, fold.split)


def read_folds(folder: str | Path, cells: anndata.AnnData, folds: Sequence[Fold]) -> list[Fold]:
    """The folds as the files of `write_folds` say; only those whose file is there, so that a part can be run."""
    paths = [Path(folder) / name for name in _files_of(folds)]
    kept = [(fold, path) for fold, path in zip(folds, paths, strict=True) if path.is_file()]
    if not kept:
        shown = ", ".join(path.name for path in paths[:3])
        raise InputError(f"{folder} has none of the files {shown}, ... of this protocol.")
    return [replace(fold, split=read_split(str(path), cells.obs_names)) for fold, path in kept]


def _files_of(folds: Sequence[Fold]) -> list[str]:
    """Names of the split files; those that would be the same but for case, such as of A/B and A_B, with a number."""
    names = [fold.file for fold in folds]
    plain = [name.lower() for name in names]
    return [f"{i}-{name}" if plain.count(plain[i]) > 1 else name for i, name in enumerate(names)]


def groups_of(cells: anndata.AnnData, group_key: str | None) -> np.ndarray:
    """The group (dataset, donor, batch) of every cell, [cells] str; an `InputError` where there are not two."""
    if not group_key or group_key not in list(cells.obs):
        have = ", ".join(str(name) for name in cells.obs.columns if name != LABEL) or "none"
        raise InputError(
            f"The column of the groups, such as donor or dataset, must be named (group_key=, or --group-key); obs has: "
            f"{have}."
        )
    column = cells.obs[group_key]
    if column.isna().any():
        raise InputError(
            f"{column.isna().sum()} of {len(column)} cells have no group in {group_key!r}: they may be of the one that "
            "is left out. Fill the column, or leave these cells out."
        )
    groups = column.astype(str).to_numpy()
    if len(np.unique(groups)) < 2:
        raise InputError(f"The column {group_key!r} has one group only; two are needed.")
    return groups


def _split(labels: np.ndarray, test: np.ndarray, seed: int, among: np.ndarray | None = None) -> np.ndarray:
    """Train and validation of the cells outside the test, and the test cells whose type is learnt."""
    split = np.full(len(labels), "", dtype=object)
    chosen = ~test if among is None else among & ~test
    split[chosen] = stratified_split(labels[chosen], 0.0, VALIDATION_SHARE, seed)
    names, counts = np.unique(labels[chosen], return_counts=True)
    learnt = np.isin(labels, names[counts >= 3])
    split[test & learnt] = TEST
    split[~learnt] = ""
    return split


def _validate_on_a_group(split: np.ndarray, groups: np.ndarray, labels: np.ndarray) -> None:
    """Make the smallest training group whose types the others have too the validation, where there is one."""
    training = np.isin(split, [TRAIN, VALIDATION])
    names, sizes = np.unique(groups[training], return_counts=True)
    types = set(labels[training])
    for name in names[np.argsort(sizes, kind="stable")]:
        here = training & (groups == name)
        if set(labels[training & ~here]) == types:
            split[training] = TRAIN
            split[here] = VALIDATION
            return


def _ranks(labels: np.ndarray, seed: int) -> np.ndarray:
    """Random rank of every cell within its type, [cells]."""
    ranks = np.empty(len(labels), dtype=int)
    for place, name in enumerate(np.unique(labels)):
        rows = np.flatnonzero(labels == name)
        ranks[rows] = np.random.default_rng([seed, place]).permutation(len(rows))
    return ranks


def _places(labels: np.ndarray, seed: int) -> np.ndarray:
    """Random place of every cell within its type as a share from 0 to below 1, [cells]."""
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return _ranks(labels, seed) / counts[index]


def _markers(cells: anndata.AnnData, learnt: np.ndarray) -> list[str]:
    matrix, genes = log_normalize(cells[learnt], input=input_of(cells))
    labels = cells.obs[LABEL].to_numpy()[learnt]
    names = np.unique(labels)
    means = np.stack([np.asarray(matrix[labels == name].mean(axis=0)).ravel() for name in names])
    chosen: dict[str, None] = {}
    for row in range(len(names)):
        lead = means[row] - np.delete(means, row, axis=0).max(axis=0)
        best = np.argsort(-lead, kind="stable")[:MARKERS_PER_TYPE]
        chosen.update(dict.fromkeys(genes[i] for i in best if lead[i] > 0))
    return list(chosen)
