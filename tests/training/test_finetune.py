"""Fine-tuning through the function: what is written, learnt, scored and resumed."""

import json
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import scbert
from scbert import ScBertConfig, ScBertForMaskedExpression, ScBertTokenizer
from scbert.data.paths import keep_record
from scbert.inference import annotate
from scbert.tokenization import InputError
from scbert.training import callbacks, run_finetune
from scbert.training.finetune_arguments import FINETUNE
from scbert.training.initial_model import new_model
from scbert.training.run_finetune import finetune
from scbert.training.run_folder import run_folder
from scbert.training.settings import RECIPES, load_recipe, parse
from scbert.training.trainer import CellTrainer

MODEL_FILES = ["config.json", "model.safetensors", "gene_panel.txt", "tokenizer_config.json"]
FIGURES = ["metrics.json", "confusion.png", "learning_curve.png"]


@pytest.fixture
def tune(reference, tiny_recipe, tmp_path):
    """Fine-tune the tiny recipe; returns the summary and the model folder."""

    def run(name="model", **options):
        options = {
            "reference": reference,
            "label_key": "cell_type",
            "recipe": tiny_recipe,
            "seed": 1,
            **options,
        }
        return finetune(output=tmp_path / name, **options), tmp_path / name

    return run


def weights_of(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def assert_equal_weights(first, second, **tolerance):
    first, second = weights_of(first), weights_of(second)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=name, **tolerance)


EXACT = {"rtol": 0, "atol": 0}


def test_the_folder_is_complete_and_learns(tune):
    _, folder = tune(num_train_epochs=10)
    for name in MODEL_FILES + FIGURES:
        assert (folder / name).is_file()
    assert not folder.with_name("model.partial").exists()
    assert not (folder / "checkpoints").exists()
    written = json.loads((folder / "metrics.json").read_text())
    assert written["cells"] == {"train": 84, "validation": 12, "test": 24}
    assert written["test_macro_f1"] == written["test"]["macro_f1"] > 0.9
    assert written["baseline"]["test"]["cells"] == 24
    assert written["settings"]["seed"] == 1
    assert written["data"]["genes"]["matched"] == written["data"]["genes"]["panel"]
    config = json.loads((folder / "config.json").read_text())
    assert sorted(config["id2label"].values()) == ["B cell", "T cell", "monocyte"]


def test_annotating_the_test_cells_gives_the_score_written(tune, adata, tmp_path):
    adata.obs["split"] = ["train"] * 80 + ["test"] * 40
    adata.write_h5ad(tmp_path / "split.h5ad")
    summary, folder = tune(reference=tmp_path / "split.h5ad", test_key="split")
    annotated = annotate(adata[80:].copy(), model=folder, threshold=0, progress=False)
    right = annotated.obs["scbert_cell_type"].astype(str) == annotated.obs["cell_type"].astype(str)
    assert right.mean() == pytest.approx(summary["test_accuracy"])


def test_the_test_split_is_read_once_and_after_training(tune, monkeypatch):
    sizes = []
    predict, evaluate = CellTrainer.predict, CellTrainer.evaluate

    def count(self, dataset, *args, **kwargs):
        sizes.append(("predict", len(dataset)))
        return predict(self, dataset, *args, **kwargs)

    def count_evaluate(self, *args, **kwargs):
        sizes.append(("evaluate", len(self.eval_dataset)))
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(CellTrainer, "predict", count)
    monkeypatch.setattr(CellTrainer, "evaluate", count_evaluate)
    tune()
    assert sizes == [("evaluate", 12)] * 3 + [("predict", 12), ("predict", 12), ("predict", 24)]


def test_equal_seeds_give_equal_weights(tune):
    _, first = tune("first")
    _, second = tune("second")
    _, third = tune("third", seed=2)
    assert_equal_weights(first, second, **EXACT)
    with pytest.raises(AssertionError):
        assert_equal_weights(first, third, **EXACT)


@pytest.mark.parametrize("balance", ["weights", "none"])
def test_accumulation_does_not_change_the_result(tune, balance):
    shared = {"class_balance": balance, "num_train_epochs": 1}
    _, whole = tune("whole", per_device_train_batch_size=16, **shared)
    _, parts = tune("parts", per_device_train_batch_size=4, gradient_accumulation_steps=4, **shared)
    assert_equal_weights(whole, parts, rtol=0, atol=1e-4)


