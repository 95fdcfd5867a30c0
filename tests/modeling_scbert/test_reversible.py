"""The reversible encoder against the same layers run plainly: outputs, gradients, and what is kept for backward."""

import pytest
import torch

from scbert import ScBertConfig, ScBertModel


def build(attention_type="lsh", layers=3, **settings):
    sizes = dict(hidden_size=16, num_attention_heads=2, head_dim=8, intermediate_size=32)
    hashing = dict(lsh_num_buckets=8, lsh_chunk_length=16, num_random_features=16)
    torch.manual_seed(0)
    config = ScBertConfig(
        attention_type=attention_type,
        num_hidden_layers=layers,
        max_position_embeddings=81,
        reversible=True,
        **sizes,
        **hashing,
        **settings,
    )
    return ScBertModel(config).train()


def step(model, plain, autocast=False, **inputs):
    """Loss, and every gradient; recording hidden states runs the layers plainly."""
    if not inputs:
        inputs["input_ids"] = torch.randint(0, 6, (2, 81), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model(**inputs, output_hidden_states=plain).last_hidden_state
        loss = hidden.float().pow(3).mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance=1e-5):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("attention_type", ["favor", "lsh", "softmax"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_equal_the_plain_form(attention_type, dropout):
    model = build(attention_type, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    assert_same(step(model, plain=False), step(model, plain=True))


@pytest.mark.parametrize("attention_type", ["favor", "lsh"])
def test_gradients_equal_under_autocast(attention_type):
    model = build(attention_type, hidden_dropout_prob=0.1)
    assert_same(
        step(model, plain=False, autocast=True), step(model, plain=True, autocast=True), tolerance=1e-2
    )


def test_masks_and_input_gradients():
    model = build()
    embeds = torch.randn(2, 81, 16, requires_grad=True)
    mask = (torch.arange(81) < torch.tensor([[81], [40]])).long()
    gradients = []
    for plain in (False, True):
        torch.manual_seed(3)
        hidden = model(
            inputs_embeds=embeds, attention_mask=mask, output_hidden_states=plain
        ).last_hidden_state
        gradients.append(torch.autograd.grad((hidden * mask[..., None]).pow(3).sum(), embeds)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert gradients[0][1, 40:].abs().max() == 0


def test_autograd_grad_gets_parameter_gradients():
    model = build()
    weight = model.layers[0].attention.v_proj.weight
    torch.manual_seed(7)
    loss = model(torch.randint(0, 6, (2, 81), generator=torch.Generator().manual_seed(1)))[0].pow(3).mean()
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert weight.grad is None
    loss.backward()
    torch.testing.assert_close(weight.grad, gradient)
    assert_same(
        (loss.item(), {"w": gradient}),
        (loss.item(), {"w": step(model, plain=True)[1]["layers.0.attention.v_proj.weight"]}),
    )


def test_frozen_first_layers():
    model = build()
    model.embeddings.requires_grad_(False)
    model.layers[:2].requires_grad_(False)
    ours, theirs = step(model, plain=False), step(model, plain=True)
    assert_same(ours, theirs)
    assert {name.split(".")[0] for name in ours[1]} == {"layers", "final_norm"}
    assert not any(name.startswith(("layers.0", "layers.1")) for name in ours[1])


def saved_bytes(layers, plain):
    """Bytes autograd keeps for the backward pass, counted by storage."""
    model, kept = build("softmax", layers), {}
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randint(0, 6, (4, 81)), output_hidden_states=plain).last_hidden_state.sum()
    return sum(size for size, _ in kept.values())


def test_memory_kept_for_backward_does_not_grow_with_depth():
    two, six, twelve = (saved_bytes(layers, plain=False) for layers in (2, 6, 12))
    assert two == six == twelve
    assert saved_bytes(12, plain=True) > 4 * saved_bytes(2, plain=True) > 4 * two


def test_half_precision_weights_keep_float32_streams():
    model = build("favor", layers=6)
    full = step(model, plain=False)[1]
    half = step(model.to(torch.bfloat16), plain=False)[1]
    for name in ("layers.0.intermediate.weight", "layers.0.attention.v_proj.weight"):
        assert ((half[name].float() - full[name]).norm() / full[name].norm()) < 0.1


def test_gradient_checkpointing_may_be_on():
    model = build()
    expected = step(model, plain=False)
    model.gradient_checkpointing_enable()
    assert_same(step(model, plain=False), expected)
    assert_same(step(model, plain=True), expected)


def test_a_second_pass_under_one_autocast_has_gradients():
    model = build("favor")
    cells = torch.randint(0, 6, (1, 81))
    with torch.autocast("cpu", torch.bfloat16):
        model(cells)
        loss = model(cells, output_hidden_states=True).last_hidden_state.float().pow(3).mean()
    loss.backward()
    assert all(p.grad is not None for p in model.layers.parameters())


def test_hidden_states_are_one_more_than_layers():
    outputs = build("favor")(torch.randint(0, 6, (2, 81)), output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in outputs.hidden_states] == [(2, 81, 16)] * 4


def test_reversible_follows_the_attention_type_unless_said():
    assert ScBertConfig(attention_type="lsh").reversible and not ScBertConfig().reversible
    assert not ScBertConfig(attention_type="lsh", reversible=False).reversible
