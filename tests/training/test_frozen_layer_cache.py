"""Fine-tuning with the frozen layers' output kept is the fine-tuning without."""

import pytest
import torch

from scbert import ScBertConfig, ScBertForCellClassification
from scbert.training.frozen_layer_cache import FrozenLayerCache, cached_frozen_layers, frozen_layers
from scbert.training.initial_model import freeze_for_finetuning


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ScBertConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        head_dim=8,
        num_random_features=20,
        intermediate_size=32,
        max_position_embeddings=61,
        classifier_hidden_sizes=[8],
        num_labels=3,
    )
    model = ScBertForCellClassification(config).train()
    freeze_for_finetuning(model)
    return model


def batches(n_steps=6):
    """Cells of different lengths in changing company, padded to the longest of each batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 6, (8, 40), generator=generator)
    genes = torch.rand(8, 61, generator=generator).argsort(1)[:, :40]
    mask = torch.ones(8, 40, dtype=torch.int64)
    mask[::2, 30:] = 0
    labels = torch.randint(0, 3, (8,), generator=generator)
    for _ in range(n_steps):
        rows = torch.randperm(8, generator=generator)[:3]
        length = int(mask[rows].sum(1).max())
        part = {"input_ids": ids, "attention_mask": mask, "gene_ids": genes}
        yield {name: x[rows, :length] for name, x in part.items()} | {"labels": labels[rows]}


def losses(model):
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 1e-2)
    found = []
    for batch in batches():
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("storage", ["off", "memory", "disk", "auto"])
def test_losses_are_those_without_the_cache(model, storage, tmp_path):
    start = {name: x.clone() for name, x in model.state_dict().items()}
    wanted = losses(model)
    model.load_state_dict(start)
    with cached_frozen_layers(model.scbert, storage, 8, tmp_path) as cache:
        assert losses(model) == pytest.approx(wanted, abs=1e-5)
        kept = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert bool(kept) == (storage == "disk")
    if storage == "off":
        assert cache is None
        return
    assert cache.misses <= 8 < cache.hits + cache.misses == 18
    assert model.scbert.prefix is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_disk_that_is_full_ends_the_keeping(model, tmp_path):
    batch = next(batches(1))
    # every write fails: the folder is not there
    cache = FrozenLayerCache(model.scbert, folder=tmp_path / "gone").attach()
    logits = [model(**batch).logits for _ in range(2)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert (cache.hits, cache.misses, cache.max_bytes) == (0, 6, 0)


def test_changed_weights_empty_the_cache(model):
    batch = next(batches(1))
    cache = FrozenLayerCache(model.scbert).attach()
    model(**batch)
    with torch.no_grad():
        model.scbert.layers[0].output.bias.add_(1.0)
    changed = model(**batch).logits
    assert (cache.hits, cache.misses) == (0, 6)
    cache.detach()
    torch.testing.assert_close(model(**batch).logits, changed)


def test_a_reload_of_the_same_weights_keeps_it(model):
    batch = next(batches(1))
    cache = FrozenLayerCache(model.scbert).attach()
    model(**batch)
    model.load_state_dict(model.state_dict())
    model(**batch)
    assert (cache.hits, cache.misses) == (3, 3)


def test_a_token_that_differs_is_another_cell(model):
    batch = next(batches(1))
    cache = FrozenLayerCache(model.scbert).attach()
    model(**batch)
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][0, 0] = (batch["input_ids"][0, 0] + 1) % 6
    batch["gene_ids"] = batch["gene_ids"].clone()
    batch["gene_ids"][1, 0] = (batch["gene_ids"][1, 0] + 1) % 61
    model(**batch)
    assert (cache.hits, cache.misses) == (1, 5)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_full_store_computes_the_rest(model, on_disk, tmp_path):
    cache = FrozenLayerCache(model.scbert, 40 * 16 * 4, tmp_path if on_disk else None).attach()
    wanted = losses(model)
    assert cache.used <= 40 * 16 * 4
    assert cache.misses > 8
    assert all(torch.isfinite(torch.tensor(wanted)))


def test_what_counts_as_frozen(model):
    assert frozen_layers(model.scbert) == 2
    model.scbert.embeddings.expression_embeddings.weight.requires_grad_(True)
    assert frozen_layers(model.scbert) == 0
    model.scbert.embeddings.expression_embeddings.weight.requires_grad_(False)
    model.scbert.config.hidden_dropout_prob = 0.1
    assert frozen_layers(model.scbert) == 0


def test_hidden_states_on_request_are_all_there(model):
    batch = next(batches(1))
    FrozenLayerCache(model.scbert).attach()
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 5
