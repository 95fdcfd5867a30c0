"""The ablation grid: encoder x gene embedding x pretraining x modality, every combination on the same draws."""

import itertools
import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from transformers import set_seed

from ...data.splits import stratified_split
from ...data.write_output import partial_folder
from ...extras import versions
from ...tokenization import InputError
from ...trained_model.model_folder import save_model
from ...training import run_pretrain
from ...training.finetune_arguments import FINETUNE
from ...training.pretrain_arguments import PRETRAIN
from ...training.run_gene2vec import gene2vec
from ...training.settings import merge_settings, parse
from ..baselines import log_normalize
from ..comparison import TIE
from ..tables import TextTable
from .cells import LABEL, MODALITY, input_of
from .contestants import Contestant, Outputs, control, scbert
from .protocols import TEST, VALIDATION_SHARE, Fold
from .scores import finite, fold_scores

logger = logging.getLogger(__name__)

FACTORS: dict[str, tuple[str, ...]] = {
    "encoder": ("favor", "lsh", "softmax"),
    "gene embedding": ("gene2vec", "random"),
    "pretraining": ("yes", "no"),
    "modality": ("yes", "no"),
}
# what the grid is told beside the settings of fine-tuning
GRID_SETTINGS = {"grid", "pretrain", "gene2vec", "top_features"}
TEST_SHARE = 0.2
# at a cutoff, few cells give no pair at all
GENE2VEC = {"top_pairs": 50_000, "iterations": 5, "min_cells": 10}
SCORES = ("accuracy", "macro_f1", "masked_accuracy", "seconds")
RECORD = "settings.json"


def run_ablation(
    cells: anndata.AnnData,
    output: str | Path,
    settings: dict[str, Any],
    controls: Sequence[str],
    draws: int = 5,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    marker: str = "results.json",
) -> tuple[dict[str, Any], list[TextTable]]:
    """
    Train every combination of the grid on several draws of the test cells, and tabulate.

    In each draw a fifth of the cells is the test. Pretraining and gene2vec see the other cells only, without their
    labels. All weights are trained in fine-tuning, pretrained or not, the gene table too.

    Parameters
    ----------
    cells
        Of `load_benchmark_cells`. Without features of several modalities, "modality" is "no" only; with them, "yes"
        tells the model which feature is of which (embedding and, in pretraining, prediction loss), and "no" gives it
        the same features as if of one.
    output
        Folder. It is built as ``OUTPUT.partial``, a file for every training that has ended, so that an interrupted
        grid goes on with `resume`.
    settings
        ``recipe`` and what goes over it in fine-tuning (sizes of the ``model``, too), and those of the grid: ``grid``
        (factor -> values, to run a part of it), ``pretrain`` (settings of pretraining), ``gene2vec`` (arguments of
        the verb) and ``top_features`` (only so many most variable features of each modality, chosen on each draw's
        training cells).
    controls
        Names of `BASELINES`.
    draws, seed
        Number of draws; the seed decides them and all weights.
    overwrite, resume
        Replace an output; go on with an interrupted one.
    marker
        File by which the folder is known.

    Returns
    -------
    tuple
        The result, as in ``results.json``, and the tables: the grid, and the mean of every value of a factor.

    Raises
    ------
    InputError
        If a setting is unknown or a resumed run had others.
    """
    started = time.perf_counter()
    options = {name: settings[name] for name in GRID_SETTINGS & set(settings)}
    tuning = {name: value for name, value in settings.items() if name not in GRID_SETTINGS}
    combinations = grid(options.get("grid", {}), MODALITY in cells.var)
    record = {
        "settings": settings,
        "controls": list(controls),
        "draws": draws,
        "seed": seed,
        "cells": cells.n_obs,
    }
    with partial_folder(output, overwrite, resume, marker=marker) as folder:
        _check_record(folder / RECORD, record, resume)
        rows = []
        for number, fold in enumerate(draws_of(cells, draws, seed)):
            asked = combinations, options, tuning, controls
            rows += _run_draw(cells, fold, *asked, folder, seed + number)
        result, tables = summarise(rows, combinations, cells)
        result |= {"settings": record, "versions": versions(), "seconds": time.perf_counter() - started}
        write(folder, rows, result, tables, marker)
    return {**result, "output": str(output)}, tables


