"""Attributions, the deletion test and `scbert explain` on a model whose reasons are known."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from scbert import ScBertConfig, ScBertForCellClassification, ScBertTokenizer
from scbert.commands.cli import main
from scbert.interpretation.attribution import gradient_shap, integrated_gradients
from scbert.interpretation.deletion import COLUMNS, deletion_test, remove_top, verdict
from scbert.interpretation.explain_files import explain_file
from scbert.interpretation.explain_types import attention_by_gene, explain
from scbert.interpretation.received_attention import gene_attention
from scbert.tokenization import InputError
from scbert.trained_model.prediction import LoadedModel

LABELS = ["B cell", "CD8+/CD45RA+ T"]
# the only genes that decide, by their place in the panel
DECISIVE = (4, 7, 20)


def make_classifier(gene_panel, **options):
    """A classifier for whose first class three genes speak, and no other."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    sizes |= {"intermediate_size": 8, "num_random_features": 8, "classifier_hidden_sizes": []}
    config = ScBertConfig(
        max_position_embeddings=len(gene_panel) + 1,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
        **{**sizes, **options},
    )
    model = ScBertForCellClassification(config)
    with torch.no_grad():
        model.scbert.embeddings.expression_embeddings.weight.copy_(
            torch.arange(7.0)[:, None] * torch.linspace(-1, 1, 8)
        )
        model.classifier.conv.weight.copy_(torch.linspace(-1, 1, 8)[None])
        model.classifier.out_proj.weight.zero_()
        model.classifier.out_proj.weight[0, list(DECISIVE)] = 1.0
        model.classifier.out_proj.bias.copy_(torch.tensor([-2.0, 0.0]))
    return model.eval()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=[False, True], ids=["expressed genes", "every gene"])
def classifier(request, gene_panel):
    tokenizer = ScBertTokenizer(gene_panel=gene_panel, keep_zeros=request.param)
    return make_classifier(gene_panel), tokenizer


@pytest.mark.parametrize("method", [integrated_gradients, gradient_shap])
def test_the_genes_that_decide_are_found(method, classifier, adata):
    model, tokenizer = classifier
    bins = tokenizer.bin_cells(adata)[:6]
    result = method(model, tokenizer, bins, np.zeros(6, dtype=int))
    assert result.values.shape == bins.shape
    share = np.abs(result.values[:, list(DECISIVE)]).sum() / np.abs(result.values).sum()
    assert share > 0.8
    # a gene at bin 0 is its own baseline
    silent = np.asarray(bins.todense() == 0)
    if method is integrated_gradients:
        assert np.abs(result.values[silent]).max() < 1e-6
        fine = method(model, tokenizer, bins, np.zeros(6, dtype=int), n_steps=256)
        assert fine.relative_error < 0.05
        np.testing.assert_allclose(fine.values.sum(axis=1), fine.explained, rtol=0.1, atol=0.1)
    else:
        again = method(model, tokenizer, bins, np.zeros(6, dtype=int))
        np.testing.assert_array_equal(result.values, again.values)


def test_more_steps_are_more_complete(classifier, adata):
    model, tokenizer = classifier
    bins = tokenizer.bin_cells(adata)[:3]
    errors = [
        integrated_gradients(model, tokenizer, bins, np.zeros(3, dtype=int), n_steps=n).relative_error
        for n in (2, 64)
    ]
    assert errors[1] < errors[0]


def test_attention_stands_at_its_gene(classifier, adata):
    model, tokenizer = classifier
    bins = tokenizer.bin_cells(adata)[:5]
    weights = attention_by_gene(model, tokenizer, bins, batch=2)
    encoded = {k: torch.from_numpy(v) for k, v in tokenizer.encode_bins(bins[:1]).items()}
    alone = gene_attention(model, encoded.pop("input_ids"), encoded.pop("attention_mask", None), **encoded)
    assert weights[0].sum() == pytest.approx(float(alone[0, :-1].sum()), rel=1e-4)
    if not tokenizer.keep_zeros:
        assert (weights[np.asarray(bins.todense() == 0)] == 0).all()


def test_removing_the_genes_that_decide_hurts(classifier, adata):
    model, tokenizer = classifier
    bins = tokenizer.bin_cells(adata)[:20]
    good = np.zeros(bins.shape)
    good[:, list(DECISIVE)] = 1
    targets = np.zeros(20, dtype=int)
    table = deletion_test(
        LoadedModel(model, tokenizer), bins, targets, {"good": good, "bad": -good}, n_genes=3
    )
    assert list(table.columns) == COLUMNS
    good_row, bad_row = table.to_dict(orient="records")
    assert good_row["drop"] > 3 * good_row["random_drop"] and bad_row["drop"] < 0.01
    assert "trust good" in verdict(table) and "not bad" in verdict(table)
    assert "no explanation is to be trusted" in verdict(table[1:])


