"""Pretraining a cell token: from axes that start it to a saved model whose embedding is one answer everywhere."""

import sys
import types

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from transformers import AutoModel, AutoTokenizer, TrainerCallback, pipeline

import scbert
from scbert import ScBertForMaskedExpression, ScBertTokenizer
from scbert.modeling_scbert.cell_scbert import whole_cell_loss
from scbert.tokenization import InputError
from scbert.training import pretrain_trainer
from scbert.training.cell_batches import CellDataset, DataCollatorForMaskedExpression
from scbert.training.cell_targets import CellTargets, bin_values, mean_cell, thin_cells
from scbert.training.initial_model import new_config, start_cell
from scbert.training.pretrain_data import load_data
from scbert.training.principal_axes import axes_of_cells
from scbert.training.run_pretrain import PRETRAIN, pretrain
from scbert.training.settings import parse

SIZE = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
SIZE |= {"num_random_features": 16, "intermediate_size": 32, "feature_redraw_interval": 3}
SIZE |= {
    "ordinal_expression": True,
    "pooling": "cell",
    "cell_loss_weight": 1.0,
    "freeze_gene_embeddings": False,
}
TOKENIZER = {"n_bins": 18, "bin_width": 0.5, "keep_zeros": False, "target_sum": 200}
QUICK = {"model": SIZE, "tokenizer": TOKENIZER, "batch_size": 8, "use_cpu": True, "learning_rate": 3e-3}
QUICK |= {"disable_tqdm": True, "epochs": 3, "validation_fraction": 0.2, "logging_steps": 1}
GENES = 60


