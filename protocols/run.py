"""Run a protocol: every method on every fold, tables with warnings, files."""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
from rich.console import Console

from ..data.labels import copy_notes
from ..data.paths import check_output_folder, check_output_path, partial_folder
from ..evaluation.baselines import BASELINES, available_baselines
from ..evaluation.tables import TextTable
from ..tokenization import InputError, read_gene_panel
from ..trained_model.model_folder import find_model, versions
from ..training.finetune_arguments import FINETUNE
from ..training.settings import read_json
from .cells import LABEL, load_benchmark_cells
from .comparison import score_tables, summarise_folds, warnings_of, warnings_of_modalities
from .folds import PROTOCOLS, SHOTS, TEST, TRAIN, Fold, ProtocolOptions, read_folds, write_folds
from .masked_expression import masked_accuracy
from .methods import DEFAULT_BASELINES, Method, Outputs, all_methods
from .report import plot_one_setting, plot_scores, write_report
from .scores import finite, fold_scores

logger = logging.getLogger(__name__)

RESULTS = "results.json"
# what is tried around the default recipe, where no variants are given
DEFAULT_VARIANTS: dict[str, dict[str, Any]] = {
    "bins 5": {"tokenizer": {"n_bins": 5, "bin_width": 1.0}},
    "bins 36": {"tokenizer": {"n_bins": 36, "bin_width": 0.25}},
    "no bins apart": {"model": {"ordinal_expression": False}},
    "no cell vectors": {"model": {"cell_vector_size": 0}},
    "a random layer": {"model": {"num_hidden_layers": 1}},
}


# fold, outputs and true types of the model in question
Main = list[tuple[Fold, Outputs, np.ndarray]]


