import json
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

from scbert import ScBertConfig, ScBertModel
from scbert.tokenization import InputError
from scbert.training import pretrain_trainer, trainer
from scbert.training.callbacks import RedrawFeaturesCallback
from scbert.training.gene2vec import GeneVectors, save_gene_vectors
from scbert.training.run_pretrain import pretrain

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "num_random_features": 16,
    "intermediate_size": 32,
    "feature_redraw_interval": 3,
}
# counts of some hundred a cell, so that bins differ
QUICK = {
    "model": SIZE,
    "tokenizer": {"target_sum": 200},
    "batch_size": 8,
    "use_cpu": True,
    "learning_rate": 3e-3,
    "disable_tqdm": True,
}


def make_cells(path, n_cells=48, seed=0, genes=60):
    """Cells of two kinds, each with its own half of the genes switched on."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, n_cells)
    rate = np.where((np.arange(genes) < genes // 2)[None] == (kind[:, None] == 0), 3.0, 0.4)
    counts = rng.poisson(rate).astype(np.float32)
    adata = anndata.AnnData(counts)
    adata.var_names = [f"GENE{i}" for i in range(genes)]
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_cells(tmp_path_factory.mktemp("corpus") / "cells.h5ad")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    return folder, pretrain(corpus, folder, epochs=3, validation_fraction=0.2, logging_steps=1, **QUICK)


def test_the_first_batch_says_how_much_work_is_ahead(corpus, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        trainer, "expect_work", lambda config, tokens, training: said.append((tokens, training))
    )
    pretrain(corpus, tmp_path / "model", epochs=3, validation_fraction=0.5, **QUICK)
    # 24 cells three times, of so many expressed genes as the longest of the first batch
    [(tokens, training)] = said
    assert training and tokens % (3 * 24) == 0 and 20 < tokens // (3 * 24) <= 61


def losses(summary):
    return {row["step"]: row["loss"] for row in summary["training"]["history"] if "loss" in row}


def test_a_data_seed_of_0_is_one(corpus, tmp_path):
    options = {"epochs": 1, "logging_steps": 1, "seed": 1, **QUICK}
    first, own = (
        losses(pretrain(corpus, tmp_path / str(number), data_seed=number, **options)) for number in (0, 1)
    )
    assert first != own


def test_folder_and_figures(trained):
    folder, summary = trained
    assert not folder.with_name("model.partial").exists()
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "gene_panel.txt"}
    assert not (folder / "checkpoints").exists() and not (folder / "run.json").exists()
    assert json.loads((folder / "metrics.json").read_text())["loss"] == pytest.approx(summary["loss"])
    for name in ("loss", "baseline_loss", "masked_accuracy", "baseline_masked_accuracy"):
        assert np.isfinite(summary[name])
    bins = [name for name in summary if name.startswith("masked_accuracy_bin_") and name[-1].isdigit()]
    assert len(bins) > 2 and {f"baseline_{name}" for name in bins} <= set(summary)
    assert summary["cells"] == {"train": 38, "validation": 10}
    assert min(losses(summary)) == 1 and losses(summary)[15] < losses(summary)[1]


def test_folder_loads_by_the_auto_classes(trained):
    folder, summary = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(np.ones((2, summary["genes"]), dtype=int), return_tensors="pt")
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert model(**ids).logits.shape[-1] == tokenizer.vocab_size
    assert AutoModel.from_pretrained(folder)(**ids).last_hidden_state.shape[-1] == 16


def test_the_same_run_gives_the_same_losses(corpus, trained, tmp_path):
    again = pretrain(
        corpus,
        tmp_path / "model",
        epochs=3,
        validation_fraction=0.2,
        logging_steps=1,
        dataloader_num_workers=1,
        **QUICK,
    )
    assert losses(again) == losses(trained[1])
    assert again["loss"] == trained[1]["loss"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [7, 12])
def test_resumed_run_repeats_an_uninterrupted_one(corpus, trained, tmp_path, monkeypatch, kill_at):
    """Stopped in the middle of an epoch, with features redrawn before and after."""

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == kill_at:
                raise Killed

    options = {
        "epochs": 3,
        "validation_fraction": 0.2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        **QUICK,
    }
    build = pretrain_trainer.build_pretrainer

    def build_to_be_killed(*arguments):
        trainer = build(*arguments)
        trainer.add_callback(Kill())
        return trainer

    monkeypatch.setattr("scbert.training.run_pretrain.build_pretrainer", build_to_be_killed)
    with pytest.raises(Killed):
        pretrain(corpus, tmp_path / "model", **options)
    monkeypatch.undo()
    assert not (tmp_path / "model").exists()
    resumed = pretrain(corpus, tmp_path / "model", resume=True, **options)
    assert losses(resumed) == losses(trained[1])
    assert resumed["loss"] == trained[1]["loss"]
    whole, again = (AutoModel.from_pretrained(path) for path in (trained[0], tmp_path / "model"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_going_on_from_a_base(corpus, trained, tmp_path):
    summary = pretrain(corpus, tmp_path / "more", base=trained[0], max_steps=2, batch_size=8, use_cpu=True)
    assert summary["training"]["steps"] == 2 and summary["genes"] == trained[1]["genes"]
    with pytest.raises(InputError, match="panel file"):
        pretrain(corpus, tmp_path / "other", base=trained[0], genes=corpus, use_cpu=True)


def test_folder_of_files_panel_and_gene_vectors(tmp_path, caplog):
    cells = tmp_path / "cells"
    cells.mkdir()
    make_cells(cells / "a.h5ad", n_cells=20)
    make_cells(cells / "b.h5ad", n_cells=20, seed=1, genes=40)
    (cells / "broken.h5ad").write_bytes(b"no")
    genes = tmp_path / "genes.txt"
    genes.write_text("\n".join(f"GENE{i}" for i in range(50)) + "\n")
    rng = np.random.default_rng(0)
    vectors = GeneVectors([f"GENE{i}" for i in range(30)], rng.normal(size=(30, 16)).astype(np.float32))
    save_gene_vectors(vectors, tmp_path / "vectors.txt")
    summary = pretrain(
        cells,
        tmp_path / "model",
        genes=genes,
        gene_vectors=tmp_path / "vectors.txt",
        max_steps=1,
        validation_fraction=0.25,
        **{**QUICK, "model": {**SIZE, "freeze_gene_embeddings": True}},
    )
    assert summary["genes"] == 50 and list(summary["data"]["left_out"]) == ["broken.h5ad"]
    assert summary["data"]["gene_vectors"] == {"assigned": 30, "initialised": 20, "unused": 0}
    table = AutoModel.from_pretrained(tmp_path / "model").embeddings.gene_embeddings.weight
    np.testing.assert_allclose(table[:30].detach(), vectors.matrix, rtol=1e-5)
    assert not table[-1].any()


def test_schedules(corpus, tmp_path):
    restarts = {"first_cycle": 4, "warmup": 2, "min_rate": 1e-5, "decay": 0.5}
    summary = pretrain(
        corpus,
        tmp_path / "a",
        epochs=6,
        logging_steps=1,
        cosine_restarts=restarts,
        # six batches an epoch: its second step has two of them
        gradient_accumulation_steps=4,
        eval_strategy="no",
        **QUICK,
    )
    rates = {
        round(r["epoch"] - 1e-3, 2): r["learning_rate"] for r in summary["training"]["history"] if "loss" in r
    }
    by_epoch = {int(epoch): rate for epoch, rate in rates.items()}
    assert by_epoch[0] == pytest.approx(1e-5) and by_epoch[2] == pytest.approx(3e-3)
    assert by_epoch[4] == pytest.approx(1e-5)
    linear = pretrain(
        corpus,
        tmp_path / "b",
        max_steps=4,
        logging_steps=1,
        lr_scheduler_type="linear",
        warmup_steps=0,
        **QUICK,
    )
    rates = [row["learning_rate"] for row in linear["training"]["history"] if "loss" in row]
    np.testing.assert_allclose(rates, 3e-3 * np.array([1, 0.75, 0.5, 0.25]), rtol=1e-6)


def test_logs_of_tensorboard_stay(corpus, tmp_path):
    pytest.importorskip("tensorboard")
    pretrain(corpus, tmp_path / "model", max_steps=2, report_to="tensorboard", **QUICK)
    assert list((tmp_path / "model" / "runs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"recipe": "absent"}, "no recipe 'absent'"),
        ({"validation_fraction": 0.0}, "validation_fraction"),
        ({"mlm_probability": 2.0}, "probabilities"),
        ({"unknown_setting": 1}, "unknown_setting"),
        ({"cosine_restarts": {"speed": 1}}, "speed"),
        ({"cosine_restarts": {"first_cycle": 3}}, "longer than its warm-up"),
        ({"model": {"depth": 1}}, "depth"),
        ({"model": "{"}, "A JSON object was needed"),
        ({"batch_size": 0}, "per_device_train_batch_size must be 1 or more"),
        ({"epochs": -1}, "num_train_epochs must be 0 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"gene_vectors": "absent.txt"}, "no file absent.txt"),
        ({"min_genes": 1000}, "min-genes"),
    ],
)
def test_wrong_settings_are_refused(corpus, tmp_path, options, problem):
    with pytest.raises(InputError, match=problem):
        pretrain(corpus, tmp_path / "model", use_cpu=True, **options)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("accumulated, wanted", [(1, [3, 6]), (2, [2, 3, 5, 6]), (7, [1, 2, 3, 4, 5, 6, 7])])
def test_features_are_redrawn_by_batches_alone(accumulated, wanted):
    """Every third batch, at the beginning of the step that follows it."""

    class State:
        global_step = 0

    def run(steps):
        model = ScBertModel(ScBertConfig(**SIZE, max_position_embeddings=9))
        callback, args = (
            RedrawFeaturesCallback(),
            SimpleNamespace(seed=5, gradient_accumulation_steps=accumulated),
        )
        matrices = []
        for State.global_step in steps:
            callback.on_step_begin(args, State, None, model=model)
            matrices.append(model.layers[0].attention.projection_matrix.clone())
        return matrices

    whole = run(range(8))
    changes = [i for i in range(1, 8) if not torch.equal(whole[i], whole[i - 1])]
    assert changes == wanted
    # resumed at step 6, it draws what the whole run drew there
    assert torch.equal(run([6])[0], whole[6])