def test_oversampling_runs(tune):
    summary, _ = tune(class_balance="oversample", num_train_epochs=10)
    assert summary["test_macro_f1"] > 0.8


@pytest.mark.parametrize("metric, name", [("macro_f1", "macro_f1"), ("loss", "validation_loss")])
def test_the_best_epoch_is_kept(tune, metric, name):
    higher = metric != "loss"
    options = {"metric_for_best_model": metric, "greater_is_better": higher}
    summary, _ = tune(num_train_epochs=6, early_stopping_patience=2, **options)
    history = summary["training"]["history"]
    place = int(np.argmax([row[name] if higher else -row[name] for row in history]))
    assert summary["validation"]["macro_f1"] == pytest.approx(history[place]["macro_f1"])
    assert summary["training"]["best_epoch"] == 1 + place
    assert len(history) <= summary["training"]["best_epoch"] + 2


class Killed(BaseException):
    """As sudden as a signal."""


@pytest.mark.parametrize("balance", ["none", "oversample"])
def test_resumed_is_the_same_as_never_stopped(tune, tmp_path, monkeypatch, balance):
    options = {"num_train_epochs": 4, "class_balance": balance}
    summary, whole = tune("whole", **options)
    mark = callbacks.CompleteCheckpoints.on_save

    def die_while_saving(self, args, state, control, **kwargs):
        # the third checkpoint lacks its mark, as when the process is killed in the middle of it
        if state.global_step > summary["training"]["steps"] / 2:
            raise Killed
        mark(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(callbacks.CompleteCheckpoints, "on_save", die_while_saving)
        tune("stopped", **options)
    assert not (tmp_path / "stopped").exists()
    assert (tmp_path / "stopped.partial" / "checkpoints").is_dir()
    resumed, stopped = tune("stopped", resume=True, **options)
    assert not (tmp_path / "stopped.partial").exists()
    assert_equal_weights(whole, stopped, **EXACT)
    assert resumed["test"] == summary["test"]
    assert resumed["training"]["history"] == summary["training"]["history"]


@pytest.mark.parametrize("max_steps", [-1, 90])
def test_a_run_that_stopped_early_is_over_when_resumed(tune, monkeypatch, max_steps):
    options = {"num_train_epochs": 9, "early_stopping_patience": 1, "learning_rate": 1e-9}
    options["max_steps"] = max_steps
    whole, _ = tune("whole", **options)

    def die(*arguments):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_finetune, "score_splits", die)
        tune("stopped", **options)
    resumed, _ = tune("stopped", resume=True, **options)
    assert resumed["training"] == whole["training"] and whole["training"]["epochs"] < 9


def test_a_second_process_may_come_before_the_folder(tmp_path):
    """A job that always resumes is started for the first time: only the first process makes the folder."""
    given = SimpleNamespace(output=tmp_path / "model", overwrite=False, resume=True)
    training = SimpleNamespace(process_index=1, output_dir=str(tmp_path / "model.partial" / "checkpoints"))
    with run_folder({"seed": 1}, given, training, 7) as (folder, checkpoint):
        assert checkpoint is None and not folder.exists()
    folder.mkdir()
    keep_record(folder / "run.json", {"seed": 1, "cells or labels": 8})
    with (
        pytest.raises(InputError, match="cells or labels was 8 and is 7 now"),
        run_folder({"seed": 1}, given, training, 7),
    ):
        pass