def run_benchmark(
    protocol: str,
    cells: Sequence[str | Path] | str | Path,
    label_key: str,
    output: str | Path,
    *,
    group_key: str | None = None,
    label_map: str | Path | None = None,
    layer: str | None = None,
    input: str = "auto",
    recipe: str | None = None,
    base: str | Path | None = None,
    settings: dict[str, Any] | str | None = None,
    epochs: float | None = None,
    variants: str | Path | dict[str, dict[str, Any]] | None = None,
    baselines: str | Sequence[str] | None = None,
    folds: int = 5,
    folds_from: str | Path | None = None,
    validate_on_group: bool = False,
    markers: str | Path | None = None,
    shots: str | Sequence[int] | None = None,
    max_cells: int | None = None,
    report: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """
    Compare scBERT with its baselines by a protocol.

    Parameters
    ----------
    protocol
        One of `PROTOCOLS`.
    cells
        Labelled files; of several the shared genes are taken, and ``obs["dataset"]`` names the file.
    label_key, label_map, layer, input, max_cells
        See `load_benchmark_cells`.
    output
        Folder for ``results.json``, ``table.md``, pictures and ``folds/*.csv``.
    group_key
        Column of what is left out (dataset, donor, organ, protocol).
    recipe
        Recipe, or several with commas, that of the model in question first; by default what `finetune` takes.
    base
        Pretrained model. Then "no pretraining" and "random genes" join the baselines, and its masked accuracy
        stands beside that of every gene's commonest bin.
    settings, epochs
        Over the recipe; JSON or a dict.
    variants
        Further scBERTs: JSON file or dict, name -> settings.
    baselines
        Names of `evaluation.baselines.BASELINES`, or one text with commas; those installed by default.
    folds
        Folds, or draws where a protocol draws.
    folds_from
        Folder of fold files to run instead (an earlier run's ``folds``).
    validate_on_group
        In leave-one-out, stop early on a held-out group instead of on more of the same.
    markers
        File of the genes that the marker-deletion protocol deletes.
    shots
        Cells of a type in the few-shot protocol: numbers, or one text with commas; 1, 2, 4, 8, 16 by default.
    report
        HTML file to write beside.
    seed
        Decides folds and weights.
    overwrite
        Replace an existing output.

    Returns
    -------
    dict
        ``summary`` (means over folds), ``warnings``, ``rows`` (every fold), ``cells``, ``seconds``, ``output``.

    Raises
    ------
    InputError
        For every fault of the input that a user can mend.

    Examples
    --------
    >>> result = run_benchmark("cross-validation", "cells.h5ad", "cell_type", "cv")  # doctest: +SKIP
    >>> result["warnings"]  # doctest: +SKIP
    ['the baseline logistic_l2 beats scBERT: macro-F1 0.907 against 0.893.']
    """
    started = time.perf_counter()
    if protocol not in PROTOCOLS:
        raise InputError(f"There is no protocol {protocol!r}; there are: {', '.join(PROTOCOLS)}.")
    base = None if base is None else find_model(base)
    recipe = recipe or (FINETUNE.default_with_base if base else FINETUNE.default_recipe)
    check_output_folder(output, overwrite, marker=RESULTS)
    if report is not None:
        check_output_path(report, overwrite)
    paths = [cells] if isinstance(cells, str | Path) else list(cells)
    adata = load_benchmark_cells(paths, label_key, label_map, layer, max_cells, seed, input)
    given = read_json(settings or {})
    given |= {} if epochs is None else {"epochs": epochs}
    named = tuple(read_gene_panel(markers)) if markers else ()
    options = ProtocolOptions(group_key, folds, seed, validate_on_group, named, _shots(shots))
    planned = PROTOCOLS[protocol](adata, options)
    if folds_from is not None:
        planned = read_folds(folds_from, adata, planned)
    planned = usable_folds(adata, planned)
    with partial_folder(output, overwrite, marker=RESULTS) as folder:
        methods = all_methods(
            protocol,
            [name.strip() for name in recipe.split(",")],
            None if base is None else str(base),
            given,
            _variants(protocol, variants),
            named_baselines(baselines),
            folder / "work",
            seed,
        )
        write_folds(folder / "folds", adata, planned)
        rows, main = run_all(methods, adata, planned, seed)
        masked = masked_accuracy(base, adata, planned[0], seed) if base else None
        result = _result(protocol, adata, rows, masked)
        result["settings"] = {"recipe": recipe, "base": str(base) if base else None, "seed": seed, **given}
        result["seconds"] = time.perf_counter() - started
        tables = write_results(folder, main, result, sorted(adata.obs[LABEL].unique()))
        if report is not None:
            write_report(report, folder, tables, main, result, overwrite)
        shutil.rmtree(folder / "work", ignore_errors=True)
    show(tables, result)
    logger.info(
        f"Written to {output}: tables of {result['cells']:,} cells and {result['genes']:,} genes; "
        f"{result['seconds']:.0f} s."
    )
    return {**result, "output": str(output)}


def usable_folds(cells: anndata.AnnData, folds: Sequence[Fold]) -> list[Fold]:
    """The folds that teach two types and test one of these, and the novel one; an `InputError` if there is none."""
    labels, kept = cells.obs[LABEL].to_numpy(), []
    for fold in folds:
        learnt, tested = (set(labels[fold.split == name]) for name in (TRAIN, TEST))
        if len(learnt) > 1 and learnt & tested and fold.novel in {None, *tested}:
            kept.append(fold)
    told = (
        f"{len(folds) - len(kept)} of {len(folds)} folds cannot be run: each needs two types of three cells to learn "
        "from, and others of their cells (of the group or type left out) to test on. Give more cells, or fewer folds."
    )
    if not kept:
        raise InputError(told)
    if len(kept) < len(folds):
        logger.warning(told)
    return kept


def _variants(protocol: str, given: str | Path | dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    if isinstance(given, str | Path):
        given = read_json(Path(given).read_text(encoding="utf-8"))
    if given is not None:
        return {name: read_json(settings) for name, settings in given.items()}
    return DEFAULT_VARIANTS if protocol == "hyperparameters" else {}


def _shots(given: str | Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        return SHOTS
    try:
        numbers = tuple(int(part) for part in (given.split(",") if isinstance(given, str) else given))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise InputError(
            f"Shots (shots=, or --shots) are whole numbers above 0, separated by commas; found {given!r}."
        )
    return tuple(sorted(set(numbers)))


def named_baselines(given: str | Sequence[str] | None) -> list[str]:
    """Names of baselines, of one text with commas or those installed; an `InputError` for an unknown one."""
    if given is None:
        return [name for name in DEFAULT_BASELINES if name in available_baselines()]
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given)
    unknown = sorted(set(names) - set(BASELINES) - {""})
    if unknown:
        raise InputError(f"There is no baseline {unknown[0]!r}; there are: {', '.join(BASELINES)}.")
    return [name for name in names if name]


def run_all(
    methods: list[Method], cells: anndata.AnnData, folds: list[Fold], seed: int
) -> tuple[list[dict[str, Any]], Main]:
    """Every method on every fold, as rows of scores, which are logged as they come, and what the first method said."""
    rows, main, labels = [], [], cells.obs[LABEL].to_numpy().astype(str)
    for number, fold in enumerate(folds):
        part = without_genes(cells, fold.deleted)
        true = labels[fold.split == TEST]
        for method in methods:
            outputs = method.run(part, fold, seed)
            row = fold_scores(method, outputs, fold, true)
            rows.append(row)
            if method is methods[0]:
                main.append((fold, outputs, true))
            place = f"{number + 1}/{len(folds)} {fold.setting} {fold.name}".replace("  ", " ")
            logger.info(
                f"{place}, {method.name}: accuracy {row['accuracy']:.3f}, macro-F1 {row['macro_f1']:.3f} "
                f"({row['seconds']:.0f} s)"
            )
    return rows, main


def without_genes(cells: anndata.AnnData, genes: Sequence[str]) -> anndata.AnnData:
    """The cells with these genes set to zero."""
    if not genes:
        return cells
    kept = ~cells.var_names.isin(genes)
    copy = cells.copy()
    copy.X = sp.csr_matrix(cells.X @ sp.diags(kept.astype(np.float32), format="csr"))
    copy.X.eliminate_zeros()
    return copy


def _result(
    protocol: str, cells: anndata.AnnData, rows: list[dict[str, Any]], masked: dict[str, Any] | None
) -> dict[str, Any]:
    # the order of the table: methods as they ran, the model in question first
    summary = summarise_folds(rows)
    warnings = warnings_of(summary) + (warnings_of_modalities(summary) if protocol == "modalities" else [])
    warnings += copy_notes([cells.X])
    result = {
        "protocol": protocol,
        "cells": cells.n_obs,
        "genes": cells.n_vars,
        "cells_per_type": {str(k): int(v) for k, v in cells.obs[LABEL].value_counts().items()},
        "macro_f1": summary[0]["macro_f1"],
        "accuracy": summary[0]["accuracy"],
        "warnings": warnings,
        "summary": summary,
        "rows": rows,
        "versions": versions(),
    }
    if masked is not None:
        result["masked_expression"] = masked
        if masked["commonest_bin"] > masked["base"]:
            warnings.append(
                f"masked expression: every gene's commonest bin is right in {masked['commonest_bin']:.3f} of the "
                f"masked tokens, the base in {masked['base']:.3f}."
            )
    return result


def write_results(folder: Path, main: Main, result: dict[str, Any], classes: list[str]) -> list[TextTable]:
    """Write results.json, table.md and the pictures; returns the tables."""
    protocol, masked = result["protocol"], result.get("masked_expression")
    tables = score_tables(result["summary"], protocol)
    if masked:
        rows = [
            ["base", f"{masked['base']:.3f}"],
            ["every gene's commonest bin", f"{masked['commonest_bin']:.3f}"],
        ]
        title = f"Masked expression, {masked['tokens']} masked tokens"
        tables.append(TextTable(title, ["model", "accuracy"], rows))
    text = "\n\n".join(table.markdown() for table in tables)
    text += "".join(f"\n\n⚠ {warning}" for warning in result["warnings"])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    written = json.dumps(finite(result), indent=1, ensure_ascii=False, default=str)
    (folder / RESULTS).write_text(written + "\n", encoding="utf-8")
    plot_scores(result["rows"], folder / "scores.png", f"{protocol}: macro-F1 (grey: baselines)")
    last = main[-1][0].setting
    shown = [(outputs, true) for fold, outputs, true in main if fold.setting == last]
    title = f"{result['rows'][0]['model']}, {protocol} {last}".strip()
    plot_one_setting(shown, classes, folder, title)
    return tables


def show(tables: Sequence[TextTable], result: dict[str, Any]) -> None:
    """Print tables and warnings on stderr."""
    console = Console(stderr=True)
    for table in tables:
        console.print(table.rich())
    for warning in result["warnings"]:
        console.print(f"⚠ {warning}", style="yellow", markup=False)
