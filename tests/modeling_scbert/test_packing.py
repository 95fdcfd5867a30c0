"""Packed cells: outputs and gradients of the padded batch and of cells one by one, for every kind of attention."""

import pytest
import torch

from scbert import ScBertConfig, ScBertForCellClassification, ScBertForMaskedExpression
from scbert.modeling_scbert.backends_scbert import favor_backend
from scbert.modeling_scbert.blocks_scbert import run_block
from scbert.modeling_scbert.packing_scbert import in_batches, pack, unpack

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(5,), (9, 9, 9), (1, 300, 2, 280, 3, 700)])
def test_a_block_is_that_of_cells_one_by_one(kind, dtype, lengths):
    layer = make(ScBertForMaskedExpression, **KINDS[kind]).scbert.layers[0].to(dtype)
    generator = torch.Generator().manual_seed(sum(lengths))
    row = torch.randn(1, sum(lengths), 16, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(row.shape, generator=generator).to(dtype)
    inputs = [row, *layer.parameters()]
    normed = layer.attention_norm(row).split(lengths, 1)
    single = row + torch.cat([layer.attention(cell)[0] for cell in normed], 1)
    single = single + layer.feed_forward(single)
    wanted = [single, *torch.autograd.grad(single, inputs, grad)]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    # scores of LSH are float32
    tolerance = {torch.float64: 2e-5 if kind == "lsh" else 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}[
        dtype
    ]
    for block in ["plain", "chunked"] if kind == "favor" and dtype != torch.bfloat16 else ["plain"]:
        packed = run_block(block, layer, row, bounds)
        for mine, theirs in zip([packed, *torch.autograd.grad(packed, inputs, grad)], wanted, strict=True):
            assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_batches_are_few_and_hold_little_padding():
    lengths = torch.randint(500, 1500, (500,), generator=torch.Generator().manual_seed(0))
    bounds, shapes = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), []

    def function(cells, mask):
        shapes.append(cells.shape[:2])
        assert mask is None or not cells[~mask].isnan().any()
        return cells

    row = torch.arange(int(bounds[-1]))[None, :, None].float()
    torch.testing.assert_close(in_batches(function, row, bounds), row)
    assert len(shapes) <= 10 and sum(cells * longest for cells, longest in shapes) < 1.12 * row.numel()


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
            in_batches(lambda cells, mask: cells, row, torch.tensor(bounds))
    with pytest.raises(ValueError, match="one row"):
        in_batches(lambda cells, mask: cells, torch.ones(2, 5, 2), torch.tensor([0, 5]))
    model, packed = make(ScBertForCellClassification, attn_implementation="eager"), pack(batch)
    del packed["labels"]
    with pytest.raises(ValueError, match="attentions"):
        model(**packed, output_attentions=True)
    del packed["gene_ids"]
    with pytest.raises(ValueError, match="gene_ids"):
        model(**packed)
