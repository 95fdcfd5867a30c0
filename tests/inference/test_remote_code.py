"""A checkpoint in a fresh process without this package: the same numbers, to the bit."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from scbert import ScBertForMaskedExpression

# no scbert can be imported: not installed as far as this process can see
SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "scbert":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
sys.path[:] = [path for path in sys.path if path]

import json
import numpy as np
import scipy.sparse as sp
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

torch.set_num_threads(1)
classifier, pretrained, output = sys.argv[1:]
cells = sp.load_npz(output + "/cells.npz")
trusted = {"trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(classifier, **trusted)
assert type(tokenizer).__module__.startswith("transformers_modules"), type(tokenizer)
encoded = tokenizer(cells, return_tensors="pt")
found = {}
with torch.no_grad():
    model = AutoModelForSequenceClassification.from_pretrained(classifier, **trusted)
    found["logits"] = model(**encoded).logits
    found["hidden"] = AutoModel.from_pretrained(classifier, **trusted)(**encoded).last_hidden_state
    found["masked"] = AutoModelForMaskedLM.from_pretrained(pretrained, **trusted)(**encoded).logits
annotator = pipeline("cell-type-annotation", model=classifier, **trusted)
# the one task that a classifier's config lists
assert type(pipeline(model=classifier, **trusted)).__name__ == "CellTypeAnnotationPipeline"
assert type(pipeline(model=pretrained, **trusted)).__name__ == "CellEmbeddingPipeline"
embedder = AutoModel.from_pretrained(classifier, **trusted).as_pipeline(tokenizer)
found["embeddings"] = np.stack(embedder(cells, batch_size=4))
# the kernels and the compiled blocks, which need more than torch, are the package's
modules = [name.rpartition(".")[2] for name in sys.modules if name.startswith("transformers_modules")]
assert "blocks_scbert" in modules and not {"compiled_layer_scbert", "favor_triton_scbert"} & set(modules)
labels = annotator(cells, batch_size=4)
# what was loaded this way can be saved and loaded again
annotator.save_pretrained(output + "/again")
again = pipeline("cell-type-annotation", model=output + "/again", **trusted)
assert again(cells, batch_size=4) == labels
assert "scbert" not in sys.modules
np.savez(output + "/found.npz", **{name: np.asarray(value) for name, value in found.items()})
json.dump(labels, open(output + "/labels.json", "w"))
"""


def test_works_without_the_package_to_the_bit(adata, make_model, tmp_path):
    import scipy.sparse as sp

    cells = adata.X[:10]
    sp.save_npz(tmp_path / "cells.npz", cells)
    classifier = str(make_model())
    pretrained = str(make_model("pretrained", model_class=ScBertForMaskedExpression))
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, classifier, pretrained, str(tmp_path)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")

    encoded = AutoTokenizer.from_pretrained(classifier)(cells, return_tensors="pt")
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(classifier)
        np.testing.assert_array_equal(found["logits"], model(**encoded).logits)
        hidden = AutoModel.from_pretrained(classifier)(**encoded).last_hidden_state
        np.testing.assert_array_equal(found["hidden"], hidden)
        masked = AutoModelForMaskedLM.from_pretrained(pretrained)(**encoded).logits
        np.testing.assert_array_equal(found["masked"], masked)
    embeddings = np.stack(pipeline("cell-embedding", model=classifier)(cells, batch_size=4))
    np.testing.assert_array_equal(found["embeddings"], embeddings)
    labels = pipeline("cell-type-annotation", model=classifier)(cells, batch_size=4)
    assert json.loads((tmp_path / "labels.json").read_text()) == labels


JOINED = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "scbert" not in sys.modules and type(model).__module__.startswith("transformers_modules")
bins = torch.arange(2 * model.config.max_position_embeddings).view(2, -1) % 6
backends = sys.modules[type(model).__module__.rpartition(".")[0] + ".backends_scbert"]
with torch.no_grad():
    wanted = model(bins).last_hidden_state
    try:
        with backends.favor_backend("compiled"):
            torch.testing.assert_close(model(bins).last_hidden_state, wanted)
        print("compiled")
    except ValueError as error:
        print(error)
"""


def test_the_installed_package_lends_a_checkpoint_s_code_its_backends(make_model, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", JOINED, str(make_model())],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.strip() == "compiled" or "compiler" in ran.stdout, ran.stdout


@pytest.mark.parametrize("tokenizer", [{}, {"keep_zeros": False}], ids=["every gene", "expressed genes"])
def test_saved_and_reloaded_logits_are_equal_to_the_bit(adata, make_model, tmp_path, tokenizer):
    first = make_model(tokenizer=tokenizer)
    model, encoded = (
        AutoModelForSequenceClassification.from_pretrained(first),
        AutoTokenizer.from_pretrained(first),
    )
    encoded = encoded(adata[:10], return_tensors="pt")
    model.save_pretrained(tmp_path / "second")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    with torch.no_grad():
        assert torch.equal(model(**encoded).logits, again(**encoded).logits)
