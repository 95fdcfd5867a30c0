"""
The ablation grid: encoder x gene embedding x pretraining x modality, every combination on the same draws.

    python scripts/ablation_study.py CELLS... --label-key KEY --output DIR [--settings JSON] [--draws 5] [--resume]
"""

import itertools
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from transformers import set_seed

from scbert.data.paths import partial_folder
from scbert.data.read import log_normalize
from scbert.data.splits import stratified_split
from scbert.evaluation.tables import TextTable
from scbert.protocols.cells import LABEL, MODALITY, input_of
from scbert.protocols.comparison import TIE
from scbert.protocols.folds import TEST, VALIDATION_SHARE, Fold
from scbert.protocols.methods import Method, Outputs, baseline, scbert
from scbert.protocols.run import RESULTS, named_baselines
from scbert.protocols.scores import finite, fold_scores
from scbert.tokenization import InputError
from scbert.trained_model.model_folder import save_model, versions
from scbert.training import run_pretrain
from scbert.training.finetune_arguments import FINETUNE
from scbert.training.pretrain_arguments import PRETRAIN
from scbert.training.run_gene2vec import gene2vec
from scbert.training.settings import merge_settings, parse
from study_frame import run_study, study_parser

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
    baselines: str | Sequence[str] | None = None,
    draws: int = 5,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
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
    baselines
        Names of `BASELINES`; those installed without it.
    draws, seed
        Number of draws; the seed decides them and all weights.
    overwrite, resume
        Replace an output; go on with an interrupted one.

    Returns
    -------
    tuple
        The result, as in ``results.json``, and the tables: the grid, and the mean of every value of a factor.

    Raises
    ------
    InputError
        If a setting is unknown or a resumed run had others.
    """
    started, baselines = time.perf_counter(), named_baselines(baselines)
    options = {name: settings[name] for name in GRID_SETTINGS & set(settings)}
    tuning = {name: value for name, value in settings.items() if name not in GRID_SETTINGS}
    combinations = grid(options.get("grid", {}), MODALITY in cells.var)
    record = {
        "settings": settings,
        "baselines": baselines,
        "draws": draws,
        "seed": seed,
        "cells": cells.n_obs,
    }
    with partial_folder(output, overwrite, resume, marker=RESULTS) as folder:
        _check_record(folder / RECORD, record, resume)
        rows = []
        for number, fold in enumerate(draws_of(cells, draws, seed)):
            asked = combinations, options, tuning, baselines
            rows += _run_draw(cells, fold, *asked, folder, seed + number)
        result, tables = summarise(rows, combinations, cells)
        result |= {"settings": record, "versions": versions(), "seconds": time.perf_counter() - started}
        write(folder, rows, result, tables)
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


def _run_draw(cells, fold, combinations, options, tuning, baselines, folder, seed) -> list[dict[str, Any]]:
    """Rows of every combination and baseline of a draw; those that an earlier run left are read."""
    true, rows, part = cells.obs[LABEL].to_numpy().astype(str)[fold.split == TEST], [], None
    (folder / "rows").mkdir(exist_ok=True)
    methods = [(name, {}) for name in baselines]
    methods += [(", ".join(point.values()), point) for point in combinations]
    for name, point in methods:
        file = folder / "rows" / f"{fold.name} {name}.json".replace(" ", "_")
        if file.is_file():
            rows.append(json.loads(file.read_text(encoding="utf-8")))
            continue
        part = variable_features(cells, fold, options.get("top_features")) if part is None else part
        method = combination(name, point, options, tuning, folder / "work") if point else baseline(name)
        outputs = method.run(part, fold, seed)
        row = {**fold_scores(method, outputs, fold, true), **point}
        # of the pretraining, on validation cells, where it was part of the run
        row["masked_accuracy"] = getattr(outputs, "masked_accuracy", None)
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
) -> Method:
    """One combination as a method: gene2vec, a base (pretrained or as it was drawn), fine-tuning."""

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

    return Method(name, run, is_baseline=False)


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
    """Means and standard deviations over draws of every combination and baseline, and by value of each factor."""
    table = pd.DataFrame(
        [{name: row.get(name) for name in ("model", "baseline", *FACTORS, *SCORES)} for row in rows]
    )
    table[list(SCORES)] = table[list(SCORES)].astype(float)
    # combinations first, in the order of the grid
    order = [", ".join(point.values()) for point in combinations]
    order += [name for name in table["model"].unique() if name not in order]
    means = table.groupby("model", sort=False)[list(SCORES)].agg(["mean", "std"]).loc[order]
    best_baseline = table[table["baseline"]].groupby("model")["macro_f1"].mean()
    found, summary = table.drop_duplicates("model").set_index("model"), []
    for name in order:
        entry = {"model": name, "baseline": bool(found.loc[name, "baseline"])}
        entry |= {factor: found.loc[name, factor] for factor in FACTORS}
        for score in SCORES:
            entry |= {
                score: float(means.loc[name, (score, "mean")]),
                f"{score}_sd": float(means.loc[name, (score, "std")]),
            }
        summary.append(entry)
    warnings = []
    if len(best_baseline):
        ahead = [e for e in summary if not e["baseline"] and e["macro_f1"] < best_baseline.max() - TIE]
        warnings.append(
            f"the baseline {best_baseline.idxmax()} (macro-F1 {best_baseline.max():.3f}) beats {len(ahead)} of the "
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
    tables = [_grid_table(summary, draws), _effects_table(table[~table["baseline"]], combinations)]
    return result, [shown for shown in tables if shown.rows]


def _grid_table(summary: list[dict[str, Any]], draws: int) -> TextTable:
    best = max((entry["macro_f1"] for entry in summary if entry["baseline"]), default=np.inf)
    lines, marked = [], set()
    for number, entry in enumerate(summary):
        places = (
            ["baseline", *[""] * (len(FACTORS) - 1)] if entry["baseline"] else [entry[f] for f in FACTORS]
        )
        beaten = not entry["baseline"] and entry["macro_f1"] < best - TIE and np.isfinite(best)
        marked |= {number} if beaten else set()
        scores = [_value(entry, name) for name in ("accuracy", "macro_f1", "masked_accuracy")]
        name = entry["model"] if entry["baseline"] else ("⚠ " if beaten else "") + "scBERT"
        lines.append([name, *map(str, places), *scores, f"{entry['seconds']:.0f}"])
    columns = ["model", *FACTORS, "accuracy", "macro-F1", "masked accuracy", "s/draw"]
    title = f"ablation (mean ± sd of {draws} draws; ⚠: a baseline has the higher macro-F1)"
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


def write(folder: Path, rows: list[dict[str, Any]], result: dict[str, Any], tables: list[TextTable]) -> None:
    """``results.json``, ``table.md``, ``ablation.csv`` (means) and ``draws.csv`` (every training)."""
    text = "\n\n".join(table.markdown() for table in tables)
    text += "".join(f"\n\n⚠ {warning}" for warning in result["warnings"])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    pd.DataFrame(result["summary"]).to_csv(folder / "ablation.csv", index=False)
    kept = ("fold", "model", "baseline", *FACTORS, *SCORES)
    pd.DataFrame([{name: row.get(name) for name in kept} for row in rows]).to_csv(
        folder / "draws.csv", index=False
    )
    written = json.dumps(finite(result), indent=1, ensure_ascii=False, default=str)
    (folder / RESULTS).write_text(written + "\n", encoding="utf-8")
    shutil.rmtree(folder / "work", ignore_errors=True)
    for vectors in folder.glob("gene_vectors_*.txt"):
        vectors.unlink()


def _value(entry: dict[str, Any], score: str) -> str:
    if np.isnan(entry[score]):
        return ""
    spread = entry[f"{score}_sd"]
    return f"{entry[score]:.3f}" + ("" if np.isnan(spread) else f" ± {spread:.3f}")


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python scripts/ablation_study.py``; returns the exit code."""
    parser = study_parser(__doc__.strip().partition("\n")[0])
    parser.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON", help="Recipe, epochs, grid, ..."
    )
    parser.add_argument("--baselines", help="Baselines, separated by commas (those installed without it).")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--resume", action="store_true", help="Go on with an interrupted grid.")
    return run_study(run_ablation, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