def grid(chosen: dict[str, Sequence[str]], several_modalities: bool) -> list[dict[str, str]]:
    """
    All combinations of the factors' values, or of those `chosen`.

    Examples
    --------
    >>> len(grid({}, True)), len(grid({}, False)), len(grid({"encoder": ["favor"]}, False))
    (24, 12, 4)
    """
    unknown = [
        f"{name} {value}" for name in chosen for value in chosen[name] if value not in FACTORS.get(name, ())
    ]
    if unknown:
        known = "; ".join(f"{name}: {', '.join(values)}" for name, values in FACTORS.items())
        raise InputError(f"The grid has no {unknown[0]!r}; it has {known}.")
    values = {name: tuple(chosen.get(name, known)) for name, known in FACTORS.items()}
    if not several_modalities:
        values["modality"] = ("no",)
    return [dict(zip(values, point)) for point in itertools.product(*values.values())]


def draws_of(cells: anndata.AnnData, n_draws: int, seed: int) -> list[Fold]:
    """Several stratified splits of the cells into train, validation and test."""
    labels = cells.obs[LABEL].to_numpy()
    return [
        Fold(f"draw {k + 1}", stratified_split(labels, TEST_SHARE, VALIDATION_SHARE, seed + k))
        for k in range(n_draws)
    ]


def _check_record(path: Path, record: dict[str, Any], resume: bool) -> None:
    """Keep what was asked for; a resumed grid must ask for the same."""
    wanted = json.loads(json.dumps(record, default=str))
    if resume and path.is_file():
        had = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in wanted if wanted[name] != had.get(name))
        if changed:
            raise InputError(
                f"The interrupted grid was begun with other {', '.join(changed)}. Give the same, or leave out --resume."
            )
    path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def _run_draw(cells, fold, combinations, options, tuning, controls, folder, seed) -> list[dict[str, Any]]:
    """Rows of every combination and control of a draw; those that an earlier run left are read."""
    true, rows, part = cells.obs[LABEL].to_numpy().astype(str)[fold.split == TEST], [], None
    (folder / "rows").mkdir(exist_ok=True)
    everybody = [(name, {}) for name in controls]
    everybody += [(", ".join(point.values()), point) for point in combinations]
    for name, point in everybody:
        file = folder / "rows" / f"{fold.name} {name}.json".replace(" ", "_")
        if file.is_file():
            rows.append(json.loads(file.read_text(encoding="utf-8")))
            continue
        part = variable_features(cells, fold, options.get("top_features")) if part is None else part
        contestant = combination(name, point, options, tuning, folder / "work") if point else control(name)
        outputs = contestant.run(part, fold, seed)
        row = {**fold_scores(contestant, outputs, fold, true), **point}
        row["masked_accuracy"] = outputs.masked_accuracy
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps(finite(row)), encoding="utf-8")
        # a row is there when it is whole
        temporary.rename(file)
        rows.append(row)
        logger.info("%s, %s: macro-F1 %.3f (%.0f s)", fold.name, name, row["macro_f1"], row["seconds"])
    shutil.rmtree(folder / "work", ignore_errors=True)
    return rows


def variable_features(cells: anndata.AnnData, fold: Fold, n_features: int | None) -> anndata.AnnData:
    """The cells with the most variable features of each modality, chosen without a look at the test cells."""
    if not n_features:
        return cells
    logged, names = log_normalize(cells[fold.split != TEST], input=input_of(cells))
    mean = np.asarray(logged.mean(axis=0)).ravel()
    variance = pd.Series(np.asarray(logged.multiply(logged).mean(axis=0)).ravel() - mean**2, index=names)
    kinds = cells.var[MODALITY] if MODALITY in cells.var else pd.Series("", index=cells.var_names)
    ranks = variance[cells.var_names].groupby(kinds).rank(ascending=False, method="first")
    return cells[:, (ranks <= n_features).to_numpy()].copy()


