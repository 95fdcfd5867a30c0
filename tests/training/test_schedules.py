import pytest
import torch

from scbert.training.schedules import cosine_restart_rate, cosine_restarts


def test_shape_of_the_first_cycles():
    rates = [cosine_restart_rate(epoch) for epoch in range(90)]
    assert rates[0] == pytest.approx(1e-6) and rates[5] == pytest.approx(1e-4)
    assert rates[:6] == sorted(rates[:6]) and rates[5:15] == sorted(rates[5:15], reverse=True)
    # the cosine part doubles: 15, 25 and 45 epochs; every peak is a tenth lower
    assert rates[15] == rates[40] == pytest.approx(1e-6)
    assert rates[20] == pytest.approx(0.9e-4) and rates[45] == pytest.approx(0.81e-4)
    assert min(rates) >= 1e-6


def test_stepped_once_an_epoch():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 1e-3}])
    scheduler = cosine_restarts(optimizer, 1e-3, steps_per_unit=4, first_cycle=3, warmup=1, min_rate=1e-5)
    rates = []
    for _ in range(16):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == rates[3] == pytest.approx(1e-5)
    assert rates[4] == rates[7] == pytest.approx(1e-3)
    assert rates[12] == pytest.approx(1e-5)
