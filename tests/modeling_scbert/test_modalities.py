"""Several modalities in one model: embeddings, the second loss, padding, and growth of a trained model."""

import pytest
import torch

from scbert import ScBertConfig, ScBertForCellClassification, ScBertForMaskedExpression, ScBertModel

LENGTH = 21
EVERY_ATTENTION = pytest.mark.parametrize("attention_type", ["favor", "lsh", "softmax"])


def build(model_class=ScBertForMaskedExpression, **settings):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
        "intermediate_size": 32,
        "num_random_features": 12,
        "lsh_num_buckets": 4,
        "lsh_chunk_length": 4,
        "max_position_embeddings": LENGTH,
        "vocab_size": 53,
        "num_modalities": 2,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    return model_class(ScBertConfig(**(sizes | settings))).eval()


def batch(seed=0):
    """Two cells of 12 and 7 features: any order of genes, padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    gene_ids = torch.stack([torch.randperm(LENGTH - 1, generator=generator)[:12] for _ in range(2)])
    gene_ids = gene_ids.masked_fill(mask == 0, LENGTH - 1)
    return {
        "input_ids": torch.randint(1, 52, (2, 12), generator=generator) * mask,
        "gene_ids": gene_ids,
        "modality_ids": (gene_ids >= 10).long() * mask,
        "attention_mask": mask,
    }


def test_both_losses_are_reported_and_weighted():
    inputs = batch()
    labels = (
        inputs["input_ids"]
        .masked_fill(torch.arange(12) % 3 > 0, -100)
        .masked_fill(inputs["attention_mask"] == 0, -100)
    )
    for weight in (0.0, 0.5):
        output = build(modality_loss_weight=weight)(**inputs, labels=labels)
        total = output.masked_expression_loss + weight * output.modality_loss
        torch.testing.assert_close(output.loss, total)
        assert output.modality_logits.shape == (2, 12, 2)
    kept = inputs["attention_mask"].bool()
    by_hand = torch.nn.functional.cross_entropy(output.modality_logits[kept], inputs["modality_ids"][kept])
    torch.testing.assert_close(output.modality_loss, by_hand)
    assert "modality_logits" in build().config.keys_to_ignore_at_inference


def test_modality_loss_is_a_share_of_accumulated_batches():
    model, inputs = build(), batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    alone = model(**inputs, labels=labels)
    part = model(**inputs, labels=labels, num_items_in_batch=4 * (labels != -100).sum())
    torch.testing.assert_close(part.modality_loss, alone.modality_loss / 4)
    torch.testing.assert_close(part.loss, alone.loss / 4)


def test_one_modality_has_neither_embedding_nor_second_loss():
    model = build(num_modalities=1)
    cells = torch.randint(0, 52, (2, LENGTH))
    output = model(cells, labels=cells)
    assert output.modality_loss is None and output.to_tuple()[0] is output.loss
    assert not any("modality" in name for name in model.state_dict())


def test_the_modality_changes_a_token():
    model, inputs = build(ScBertModel), batch()
    other = model(**(inputs | {"modality_ids": 1 - inputs["modality_ids"]}))[0]
    assert not torch.allclose(model(**inputs)[0], other)


def test_modality_prediction_can_be_learnt():
    model, inputs = build().train(), batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        output = model(**inputs, labels=labels)
        output.loss.backward()
        optimizer.step()
    assert output.modality_loss < 0.1
    assert model.scbert.embeddings.modality_embeddings.weight.grad.abs().sum() > 0


@EVERY_ATTENTION
def test_padding_changes_nothing(attention_type):
    model, inputs = build(attention_type=attention_type), batch()
    alone = {name: tensor[1:, :7] for name, tensor in inputs.items()}
    padded, unpadded = model(**inputs), model(**alone)
    torch.testing.assert_close(padded.logits[1:, :7], unpadded.logits, rtol=1e-4, atol=1e-5)


@EVERY_ATTENTION
def test_feature_order_changes_nothing(attention_type):
    model, inputs = build(ScBertForCellClassification, attention_type=attention_type, pooling="mean"), batch()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    shuffled = {name: tensor[:, order] for name, tensor in inputs.items()}
    torch.testing.assert_close(model(**shuffled).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_mean_pooling_ignores_pads():
    model, inputs = build(ScBertForCellClassification, pooling="mean", classifier_hidden_sizes=()), batch()
    hidden = model.scbert(**inputs).last_hidden_state
    mean = model.classifier.out_proj(hidden[1, :7].mean(0))
    torch.testing.assert_close(model(**inputs).logits[1], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_new_genes_leave_old_rows_to_the_bit(frozen):
    model, inputs = build(freeze_gene_embeddings=frozen), batch()
    before, rows = model(**inputs).logits, model.scbert.embeddings.gene_embeddings.weight.detach().clone()
    vectors = torch.randn(5, 16)
    model.resize_gene_embeddings(25, vectors)
    table = model.scbert.embeddings.gene_embeddings.weight
    assert isinstance(table, torch.nn.Parameter) != frozen
    assert torch.equal(table[:20], rows[:20]) and torch.equal(table[-1], rows[-1])
    assert torch.equal(table[20:25], vectors)
    moved = inputs | {"gene_ids": inputs["gene_ids"].masked_fill(inputs["gene_ids"] == 20, 25)}
    assert torch.equal(model(**moved).logits, before)
    assert model.config.max_position_embeddings == 26


@pytest.mark.parametrize("hidden_sizes", [(), (8,)])
def test_new_genes_in_a_classifier(hidden_sizes, tmp_path):
    model = build(ScBertForCellClassification, classifier_hidden_sizes=hidden_sizes)
    first = model.classifier.dense[0] if hidden_sizes else model.classifier.out_proj
    columns = first.weight.detach().clone()
    model.resize_gene_embeddings(30)
    assert torch.equal(first.weight[:, :20], columns[:, :20])
    assert torch.equal(first.weight[:, -1], columns[:, -1]) and not first.weight[:, 20:-1].any()
    cells = torch.randint(0, 52, (2, 31))
    model.save_pretrained(tmp_path)
    again = ScBertForCellClassification.from_pretrained(tmp_path)
    assert torch.equal(again(cells).logits, model(cells).logits)


@pytest.mark.parametrize("old", [1, 2])
def test_new_modalities_leave_old_rows_to_the_bit(old, tmp_path):
    model, inputs = build(num_modalities=old), batch()
    inputs["modality_ids"] = inputs["modality_ids"].clamp(max=old - 1)
    before, output = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(**inputs)
    model.resize_modality_embeddings(3)
    grown = model(**inputs)
    assert torch.equal(grown.logits, output.logits)
    assert grown.modality_logits.shape[-1] == 3
    if old > 1:
        name = "scbert.embeddings.modality_embeddings.weight"
        assert torch.equal(model.state_dict()[name][:2], before[name])
        assert torch.equal(grown.modality_logits[..., :2], output.modality_logits)
    model.save_pretrained(tmp_path)
    again = ScBertForMaskedExpression.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).modality_logits, grown.modality_logits)


def test_shrinking_is_refused():
    model = build()
    with pytest.raises(ValueError, match="not shrink"):
        model.resize_gene_embeddings(5)
    with pytest.raises(ValueError, match="not shrink"):
        model.resize_modality_embeddings(1)
    with pytest.raises(ValueError, match=r"\(2, 16\) is needed"):
        model.resize_gene_embeddings(22, torch.zeros(3, 16))