def combination(
    name: str, point: dict[str, str], options: dict[str, Any], tuning: dict[str, Any], work: Path
) -> Contestant:
    """One combination as a contestant: gene2vec, a base (pretrained or as it was drawn), fine-tuning."""

    def run(cells: anndata.AnnData, fold: Fold, seed: int) -> Outputs:
        started = time.perf_counter()
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        if MODALITY in cells.var and point["modality"] == "no":
            cells = cells.copy()
            del cells.var[MODALITY]
        learnt = work / "learnt.h5ad"
        columns = [MODALITY] if MODALITY in cells.var else []
        rows = cells[fold.split != TEST]
        anndata.AnnData(rows.X, obs=rows.obs[[]], var=rows.var[columns]).write_h5ad(learnt)
        masked_accuracy = make_base(point, learnt, options, tuning, work, input_of(cells), seed)
        given = {**tuning, "base": str(work / "base"), "train_all": True}
        outputs = scbert(name, given, work / "run").run(cells, fold, seed)
        outputs.seconds = time.perf_counter() - started
        outputs.masked_accuracy = masked_accuracy
        return outputs

    return Contestant(name, run, is_control=False)


def make_base(
    point: dict[str, str],
    learnt: Path,
    options: dict[str, Any],
    tuning: dict[str, Any],
    work: Path,
    input: str,
    seed: int,
) -> float | None:
    """Write the base of a combination to ``work/base``; returns its masked accuracy if it was pretrained."""
    recipe = merge_settings(
        FINETUNE, {name: tuning[name] for name in ("recipe", "model", "tokenizer") if name in tuning}
    )
    model = {**recipe.get("model", {}), "freeze_gene_embeddings": False, "attention_type": point["encoder"]}
    given = {"seed": seed, "disable_tqdm": True, "use_cpu": recipe.get("use_cpu", False), "min_genes": 0}
    given |= {"input": input, **options.get("pretrain", {})}
    given["model"] = {**model, **given.get("model", {})}
    given["tokenizer"] = {**recipe.get("tokenizer", {}), **given.get("tokenizer", {})}
    if point["gene embedding"] == "gene2vec":
        # one file for all combinations of a draw
        vectors = work.with_name(f"gene_vectors_{seed}.txt")
        if not vectors.exists():
            asked = {"size": given["model"].get("hidden_size", 200), "seed": seed, "input": input}
            gene2vec(vectors, learnt, **asked, **{**GENE2VEC, **options.get("gene2vec", {})})
        given["gene_vectors"] = vectors
    given |= {"corpus": learnt, "output": work / "base"}
    if point["pretraining"] == "yes":
        return run_pretrain.pretrain(**given)["masked_accuracy"]
    _, data_arguments, model_arguments, training = parse(PRETRAIN, given)
    set_seed(training.seed)
    data = run_pretrain.load(data_arguments, model_arguments, training)
    save_model(run_pretrain.build_model(model_arguments, data, training), data.tokenizer, work / "base")
    return None


def summarise(
    rows: list[dict[str, Any]], combinations: list[dict[str, str]], cells: anndata.AnnData
) -> tuple[dict[str, Any], list[TextTable]]:
    """Means and standard deviations over draws of every combination and control, and by value of each factor."""
    table = pd.DataFrame(
        [{name: row.get(name) for name in ("model", "control", *FACTORS, *SCORES)} for row in rows]
    )
    table[list(SCORES)] = table[list(SCORES)].astype(float)
    # combinations first, in the order of the grid
    order = [", ".join(point.values()) for point in combinations]
    order += [name for name in table["model"].unique() if name not in order]
    means = table.groupby("model", sort=False)[list(SCORES)].agg(["mean", "std"]).loc[order]
    best_control = table[table["control"]].groupby("model")["macro_f1"].mean()
    found, summary = table.drop_duplicates("model").set_index("model"), []
    for name in order:
        entry = {"model": name, "control": bool(found.loc[name, "control"])}
        entry |= {factor: found.loc[name, factor] for factor in FACTORS}
        for score in SCORES:
            entry |= {
                score: float(means.loc[name, (score, "mean")]),
                f"{score}_sd": float(means.loc[name, (score, "std")]),
            }
        summary.append(entry)
    warnings = []
    if len(best_control):
        ahead = [e for e in summary if not e["control"] and e["macro_f1"] < best_control.max() - TIE]
        warnings.append(
            f"the control {best_control.idxmax()} (macro-F1 {best_control.max():.3f}) beats {len(ahead)} of the "
            f"{len(combinations)} combinations."
        )
    draws = int(table.groupby("model").size().max())
    result = {
        "protocol": "ablation",
        "cells": cells.n_obs,
        "draws": draws,
        "warnings": warnings,
        "summary": summary,
        "rows": rows,
    }
    tables = [_grid_table(summary, draws), _effects_table(table[~table["control"]], combinations)]
    return result, [shown for shown in tables if shown.rows]


