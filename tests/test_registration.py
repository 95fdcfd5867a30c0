"""`import scbert` makes transformers' Auto classes know the model, whatever is imported first."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

import scbert

FIRST_IMPORTS = {
    "ours first": "import scbert; from transformers import AutoModel",
    "theirs first": "from transformers import AutoModel; import scbert",
    "the package only": "import scbert.modeling_scbert; from transformers import AutoModel",
    "within their own imports": (
        "import scbert; from transformers.modeling_layers import GradientCheckpointingLayer;"
        "from transformers import AutoModel"
    ),
    "the tokenizer first": "from scbert import ScBertTokenizer; from transformers import AutoModel",
}
LOAD = """
from transformers import AutoConfig
config = AutoConfig.from_pretrained({folder!r})
model = AutoModel.from_config(config)
import scbert
assert type(config) is scbert.ScBertConfig and type(model) is scbert.ScBertModel
import inspect, sys
inspect.getsource(type(model))
"""


@pytest.fixture(scope="module")
def tiny_config():
    return scbert.ScBertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=8,
        intermediate_size=8,
        max_position_embeddings=12,
        num_random_features=8,
        classifier_hidden_sizes=(),
    )


def test_auto_classes_know_the_model(tiny_config):
    assert type(AutoConfig.for_model("scbert")) is scbert.ScBertConfig
    for auto, ours in (
        (AutoModel, scbert.ScBertModel),
        (AutoModelForMaskedLM, scbert.ScBertForMaskedExpression),
        (AutoModelForSequenceClassification, scbert.ScBertForCellClassification),
    ):
        assert type(auto.from_config(tiny_config)) is ours
    assert TOKENIZER_MAPPING[scbert.ScBertConfig] is scbert.ScBertTokenizer


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_tuples_may_be_asked_for_in_the_config(auto, tiny_config):
    model, bins = auto.from_config(copy.deepcopy(tiny_config)).eval(), torch.ones(2, 12, dtype=torch.long)
    wanted = model(bins)[0]
    model.config.return_dict = False
    assert isinstance(model(bins), tuple) and torch.equal(model(bins)[0], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("order", FIRST_IMPORTS)
def test_in_every_order_of_imports(order, tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    script = FIRST_IMPORTS[order] + LOAD.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_transformers_reads_its_folders_once_and_lists_the_same(tmp_path):
    ours = (
        "import scbert, transformers.models; from transformers.utils import import_utils;"
        "kept = import_utils.create_import_structure_from_path; found = kept.cache_info();"
        "assert found.hits > 100, found;"
    )
    listing = "import transformers.models; print(sorted(dir(transformers)), sorted(dir(transformers.models)))"
    shown = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        for script in (ours + listing, listing)
    ]
    assert shown[0].stdout == shown[1].stdout


def test_public_names():
    assert set(scbert.__all__) <= set(dir(scbert))
    for name in scbert.__all__:
        value = getattr(scbert, name)
        assert name == "__version__" or (value.__name__ == name and value.__module__.startswith("scbert."))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = scbert.no_such_name
