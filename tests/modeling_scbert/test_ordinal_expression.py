"""Expression embeddings that start in the order of the bins."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from scbert.modeling_scbert import ScBertConfig, ScBertForCellClassification
from scbert.modeling_scbert.embeddings_scbert import arc_radius, expression_plane
from scbert.training.initial_model import start_head

N_BINS = 18


def build(**settings) -> ScBertForCellClassification:
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, num_hidden_layers=0, vocab_size=N_BINS + 2, max_position_embeddings=N_BINS + 2
    )
    return ScBertForCellClassification(
        ScBertConfig(**sizes, num_labels=3, classifier_hidden_sizes=[], **settings)
    )


def test_bins_lie_on_an_arc_in_their_order():
    model = build(ordinal_expression=True)
    embeddings = model.scbert.embeddings
    bins, genes = embeddings.expression_embeddings.weight[:-1], embeddings.gene_embeddings.weight
    plane = expression_plane(model.config)
    torch.testing.assert_close(plane @ plane.T, torch.eye(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(bins.norm(dim=1), torch.full((N_BINS + 1,), arc_radius(model.config)))
    torch.testing.assert_close((bins @ plane[0]).diff(), (bins @ plane[0])[1].expand(N_BINS))
    # genes are of one length too, but for the trailing token, and lie across the arc
    torch.testing.assert_close(genes[:-1].norm(dim=1), torch.full((N_BINS + 1,), arc_radius(model.config)))
    torch.testing.assert_close(genes @ plane.T, torch.zeros(N_BINS + 2, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_new_model_of_another_dtype_starts_on_the_same_arc(dtype):
    wanted = build(ordinal_expression=True)
    found = AutoModelForSequenceClassification.from_config(wanted.config, dtype=dtype)
    bins, others = (x.scbert.embeddings.expression_embeddings.weight for x in (wanted, found))
    assert others.dtype == dtype and torch.equal(others, bins.to(dtype))


@pytest.mark.parametrize("grown", [0, 9])
def test_a_new_head_reads_the_bins(grown):
    model = build(ordinal_expression=True)
    start_head(model)
    model.resize_gene_embeddings(N_BINS + 1 + grown)
    genes = torch.arange(N_BINS + 2 + grown)
    levels = torch.arange(N_BINS + 1)
    # every gene at every bin: [bins, genes]
    read = model.classifier.pool(model.scbert(levels[:, None].expand(-1, len(genes))).last_hidden_state)
    torch.testing.assert_close(
        read[:, :-1], levels[:, None].expand(-1, len(genes) - 1).float(), atol=1e-4, rtol=1e-4
    )


def test_loaded_weights_stay(tmp_path):
    model = build(ordinal_expression=True)
    with torch.no_grad():
        model.scbert.embeddings.expression_embeddings.weight.normal_()
        model.scbert.embeddings.gene_embeddings.weight.normal_()
    model.save_pretrained(tmp_path)
    again = ScBertForCellClassification.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_by_default_nothing_changes():
    bins = build().scbert.embeddings.expression_embeddings.weight
    assert torch.linalg.matrix_rank(bins) > 1