def test_resume_refuses_another_run(tune, monkeypatch):
    def die(self, *args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(callbacks.CompleteCheckpoints, "on_save", die)
        tune()
    with pytest.raises(InputError, match="learning_rate was 0.01 and is 0.5 now"):
        tune(resume=True, learning_rate=0.5)
    # the same command without --resume begins anew
    _, folder = tune(num_train_epochs=1)
    assert folder.is_dir()


def test_given_splits_are_kept_to(tune, adata, tmp_path):
    words = np.array(["train"] * 80 + ["Test"] * 30 + ["other"] * 10, dtype=object)
    words[110:] = None
    adata.obs["fold"] = words
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.add_categories("plasma cell")
    adata.obs.loc[adata.obs_names[80:84], "cell_type"] = "plasma cell"
    adata.write_h5ad(tmp_path / "folds.h5ad")
    summary, _ = tune(reference=tmp_path / "folds.h5ad", test_key="fold")
    assert summary["cells"]["test"] == 26
    assert summary["data"]["test_classes_unknown"] == ["plasma cell"]
    assert summary["cells"]["train"] + summary["cells"]["validation"] == 80
    adata.obs["fold"] = ["train"] * 60 + ["fold 2"] * 60
    adata.write_h5ad(tmp_path / "folds.h5ad")
    with pytest.raises(InputError, match="train, test or .* fold 2"):
        tune(reference=tmp_path / "folds.h5ad", test_key="fold", overwrite=True)


def test_a_test_file_of_its_own(tune, adata, tmp_path, caplog):
    test = adata[:40].copy()
    test.obs["cell_type"] = test.obs["cell_type"].astype(str).replace("B cell", "plasma cell")
    test.write_h5ad(tmp_path / "test.h5ad")
    summary, _ = tune(test=tmp_path / "test.h5ad")
    assert summary["data"]["test_classes_unknown"] == ["plasma cell"]
    assert summary["cells"]["test"] == summary["test"]["cells"] == 26
    assert "26 of 146 cells are copies of others" in caplog.text
    assert "Scores leave out test cells of types that are not learnt: plasma cell." in summary["notes"]
    assert summary["notes"][1] in caplog.text
    caplog.clear()
    tune("apart", reference=adata[40:].copy(), test=tmp_path / "test.h5ad")
    assert "are copies" not in caplog.text


def test_presence_and_absence_are_told_from_counts(tune, adata, caplog):
    adata.X = adata.X > 4
    tune(reference=adata)
    assert "look like presence or absence" in caplog.text


def test_references_on_disk(reference):
    folds = anndata.read_h5ad(reference, backed="r")
    options = {"test": folds, "unlabelled": folds, "use_cpu": True, "disable_tqdm": True}
    model = scbert.finetune(folds, "cell_type", **options)
    assert model.metrics["cells"]["test"] == 120 and "baseline_test_accuracy" in model.metrics


def test_low_gene_cells_are_left_out_of_training_only(tune, adata, tmp_path):
    poor = adata.X.tolil()
    poor[:30, 50:] = 0
    adata.X = poor.tocsr()
    adata.write_h5ad(tmp_path / "poor.h5ad")
    summary, _ = tune(reference=tmp_path / "poor.h5ad", min_genes=60)
    left_out = summary["data"]["min_genes"]["left_out"]
    assert 0 < left_out <= 30
    assert summary["cells"]["train"] == 84 - left_out
    assert summary["cells"]["test"] == 24
    # a class is never emptied: where no cell of it has genes enough, all are learnt from
    summary, _ = tune(reference=tmp_path / "poor.h5ad", min_genes=5000, overwrite=True)
    assert summary["data"]["min_genes"]["left_out"] == 0


def test_cells_without_a_gene_are_not_learnt_from(tune, adata, tmp_path, caplog):
    caplog.set_level("INFO")
    empty = adata.X.tolil()
    empty[:30] = 0
    adata.X = empty.tocsr()
    adata.write_h5ad(tmp_path / "empty.h5ad")
    for options in ({}, {"test_fraction": 0, "recipe": "default"}):
        summary, _ = tune(reference=tmp_path / "empty.h5ad", overwrite=True, **options)
        cells, left_out = summary["cells"], summary["data"]["empty"]
        assert sum(cells.values()) + left_out == 120 and left_out + cells["test"] >= 30
        assert f"{left_out} without a gene of the panel" in caplog.text
    assert left_out == 30 and summary["cross_validation"]["cells"] == 90
    # a test cell without a gene has no type, and not the first
    summary, _ = tune(
        "asked", recipe="default", test=adata[adata.obs["cell_type"] == "B cell"].copy(), overwrite=True
    )
    confusion = summary["test"]["confusion"]
    assert (
        summary["test"]["accuracy"] == 0.75
        and dict(zip(confusion["labels"], confusion["matrix"][0]))["unassigned"] == 10
    )
    # a class is never emptied
    empty[np.flatnonzero(adata.obs["cell_type"] == "B cell")] = 0
    adata.X = empty.tocsr()
    adata.write_h5ad(tmp_path / "empty.h5ad")
    summary, _ = tune(reference=tmp_path / "empty.h5ad", overwrite=True)
    assert "B cell" in summary["classes"]
    assert "No training cell of B cell expresses a gene of the panel" in caplog.text


def test_a_panel_file(tune, gene_panel, tmp_path):
    (tmp_path / "panel.txt").write_text("\n".join([*gene_panel[:100], "ABSENT1", "ABSENT2"]))
    summary, folder = tune(genes=tmp_path / "panel.txt")
    assert summary["data"]["genes"]["panel"] == 102
    assert summary["data"]["genes"]["absent"] == 2
    assert len((folder / "gene_panel.txt").read_text().split()) == 102


def test_bfloat16_and_every_gene(tune):
    summary, folder = tune(bf16=True, tokenizer={"keep_zeros": True})
    assert weights_of(folder)["classifier.out_proj.weight"].dtype == torch.float32
    losses = [row["train_loss"] for row in summary["training"]["history"]]
    assert losses[-1] < losses[0]


def test_divergence_is_said(tune):
    with pytest.raises(InputError, match="diverged"):
        tune(learning_rate=1e30, max_grad_norm=0)


@pytest.fixture
def base(gene_panel, tmp_path):
    """A pretrained model of three blocks."""
    torch.manual_seed(0)
    tokenizer = ScBertTokenizer(gene_panel=gene_panel, n_bins=5)
    config = ScBertConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        head_dim=8,
        intermediate_size=16,
        num_random_features=16,
        classifier_hidden_sizes=[8],
        max_position_embeddings=len(gene_panel) + 1,
    )
    folder = tmp_path / "base"
    ScBertForMaskedExpression(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed_parts(base, folder):
    """Modules of the encoder whose weights differ from the base's."""
    before = ScBertForMaskedExpression.from_pretrained(base).state_dict()
    after = weights_of(folder)
    changed = {name for name in after if name in before and not torch.equal(before[name], after[name])}
    return {".".join(name.split(".")[1:3]) for name in changed}


def test_a_base_is_frozen_as_in_the_original(tune, base):
    summary, folder = tune(base=base)
    assert changed_parts(base, folder) == {"layers.1", "final_norm.weight", "final_norm.bias"}
    assert summary["model"]["trained"] < summary["model"]["parameters"]


def test_a_base_can_be_trained_wholly(tune, base):
    _, folder = tune(base=base, train_all=True)
    parts = changed_parts(base, folder)
    assert {"layers.0", "layers.1", "layers.2", "embeddings.expression_embeddings"} <= parts
    # the gene table is a buffer
    assert "embeddings.gene_embeddings" not in parts


def test_a_fine_tuned_model_can_be_a_base(tune):
    _, first = tune("first")
    summary, _ = tune("second", base=first, label_key="donor", num_train_epochs=1)
    assert summary["classes"] == ["donor_1", "donor_2", "donor_3", "donor_4"]


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.json")))
def test_shipped_recipes_work(name, gene_panel, tmp_path):
    given = {"reference": "r.h5ad", "label_key": "k", "output": str(tmp_path / "o"), "recipe": name}
    _, _, model, training = parse(FINETUNE, given)
    assert (name == "default") == training.solved_head
    tokenizer = ScBertTokenizer(gene_panel=gene_panel, **model.tokenizer)
    network = new_model(model.model, tokenizer, ["a", "b"], training.seed)
    assert network.config.vocab_size == tokenizer.vocab_size


def test_old_recipes_name_the_new_one(reference, tmp_path):
    with pytest.raises(InputError, match="'small' is no more; 'default' took its place"):
        finetune(reference, "cell_type", tmp_path / "model", recipe="small")


def test_settings_in_the_place_of_a_recipe_are_refused(reference, tmp_path):
    with pytest.raises(InputError, match="There is no recipe .*or give a .json file"):
        finetune(reference, "cell_type", tmp_path / "model", recipe={"training": {}})


def test_a_new_head_hears_every_gene_and_votes_for_none(gene_panel):
    tokenizer = ScBertTokenizer(gene_panel=gene_panel)
    head = new_model({"hidden_size": 32, "num_hidden_layers": 1}, tokenizer, ["a", "b"], 0).classifier
    assert not head.out_proj.weight.any()
    assert head.conv.bias.item() == 0.5


def test_the_paper_recipe_is_the_paper():
    recipe = load_recipe("scbert")
    assert recipe["model"] == recipe["tokenizer"] == {}
    assert (recipe["learning_rate"], recipe["early_stopping_patience"]) == (1e-4, 10)
