"""Tiny models in folders, as `scbert finetune` would leave them."""

import pytest
import torch

from scbert import ScBertConfig, ScBertForCellClassification, ScBertForMaskedExpression, ScBertTokenizer

torch.set_num_threads(1)  # the models are far too small for two

LABELS = ["B cell", "CD8+/CD45RA+ T", "单核细胞"]


def _config(n_genes, **options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"intermediate_size": 32, "num_random_features": 16, "classifier_hidden_sizes": [8]}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    return ScBertConfig(**{"max_position_embeddings": n_genes + 1, **sizes, **names, **options})


def _strengthen(model):
    """Random weights large enough for cells to differ visibly, and for the classes to be about equally common."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 3.0 if name.endswith("out_proj.weight") else 0.4
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


@pytest.fixture
def make_model(gene_panel, tmp_path):
    """Function that writes a tiny classifier over `gene_panel` into a folder and returns its path."""

    def make(
        name="model", panel=gene_panel, model_class=ScBertForCellClassification, tokenizer=None, **options
    ):
        torch.manual_seed(0)
        folder = tmp_path / name
        tokenizer = ScBertTokenizer(gene_panel=panel, **(tokenizer or {}))
        config = _config(len(panel), vocab_size=tokenizer.n_bins + 2, **options)
        _strengthen(model_class(config)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def model_dir(make_model):
    """A tiny fine-tuned scBERT."""
    return make_model()


@pytest.fixture
def pretrained_dir(make_model):
    """A tiny model without cell types."""
    return make_model("pretrained", model_class=ScBertForMaskedExpression)


@pytest.fixture
def query(adata, tmp_path):
    """`adata` as a file."""
    path = tmp_path / "query.h5ad"
    adata.write_h5ad(path)
    return path
