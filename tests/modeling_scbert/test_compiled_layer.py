"""Compiled blocks against the plain one in float64, outputs and gradients; what they refuse; how they are built."""

import contextlib
import copy

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st

from scbert import ScBertConfig, ScBertForMaskedExpression
from scbert.modeling_scbert.backends_scbert import favor_backend
from scbert.modeling_scbert.blocks_scbert import run_plain
from scbert.modeling_scbert.compiled_layer_scbert import (
    WEIGHTS,
    compiled_blocks,
    compiled_supports,
    run_compiled,
)
from scbert.modeling_scbert.layers_scbert import ScBertLayer
from scbert.modeling_scbert.positions_scbert import labelled_positions, rows_at

HIDDEN = 24


pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_layer(seed=0, heads=3, head_dim=8, features=19, scale=1.0, **options):
    torch.manual_seed(seed)
    config = ScBertConfig(
        hidden_size=HIDDEN,
        num_attention_heads=heads,
        head_dim=head_dim,
        num_random_features=features,
        intermediate_size=40,
        **options,
    )
    layer = ScBertLayer(config, 0)
    for name, weight in layer.named_parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))
        if "q_proj" in name or "k_proj" in name:
            weight.data.mul_(scale)
    return layer


@contextlib.contextmanager
def chunks_of(size):
    with pytest.MonkeyPatch.context() as environment:
        if size is not None:
            environment.setenv("SCBERT_CHUNK_SIZE", str(size))
        yield


def reference(layer, hidden_states, mask, positions=None):
    """The block's plain operations in float64, with the naive attention."""
    exact = copy.deepcopy(layer).double()
    with favor_backend("naive"):
        output = run_plain(exact, hidden_states, mask)
    return exact, output if positions is None else rows_at(positions, output)


def relative_error(found, wanted):
    # a gradient that cancels to nothing, as of the queries of one token, is rounding and no more
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(0.05)).item()


def check(layer, cells, length, mask, chunk_size=None, positions=None, tolerance=5e-5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(
        cells, length, layer.output.out_features, generator=generator
    ).requires_grad_()
    exact_states = hidden_states.detach().double().requires_grad_()
    exact, wanted = reference(layer, exact_states, mask, positions)
    queries = None if positions is None else rows_at(positions, hidden_states)
    grad = torch.randn(wanted.shape, generator=generator)
    with chunks_of(chunk_size):
        found = run_compiled(layer, hidden_states, mask, queries)
        found.backward(grad)
    assert relative_error(found, wanted) < tolerance
    wanted.backward(grad.double())
    assert relative_error(hidden_states.grad, exact_states.grad) < tolerance
    for name in WEIGHTS:
        mine, theirs = (x.get_parameter(name).grad for x in (layer, exact))
        assert relative_error(mine, theirs) < 5 * tolerance, name
        layer.get_parameter(name).grad = None


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    cells=st.integers(1, 4),
    length=st.integers(1, 70),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 5, 8, 16]),
    features=st.integers(1, 33),
    masked=st.booleans(),
    chunk_size=st.sampled_from([None, 1, 7, 16]),
    n_threads=st.integers(1, 3),
)
def test_equals_the_plain_block(
    seed, cells, length, heads, head_dim, features, masked, chunk_size, n_threads
):
    torch.set_num_threads(n_threads)
    mask = torch.rand(cells, length, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    layer = make_layer(seed, heads, head_dim, features)
    check(layer, cells, length, mask, chunk_size, seed=seed)


def test_a_cell_without_keys_and_one_with_all():
    mask = torch.tensor([[0], [1]]).expand(2, 30).contiguous()
    check(make_layer(), 2, 30, mask, chunk_size=8)


@pytest.mark.parametrize("scale", [6.0, 40.0])
def test_large_logarithms_neither_overflow_nor_vanish(scale):
    # at 40, features span more than float32 holds: without running stabilisers all would be infinite or zero
    check(make_layer(scale=scale), 2, 60, None, chunk_size=16, tolerance=2e-3)


def test_output_at_some_queries_only():
    mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(1)) < 0.7
    positions = torch.tensor([[0, 7, 49], [3, 3, 12], [20, 1, 2]])
    check(make_layer(), 3, 50, mask, chunk_size=8, positions=positions)