def test_remove_top_leaves_cells_with_fewer_genes_empty(classifier, adata):
    _, tokenizer = classifier
    bins = tokenizer.bin_cells(adata)[:3]
    emptied = remove_top(bins, np.random.default_rng(0).random(bins.shape), bins.shape[1])
    assert emptied.nnz == 0 and bins.nnz > 0


@pytest.fixture
def model_folder(gene_panel, tmp_path):
    make_classifier(gene_panel).save_pretrained(tmp_path / "model")
    ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_explain_leaves_tables_pictures_and_columns(model_folder, adata, tmp_path, capsys):
    adata.write_h5ad(tmp_path / "query.h5ad")
    pd.DataFrame({"cell_type": ["B cells"] * 2, "gene": ["CD22", "CD3D"]}).to_csv(tmp_path / "known.csv")
    (tmp_path / "sets.gmt").write_text("set\t\t" + "\t".join(adata.var_names[:30]) + "\n")
    arguments = ["explain", str(tmp_path / "query.h5ad"), "--model", str(model_folder), "--top", "3"]
    arguments += ["--output", str(tmp_path / "out"), "--cells-per-type", "4", "--label-key", "cell_type"]
    arguments += [
        "--markers",
        str(tmp_path / "known.csv"),
        "--gene-sets",
        str(tmp_path / "sets.gmt"),
        "--json",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert "Fall of the margin" in printed.err and "Deletion test:" in summary["verdict"]
    assert set(summary["completeness"]) == {"integrated_gradients", "gradient_shap"}
    names = "attention.csv integrated_gradients.csv gradient_shap.csv top_genes.csv marker_overlap.csv "
    names += "enrichment.csv deletion_test.csv explanation.json top_genes_attention.png explained.h5ad"
    for name in names.split():
        assert (tmp_path / "out" / name).is_file(), name
    assert len(list((tmp_path / "out").glob("summary_*.png"))) == len(summary["types"])
    top = pd.read_csv(tmp_path / "out" / "top_genes.csv")
    assert {"explanation", "cell_type", "gene", "z_score", "specificity"} <= set(top)
    first = top[(top.explanation == "integrated_gradients") & (top.cell_type == "B cell")]
    assert set(first.gene) <= {adata.var_names[i] for i in DECISIVE}
    explained = anndata.read_h5ad(tmp_path / "out" / "explained.h5ad")
    assert explained.varm["scbert_attention"].shape == (adata.n_vars, len(summary["types"]))
    assert {"scbert_attention", "scbert_integrated_gradients", "scbert_gradient_shap"} <= set(explained.var)
    assert list(explained.uns["scbert_explanation"]["types"]) == summary["types"]


def test_a_model_without_attention_is_explained_by_gradients(gene_panel, adata, tmp_path):
    make_classifier(gene_panel, num_hidden_layers=0).save_pretrained(tmp_path / "model")
    ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False).save_pretrained(tmp_path / "model")
    # names too long for those of files
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"] = {number: f"{name} 单核细胞" * 60 for number, name in config["id2label"].items()}
    config["label2id"] = {name: int(number) for number, name in config["id2label"].items()}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    adata.write_h5ad(tmp_path / "query.h5ad")
    result = explain_file(
        tmp_path / "query.h5ad", tmp_path / "model", tmp_path / "out", cells_per_type=3, n_top=3
    )
    assert [row["explanation"] for row in result["deletion_test"]] == [
        "integrated_gradients",
        "gradient_shap",
    ]


def test_genes_that_the_model_knows_by_other_names_are_explained(adata, tmp_path):
    """Such as Ensembl ids with versions."""
    ids = [f"ENSG{number:011d}" for number in range(adata.n_vars)]
    make_classifier(ids, num_hidden_layers=0).save_pretrained(tmp_path / "model")
    ScBertTokenizer(gene_panel=ids, keep_zeros=False).save_pretrained(tmp_path / "model")
    adata.var_names = [f"{name}.7" for name in ids]
    adata.write_h5ad(tmp_path / "query.h5ad")
    explain_file(tmp_path / "query.h5ad", tmp_path / "model", tmp_path / "out", cells_per_type=3, n_steps=2)
    explained = anndata.read_h5ad(tmp_path / "out" / "explained.h5ad")
    assert explained.var["scbert_integrated_gradients"].notna().all()
    assert list(explained.var_names) == list(adata.var_names)
    assert set(pd.read_csv(tmp_path / "out" / "de_agreement.csv")["n_genes"]) == {adata.n_vars}


LSH = {
    "attention_type": "lsh",
    "lsh_chunk_length": 16,
    "lsh_num_buckets": 8,
    "position_embedding_type": "sinusoidal",
}


