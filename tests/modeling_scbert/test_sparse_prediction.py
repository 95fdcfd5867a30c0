"""Loss at the labelled tokens alone: the last block is computed there only, and nothing else changes."""

import pytest
import torch

from scbert import ScBertConfig, ScBertForMaskedExpression
from scbert.modeling_scbert.positions_scbert import labelled_positions

LENGTH = 41


def tiny_model(attention_type="favor", **settings):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
        "num_random_features": 20,
        "lsh_num_buckets": 4,
        "lsh_chunk_length": 8,
        "intermediate_size": 32,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.3,
    }
    return ScBertForMaskedExpression(ScBertConfig(attention_type=attention_type, **(sizes | settings))).eval()


def cells() -> torch.Tensor:
    return torch.randint(0, 6, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def some_labels() -> torch.Tensor:
    return cells().masked_fill(torch.arange(LENGTH) % 3 != 0, -100)


@pytest.mark.parametrize(
    "attention_type, settings",
    [
        ("favor", {}),
        ("favor", {"num_hidden_layers": 0}),
        ("favor", {"reversible": True}),
        ("softmax", {}),
        ("lsh", {}),
    ],
)
def test_sparse_prediction_decodes_labelled_positions_only(attention_type, settings):
    dense = tiny_model(attention_type, **settings)
    sparse = tiny_model(attention_type, sparse_prediction=True, **settings)
    labels = some_labels()
    labels[0, 5:] = -100
    mask = torch.ones_like(labels)
    mask[1, 30:], labels[1, 30:] = 0, -100
    full, few = (model(cells(), attention_mask=mask, labels=labels) for model in (dense, sparse))
    assert few.logits.shape == ((labels != -100).sum(), 7)
    torch.testing.assert_close(few.logits, full.logits[labels != -100])
    torch.testing.assert_close(few.loss, full.loss)
    assert sparse(cells()).logits.shape == (3, LENGTH, 7)
    full.loss.backward()
    few.loss.backward()
    for mine, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_sparse_prediction_still_records_every_token():
    model = tiny_model(sparse_prediction=True)
    labels = some_labels()
    output = model(cells(), labels=labels, output_hidden_states=True)
    assert output.hidden_states[-1].shape == (3, LENGTH, 24)
    torch.testing.assert_close(output.loss, model(cells(), labels=labels).loss)
    nothing = model(cells(), labels=torch.full_like(labels, -100))
    assert nothing.logits.shape == (0, 7)


def test_positions_beside_what_is_recorded():
    model, positions = tiny_model().scbert, torch.tensor([[3, 1], [0, 40], [7, 7]])
    wanted = model(cells(), positions=positions).last_hidden_state
    recorded = model(cells(), positions=positions, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(recorded.last_hidden_state, wanted)
    assert len(recorded.attentions) == 2 and recorded.hidden_states[1].shape[1] == LENGTH


def test_chunks_of_the_feed_forward_network_need_not_fit():
    plain, chunked = (
        tiny_model(sparse_prediction=True),
        tiny_model(sparse_prediction=True, chunk_size_feed_forward=3),
    )
    labels = some_labels()
    torch.testing.assert_close(chunked(cells(), labels=labels).loss, plain(cells(), labels=labels).loss)


def test_no_cells_have_no_labelled_positions():
    assert labelled_positions(torch.empty(0, LENGTH, dtype=torch.long)) is None
