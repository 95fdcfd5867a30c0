"""The three published recipes end to end: finetune, annotate, then the folder alone, without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from transformers import AutoConfig, AutoModel

import scbert
from scbert.commands.cli import main

RECIPES = ("scbert", "scmbert", "screformer")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "num_random_features": 8,
    "lsh_chunk_length": 16,
    "lsh_num_buckets": 8,
    "initializer_range": 0.2,
}
SHORT = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.01,
    "use_cpu": True,
}
# no scbert can be imported, as on a machine that has the folder only
SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "scbert":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
sys.path[:] = [path for path in sys.path if path]

import numpy as np
import scipy.sparse as sp
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

torch.set_num_threads(1)
output, trusted = sys.argv[1], {"trust_remote_code": True}
for name in sys.argv[2:]:
    folder, found = f"{output}/{name}", {}
    cells = {"X": sp.load_npz(f"{folder}/cells.npz"), "gene_names": open(f"{folder}/names.txt").read().split()}
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    encoded = tokenizer(cells["X"], gene_names=cells["gene_names"], return_tensors="pt")
    with torch.no_grad():
        found["logits"] = AutoModelForSequenceClassification.from_pretrained(folder, **trusted)(**encoded).logits
        found["hidden"] = AutoModel.from_pretrained(folder, **trusted)(**encoded).last_hidden_state
    answers = pipeline("cell-type-annotation", model=folder, **trusted)(cells)
    found["labels"] = [max(answer, key=lambda each: each["score"])["label"] for answer in answers]
    np.savez(f"{output}/{name}.npz", **{key: np.asarray(value) for key, value in found.items()})
"""


def tiny_recipe(name, folder):
    """The shipped recipe with everything that makes it what it is, at a size that trains in a second."""
    recipe = json.loads((Path(scbert.__file__).parent / "training" / "recipes" / f"{name}.json").read_text())
    recipe["model"] |= SIZES
    recipe["training"] |= SHORT
    (folder / f"{name}.json").write_text(json.dumps(recipe))
    return folder / f"{name}.json"


def with_peaks(adata, folder):
    """The cells and twelve peaks, as `scbert combine-modalities` joins them."""
    peaks = [f"chr1:{1000 * i}-{1000 * i + 500}" for i in range(1, 13)]
    open_in = np.arange(12) % 3 == adata.obs["cell_type"].cat.codes.to_numpy()[:, None]
    atac = anndata.AnnData(
        sp.csr_matrix(open_in, dtype=np.float32), obs=adata.obs[[]], var=pd.DataFrame(index=peaks)
    )
    atac.write_h5ad(folder / "atac.h5ad")
    command = ["combine", str(folder / "rna.h5ad"), "--atac", str(folder / "atac.h5ad"), "--genome", "hg38"]
    assert main([*command, "--output", str(folder / "both.h5ad")]) == 0
    return folder / "both.h5ad"


def test_finetune_annotate_and_reload(adata, tmp_path):
    pytest.importorskip("bioframe")
    torch.set_num_threads(1)
    adata.write_h5ad(tmp_path / "rna.h5ad")
    annotated = {}
    for name in RECIPES:
        cells = with_peaks(adata, tmp_path) if name == "scmbert" else tmp_path / "rna.h5ad"
        folder, output = tmp_path / name, tmp_path / f"{name}.h5ad"
        command = ["finetune", str(cells), "--label-key", "cell_type", "--output", str(folder)]
        assert main([*command, "--recipe", str(tiny_recipe(name, tmp_path))]) == 0
        command = [
            "annotate",
            str(cells),
            "--model",
            str(folder),
            "--output",
            str(output),
            "--threshold",
            "0",
        ]
        assert main(command) == 0
        annotated[name] = anndata.read_h5ad(output)
        sp.save_npz(folder / "cells.npz", sp.csr_matrix(annotated[name].X[:12]))
        (folder / "names.txt").write_text("\n".join(annotated[name].var_names))

    kinds = {name: AutoConfig.from_pretrained(tmp_path / name) for name in RECIPES}
    assert kinds["scbert"].attention_type == "favor" and kinds["scbert"].pooling == "conv"
    assert kinds["scmbert"].num_modalities == 2 and kinds["scmbert"].pooling == "mean"
    assert kinds["screformer"].reversible and kinds["screformer"].position_embedding_type == "sinusoidal"

    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), *RECIPES],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    for name in RECIPES:
        found, cells = np.load(tmp_path / f"{name}.npz"), annotated[name]
        model = AutoModel.from_pretrained(tmp_path / name).eval()
        assert found["hidden"].shape[-1] == model.config.hidden_size and np.isfinite(found["hidden"]).all()
        chances = torch.from_numpy(found["logits"]).softmax(-1)
        np.testing.assert_allclose(chances, cells.obsm["scbert_probabilities"][:12], atol=1e-4)
        called = cells.obs["scbert_cell_type"][:12].astype(str).to_numpy()
        # the command was given no threshold, the pipeline has the model's
        assigned = found["labels"] != "unassigned"
        assert found["labels"][assigned].tolist() == called[assigned].tolist(), name
