"""oneDNN's products: kept only where they are exact, measured only where it pays or is asked for."""

import pytest
import torch

from scbert.modeling_scbert import cpu_matmul_scbert
from scbert.modeling_scbert.backends_scbert import favor_backend
from scbert.modeling_scbert.cpu_matmul_scbert import consider_onednn, restore_matmul, use_onednn


@pytest.fixture(autouse=True)
def undone(monkeypatch):
    monkeypatch.setattr(cpu_matmul_scbert, "_considered", [])
    yield
    restore_matmul()


def test_onednn_is_kept_only_where_it_is_exact():
    assert not use_onednn(max_error=0.0).enabled
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    report = use_onednn()
    if report.enabled:
        left, right = torch.randn(600, 64), torch.randn(64, 266)
        exact = left.double() @ right.double()
        assert ((left @ right - exact).abs().max() / exact.abs().max()).item() < 1e-5
        assert "kept" in str(report)


@pytest.mark.parametrize(
    "seconds_ahead, asked, measured",
    [(0.1, (), False), (100.0, (), True), (100.0, ("-onednn",), False), (0.1, ("onednn",), True)],
)
def test_onednn_is_measured_once_where_it_pays(seconds_ahead, asked, measured, caplog):
    with favor_backend(*asked), caplog.at_level("INFO"):
        for _ in range(2):
            consider_onednn(seconds_ahead)
    assert len(caplog.records) == len(cpu_matmul_scbert._considered) == int(measured)
