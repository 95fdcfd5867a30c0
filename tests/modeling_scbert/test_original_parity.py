"""The converted model against a slow reference of the whole original, made from the published facts alone."""

import pytest
import torch

from scbert.interpretation.received_attention import gene_attention
from scbert.modeling_scbert.convert_checkpoint import convert_checkpoint

TOLERANCE = 1e-4


def bins(model, cells=1, seed=0):
    """Random bins, one in five expressed, with the trailing zero."""
    generator = torch.Generator().manual_seed(seed)
    length = model.pos_emb.emb.weight.shape[0]
    ids = torch.randint(1, 6, (cells, length), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) > 0.2] = 0
    ids[:, -1] = 0
    return ids


def converted(reference, original, tmp_path):
    path = tmp_path / "original.pth"
    torch.save(reference.original_checkpoint(reference.rounded(original), prefix="module."), path)
    return convert_checkpoint(path)


def assert_near(found, wanted):
    assert found.dtype == torch.float32
    scale = max(1.0, wanted.abs().max().item())
    assert (found.double() - wanted).abs().max().item() < TOLERANCE * scale


def assert_parity(reference, original, tmp_path, cells):
    model = converted(reference, original, tmp_path)
    for ids in bins(original, cells).split(1):
        # one cell at a time: the original's key maximum runs over its whole batch
        wanted = original(ids)
        with torch.no_grad():
            found = model(ids, output_hidden_states=True)
        assert_near(found.logits, wanted.logits)
        assert len(found.hidden_states) == len(wanted.hidden_states) - 1
        for ours, theirs in zip(found.hidden_states[:-1], wanted.hidden_states):
            assert_near(ours, theirs)
        assert_near(found.hidden_states[-1], wanted.hidden_states[-1])
        assert_near(gene_attention(model, ids), wanted.attention)


@pytest.mark.parametrize("labels", [None, 4], ids=["pretrained", "fine-tuned"])
@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["mild", "peaked"])
def test_small_model(original_reference, tmp_path, labels, scale):
    original = original_reference.make_original(scale=scale, labels=labels)
    assert_parity(original_reference, original, tmp_path, cells=3)


def test_other_sizes(original_reference, tmp_path):
    sizes = {"genes": 130, "vocab": 5, "width": 12, "depth": 3, "heads": 2, "head_dim": 6, "features": 40}
    original = original_reference.make_original(seed=1, scale=1.5, labels=9, hidden=31, **sizes)
    model = converted(original_reference, original, tmp_path)
    ids = bins(original).clamp(max=4)
    assert_near(model(ids).logits.detach(), original(ids).logits)


def test_a_batch_equals_its_cells(original_reference, tmp_path):
    """Where the original's key maximum over the batch would let cells disturb each other."""
    original = original_reference.make_original(scale=2.0)
    model = converted(original_reference, original, tmp_path)
    ids = bins(original, cells=4)
    alone = torch.cat([original(cell).logits for cell in ids.split(1)])
    with torch.no_grad():
        assert_near(model(ids).logits, alone)
    assert (original(ids).logits - alone).abs().max() > 1e-3


def test_epsilon_is_the_original_one(original_reference, tmp_path):
    original = original_reference.make_original(scale=2.0)
    model = converted(original_reference, original, tmp_path)
    ids = bins(original)
    model.config.kernel_epsilon = 1e-3
    with torch.no_grad():
        assert (model(ids).logits - original(ids).logits).abs().max() > 10 * TOLERANCE


def test_the_reference_agrees_with_itself(original_reference):
    attention = original_reference.make_original(scale=2.0).performer.net.layers[0][0].fn
    x = torch.randn(2, 30, 20, dtype=torch.float64)
    for matrix, associative in zip(attention(x), attention(x, longest_matrix=0)):
        torch.testing.assert_close(matrix, associative, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_full_length(original_reference, tmp_path):
    pretrained = original_reference.make_original(**original_reference.FULL)
    assert sum(weight.numel() for weight in pretrained.parameters()) == 8_388_607
    original = original_reference.make_original(labels=7, **original_reference.FULL)
    assert_parity(original_reference, original, tmp_path, cells=1)
