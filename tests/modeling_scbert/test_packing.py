"""Packed cells: outputs and gradients of the padded batch, for every kind of attention and both heads."""

import pytest
import torch

from scbert import ScBertConfig, ScBertForCellClassification, ScBertForMaskedExpression
from scbert.modeling_scbert.backends_scbert import favor_backend
from scbert.modeling_scbert.packing_scbert import pack, per_cell, unpack

GENES = 60
LENGTHS = (40, 7, 25)
KINDS = {
    "favor": {"attention_type": "favor"},
    "softmax": {"attention_type": "softmax"},
    "lsh": {"attention_type": "lsh", "lsh_chunk_length": 8, "lsh_num_buckets": 4},
    "favor, reversible": {"attention_type": "favor", "reversible": True},
}


def make(model_class, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"intermediate_size": 16, "num_random_features": 8, "classifier_hidden_sizes": [8]}
    sizes |= {"num_modalities": 2, "freeze_gene_embeddings": False, "initializer_range": 0.3}
    # evaluation: in training LSH draws its hash anew for every call
    return model_class(ScBertConfig(max_position_embeddings=GENES + 1, **{**sizes, **options})).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    genes = torch.stack([torch.randperm(GENES + 1, generator=generator)[: max(LENGTHS)] for _ in LENGTHS])
    cells = torch.randint(1, 6, mask.shape, generator=generator) * mask
    found = {"input_ids": cells, "gene_ids": genes, "modality_ids": genes % 2, "attention_mask": mask}
    return found | {"labels": torch.where((cells > 2) & (mask > 0), cells, -100)}


def gradients(model, loss):
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind, backend", [*((kind, "plain") for kind in KINDS), ("favor", "chunked")])
def test_masked_expression_is_that_of_the_padded_batch(kind, backend, batch):
    found = {}
    for name, inputs in {"padded": batch, "packed": pack(batch)}.items():
        model = make(ScBertForMaskedExpression, **KINDS[kind])
        with favor_backend(backend):
            output = model(**inputs)
            found[name] = output, gradients(model, output.loss)
    padded, packed = found["padded"][0], found["packed"][0]
    assert packed.logits.shape == (1, sum(LENGTHS), 7)
    keep = batch["attention_mask"].bool()
    torch.testing.assert_close(packed.logits[0], padded.logits[keep], atol=1e-5, rtol=1e-5)
    for loss in ("loss", "masked_expression_loss", "modality_loss"):
        torch.testing.assert_close(packed[loss], padded[loss], atol=1e-5, rtol=1e-5)
    assert set(found["packed"][1]) == set(found["padded"][1])
    for name, gradient in found["padded"][1].items():
        torch.testing.assert_close(found["packed"][1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("pooling", ["conv", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_those_of_the_padded_batch(kind, pooling, batch):
    model, labels = make(ScBertForCellClassification, pooling=pooling, **KINDS[kind]), torch.tensor([0, 1, 0])
    with torch.no_grad():
        padded, packed = (model(**{**inputs, "labels": labels}) for inputs in (batch, pack(batch)))
    torch.testing.assert_close(packed.logits, padded.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.loss, padded.loss, atol=1e-5, rtol=1e-5)


def test_packing_and_back(batch):
    packed = pack(batch)
    assert packed["attention_mask"].tolist() == [0, 40, 47, 72]
    torch.testing.assert_close(unpack(packed["input_ids"], packed["attention_mask"]), batch["input_ids"])
    whole = {"input_ids": batch["input_ids"]}
    assert pack(whole) is whole


def test_what_cannot_be_is_said(batch):
    row = torch.ones(1, 5, 2)
    for bounds in ([0, 2, 4], [1, 5], [0, 3, 3, 5]):
        with pytest.raises(ValueError, match="bounds"):
            per_cell(lambda cell: cell, row, torch.tensor(bounds))
    with pytest.raises(ValueError, match="one row"):
        per_cell(lambda cell: cell, torch.ones(2, 5, 2), torch.tensor([0, 5]))
    model, packed = make(ScBertForCellClassification, attn_implementation="eager"), pack(batch)
    del packed["labels"]
    with pytest.raises(ValueError, match="attentions"):
        model(**packed, output_attentions=True)
    del packed["gene_ids"]
    with pytest.raises(ValueError, match="gene_ids"):
        model(**packed)