def make_cells(path, n_cells, seed, genes=GENES):
    """Cells of two kinds, each with its own half of the genes switched on."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, n_cells)
    rate = np.where((np.arange(genes) < GENES // 2)[None] == (kind[:, None] == 0), 3.0, 0.4)
    adata = anndata.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)))
    adata.var_names = [f"GENE{i}" for i in range(genes)]
    adata.write_h5ad(path)


def principal(files, n_axes):
    """Axes of all cells of all files, as `cell_axes` gives its own: what is done with them is tested here."""
    cells = sp.vstack(list(files())).astype(np.float32)
    axes = axes_of_cells(cells, rank=n_axes)
    vectors = axes.to_genes(np.eye(axes.coordinates.shape[1])).T
    return types.SimpleNamespace(vectors=vectors.astype(np.float32), center=axes.center @ vectors)


@pytest.fixture(autouse=True)
def axes(monkeypatch):
    monkeypatch.setitem(sys.modules, "scbert.training.cell_axes", types.SimpleNamespace(cell_axes=principal))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_cells(folder / "a.h5ad", 40, 0)
    make_cells(folder / "b.h5ad", 40, 1, genes=50)
    return folder


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "scbert.training.cell_axes", types.SimpleNamespace(cell_axes=principal))
        folder = tmp_path_factory.mktemp("pretrained") / "model"
        return folder, pretrain(corpus, folder, n_cell_axes=10, thinning=0.5, **QUICK)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("n_axes", [1, 21])
def test_the_start_is_the_axes_exactly(layers, n_axes):
    torch.manual_seed(0)
    tokenizer = ScBertTokenizer(gene_panel=[f"G{i}" for i in range(GENES)], **TOKENIZER)
    model = ScBertForMaskedExpression(new_config({**SIZE, "num_hidden_layers": layers}, tokenizer, 0)).eval()
    rng = np.random.default_rng(0)
    vectors, center = (
        rng.normal(size=(GENES, n_axes)) * rng.exponential(size=(GENES, 1)),
        rng.normal(size=n_axes),
    )
    vectors[::7] = 0
    start_cell(model, vectors, center)
    bins = sp.csr_matrix(rng.integers(0, 19, (9, GENES)) * (rng.random((9, GENES)) < 0.5), dtype=np.int8)
    encoded = {name: torch.from_numpy(x) for name, x in tokenizer.encode_bins(bins).items()}
    with torch.no_grad():
        found = model.scbert(**encoded).pooler_output.double()
    wanted = torch.from_numpy(bins @ vectors - center)
    # turned: all lengths and angles stay
    scale = wanted.norm(dim=1).max() ** 2
    torch.testing.assert_close(found @ found.T / scale, wanted @ wanted.T / scale, atol=1e-5, rtol=0)
    genes = model.scbert.embeddings.gene_embeddings.weight
    assert genes.norm(dim=1).max().item() == pytest.approx(0.02 * 24**0.5) and not genes[-1].any()


def test_axes_that_cannot_be_started_from_are_refused(corpus, tmp_path):
    for given, problem in (
        ({"n_cell_axes": 22}, "hidden_size of 25"),
        ({"n_cell_axes": 2, "model": {**SIZE, "pooling": "conv", "cell_loss_weight": 0.0}}, "pooling"),
        ({"n_cell_axes": 2, "gene_vectors": "vectors.txt"}, "one start"),
        ({"n_cell_axes": -1}, "n_cell_axes"),
        ({"thinning": 1.0}, "thinning"),
        ({"tokenizer": {"binning": "quantile", "n_bins": 18}}, "floor"),
    ):
        with pytest.raises(InputError, match=problem):
            pretrain(corpus, tmp_path / "model", **{**QUICK, **given})


def test_bins_stand_for_the_middle_of_what_falls_into_them():
    tokenizer = ScBertTokenizer(gene_panel=["A", "B"], n_bins=6, bin_width=0.5, target_sum=1)
    values = bin_values(tokenizer)
    assert values[0] == 0
    for bin_ in range(1, 6):
        low, high = 2 ** (bin_ * 0.5) - 1, 2 ** ((bin_ + 1) * 0.5) - 1
        assert low < values[bin_] < high


def test_targets_are_of_all_genes_whatever_is_hidden_or_cut():
    rng = np.random.default_rng(0)
    bins = sp.csr_matrix(rng.integers(0, 3, (4, GENES)).astype(np.int8))
    panel = [f"G{i}" for i in range(GENES)]
    measured = np.ones((2, GENES), dtype=bool)
    measured[1, :20] = False
    files = np.array([0, 1, 0, 1])
    cells = CellDataset(bins, files=files)
    for options in ({"keep_zeros": True}, {"keep_zeros": False}, {"keep_zeros": False, "max_length": 10}):
        tokenizer = ScBertTokenizer(gene_panel=panel, **options)
        targets = CellTargets(tokenizer, measured)
        for packing in (False, True):
            collator = DataCollatorForMaskedExpression(
                tokenizer, packing=packing, targets=targets, thinning=0.9
            )
            found = collator(cells.__getitems__([3, 4]))["cell_targets"]
            wanted = torch.from_numpy(bin_values(tokenizer)[bins[[3, 0]].toarray()])
            wanted[0, :20] = -100
            assert torch.equal(found, wanted)


def test_thinning_takes_what_shallow_sequencing_would_miss():
    counts = np.array([1, 2, 8] * 20_000)
    values = np.arange(9.0) * 37
    cells = sp.csr_matrix(np.stack([counts, counts]).astype(np.int8))
    generators = [np.random.default_rng(i) for i in (5, 6)]
    lost = [0.8 * np.random.default_rng(i).random() for i in (5, 6)]
    thin = thin_cells(cells, values, 0.8, generators)
    assert lost[0] != lost[1]
    for row, share in zip(thin.toarray(), lost, strict=True):
        for n in (1, 2, 8):
            assert (row[counts == n] == 0).mean() == pytest.approx(share**n, abs=0.01)
    assert set(np.unique(thin.data)) == {1, 2, 8}
    empty = sp.csr_matrix((1, 5), dtype=np.int8)
    assert thin_cells(empty, values, 0.5, generators[:1]).nnz == 0


def test_a_visit_decides_what_is_thinned():
    tokenizer = ScBertTokenizer(gene_panel=[f"G{i}" for i in range(GENES)], keep_zeros=False)
    cells = CellDataset(sp.csr_matrix(np.ones((4, GENES), dtype=np.int8)))
    collator = DataCollatorForMaskedExpression(tokenizer, thinning=0.5)
    alone, together = collator(cells.__getitems__([6])), collator(cells.__getitems__([1, 6]))
    length = alone["input_ids"].shape[1]
    assert torch.equal(together["gene_ids"][1, :length], alone["gene_ids"][0]) and 25 < length < 61
    assert not torch.equal(collator(cells.__getitems__([2]))["gene_ids"], alone["gene_ids"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_gene_is_measured_in_the_files_that_express_it(corpus, tmp_path, streaming):
    options = {"corpus": corpus, "output": tmp_path / "model", "streaming": streaming, **QUICK}
    _, data_arguments, model, training = parse(PRETRAIN, options)
    data = load_data(data_arguments, model.tokenizer, training.seed)
    order = [data.tokenizer.gene_panel.index(f"GENE{i}") for i in range(GENES)]
    assert data.measured[:, order].tolist() == [[True] * 60, [True] * 50 + [False] * 10]
    parts = list(data.cells_by_file())
    assert sum(part.shape[0] for part in parts) == len(data.train) == 64
    # the mean over the cells that tell, one of the mean of all genes added
    values = bin_values(data.tokenizer)
    dense = [values[part.toarray()] for part in parts]
    told = [
        np.concatenate([d[:, g] for d, m in zip(dense, data.measured, strict=True) if m[g]])
        for g in range(GENES)
    ]
    typical = sum(t.sum() for t in told) / sum(len(t) for t in told)
    wanted = np.log([(t.sum() + typical) / (len(t) + 1) for t in told])
    np.testing.assert_allclose(data.mean_cell(), wanted, rtol=1e-4)


def test_genes_nobody_expresses_have_a_level():
    found = mean_cell(
        np.zeros((2, 3)), np.array([0.0, 1.0, 2.0]), np.zeros((1, 2), dtype=bool), np.array([4])
    )
    assert np.isfinite(found).all()


def losses(summary):
    return {row["step"]: row["loss"] for row in summary["training"]["history"] if "loss" in row}


def test_the_cell_is_told_better_than_by_the_mean_cell(trained, corpus):
    folder, summary = trained
    assert summary["cell_loss"] < summary["baseline_cell_loss"] - 0.05
    assert summary["data"]["cell_axes"] == {"axes": 10, "genes": GENES}
    # what is reported is the model's own loss, on cells that are as they were
    model = ScBertForMaskedExpression.from_pretrained(folder)
    _, data_arguments, _, training = parse(PRETRAIN, {"corpus": corpus, "output": "x", **QUICK})
    data = load_data(data_arguments, AutoTokenizer.from_pretrained(folder), training.seed)
    targets = CellTargets(data.tokenizer, data.measured)
    collator = DataCollatorForMaskedExpression(data.tokenizer, seed=training.seed, targets=targets)
    batch = collator(data.validation.__getitems__(range(len(data.validation))))
    batch.pop("indices")
    with torch.no_grad():
        outputs = model(**batch)
    assert outputs.cell_loss.item() == pytest.approx(summary["cell_loss"], rel=1e-4)
    mean = torch.from_numpy(data.mean_cell()).expand(len(data.validation), -1)
    assert whole_cell_loss(mean, batch["cell_targets"]).item() == pytest.approx(summary["baseline_cell_loss"])


def test_one_embedding_whoever_is_asked(trained, corpus):
    folder, _ = trained
    adata = anndata.read_h5ad(corpus / "a.h5ad")[:12].copy()
    embedded = scbert.embed(adata, folder, batch_size=5, progress=False)
    assert embedded.uns["scbert_embedding"]["pooling"].startswith("cell token")
    found = embedded.obsm["X_scbert"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    with torch.no_grad():
        cells = model(**tokenizer(adata, return_tensors="pt")).pooler_output
    np.testing.assert_allclose(found, cells, rtol=1e-4, atol=1e-4)
    by_pipeline = pipeline("cell-embedding", model=str(folder))(adata, batch_size=3)
    np.testing.assert_allclose(found, np.stack(by_pipeline), rtol=1e-4, atol=1e-4)
    # two kinds of cells, told apart by the first axis of the token
    kinds = (adata.X[:, :30].sum(axis=1) > adata.X[:, 30:50].sum(axis=1)).A1
    centered = found - found.mean(axis=0)
    first = centered @ np.linalg.svd(centered)[2][0]
    assert kinds.any() and not kinds.all()
    assert (kinds == (first > 0)).all() or (kinds == (first < 0)).all()


class Killed(Exception):
    pass


def test_a_resumed_run_repeats_an_uninterrupted_one(corpus, trained, tmp_path, monkeypatch):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 11:
                raise Killed

    build = pretrain_trainer.build_pretrainer

    def build_to_be_killed(*arguments):
        trainer = build(*arguments)
        trainer.add_callback(Kill())
        return trainer

    options = {"n_cell_axes": 10, "thinning": 0.5, "save_strategy": "steps", "save_steps": 4, **QUICK}
    with monkeypatch.context() as patch:
        patch.setattr("scbert.training.run_pretrain.build_pretrainer", build_to_be_killed)
        with pytest.raises(Killed):
            pretrain(corpus, tmp_path / "model", **options)
    resumed = pretrain(corpus, tmp_path / "model", resume=True, **options)
    assert losses(resumed) == losses(trained[1])
    assert (resumed["loss"], resumed["cell_loss"]) == (trained[1]["loss"], trained[1]["cell_loss"])


def test_packed_and_accumulated_batches_have_the_losses_of_padded_ones(corpus, tmp_path):
    found = {}
    for packing in (False, True):
        options = {**QUICK, "packing": packing, "gradient_accumulation_steps": 2, "epochs": 2}
        summary = pretrain(corpus, tmp_path / str(packing), **options)
        found[packing] = [*losses(summary).values(), summary["loss"], summary["cell_loss"]]
    np.testing.assert_allclose(found[True], found[False], rtol=1e-3)


def test_going_on_without_the_cell_and_fine_tuning(trained, corpus, tmp_path):
    folder, _ = trained
    more = pretrain(corpus, tmp_path / "more", base=folder, max_steps=2, batch_size=8, use_cpu=True)
    assert np.isfinite(more["cell_loss"])
    plain = {**SIZE, "cell_loss_weight": 0.0}
    summary = pretrain(corpus, tmp_path / "plain", **{**QUICK, "model": plain, "epochs": 1})
    assert "cell_loss" not in summary
    adata = anndata.read_h5ad(corpus / "a.h5ad")
    on = (adata.X[:, :30].sum(axis=1) > adata.X[:, 30:].sum(axis=1)).A1
    adata.obs["kind"] = np.where(on, "left", "right")
    recipe = {"classifier_hidden_sizes": []}
    model = scbert.finetune(
        adata, "kind", tmp_path / "tuned", base=folder, model=recipe, epochs=2, batch_size=8, use_cpu=True,
        learning_rate=0.01,
    )  # fmt: skip
    config = scbert.load_model(tmp_path / "tuned").model.config
    assert config.pooling == "cell"
    labels = scbert.annotate(
        adata,
        tmp_path / "tuned",
        progress=False,
    ).obs["scbert_cell_type"]
    assert model is not None and (labels == adata.obs["kind"]).mean() > 0.9
