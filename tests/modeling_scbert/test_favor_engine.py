"""Attention in chunks against the naive reference: outputs, gradients, masks, dtypes, chunk sizes, compilers."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scbert.modeling_scbert.backends_scbert import favor_backend
from scbert.modeling_scbert.favor_chunks_scbert import chunk_positions
from scbert.modeling_scbert.favor_engine_scbert import favor_attention
from scbert.modeling_scbert.favor_scbert import draw_projection, favor_attention_naive

pytestmark = pytest.mark.usefixtures("in_chunks")


@pytest.fixture
def in_chunks():
    with favor_backend("chunked"):
        yield


@contextlib.contextmanager
def chunks_of(size):
    with pytest.MonkeyPatch.context() as environment:
        if size is not None:
            environment.setenv("SCBERT_CHUNK_SIZE", str(size))
        yield


# output, then gradients: relative to the largest entry
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def inputs(seed, cells=2, heads=2, queries=17, keys=23, dim=8, width=5, features=19, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, dim), (keys, dim), (keys, width))
    q, k, v = (
        torch.randn(cells, n, heads, w, generator=generator, dtype=torch.float64).transpose(1, 2)
        for n, w in shapes
    )
    projection = draw_projection(features, dim, generator).double()
    mask = torch.rand(cells, keys, generator=generator) < 0.6
    mask[:, 0] = True
    grad = torch.randn(cells, heads, queries, width, generator=generator, dtype=torch.float64)
    return (scale * q, scale * k, v), projection, mask, grad


def with_gradients(attention, tensors, grad, *arguments):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    output = attention(*tensors, *arguments)
    return output, *torch.autograd.grad(output, tensors, grad.to(output.dtype))


def assert_equal(found, wanted, tolerance):
    for mine, theirs in zip(found, wanted, strict=True):
        scale = theirs.abs().max().clamp_min(1e-4)
        assert ((mine.double() - theirs).abs().max() / scale).item() < tolerance


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    cells=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    dim=st.integers(1, 12),
    width=st.integers(1, 9),
    features=st.integers(1, 30),
    masked=st.booleans(),
    epsilon=st.sampled_from([1e-4, 1e-2]),
    chunk_size=st.sampled_from([None, 1, 7, 16, 1000]),
)
def test_equals_the_reference(seed, masked, epsilon, chunk_size, **shape):
    tensors, projection, mask, grad = inputs(seed, **shape)
    mask = mask if masked else None
    wanted = with_gradients(favor_attention_naive, tensors, grad, projection, mask, epsilon)
    with chunks_of(chunk_size):
        found = with_gradients(favor_attention, tensors, grad, projection, mask, epsilon)
    assert_equal(found, wanted, 1e-9)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True])
def test_every_dtype_accumulates_in_float32_or_better(dtype, masked):
    tensors, projection, mask, grad = inputs(0, queries=100, keys=150)
    tensors, grad = [x.to(dtype) for x in tensors], grad.to(dtype)
    mask = mask if masked else None
    exact = [x.double() for x in tensors]
    wanted = with_gradients(favor_attention_naive, exact, grad.double(), projection, mask, 1e-4)
    with chunks_of(64):
        found = with_gradients(favor_attention, tensors, grad, projection.float(), mask, 1e-4)
    assert all(x.dtype == dtype for x in found)
    if dtype == torch.float64:
        wanted = with_gradients(favor_attention_naive, exact, grad, projection.float(), mask, 1e-4)
    assert_equal(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_by_finite_differences(masked):
    # without epsilon the output does not depend on the stabilisers, which are constants to the gradient
    tensors, projection, mask, _ = inputs(3, queries=3, keys=4, dim=3, width=2, features=5)
    tensors = [x.requires_grad_() for x in tensors]
    mask = mask if masked else None
    with chunks_of(2):
        assert torch.autograd.gradcheck(
            lambda q, k, v: favor_attention(q, k, v, projection, mask, 0.0), tensors
        )


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_chunk_size_changes_nothing(scale):
    """Also where the running maximum moves from chunk to chunk, and far beyond what exp2 holds unshifted."""
    tensors, projection, mask, grad = inputs(1, keys=60, queries=45, scale=scale)
    tensors = [x.float() for x in tensors]
    tensors[1] = tensors[1] * torch.linspace(0.1, 3, 60)[:, None]
    arguments = (grad.float(), projection.float(), mask, 1e-4)
    with chunks_of(1000):
        wanted = with_gradients(favor_attention, tensors, *arguments)
    for chunk_size in (7, 32):
        with chunks_of(chunk_size):
            found = with_gradients(favor_attention, tensors, *arguments)
        # with queries this long features are far below epsilon, and their gradient is all rounding
        assert_equal(
            found[: 2 if scale == 1 else 1], [x.double() for x in wanted][: 2 if scale == 1 else 1], 1e-4
        )
        assert_equal(found[3:], [x.double() for x in wanted[3:]], 1e-4)


def test_large_logarithms_do_not_overflow():
    tensors, projection, mask, grad = inputs(2, keys=60, scale=25.0)
    wanted = with_gradients(favor_attention_naive, tensors, grad, projection, mask, 1e-4)
    found = with_gradients(favor_attention, [x.float() for x in tensors], grad, projection.float(), mask)
    assert all(torch.isfinite(x).all() for x in found)
    assert_equal(found[:1], wanted[:1], 1e-4)


def test_masked_keys_contribute_nothing_whatever_they_hold():
    tensors, projection, mask, grad = inputs(4)
    wanted = with_gradients(favor_attention, tensors, grad, projection, mask)
    hidden = ~mask[:, None, :, None]
    tensors = (tensors[0], *(x.masked_fill(hidden, float("nan")) for x in tensors[1:]))
    found = with_gradients(favor_attention, tensors, grad, projection, mask)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert not found[2].masked_select(hidden).any() and not found[3].masked_select(hidden).any()


@pytest.mark.parametrize("attention", [favor_attention_naive, favor_attention])
def test_a_cell_without_keys_gets_zeros(attention):
    tensors, projection, mask, grad = inputs(5)
    mask[1] = False
    output, *grads = with_gradients(attention, tensors, grad, projection, mask)
    assert not output[1].any() and output[0].all()
    assert all(torch.isfinite(x).all() and not x[1].any() for x in grads)


def test_a_cell_does_not_depend_on_its_batch():
    tensors, projection, mask, _ = inputs(6, cells=5)
    with chunks_of(64):
        whole = favor_attention(*tensors, projection, mask)
    for cell in range(5):
        alone = favor_attention(*(x[cell : cell + 1] for x in tensors), projection, mask[cell : cell + 1])
        torch.testing.assert_close(whole[cell : cell + 1], alone, rtol=1e-12, atol=1e-12)


def test_operator_is_registered_as_torch_wants_it():
    tensors, projection, mask, _ = inputs(7, queries=5, keys=6)
    operator = torch.ops.scbert.favor_attention.default
    for keep in (None, mask):
        arguments = ([x.requires_grad_() for x in tensors], projection, keep, 1e-4, "chunked")
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, (*arguments[0], *arguments[1:]), test_utils=checks)


def test_exports_with_any_length():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value, projection):
            return favor_attention(query, key, value, projection)

    tensors, projection, _, _ = inputs(8, queries=20, keys=20)
    length = torch.export.Dim("length", min=2)
    dynamic = ({2: length}, {2: length}, {2: length}, None)
    program = torch.export.export(Attention(), (*tensors, projection), dynamic_shapes=dynamic)
    tensors, projection, _, _ = inputs(8, queries=33, keys=33)
    wanted = favor_attention_naive(*tensors, projection)
    torch.testing.assert_close(program.module()(*tensors, projection), wanted)


def rms_error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_share_an_offset_leave_the_gradients_of_half_precision_alone(dtype, masked):
    """A gradient of a query is a difference of outputs: rounded with their offset, it would be mostly rounding."""
    sizes = {"queries": 300, "keys": 300, "dim": 64, "width": 64, "features": 266}
    tensors, projection, mask, grad = inputs(12, cells=1, **sizes)
    tensors[2].add_(4)
    tensors, mask = [x.to(dtype) for x in tensors], mask if masked else None
    grad = grad.to(dtype)
    exact = [x.double() for x in tensors]
    wanted = with_gradients(favor_attention_naive, exact, grad.double(), projection, mask)
    found = with_gradients(favor_attention, tensors, grad, projection.float(), mask)
    assert [rms_error(*pair) < 2e-2 for pair in zip(found, wanted, strict=True)] == [True] * 4


def test_an_empty_batch_has_empty_gradients():
    tensors, projection, _, grad = inputs(13)
    found = with_gradients(favor_attention, [x[:0] for x in tensors], grad[:0], projection)
    assert [len(x) for x in found] == [0] * 4


def test_under_checkpoint_and_autocast():
    tensors, projection, mask, grad = inputs(9)
    tensors = [x.float() for x in tensors]
    plain = with_gradients(favor_attention, tensors, grad.float(), projection.float(), mask)

    def checkpointed(*x):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(
                favor_attention, *x, projection.float(), mask, use_reentrant=False
            )

    again = with_gradients(checkpointed, tensors, grad.float())
    assert all(torch.equal(x, y) for x, y in zip(again, plain, strict=True))


def test_joining_the_heads_copies_nothing():
    tensors, projection, _, _ = inputs(10)
    output = favor_attention(*tensors, projection)
    assert output.transpose(1, 2).is_contiguous()


def test_chunk_size_follows_the_cache_and_the_environment(monkeypatch):
    cpu = torch.device("cpu")
    assert 64 <= chunk_positions(10, 266, cpu) <= 4096
    assert chunk_positions(40, 266, cpu) <= chunk_positions(10, 266, cpu) <= chunk_positions(1, 16, cpu)
    monkeypatch.setenv("SCBERT_CHUNK_SIZE", "96")
    assert chunk_positions(10, 266, cpu) == 96


def test_more_features_come_closer_to_softmax():
    tensors, _, _, _ = inputs(11, cells=1, queries=256, keys=256, dim=16, width=16, scale=0.7)
    exact = torch.nn.functional.scaled_dot_product_attention(*tensors)
    errors = []
    for features in (32, 256, 2048):
        projection = draw_projection(features, 16, torch.Generator().manual_seed(0)).double()
        approximate = favor_attention(*tensors, projection, epsilon=0.0)
        errors.append(((approximate - exact).norm() / exact.norm()).item())
    assert errors[0] > errors[1] > errors[2]
