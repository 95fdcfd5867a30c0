import pytest
import torch

from scbert import ScBertConfig, ScBertForMaskedExpression, ScBertModel
from scbert.interpretation import received_attention as module
from scbert.interpretation.received_attention import gene_attention
from scbert.tokenization import InputError

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "num_random_features": 16,
    "lsh_num_buckets": 4,
    "lsh_chunk_length": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 30,
    "initializer_range": 0.5,
}


def make(kind, **changes):
    return ScBertForMaskedExpression(ScBertConfig(**SIZE, **{"attention_type": kind, **changes})).eval()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "with gradients"])
@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("kind", ["favor", "softmax", "lsh"])
def test_equals_the_column_sums_of_the_attention_matrices(kind, reversible, training):
    model = make(kind, reversible=reversible)
    ids = torch.randint(0, 6, (3, 30), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(training)
    found = gene_attention(model, ids)
    matrices = model(ids, output_attentions=True).attentions
    assert found.std() > 1e-3
    torch.testing.assert_close(found, torch.stack(matrices).mean(dim=(0, 2)).sum(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["favor", "softmax", "lsh"])
def test_pads_neither_give_nor_receive(kind):
    model = make(kind)
    ids = torch.randint(0, 6, (2, 30), generator=torch.Generator().manual_seed(0))
    gene_ids = torch.arange(30).expand(2, 30)
    mask = (torch.arange(30) < torch.tensor([[30], [20]])).long()
    padded = gene_attention(model, ids, mask, gene_ids=gene_ids)
    alone = gene_attention(model, ids[1:, :20], gene_ids=gene_ids[1:, :20])
    torch.testing.assert_close(padded[1, :20], alone[0], atol=1e-5, rtol=1e-5)
    assert not padded[1, 20:].any()
    torch.testing.assert_close(padded.sum(1), torch.tensor([30.0, 20.0]))
    assert not gene_attention(model, ids, torch.zeros_like(mask)).any()


@pytest.mark.parametrize("kind", ["favor", "softmax", "lsh"])
def test_parts_make_no_difference(kind, monkeypatch):
    model = make(kind)
    ids = torch.randint(0, 6, (5, 30), generator=torch.Generator().manual_seed(0))
    whole = gene_attention(model, ids)
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 60)
    torch.testing.assert_close(gene_attention(model, ids), whole)


def test_a_model_without_layers_is_refused():
    ids = torch.zeros(1, 30, dtype=torch.long)
    with pytest.raises(InputError, match="no layers"):
        gene_attention(ScBertModel(ScBertConfig(**SIZE | {"num_hidden_layers": 0})), ids)


def test_hooks_are_taken_away():
    model = make("favor")
    gene_attention(model, torch.zeros(1, 30, dtype=torch.long))
    assert not any(layer._forward_pre_hooks for layer in model.scbert.layers)