def _grid_table(summary: list[dict[str, Any]], draws: int) -> TextTable:
    best = max((entry["macro_f1"] for entry in summary if entry["control"]), default=np.inf)
    lines, marked = [], set()
    for number, entry in enumerate(summary):
        places = ["control", *[""] * (len(FACTORS) - 1)] if entry["control"] else [entry[f] for f in FACTORS]
        beaten = not entry["control"] and entry["macro_f1"] < best - TIE and np.isfinite(best)
        marked |= {number} if beaten else set()
        scores = [_value(entry, name) for name in ("accuracy", "macro_f1", "masked_accuracy")]
        name = entry["model"] if entry["control"] else ("⚠ " if beaten else "") + "scBERT"
        lines.append([name, *map(str, places), *scores, f"{entry['seconds']:.0f}"])
    columns = ["model", *FACTORS, "accuracy", "macro-F1", "masked accuracy", "s/draw"]
    title = f"ablation (mean ± sd of {draws} draws; ⚠: a control has the higher macro-F1)"
    return TextTable(title, columns, lines, frozenset(marked))


def _effects_table(table: pd.DataFrame, combinations: list[dict[str, str]]) -> TextTable:
    """Mean scores of all combinations with a value of a factor, where a factor has several."""
    lines = []
    for factor in FACTORS:
        values = list(dict.fromkeys(point[factor] for point in combinations))
        for value in values if len(values) > 1 else ():
            chosen = table[table[factor] == value]
            scores = [f"{chosen[name].mean():.3f}" for name in ("accuracy", "macro_f1")]
            lines.append([f"{factor}: {value}", str(chosen["model"].nunique()), *scores])
    return TextTable(
        "mean over all combinations with", ["choice", "combinations", "accuracy", "macro-F1"], lines
    )


def write(
    folder: Path, rows: list[dict[str, Any]], result: dict[str, Any], tables: list[TextTable], marker: str
) -> None:
    """``results.json``, ``table.md``, ``ablation.csv`` (means) and ``draws.csv`` (every training)."""
    text = "\n\n".join(table.markdown() for table in tables)
    text += "".join(f"\n\n⚠ {warning}" for warning in result["warnings"])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    pd.DataFrame(result["summary"]).to_csv(folder / "ablation.csv", index=False)
    kept = ("fold", "model", "control", *FACTORS, *SCORES)
    pd.DataFrame([{name: row.get(name) for name in kept} for row in rows]).to_csv(
        folder / "draws.csv", index=False
    )
    written = json.dumps(finite(result), indent=1, ensure_ascii=False, default=str)
    (folder / marker).write_text(written + "\n", encoding="utf-8")
    shutil.rmtree(folder / "work", ignore_errors=True)
    for vectors in folder.glob("gene_vectors_*.txt"):
        vectors.unlink()


def _value(entry: dict[str, Any], score: str) -> str:
    if np.isnan(entry[score]):
        return ""
    spread = entry[f"{score}_sd"]
    return f"{entry[score]:.3f}" + ("" if np.isnan(spread) else f" ± {spread:.3f}")