def test_the_published_width():
    torch.manual_seed(0)
    layer = ScBertLayer(ScBertConfig(), 0)
    check(layer, 2, 300, None, chunk_size=64)


def test_bfloat16_autocast_is_near():
    layer, hidden_states = make_layer(), torch.randn(2, 90, HIDDEN)
    exact, wanted = reference(layer, hidden_states.double(), None)
    with torch.autocast("cpu", torch.bfloat16), chunks_of(16):
        found = run_compiled(layer, hidden_states)
    assert found.dtype == torch.float32 and relative_error(found, wanted) < 2e-2
    grad = torch.randn_like(found)
    found.backward(grad)
    wanted.backward(grad.double())
    for name in WEIGHTS:
        mine, theirs = (x.get_parameter(name).grad for x in (layer, exact))
        assert (mine.double() - theirs).norm() < 3e-2 * theirs.norm(), name


def test_a_frozen_block_passes_its_gradient_on():
    layer, hidden_states = make_layer(), torch.randn(1, 40, HIDDEN, requires_grad=True)
    run_compiled(layer, hidden_states).square().sum().backward()
    wanted, hidden_states.grad = hidden_states.grad, None
    layer.zero_grad()
    run_compiled(layer.requires_grad_(False), hidden_states).square().sum().backward()
    torch.testing.assert_close(hidden_states.grad, wanted)
    assert all(weight.grad is None for weight in layer.parameters())


def test_a_cell_does_not_depend_on_its_batch():
    layer, hidden_states = make_layer(), torch.randn(5, 33, HIDDEN)
    with torch.no_grad():
        together = run_compiled(layer, hidden_states)
        alone = torch.cat([run_compiled(layer, cell[None]) for cell in hidden_states])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_what_it_does_not_serve():
    x = torch.randn(1, 9, HIDDEN)
    assert compiled_supports(make_layer(), x) is None
    assert compiled_supports(make_layer().double(), x.double())
    assert compiled_supports(make_layer(hidden_act="relu"), x)
    assert compiled_supports(make_layer(qkv_bias=True), x)
    adapted, hooked = make_layer(), make_layer()
    adapted.attention.v_proj = torch.nn.Sequential(adapted.attention.v_proj)
    adapted.attention.v_proj.weight = adapted.attention.v_proj[0].weight
    assert compiled_supports(adapted, x)
    hooked.intermediate.register_forward_hook(lambda *_: None)
    assert compiled_supports(hooked, x)
    with torch.autocast("cpu", torch.float16):
        assert compiled_supports(make_layer(), x)


def test_a_model_trains_the_same_with_it():
    torch.manual_seed(0)
    config = ScBertConfig(
        hidden_size=32, num_hidden_layers=3, max_position_embeddings=101, sparse_prediction=True
    )
    model = ScBertForMaskedExpression(config).train()
    bins = torch.randint(0, 6, (2, 101))
    labels = bins.masked_fill(torch.rand(2, 101) > 0.2, -100)

    def step():
        model.zero_grad()
        loss = model(bins, labels=labels).loss
        loss.backward()
        return loss.item(), [weight.grad for weight in model.parameters() if weight.grad is not None]

    loss, grads = step()
    with favor_backend("chunked"):
        wanted_loss, wanted = step()
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    for mine, theirs in zip(grads, wanted, strict=True):
        assert relative_error(mine, theirs.double()) < 2e-4


def test_hooks_of_all_modules_and_of_the_activation_are_called():
    x, layer = torch.randn(1, 9, HIDDEN), make_layer()
    handle = layer.activation.register_forward_hook(lambda *_: None)
    assert compiled_supports(layer, x)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert compiled_supports(layer, x)
    handle.remove()
    assert compiled_supports(layer, x) is None


