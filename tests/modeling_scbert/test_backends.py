"""Which backend is chosen, how one is asked for or forbidden, and what happens where a kernel fails."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from scbert.modeling_scbert import backends_scbert, favor_engine_scbert
from scbert.modeling_scbert.backends_scbert import NAMES, Backend, favor_backend, log_once, select
from scbert.modeling_scbert.blocks_scbert import BLOCKS
from scbert.modeling_scbert.favor_engine_scbert import FAVOR, favor_attention
from scbert.modeling_scbert.favor_scbert import draw_projection

TABLE = {
    "compiled": Backend(
        lambda x: "it is odd" if x % 2 else None, None, lambda x: "it is small" if x < 9 else None
    ),
    "chunked": Backend(lambda x: "it is negative" if x < 0 else None, None),
    "plain": Backend(lambda x: None, None),
}


@pytest.fixture(autouse=True)
def nothing_said_yet():
    log_once.cache_clear()


@pytest.mark.parametrize("number, chosen", [(10, "compiled"), (11, "chunked"), (8, "chunked"), (-1, "plain")])
def test_the_first_that_pays_and_serves_is_chosen(number, chosen):
    assert select(TABLE, number) == chosen


def test_what_is_asked_for_need_not_pay():
    with favor_backend("compiled"):
        assert select(TABLE, 8) == "compiled"
        with pytest.raises(ValueError, match="compiled: it is odd"):
            select(TABLE, 9)
    with favor_backend("naive", "compiled", "plain"):
        assert select(TABLE, 9) == "plain"


def test_names_with_a_minus_are_left_out():
    with favor_backend("-compiled", "-chunked"):
        assert select(TABLE, 10) == "plain"
    with (
        favor_backend("-plain"),
        pytest.raises(ValueError, match="forbids"),
        favor_backend("plain", "-plain"),
    ):
        select(TABLE, 10)


def test_the_inner_block_counts_and_the_outer_comes_back(monkeypatch):
    monkeypatch.setenv("SCBERT_BACKEND", "plain")
    assert select(TABLE, 10) == "plain"
    with favor_backend("chunked"):
        with favor_backend():
            assert select(TABLE, 10) == "compiled"
        assert select(TABLE, 10) == "chunked"
    assert select(TABLE, 10) == "plain"


def test_the_variable_reaches_child_processes():
    script = (
        "import torch; from scbert.modeling_scbert.favor_engine_scbert import FAVOR;"
        "from scbert.modeling_scbert.backends_scbert import select;"
        "print(select(FAVOR, *[torch.ones(1, 1, 4, 2)] * 2, torch.ones(3, 2)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "SCBERT_BACKEND": "naive,-compiled"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "naive", run.stderr


def test_an_unknown_name_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="fast"), favor_backend("fast"):
        pass
    monkeypatch.setenv("SCBERT_BACKEND", "chunked,-quick")
    with pytest.raises(ValueError, match="SCBERT_BACKEND names -quick; known are naive"):
        select(TABLE, 10)


def test_every_backend_has_a_known_name():
    assert {*FAVOR, *BLOCKS} <= set(NAMES)


def test_a_reason_is_said_once(caplog):
    with caplog.at_level(logging.DEBUG, logger="scbert"):
        for _ in range(3):
            select(TABLE, 8), select(TABLE, 11)
    assert [record.message for record in caplog.records] == [
        "FAVOR+ by chunked, for compiled: it is small.",
        "FAVOR+ by chunked, for compiled: it is odd.",
    ]


class FailingKernels:
    """Stands in for favor_triton_scbert on any device; fails as it is told, in the forward or the backward."""

    FATAL_ERRORS, LAUNCH_ERRORS = (torch.OutOfMemoryError,), (RuntimeError, ZeroDivisionError)

    def __init__(self, forward=None, backward=None):
        self.errors, self.calls = {"forward": forward, "backward": backward}, []

    def triton_supports(self, *_):
        return None

    def triton_state(self, query, value, projection_matrix):
        return [query.new_empty(3)]

    def triton_forward(self, query, key, value, projection_matrix, attention_mask, epsilon):
        self._fail("forward")
        return value.mT.mT.transpose(1, 2).contiguous(), *self.triton_state(query, value, projection_matrix)

    def triton_backward(
        self, grad, query, key, value, projection_matrix, attention_mask, output, state, epsilon
    ):
        self._fail("backward")
        return [x.transpose(1, 2).contiguous() for x in (query, key, value)]

    def _fail(self, where):
        self.calls.append(where)
        if self.errors[where] is not None:
            raise self.errors[where]


@pytest.fixture
def kernels(monkeypatch):
    def put(**errors):
        made = FailingKernels(**errors)
        # the installed package's kernels are what this one thing stands for
        found = {"favor_triton_scbert": made}
        monkeypatch.setattr(favor_engine_scbert, "from_package", found.get)
        return made

    favor_engine_scbert._disabled.clear()
    yield put
    favor_engine_scbert._disabled.clear()


def inputs(cells=2, length=9, dim=4):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(cells, 2, length, dim, generator=generator, requires_grad=True) for _ in range(3)]
    return tensors, draw_projection(7, dim, generator)


def gradients(tensors, projection):
    output = favor_attention(*tensors, projection)
    return output, *torch.autograd.grad(output, tensors, torch.ones_like(output))


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [RuntimeError("no such chip"), ZeroDivisionError("out of resources")])
def test_a_kernel_that_does_not_launch_leaves_its_shapes_to_chunks(where, error, kernels, caplog):
    tensors, projection = inputs()
    with favor_backend("chunked"):
        wanted = gradients(tensors, projection)
    made = kernels(**{where: error})
    for _ in range(2):
        found = gradients(tensors, projection)
    assert made.calls.count(where) == 1
    assert all(torch.equal(x, y) for x, y in zip(found[where == "backward" :], wanted[where == "backward" :]))
    assert [record.levelname for record in caplog.records if str(error) in record.message] == ["WARNING"]
    # other cells of other lengths would fail too; other heads are tried anew
    gradients(*inputs(cells=3, length=5))
    assert made.calls.count(where) == 1
    gradients(*inputs(dim=8))
    assert made.calls.count(where) == 2


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_full_memory_is_raised_and_disables_nothing(where, kernels):
    made = kernels(**{where: torch.OutOfMemoryError("full")})
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            gradients(*inputs())
    assert made.calls.count(where) == 2 and not favor_engine_scbert._disabled


def test_a_mistake_in_the_kernels_is_no_launch_failure(kernels):
    kernels(forward=TypeError("a mistake"))
    with pytest.raises(TypeError, match="a mistake"):
        gradients(*inputs())


def test_without_the_package_a_checkpoint_s_code_goes_on_in_chunks(monkeypatch):
    monkeypatch.setattr(favor_engine_scbert, "from_package", lambda name: None)
    tensors, projection = inputs()
    assert select(FAVOR, tensors[0], tensors[2], projection) == "chunked"
    with favor_backend("triton"), pytest.raises(ValueError, match="not both installed"):
        favor_attention(*tensors, projection)


def test_backends_of_another_contract_are_not_used(monkeypatch):
    modules = {
        "scbert.modeling_scbert.backends_scbert": SimpleNamespace(CONTRACT=0),
        "scbert.modeling_scbert.other": SimpleNamespace(),
    }
    monkeypatch.setattr(backends_scbert.importlib, "import_module", modules.__getitem__)
    assert backends_scbert.from_package.__wrapped__("other") is None
