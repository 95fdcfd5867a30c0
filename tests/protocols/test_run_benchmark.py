"""Benchmarks on synthetic cells: folds, methods, files, the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from scbert import ScBertConfig, ScBertForMaskedExpression, ScBertTokenizer
from scbert.commands.cli import main
from scbert.evaluation.baselines import LogisticRegressionBaseline
from scbert.protocols import PROTOCOLS, run_benchmark
from scbert.protocols.cells import LABEL, load_benchmark_cells
from scbert.protocols.folds import ProtocolOptions, read_folds, write_folds
from scbert.protocols.methods import baseline, scbert
from scbert.protocols.run import usable_folds, without_genes
from scbert.tokenization import InputError

TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 4,
    "intermediate_size": 8,
}
TINY |= {"num_random_features": 8, "classifier_hidden_sizes": [], "initializer_range": 0.2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def labelled(adata):
    adata.obs[LABEL] = adata.obs["cell_type"].astype(str)
    # a fourth type, for class imbalance
    adata.obs.loc[adata.obs_names[:16], LABEL] = "fourth"
    return adata


@pytest.fixture
def cells_file(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture
def recipe(tmp_path):
    training = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.03,
        "use_cpu": True,
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"model": TINY, "tokenizer": {"keep_zeros": False}, "training": training}))
    return path


@pytest.fixture
def base(gene_panel, tmp_path):
    tokenizer = ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False)
    torch.manual_seed(0)
    ScBertForMaskedExpression(ScBertConfig(max_position_embeddings=301, **TINY)).save_pretrained(
        tmp_path / "b"
    )
    tokenizer.save_pretrained(tmp_path / "b")
    return tmp_path / "b"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_cell_is_learnt_and_tested(protocol, labelled):
    # the last features as if they were peaks
    labelled.var["feature_types"] = ["Gene Expression"] * 280 + ["Peaks"] * 20
    folds = PROTOCOLS[protocol](labelled, ProtocolOptions("donor", n_folds=2))
    assert folds and len({fold.file for fold in folds}) == len(folds)
    labels = labelled.obs[LABEL].to_numpy()
    for fold in folds:
        assert {"train", "test"} <= set(fold.split) <= {"train", "validation", "test", ""}
        learnt = set(labels[fold.split == "train"])
        novel = set(labels[fold.split == "test"]) - learnt
        assert novel == ({fold.novel} if fold.novel else set())
    again = PROTOCOLS[protocol](labelled, ProtocolOptions("donor", n_folds=2))
    assert all((a.split == b.split).all() for a, b in zip(folds, again))


def test_cross_validation_tests_every_cell_once(labelled):
    folds = PROTOCOLS["cross-validation"](labelled, ProtocolOptions(n_folds=3))
    assert (np.sum([fold.split == "test" for fold in folds], axis=0) == 1).all()


def test_leave_one_out_keeps_groups_apart(labelled):
    options = ProtocolOptions("donor", validate_on_group=True)
    donors = labelled.obs["donor"].to_numpy()
    for fold in PROTOCOLS["leave-one-out"](labelled, options):
        groups = [set(donors[fold.split == name]) for name in ("train", "validation", "test")]
        assert len(groups[2]) == 1 and not set.intersection(*groups) and not groups[0] & groups[1]
    with pytest.raises(InputError, match="--group-key"):
        PROTOCOLS["leave-one-out"](labelled, ProtocolOptions("organ"))


def test_groups_that_cannot_be_left_out_are_told(labelled):
    labelled.obs["group"] = np.where(labelled.obs[LABEL] == "B cell", "one", "two")
    labelled.obs.loc[labelled.obs[LABEL] == "T cell", "group"] = "three"
    kept = labelled[labelled.obs[LABEL].isin(["B cell", "T cell"])]
    with pytest.raises(InputError, match=r"2 of 2 folds cannot be run: .*of the group or type left out"):
        usable_folds(kept, PROTOCOLS["leave-one-out"](kept, ProtocolOptions("group")))
    labelled.obs["donor"] = labelled.obs["donor"].where(labelled.obs["donor"] != "donor_1")
    with pytest.raises(InputError, match="cells have no group in 'donor'"):
        PROTOCOLS["leave-one-out"](labelled, ProtocolOptions("donor"))


def test_a_type_too_rare_to_be_asked_for_is_not_left_out(labelled, caplog):
    rare = labelled[12:].copy()
    assert (rare.obs[LABEL] == "fourth").sum() == 4
    folds = usable_folds(rare, PROTOCOLS["novel-types"](rare, ProtocolOptions()))
    # without a novel cell, novel accuracy would be 0 for every cell called so
    assert [fold.novel for fold in folds] == ["B cell", "T cell", "monocyte"]
    assert "1 of 4 folds cannot be run" in caplog.text


@pytest.mark.parametrize("protocol", ["cross-validation", "reference-size", "novel-types", "marker-deletion"])
def test_too_few_cells_are_told(protocol, labelled, tmp_path):
    labelled[:9].write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(InputError, match=r"folds cannot be run: .* Give more cells, or fewer folds"):
        run_benchmark(protocol, tmp_path / "few.h5ad", "cell_type", tmp_path / "out", folds=3)


def test_every_size_of_reference_has_the_same_test(labelled):
    # of 16 cells a tenth is too few to learn from, and the last tenth is not empty
    assert (labelled.obs[LABEL] == "fourth").sum() == 16
    folds = PROTOCOLS["reference-size"](labelled, ProtocolOptions(n_folds=1))
    assert len(folds) == 5
    assert all(((fold.split == "test") == (folds[0].split == "test")).all() for fold in folds)


def test_shots_and_sizes_are_what_they_say(labelled):
    labels = labelled.obs[LABEL].to_numpy()
    few = {fold.setting: fold for fold in PROTOCOLS["few-shot"](labelled, ProtocolOptions(n_folds=1))}
    for shots in (1, 4, 8):
        learnt = labels[few[f"{shots} per type"].split == "train"]
        assert set(np.unique(learnt, return_counts=True)[1]) == {shots}
    tests = [fold.split == "test" for fold in few.values()]
    assert all((test == tests[0]).all() for test in tests)
    with pytest.raises(InputError, match="no type has more than 90 cells"):
        PROTOCOLS["few-shot"](labelled, ProtocolOptions(n_folds=1, shots=(90,)))
    (imbalanced,) = PROTOCOLS["class-imbalance"](labelled, ProtocolOptions(n_folds=1))
    sizes = [int(n) for n in imbalanced.setting.split("/")]
    assert sizes[0] == sizes[2] > sizes[1] == sizes[3] == 3


def test_markers_are_deleted(labelled):
    folds = PROTOCOLS["marker-deletion"](
        labelled, ProtocolOptions(n_folds=2, markers=("CD3D", "MS4A1", "NONE"))
    )
    assert [len(fold.deleted) for fold in folds[:4]] == [0, 0, 1, 2]
    with pytest.raises(InputError, match="none of the 1 marker genes, such as ENSG01"):
        PROTOCOLS["marker-deletion"](labelled, ProtocolOptions(n_folds=2, markers=("ENSG01",)))
    own = PROTOCOLS["marker-deletion"](labelled, ProtocolOptions(n_folds=2))
    assert "MS4A1" in own[3].deleted and "ACTB" not in own[3].deleted


def test_folds_are_files_that_come_back(labelled, tmp_path):
    folds = PROTOCOLS["few-shot"](labelled, ProtocolOptions(n_folds=1))
    write_folds(tmp_path / "folds", labelled, folds)
    (tmp_path / "folds" / folds[0].file).unlink()
    again = read_folds(tmp_path / "folds", labelled, folds)
    assert [fold.name for fold in again] == [fold.name for fold in folds[1:]]
    assert all((a.split == b.split).all() for a, b in zip(again, folds[1:]))
    with pytest.raises(InputError, match="none of the files"):
        read_folds(tmp_path, labelled, folds)


def test_folds_of_types_that_differ_in_a_slash_have_files_of_their_own(labelled, tmp_path):
    folds = PROTOCOLS["cross-validation"](labelled, ProtocolOptions(n_folds=3))
    folds = [replace(fold, name=f"without {name}") for fold, name in zip(folds, ("A/B", "A_B", "a b"))]
    write_folds(tmp_path / "folds", labelled, folds)
    again = read_folds(tmp_path / "folds", labelled, folds)
    assert all((a.split == b.split).all() for a, b in zip(again, folds, strict=True))


def test_several_files_share_genes_and_types(adata, tmp_path):
    first, second = adata[:60, :200].copy(), adata[60:, 100:].copy()
    second.obs["kind"] = second.obs["cell_type"].astype(str).str.upper()
    first.write_h5ad(tmp_path / "one.h5ad")
    second.write_h5ad(tmp_path / "two.h5ad")
    (tmp_path / "map.csv").write_text("from,to\nB cell,B\nB CELL,B\nT cell,T\nT CELL,T\n")
    paths = [tmp_path / "one.h5ad", tmp_path / "two.h5ad"]
    cells = load_benchmark_cells(paths, "cell_type,kind", tmp_path / "map.csv")
    assert cells.shape == (80, 100)
    assert set(cells.obs[LABEL]) == {"B", "T"} and set(cells.obs["dataset"]) == {"one", "two"}
    with pytest.raises(InputError, match="label keys"):
        load_benchmark_cells(paths, "a,b,c")
    with pytest.raises(InputError, match=r"elsewhere\.csv cannot be read"):
        load_benchmark_cells(paths[:1], "cell_type", tmp_path / "elsewhere.csv")


def test_a_file_names_its_dataset_by_itself(adata, tmp_path):
    for name in ("blood.v2.h5ad", "blood.v3.h5ad", "again/blood.v3.h5ad"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        adata.write_h5ad(tmp_path / name)
    paths = [tmp_path / "blood.v2.h5ad", tmp_path / "blood.v3.h5ad"]
    assert set(load_benchmark_cells(paths, "cell_type").obs["dataset"]) == {"blood.v2", "blood.v3"}
    with pytest.raises(InputError, match=r"Several files are called 'blood\.v3'"):
        load_benchmark_cells([*paths, tmp_path / "again" / "blood.v3.h5ad"], "cell_type")


def test_log_values_are_told_from_all_genes(adata, tmp_path):
    """Without the markers, or the genes of one file only, their sums are those of log1p values no more."""
    sums = np.asarray(adata.X.sum(axis=1)).ravel()
    adata.X.data = np.log1p(adata.X.data * np.repeat(1e4 / sums, np.diff(adata.X.indptr))).astype(np.float32)
    adata.write_h5ad(tmp_path / "log.h5ad")
    cells = load_benchmark_cells([tmp_path / "log.h5ad"], "cell_type")
    markers = PROTOCOLS["marker-deletion"](cells, ProtocolOptions(n_folds=2))[-1]
    outputs = baseline("majority", 1).run(without_genes(cells, markers.deleted), markers, 0)
    assert len(outputs.probabilities)


def test_a_benchmark_leaves_its_files(cells_file, recipe, tmp_path):
    options = {"recipe": str(recipe), "baselines": "logistic_l2,majority", "folds": 2}
    result = run_benchmark("cross-validation", cells_file, "cell_type", tmp_path / "out", **options)
    assert not any("copies" in warning for warning in result["warnings"])
    models = [entry["model"] for entry in result["summary"]]
    assert models == ["scBERT", "logistic_l2", "majority"]
    assert result["summary"][1]["macro_f1"] > 0.95 > result["summary"][2]["macro_f1"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["summary"][1]["macro_f1"] == result["summary"][1]["macro_f1"]
    assert "| model | accuracy |" in (tmp_path / "out" / "table.md").read_text()
    for name in ("scores.png", "confusion.png", "reliability.png", "folds/fold_1.csv"):
        assert (tmp_path / "out" / name).is_file()
    assert not (tmp_path / "out" / "work").exists()
    with pytest.raises(InputError, match="exists"):
        run_benchmark("cross-validation", cells_file, "cell_type", tmp_path / "out", **options)


def test_cells_of_two_datasets_are_told(adata, recipe, tmp_path):
    for name, part in (("one", adata[:70]), ("two", adata[40:])):
        part.copy().write_h5ad(tmp_path / f"{name}.h5ad")
    options = {"recipe": str(recipe), "baselines": "majority", "group_key": "dataset"}
    paths = [tmp_path / "one.h5ad", tmp_path / "two.h5ad"]
    result = run_benchmark("leave-one-out", paths, "cell_type", tmp_path / "out", **options)
    assert any("30 of 150 cells are copies of others" in warning for warning in result["warnings"])


def test_novel_types_are_scored_many_ways(labelled, recipe, tmp_path):
    fold = PROTOCOLS["novel-types"](labelled, ProtocolOptions())[0]
    from scbert.protocols.scores import fold_scores

    true = labelled.obs[LABEL].to_numpy()[fold.split == "test"].astype(str)
    method = scbert("scBERT", {"recipe": str(recipe)}, tmp_path / "work")
    row = fold_scores(method, method.run(labelled, fold, 0), fold, true)
    assert {"auroc_energy", "auroc_mahalanobis", "auroc_neighbours", "at_fitted_threshold"} <= set(row)
    assert row["n_novel"] == (true == fold.novel).sum() > 0


def test_one_shot_learns(labelled, recipe, tmp_path):
    fold = PROTOCOLS["few-shot"](labelled, ProtocolOptions(n_folds=1))[0]
    assert "1 per type" in fold.setting
    outputs = scbert("scBERT", {"recipe": str(recipe)}, tmp_path / "work").run(labelled, fold, 0)
    assert outputs.probabilities.shape == ((fold.split == "test").sum(), 4)
    assert (
        baseline("logistic_l1", 1).run(labelled, fold, 0).probabilities.shape == outputs.probabilities.shape
    )


def test_a_type_of_one_cell_takes_no_search_from_a_baseline(labelled, monkeypatch):
    cells, searched = labelled[15:].copy(), []
    assert (cells.obs[LABEL] == "fourth").sum() == 1
    (fold,) = PROTOCOLS["few-shot"](cells, ProtocolOptions(n_folds=1, shots=(8,)))
    monkeypatch.setattr(
        LogisticRegressionBaseline, "predict_proba", lambda self, *_, **__: searched.extend(self.scores)
    )
    baseline("logistic_l2", 1).run(cells, fold, 0)
    assert len(searched) == 3


def test_a_base_brings_its_ablations(cells_file, recipe, base, tmp_path):
    options = {"recipe": str(recipe), "base": base, "baselines": "majority", "folds": 2, "epochs": 1}
    result = run_benchmark("cross-validation", cells_file, "cell_type", tmp_path / "out", **options)
    models = [entry["model"] for entry in result["summary"]]
    assert models == ["scBERT", "scBERT, no pretraining", "scBERT, random genes", "majority"]
    masked = result["masked_expression"]
    # weights that learnt nothing lose to the gene's commonest bin, and it is said
    assert masked["commonest_bin"] > masked["base"] and masked["tokens"] > 100
    assert any("commonest bin" in warning for warning in result["warnings"])


def test_zero_shot_needs_a_base(cells_file, base, tmp_path):
    options = {"baselines": "knn", "folds": 2}
    with pytest.raises(InputError, match="--base"):
        run_benchmark("zero-shot", cells_file, "cell_type", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    result = run_benchmark("zero-shot", cells_file, "cell_type", tmp_path / "out", base=base, **options)
    assert [entry["model"] for entry in result["summary"]][1] == "untrained embeddings, kNN"
    # what `finetune` takes with a base: the default recipe would keep its encoder, pretrained or not, as it is
    assert result["settings"]["recipe"] == "scbert"


def test_the_command(cells_file, tmp_path, capsys):
    arguments = ["evaluate", "nonsense", str(cells_file), "--label-key", "cell_type", "--output"]
    assert main([*arguments, str(tmp_path / "o")]) == 1
    assert "There is no protocol 'nonsense'" in capsys.readouterr().err
    (tmp_path / "variants.json").write_text('{"deeper": 3}')
    arguments[1] = "cross-validation"
    for option, given in (
        ("--settings", "{1"),
        ("--settings", "[1]"),
        ("--variants", tmp_path / "variants.json"),
    ):
        assert main([*arguments, str(tmp_path / "o"), option, str(given)]) == 1
        assert "A JSON object was needed" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_holds_tables_and_pictures(cells_file, recipe, tmp_path):
    options = {"recipe": str(recipe), "baselines": "majority", "folds": 2, "report": tmp_path / "r.html"}
    run_benchmark("cross-validation", cells_file, "cell_type", tmp_path / "out", **options)
    page = (tmp_path / "r.html").read_text()
    # scores, confusion, reliability and a UMAP
    assert page.count("data:image/png;base64") == 4
    assert "cross-validation" in page and "majority" in page