def test_hooks_by_which_transformers_records_do_not_count():
    config = ScBertConfig(hidden_size=HIDDEN, num_hidden_layers=1, max_position_embeddings=9)
    model = ScBertForMaskedExpression(config).eval()
    bins, x = torch.zeros(1, 9, dtype=torch.long), torch.randn(1, 9, HIDDEN)
    reason = compiled_supports(model.scbert.layers[0], x)
    assert model(bins, output_attentions=True).attentions
    assert compiled_supports(model.scbert.layers[0], x) == reason


def test_norms_that_differ_and_no_epsilon_are_left_to_the_plain_block():
    x, layer = torch.randn(1, 9, HIDDEN), make_layer()
    layer.ffn_norm.eps = 0.5
    assert compiled_supports(layer, x)
    assert compiled_supports(make_layer(kernel_epsilon=0.0), x)


def test_offloaded_weights_are_fetched():
    layer, x = make_layer().eval(), torch.randn(1, 30, HIDDEN)
    with torch.no_grad():
        wanted = layer(x)
        cpu_offload(layer, execution_device="cpu")
        assert compiled_supports(layer, x)
        with favor_backend():
            torch.testing.assert_close(layer(x), wanted)


def test_other_weights_for_one_call():
    layer, x = make_layer(), torch.randn(1, 30, HIDDEN)
    weights = {name: weight.detach() * 1.1 for name, weight in layer.named_parameters()}
    found = torch.func.functional_call(layer, weights, (x,))
    with favor_backend("plain"):
        wanted = torch.func.functional_call(layer, weights, (x,))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_masked_may_hold_anything():
    layer, mask = make_layer(), torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    x = torch.randn(2, 40, HIDDEN)
    with torch.no_grad(), chunks_of(16):
        wanted = run_compiled(layer, x, mask)[mask]
        for value in (torch.nan, torch.inf, 3e38):
            torch.testing.assert_close(
                run_compiled(layer, x.masked_fill(~mask[..., None], value), mask)[mask], wanted
            )


@pytest.mark.parametrize("shapes", [((2, 9, 24), (1, 9)), ((2, 9, 24), (2, 8)), ((2, 9, 28), None)])
def test_wrong_shapes_are_refused(shapes):
    states, mask = shapes
    with pytest.raises(RuntimeError, match="needed"):
        run_compiled(make_layer(), torch.randn(states), None if mask is None else torch.ones(mask))


def test_queries_that_are_all_positions_count_once():
    layer, x = make_layer(), torch.randn(1, 30, HIDDEN, requires_grad=True)
    run_compiled(layer, x).sum().backward()
    wanted, x.grad = x.grad, None
    run_compiled(layer, x, queries=x).sum().backward()
    torch.testing.assert_close(x.grad, wanted)


def test_another_default_dtype_changes_nothing():
    layer, x = make_layer(), torch.randn(1, 30, HIDDEN, requires_grad=True)
    wanted = run_compiled(layer, x)
    torch.set_default_dtype(torch.float64)
    try:
        found = run_compiled(layer, x)
        found.sum().backward()
        compiled_blocks.cache_clear()
        assert compiled_blocks(ScBertLayer, ScBertConfig).operators
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


def test_dropout_keeps_the_plain_block():
    torch.manual_seed(0)
    for option in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        layer, x = make_layer(**{option: 0.5}).train(), torch.randn(1, 20, HIDDEN)
        assert compiled_supports(layer, x) == "dropout is active"
        with favor_backend():
            assert not torch.equal(layer(x), layer(x))
            with torch.no_grad():
                assert not torch.equal(layer(x), layer(x))
        assert torch.equal(layer.eval()(x), layer(x))


def test_labelled_positions_keep_their_order():
    labels = torch.tensor([[-100, 3, -100, 4], [-100, -100, 5, -100]])
    positions = labelled_positions(labels)
    assert rows_at(positions, labels)[rows_at(positions, labels) != -100].tolist() == [3, 4, 5]
    assert labelled_positions(torch.full((2, 3), -100)) is None
