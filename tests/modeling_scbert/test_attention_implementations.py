"""transformers' `attn_implementation`, recorded outputs, export, random features; odd batches and labels."""

import pytest
import torch

from scbert import ScBertConfig, ScBertForCellClassification, ScBertModel

LENGTH = 41


def tiny_model(model_class, attention_type="favor", **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"num_random_features": 20, "lsh_num_buckets": 4, "lsh_chunk_length": 8, "intermediate_size": 32}
    sizes |= {"max_position_embeddings": LENGTH, "classifier_hidden_sizes": (16,), "num_labels": 3}
    # large enough that attention differs from the uniform mean and a wrong mask shows
    sizes |= {"initializer_range": 0.3}
    return model_class(ScBertConfig(attention_type=attention_type, **(sizes | settings))).eval()


def cells(batch=3) -> torch.Tensor:
    return torch.randint(0, 6, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


def test_exact_attention_takes_transformers_implementations(tmp_path):
    model = tiny_model(ScBertForCellClassification, "softmax")
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, 20:] = 0
    assert model.config._attn_implementation == "sdpa"
    wanted = model(cells(), attention_mask=mask).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(cells(), attention_mask=mask).logits, wanted, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        loaded = ScBertForCellClassification.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == name
        torch.testing.assert_close(loaded(cells(), attention_mask=mask).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention_type", ["favor", "lsh"])
def test_other_attention_refuses_sdpa_and_says_why(attention_type):
    with pytest.raises(ValueError, match=f'attention_type="{attention_type}"'):
        tiny_model(ScBertModel, attention_type, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="Leave attn_implementation out"):
        tiny_model(ScBertModel, attention_type).set_attn_implementation("sdpa")


def test_attentions_are_those_that_are_used_and_have_a_gradient():
    model = tiny_model(ScBertModel)
    outputs = model(cells(), output_attentions=True)
    outputs.attentions[0].retain_grad()
    outputs.last_hidden_state.sum().backward()
    assert outputs.attentions[0].grad.any()


def test_an_exported_classifier_is_loaded_without_its_class(tmp_path):
    model = tiny_model(ScBertForCellClassification)
    batch = {"input_ids": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (cells(2),), dynamic_shapes=batch)
    torch.export.save(program, tmp_path / "classifier.pt2")
    loaded = torch.export.load(tmp_path / "classifier.pt2").module()
    torch.testing.assert_close(loaded(cells(7)).logits, model(cells(7)).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_random_features_do_not_depend_on_the_default_dtype(dtype):
    wanted = tiny_model(ScBertModel).layers[1].attention.projection_matrix
    torch.set_default_dtype(dtype)
    try:
        found = tiny_model(ScBertModel).layers[1].attention.projection_matrix
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("attention_type", ["favor", "lsh", "softmax"])
def test_no_cells_have_no_logits(attention_type):
    for length in (LENGTH, 10):
        model = tiny_model(ScBertForCellClassification, attention_type, max_position_embeddings=length)
        assert model(torch.zeros(0, length, dtype=torch.long)).logits.shape == (0, 3)


def test_without_layers_the_hidden_states_are_those_of_the_end():
    model = tiny_model(ScBertForCellClassification, num_hidden_layers=0)
    (last,) = model(cells(), output_hidden_states=True).hidden_states
    assert torch.equal(last, model.scbert(cells()).last_hidden_state)


def test_where_a_cell_may_have_several_labels_each_has_a_probability_of_its_own():
    settings = {"problem_type": "multi_label_classification"}
    outputs = tiny_model(ScBertForCellClassification, **settings)(cells())
    assert torch.equal(outputs.probabilities, outputs.logits.sigmoid())


def test_what_was_chosen_for_some_types_is_not_kept_for_others(tmp_path):
    chosen = {"unassigned_threshold": 0.7, "conformal_quantiles": {"0.9": [0.5] * 3}}
    chosen |= {"label_ontology_ids": {"T": "CL:0000084"}, "label_parents": {"T": "lymphocyte"}}
    ScBertConfig(num_labels=3, **chosen).save_pretrained(tmp_path)
    for n_types in (3, 5):
        config = ScBertConfig.from_pretrained(tmp_path, num_labels=n_types)
        kept = chosen if n_types == 3 else dict.fromkeys(chosen)
        assert {name: getattr(config, name) for name in chosen} == kept and config.num_labels == n_types
