"""The studies beside the package: batch effect of an embedding, the ablation grid."""

import json

import pandas as pd
import pytest
import torch

import ablation_study
import integration_study
from ablation_study import FACTORS, grid
from scbert import ScBertConfig, ScBertForMaskedExpression, ScBertTokenizer
from scbert.protocols.cells import load_benchmark_cells
from scbert.tokenization import InputError

TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 4,
    "intermediate_size": 8,
    "num_random_features": 8,
    "classifier_hidden_sizes": [],
}
TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 32, "learning_rate": 0.03, "use_cpu": True}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def cells_file(adata, tmp_path):
    """Cells whose last 20 features pass for peaks."""
    names = adata.var_names.tolist()
    names[280:] = [f"chr1:{1000 * i}-{1000 * i + 500}" for i in range(1, 21)]
    adata.var_names = names
    adata.var["feature_types"] = ["Gene Expression"] * 280 + ["Peaks"] * 20
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"model": TINY, "tokenizer": {"keep_zeros": False}, "training": TRAINING}))
    return path


def test_batch_effect_before_and_after(adata, tmp_path, capsys, monkeypatch):
    # the pictures' coordinates cost more than all the rest
    monkeypatch.setattr(integration_study, "umap_of", lambda vectors, seed: vectors[:, :2])
    tokenizer = ScBertTokenizer(gene_panel=adata.var_names.tolist(), keep_zeros=False)
    torch.manual_seed(0)
    config = ScBertConfig(max_position_embeddings=301, **TINY)
    ScBertForMaskedExpression(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    command = [str(tmp_path / "cells.h5ad"), "--label-key", "cell_type", "--output", str(tmp_path / "out")]
    command += ["--base", str(tmp_path / "base"), "--group-key"]
    assert integration_study.main([*command, "nothing"]) == 1
    assert "batch" in capsys.readouterr().err
    assert integration_study.main([*command, "batch"]) == 0
    assert "scBERT embedding" in capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["representation"]: row for row in result["rows"]}
    assert list(rows) == ["values as they stand, PCA", "log1p, PCA", "scBERT embedding", "untrained scBERT"]
    for row in rows.values():
        assert 0 <= row["avg_bio"] <= 1 and 0 <= row["avg_batch"] <= 1
    # markers decide the types; weights that learnt nothing lose to them, and it is said
    assert rows["log1p, PCA"]["avg_bio"] > 0.8
    assert any("log1p, PCA beats" in warning for warning in result["warnings"])
    assert (tmp_path / "out" / "umap_scBERT_embedding.png").is_file()
    assert not (tmp_path / "out" / "work").exists()


def test_the_grid_is_every_combination():
    points = grid({}, several_modalities=True)
    assert len(points) == len({tuple(point.values()) for point in points}) == 24
    assert {point["modality"] for point in grid({}, several_modalities=False)} == {"no"}
    assert all(set(point) == set(FACTORS) for point in points)
    with pytest.raises(InputError, match="encoder mamba"):
        grid({"encoder": ["mamba"]}, False)


def test_an_ablation_is_resumed_and_tabulated(cells_file, recipe, tmp_path, monkeypatch):
    settings = {
        "grid": {"encoder": ["favor", "lsh"], "gene embedding": ["gene2vec"], "modality": ["yes"]},
        "pretrain": {"epochs": 1},
        "gene2vec": {"top_pairs": 500, "iterations": 1},
        "top_features": 60,
    }
    settings["recipe"] = str(recipe)
    given = (load_benchmark_cells([cells_file], "cell_type"), tmp_path / "out")
    options = {"baselines": "logistic_l2", "draws": 2, "settings": settings}
    make_base, made = ablation_study.make_base, []

    def interrupted(point, *args):
        made.append(tuple(point.values()))
        if len(made) == 3:
            raise KeyboardInterrupt
        return make_base(point, *args)

    monkeypatch.setattr(ablation_study, "make_base", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablation_study.run_ablation(*given, **options)
    with pytest.raises(InputError, match="other draws"):
        ablation_study.run_ablation(*given, **{**options, "draws": 3}, resume=True)
    result, _ = ablation_study.run_ablation(*given, **options, resume=True)
    # four combinations in two draws; the one that was interrupted is trained twice
    assert len(made) == 9 and made[2] == made[3]
    models = [entry for entry in result["summary"] if not entry["baseline"]]
    assert [(entry["encoder"], entry["pretraining"]) for entry in models] == [
        ("favor", "yes"), ("favor", "no"), ("lsh", "yes"), ("lsh", "no"),
    ]  # fmt: skip
    assert all((entry["masked_accuracy"] > 0) == (entry["pretraining"] == "yes") for entry in models)
    table = pd.read_csv(tmp_path / "out" / "ablation.csv")
    assert len(table) == 5 and table["macro_f1_sd"].notna().all()
    assert len(pd.read_csv(tmp_path / "out" / "draws.csv")) == 10
    text = (tmp_path / "out" / "table.md").read_text()
    assert "logistic_l2 | baseline" in text and "pretraining: yes" in text
    assert not list((tmp_path / "out").glob("gene_vectors*")) and not (tmp_path / "out" / "work").exists()
