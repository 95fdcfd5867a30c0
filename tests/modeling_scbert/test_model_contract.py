"""What every scBERT class does with every attention type: the common tests of a transformers encoder."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    set_seed,
)

import scbert  # noqa: F401 - registers the Auto classes
from scbert import ScBertConfig, ScBertForCellClassification, ScBertForMaskedExpression, ScBertModel

ATTENTION_TYPES = ["favor", "softmax", "lsh"]
MODEL_CLASSES = [ScBertModel, ScBertForMaskedExpression, ScBertForCellClassification]
AUTO_CLASSES = {
    ScBertModel: AutoModel,
    ScBertForMaskedExpression: AutoModelForMaskedLM,
    ScBertForCellClassification: AutoModelForSequenceClassification,
}
LENGTH = 41

every_attention = pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
every_class = pytest.mark.parametrize("model_class", MODEL_CLASSES, ids=lambda cls: cls.__name__)


def tiny_config(attention_type="favor", **settings) -> ScBertConfig:
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
        "classifier_hidden_sizes": (16,),
        "num_labels": 3,
        # large enough that attention differs from the uniform mean and a wrong mask shows
        "initializer_range": 0.3,
    }
    return ScBertConfig(attention_type=attention_type, **(sizes | settings))


def tiny_model(model_class, attention_type="favor", **settings):
    set_seed(0)
    return model_class(tiny_config(attention_type, **settings)).eval()


def cells(batch=3, length=LENGTH, seed=0) -> torch.Tensor:
    return torch.randint(0, 6, (batch, length), generator=torch.Generator().manual_seed(seed))


def labels_for(model, input_ids) -> torch.Tensor:
    if isinstance(model, ScBertForMaskedExpression):
        return input_ids.masked_fill(torch.arange(input_ids.shape[1]) % 3 != 0, -100)
    return torch.arange(input_ids.shape[0]) % 3


def first_output(model, input_ids, **kwargs) -> torch.Tensor:
    outputs = model(input_ids, **kwargs)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def loss_of(model, input_ids, **kwargs) -> torch.Tensor:
    if isinstance(model, ScBertModel):
        return model(input_ids, **kwargs).last_hidden_state.square().mean()
    return model(input_ids, labels=labels_for(model, input_ids), **kwargs).loss


def gradients(model, input_ids) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, input_ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_attention
@every_class
def test_a_reload_gives_the_same_output_to_the_bit(model_class, attention_type, tmp_path):
    model = tiny_model(model_class, attention_type)
    model.save_pretrained(tmp_path)
    reloaded = AUTO_CLASSES[model_class].from_pretrained(tmp_path)
    assert type(reloaded) is model_class
    assert torch.equal(first_output(reloaded, cells()), first_output(model, cells()))
    assert {k: v for k, v in reloaded.state_dict().items() if not torch.equal(v, model.state_dict()[k])} == {}


@every_attention
@every_class
def test_initialisation_is_deterministic_and_complete(model_class, attention_type, tmp_path):
    model = tiny_model(model_class, attention_type)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    again = tiny_model(model_class, attention_type)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    # from a config on the meta device, as from_pretrained builds it
    tiny_model(ScBertModel, attention_type).save_pretrained(tmp_path)
    base = ScBertModel.from_pretrained(tmp_path)
    grown = model_class.from_pretrained(tmp_path)
    inner = getattr(grown, "scbert", grown)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, inner.state_dict()[name]), name
    assert all(torch.isfinite(tensor).all() for tensor in grown.state_dict().values())


@every_attention
def test_hidden_states_and_attentions(attention_type):
    model = tiny_model(ScBertForCellClassification, attention_type)
    outputs = model(cells(), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(3, LENGTH, 24)] * 3
    assert [tuple(a.shape) for a in outputs.attentions] == [(3, 2, LENGTH, LENGTH)] * 2
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, LENGTH))
    assert model(cells()).hidden_states is None and model(cells()).attentions is None
    torch.testing.assert_close(outputs.logits, model(cells()).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(cells(), return_dict=False)[0], model(cells()).logits)


@every_attention
@every_class
def test_gradient_checkpointing_gives_equal_gradients(model_class, attention_type):
    model = tiny_model(model_class, attention_type).train()
    set_seed(1)  # hashing draws random numbers in training
    plain = gradients(model, cells())
    for use_reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
        set_seed(1)
        checkpointed = gradients(model, cells())
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@every_attention
@every_class
def test_every_parameter_gets_a_gradient(model_class, attention_type):
    model = tiny_model(model_class, attention_type, freeze_gene_embeddings=False).train()
    assert gradients(model, cells()).keys() == dict(model.named_parameters()).keys()


@every_attention
@every_class
def test_a_cell_does_not_depend_on_its_batch_mates(model_class, attention_type):
    model = tiny_model(model_class, attention_type)
    batch = cells(8)
    together = first_output(model, batch)
    alone = torch.cat([first_output(model, batch[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@every_attention
def test_padding_changes_nothing(attention_type):
    model = tiny_model(ScBertForCellClassification, attention_type)
    short = cells(2, 29)
    gene_ids = torch.stack([torch.randperm(LENGTH)[:29] for _ in range(2)])
    filler = torch.randint(0, 6, (2, 9))
    padded = torch.cat([short[:, :10], filler, short[:, 10:]], 1)
    padded_genes = torch.cat([gene_ids[:, :10], torch.randint(0, LENGTH, (2, 9)), gene_ids[:, 10:]], 1)
    mask = torch.ones_like(padded).index_fill_(1, torch.arange(10, 19), 0)
    wanted = model(short, gene_ids=gene_ids).logits
    got = model(padded, attention_mask=mask, gene_ids=padded_genes).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    hidden = model.scbert(padded, attention_mask=mask, gene_ids=padded_genes).last_hidden_state[mask.bool()]
    torch.testing.assert_close(
        hidden.view(2, 29, -1), model.scbert(short, gene_ids=gene_ids).last_hidden_state, rtol=1e-5, atol=1e-5
    )


@every_attention
@pytest.mark.parametrize("pooling", ["conv", "mean"])
def test_genes_may_come_in_any_order(attention_type, pooling):
    model = tiny_model(ScBertForCellClassification, attention_type, pooling=pooling)
    batch, order = cells(), torch.randperm(LENGTH)
    shuffled = model(batch[:, order], gene_ids=order.expand(3, -1)).logits
    torch.testing.assert_close(shuffled, model(batch).logits, rtol=1e-5, atol=1e-5)


@every_attention
@every_class
def test_inputs_embeds_replace_input_ids(model_class, attention_type):
    model = tiny_model(model_class, attention_type)
    embedded = model.get_input_embeddings()(cells())
    assert torch.equal(first_output(model, None, inputs_embeds=embedded), first_output(model, cells()))
    with pytest.raises(ValueError, match="exactly one"):
        model(cells(), inputs_embeds=embedded)


@every_attention
@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loading_in_another_dtype(model_class, attention_type, dtype, tmp_path):
    model = tiny_model(model_class, attention_type, initializer_range=0.1)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path, dtype=dtype)
    inner = getattr(loaded, "scbert", loaded)
    assert inner.final_norm.weight.dtype == dtype
    output = first_output(loaded, cells())
    assert output.dtype == dtype
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-4}[dtype]
    wanted = first_output(model, cells())
    assert (output.float() - wanted).norm() <= tolerance * wanted.norm()
    if attention_type == "favor" and dtype != torch.float64:
        assert inner.layers[0].attention.projection_matrix.dtype == torch.float32


@every_attention
@every_class
def test_feed_forward_chunking_changes_nothing(model_class, attention_type):
    model = tiny_model(model_class, attention_type)
    chunked = tiny_model(model_class, attention_type, chunk_size_feed_forward=1)
    torch.testing.assert_close(
        first_output(chunked, cells()), first_output(model, cells()), rtol=1e-5, atol=1e-5
    )


@every_attention
@every_class
def test_resizing_the_expression_vocabulary(model_class, attention_type):
    model = tiny_model(model_class, attention_type)
    before, wanted = model.get_input_embeddings().weight.clone(), first_output(model, cells())
    model.resize_token_embeddings(11)
    assert model.config.vocab_size == 11
    assert torch.equal(model.get_input_embeddings().weight[:7], before)
    got = first_output(model, cells())
    if model_class is ScBertForMaskedExpression:
        assert got.shape[-1] == 11
        got = got[..., :7]
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    model(torch.full((1, LENGTH), 10))


@every_attention
def test_embeddings_and_decoder_are_not_tied(attention_type, tmp_path):
    model = tiny_model(ScBertForMaskedExpression, attention_type)
    model.save_pretrained(tmp_path)
    for candidate in (model, ScBertForMaskedExpression.from_pretrained(tmp_path)):
        assert candidate.decoder.weight.data_ptr() != candidate.get_input_embeddings().weight.data_ptr()
    assert not torch.equal(model.decoder.weight, model.get_input_embeddings().weight)


@every_attention
@every_class
def test_training_overfits_a_few_cells(model_class, attention_type):
    # from a larger start or in larger steps the head's one channel may end below zero everywhere and learn no more
    model = tiny_model(model_class, attention_type, initializer_range=0.05).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    start = loss_of(model, cells()).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(model, cells())
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * start


@every_attention
@every_class
def test_full_graph_compile(model_class, attention_type):
    model = tiny_model(model_class, attention_type)
    # "eager" compiles the graph without a C++ compiler; a graph break fails all the same
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(first_output(compiled, cells()), first_output(model, cells()))
    loss_of_compiled = first_output(compiled, cells()).square().mean()
    loss_of_compiled.backward()
    torch._dynamo.reset()


@every_attention
@every_class
def test_export_with_a_dynamic_batch(model_class, attention_type):
    model = tiny_model(model_class, attention_type)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(
            model, (cells(3),), dynamic_shapes={"input_ids": {0: batch}}, strict=False
        )
        exported = program.module()(cells(5, seed=1))
        wanted = first_output(model, cells(5, seed=1))
    torch.testing.assert_close(
        exported[0] if isinstance(exported, tuple) else next(iter(exported.values())), wanted
    )


@every_attention
def test_autocast_stays_close(attention_type):
    model = tiny_model(ScBertForCellClassification, attention_type, initializer_range=0.1)
    wanted = model(cells()).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = model(cells()).logits.float()
    assert (got - wanted).norm() <= 5e-2 * wanted.norm()


def test_the_gene_table_stays_frozen_after_a_reload(tmp_path):
    model = tiny_model(ScBertForMaskedExpression)
    model.save_pretrained(tmp_path)
    reloaded = ScBertForMaskedExpression.from_pretrained(tmp_path).train()
    table = reloaded.scbert.embeddings.gene_embeddings.weight
    before = table.clone()
    optimizer = torch.optim.AdamW(reloaded.parameters(), lr=1.0, weight_decay=0.5)
    loss_of(reloaded, cells()).backward()
    optimizer.step()
    assert torch.equal(before, table)
    assert torch.equal(table[-1], torch.zeros(24)), "the trailing token has a zero gene embedding"
    assert table[:-1].std() > 0


def test_other_types_are_not_judged_by_what_was_fitted_to_those_of_the_checkpoint(tmp_path):
    model = tiny_model(ScBertForCellClassification, cell_vector_size=4)
    # every cell is farther than known ones are
    model.classifier.novelty.odds.copy_(torch.tensor([-5.0, 1.0]))
    assert (model(cells()).probabilities.sum(1) < 0.9).all()
    model.save_pretrained(tmp_path)
    other = ScBertForCellClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    torch.testing.assert_close(other(cells()).probabilities.sum(1), torch.ones(3))


def test_softmax_and_favor_agree_as_features_grow():
    exact = tiny_model(ScBertModel, "softmax", initializer_range=0.1)
    errors = []
    for num_features in (16, 512, 16384):
        approximate = tiny_model(
            ScBertModel, "favor", initializer_range=0.1, num_random_features=num_features, kernel_epsilon=0.0
        )
        approximate.load_state_dict(exact.state_dict(), strict=False)
        wanted, got = exact(cells()).last_hidden_state, approximate(cells()).last_hidden_state
        errors.append(((got - wanted).norm() / wanted.norm()).item())
    # the error of m random features shrinks as m^(-1/2): some sixfold a step
    assert errors[0] > 2 * errors[1] > 6 * errors[2] and errors[2] < 8e-3


def test_redrawn_features_depend_on_the_seed_alone():
    first, second = tiny_model(ScBertModel), tiny_model(ScBertModel, seed=5)
    before = first.layers[0].attention.projection_matrix.clone()
    first.redraw_features(123)
    second.redraw_features(123)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert torch.equal(a.attention.projection_matrix, b.attention.projection_matrix)
    assert not torch.equal(first.layers[0].attention.projection_matrix, before)
    redrawn = [layer.attention.projection_matrix for layer in first.layers]
    assert not torch.equal(*redrawn)


def test_published_size():
    model = ScBertForMaskedExpression(ScBertConfig())
    table = model.scbert.embeddings.gene_embeddings.weight
    assert sum(p.numel() for p in model.parameters()) + table.numel() == 8_388_607
    assert table.shape == (16_907, 200)


def test_losses_are_those_of_the_task():
    classifier = tiny_model(ScBertForCellClassification)
    labels = torch.tensor([0, 2, 1])
    outputs = classifier(cells(), labels=labels)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))
    masked = tiny_model(ScBertForMaskedExpression)
    labels = labels_for(masked, cells())
    outputs = masked(cells(), labels=labels)
    wanted = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(outputs.loss, wanted)


def test_config_round_trip(tmp_path):
    labels = {0: "B", 1: "CD8+/CD45RA+"}
    config = ScBertConfig(attention_type="softmax", classifier_hidden_sizes=(), id2label=labels)
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert reloaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert reloaded.id2label == labels and reloaded.num_labels == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_type": "flash"},
        {"hidden_size": "200"},
        {"num_random_features": 0},
        {"kernel_epsilon": -1.0},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(Exception, match=next(iter(wrong))):
        ScBertConfig(**wrong)


def test_a_sequence_that_does_not_fit_is_refused():
    model = tiny_model(ScBertForCellClassification)
    with pytest.raises(ValueError, match="42 tokens"):
        model(cells(1, LENGTH + 1))
    with pytest.raises(ValueError, match="built for 41 tokens and got 40"):
        model(cells(1, LENGTH - 1))
