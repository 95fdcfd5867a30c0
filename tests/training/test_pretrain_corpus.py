"""Pretraining on a corpus: as from files, streamed, restarted, stopped, and its faults."""

import os
import signal

import numpy as np
import pytest
import torch
from transformers import AutoModel, TrainerCallback

from scbert.data.corpus_build import build_corpus
from scbert.data.paths import partial_folder
from scbert.tokenization import InputError
from scbert.training import pretrain_trainer
from scbert.training.gene2vec import load_gene_vectors
from scbert.training.run_gene2vec import gene2vec
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
QUICK = {
    "model": SIZE,
    "batch_size": 8,
    "use_cpu": True,
    "learning_rate": 3e-3,
    "disable_tqdm": True,
    "epochs": 2,
    "logging_steps": 1,
    "validation_fraction": 0.2,
}


@pytest.fixture
def cells(adata, tmp_path):
    folder = tmp_path / "cells"
    folder.mkdir()
    adata[:30, :80].write_h5ad(folder / "a.h5ad")
    adata[30:60, :80].write_h5ad(folder / "b.h5ad")
    return folder


@pytest.fixture
def corpus(cells, tmp_path):
    build_corpus([cells], tmp_path / "corpus", min_genes=0, shard_cells=20)
    return tmp_path / "corpus"


def losses(summary):
    return {row["step"]: row["loss"] for row in summary["training"]["history"] if "loss" in row}


def weights(folder):
    return AutoModel.from_pretrained(folder).state_dict()


def test_corpus_and_files_train_the_same_model(cells, corpus, tmp_path):
    from_files = pretrain(cells, tmp_path / "a", **QUICK)
    from_corpus = pretrain(corpus, tmp_path / "b", **QUICK)
    assert losses(from_files) == losses(from_corpus) and from_files["loss"] == from_corpus["loss"]
    assert from_files["baseline_loss"] == from_corpus["baseline_loss"]
    assert list((corpus / "cache").glob("bins-*.npz"))
    again = pretrain(corpus, tmp_path / "c", dataloader_num_workers=1, **QUICK)
    assert losses(again) == losses(from_corpus)


@pytest.mark.parametrize("source", ["corpus", "cells"])
def test_streamed_run_goes_on_in_the_middle_of_an_epoch(source, cells, corpus, tmp_path, monkeypatch):
    path = corpus if source == "corpus" else cells
    options = {
        "streaming": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "dataloader_num_workers": 2,
        **QUICK,
    }
    whole = pretrain(path, tmp_path / "whole", **options)
    assert whole["cells"] == {"train": 48, "validation": 12} and len(losses(whole)) == 12

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 9:
                raise KeyboardInterrupt

    build = pretrain_trainer.build_pretrainer

    def build_to_be_killed(*arguments):
        trainer = build(*arguments)
        trainer.add_callback(Kill())
        return trainer

    monkeypatch.setattr("scbert.training.run_pretrain.build_pretrainer", build_to_be_killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(path, tmp_path / "model", **options)
    monkeypatch.undo()
    resumed = pretrain(path, tmp_path / "model", resume=True, **options)
    assert losses(resumed) == losses(whole) and resumed["loss"] == whole["loss"]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sigterm_saves_and_leaves(corpus, tmp_path, monkeypatch):
    options = {"save_strategy": "no", "eval_strategy": "no", **QUICK}
    whole = pretrain(corpus, tmp_path / "whole", **options)
    build = pretrain_trainer.build_pretrainer

    class Terminate(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            """Never called without accumulation."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    def build_to_be_stopped(*arguments):
        trainer = build(*arguments)
        trainer.add_callback(Terminate())
        return trainer

    monkeypatch.setattr("scbert.training.run_pretrain.build_pretrainer", build_to_be_stopped)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        pretrain(corpus, tmp_path / "model", **options)
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert (tmp_path / "model.partial" / "checkpoints" / "checkpoint-5" / "complete").exists()
    resumed = pretrain(corpus, tmp_path / "model", resume=True, **options)
    assert losses(resumed) == losses(whole)


def test_loss_that_is_no_number_names_its_batch(corpus, tmp_path, monkeypatch):
    build = pretrain_trainer.build_pretrainer

    def build_to_fail(*arguments):
        trainer = build(*arguments)
        compute = trainer.compute_loss
        # NaN in the third step
        trainer.compute_loss = lambda *a, **k: (
            compute(*a, **k) * (np.nan if trainer.state.global_step == 2 else 1)
        )
        return trainer

    monkeypatch.setattr("scbert.training.run_pretrain.build_pretrainer", build_to_fail)
    with pytest.raises(InputError, match=r"nan in step 3, process 0, .*cells \[\d+, .*learning_rate"):
        pretrain(corpus, tmp_path / "model", **QUICK)


def test_wrong_corpus_and_damaged_shard(corpus, adata, tmp_path):
    genes = tmp_path / "genes.txt"
    genes.write_text("".join(f"OTHER{i}\n" for i in range(99)) + f"{adata.var_names[0]}\n")
    with pytest.raises(InputError, match=r"does not suit the model's panel.* 1 of the model's 100 genes"):
        pretrain(corpus, tmp_path / "model", genes=genes, **QUICK)
    with pytest.raises(InputError, match="chosen when it was built"):
        pretrain(corpus, tmp_path / "model", layer="counts", **QUICK)
    with pytest.raises(InputError, match="too few to learn from"):
        pretrain(corpus, tmp_path / "model", min_genes=1000, **QUICK)
    shard = corpus / "cells-00001-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cells-00001-00000\.arrow has 1000 bytes"):
        pretrain(corpus, tmp_path / "model", **QUICK)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: os error 28")]
)
def test_full_disk_is_one_message(tmp_path, error):
    """torch and safetensors report it in types and words of their own."""
    with pytest.raises(OSError, match="disk is full"), partial_folder(tmp_path / "model"):
        raise error


def test_gene2vec_takes_a_corpus(cells, corpus, tmp_path):
    options = {"size": 8, "cutoff": 0.2, "min_cells": 5, "iterations": 1}
    from_files = gene2vec(tmp_path / "a.txt", cells, **options)
    from_corpus = gene2vec(tmp_path / "b.txt", corpus, **options)
    assert from_corpus["files"] == 2 and from_corpus["pairs"] == from_files["pairs"]
    assert load_gene_vectors(tmp_path / "b.txt").matrix.shape[1] == 8
