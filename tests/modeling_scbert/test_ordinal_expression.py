"""Expression embeddings that start in the order of the bins."""

import torch

from scbert.modeling_scbert import ScBertConfig, ScBertForCellClassification
from scbert.modeling_scbert.embeddings_scbert import expression_direction
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


def test_bins_lie_on_a_line_in_their_order():
    embeddings = build(ordinal_expression=True).scbert.embeddings
    bins = embeddings.expression_embeddings.weight[:-1]
    assert torch.linalg.matrix_rank(bins) == 1
    torch.testing.assert_close(bins.diff(dim=0), bins[1:2].expand(N_BINS, -1))
    along = embeddings.gene_embeddings.weight @ expression_direction(build().config)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-6, rtol=0)


def test_a_new_head_reads_expression():
    model = build(ordinal_expression=True)
    start_head(model)
    genes = torch.arange(N_BINS + 2)
    levels = torch.arange(N_BINS + 1)
    # every gene at every bin: [bins, genes]
    read = model.classifier.pool(model.scbert(levels[:, None].expand(-1, len(genes))).last_hidden_state)
    rises = read[:, :-1].diff(dim=0)
    assert (rises > 0).all()
    # one gene is heard as another is, within what a random gene's length varies
    assert (read[-1, :-1].std() / read[-1, :-1].mean()) < 0.15


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