def test_an_lsh_model_is_explained_and_its_completeness_error_told(gene_panel, adata, tmp_path, capsys):
    make_classifier(gene_panel, **LSH).save_pretrained(tmp_path / "model")
    ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False).save_pretrained(tmp_path / "model")
    adata[:30].write_h5ad(tmp_path / "query.h5ad")
    command = ["explain", str(tmp_path / "query.h5ad"), "--model", str(tmp_path / "model"), "--top", "3"]
    assert main([*command, "--output", str(tmp_path / "out"), "--cells-per-type", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert all(np.isfinite(error) for error in result["completeness"].values())
    # hashing is constant between its jumps: the genes that decide are found all the same
    top = pd.read_csv(tmp_path / "out" / "top_genes.csv")
    for name in ("integrated_gradients", "gradient_shap"):
        first = top[(top.explanation == name) & (top.cell_type == "B cell")]
        assert len(set(first.gene) & {adata.var_names[i] for i in DECISIVE}) >= 2, name
    assert {"attention", "gradient_shap"} <= {row["explanation"] for row in result["deletion_test"]}


def test_the_completeness_error_of_an_lsh_model_is_what_its_gradients_miss(gene_panel, adata):
    tokenizer = ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False)
    bins = tokenizer.bin_cells(adata)[:2]
    model = make_classifier(gene_panel, **LSH)
    with torch.no_grad():
        # tokens change their buckets on the way, and attention counts
        for name in ("v_proj", "o_proj"):
            getattr(model.scbert.layers[0].attention, name).weight.mul_(30)
    result = integrated_gradients(model, tokenizer, bins, np.zeros(2, dtype=int), n_steps=32)
    missed = np.abs(result.values.sum(axis=1) - result.explained)
    assert missed.min() > 1e-4
    np.testing.assert_allclose(missed, result.completeness_error, rtol=0.05, atol=0.02)


def test_modalities_reach_the_explanations(gene_panel, adata):
    kinds = [0] * 150 + [1] * 150
    tokenizer = ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False, feature_modalities=kinds)
    model = make_classifier(gene_panel, num_modalities=2)
    with torch.no_grad():
        model.scbert.embeddings.modality_embeddings.weight.copy_(
            torch.stack([torch.zeros(8), torch.ones(8) * 3])
        )
    bins = tokenizer.bin_cells(adata)[:2]
    encoded = {name: torch.from_numpy(array) for name, array in tokenizer.encode_bins(bins).items()}
    with torch.no_grad():
        whole = model(**encoded).logits[:, 0]
        empty = model(**{**encoded, "input_ids": torch.zeros_like(encoded["input_ids"])}).logits[:, 0]
    result = integrated_gradients(model, tokenizer, bins, np.zeros(2, dtype=int), n_steps=4)
    np.testing.assert_allclose(result.explained, (whole - empty).numpy(), rtol=1e-5)


def test_a_missing_column_and_no_cells_are_named(model_folder, adata, tmp_path):
    adata.write_h5ad(tmp_path / "query.h5ad")
    arguments = ["explain", str(tmp_path / "query.h5ad"), "--model", str(model_folder), "--label-key", "type"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
    for name in ("cells_per_type", "n_top", "n_steps"):
        with pytest.raises(InputError, match=f"{name} .* found 0"):
            explain(adata, model_folder, **{name: 0})


@pytest.mark.parametrize(
    ("option", "content", "told"),
    [("--marker-names", "[1]", "JSON object"), ("--gene-sets", "x", "no gene set")],
)
def test_files_that_cannot_be_used_are_told_before_the_work(
    option, content, told, model_folder, adata, tmp_path, capsys, monkeypatch
):
    adata.write_h5ad(tmp_path / "query.h5ad")
    (tmp_path / "file").write_text(content)
    monkeypatch.setattr("scbert.interpretation.explain_files.explanations", None)
    arguments = ["explain", str(tmp_path / "query.h5ad"), "--model", str(model_folder), option]
    assert main([*arguments, str(tmp_path / "file"), "--output", str(tmp_path / "out")]) == 1
    assert told in capsys.readouterr().err


def test_a_ratio_that_is_no_number_is_null_in_the_file(model_folder, adata, tmp_path, monkeypatch):
    def without_ratio(*arguments, **options):
        return deletion_test(*arguments, **options).assign(ratio=np.nan)

    monkeypatch.setattr("scbert.interpretation.explain_files.deletion_test", without_ratio)
    adata.write_h5ad(tmp_path / "query.h5ad")
    explain_file(tmp_path / "query.h5ad", model_folder, tmp_path / "out", cells_per_type=1, n_steps=2)
    written = json.loads((tmp_path / "out" / "explanation.json").read_text(), parse_constant=pytest.fail)
    assert [row["ratio"] for row in written["deletion_test"]] == [None] * 3
