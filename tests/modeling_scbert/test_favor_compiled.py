"""The Triton kernels as Triton's own compiler makes them for GPUs that are not here; see kernel_resources.py."""

import pytest
import torch

pytest.importorskip("triton")

from scbert.benchmarks import kernel_resources as resources

# beyond this a loop feels what its registers do not hold
MAX_SPILLED = 512
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def test_launches_go_to_the_device_of_the_tensors():
    launches = resources.attention_launches((2, 3, 100, 16, 30), torch.float32, True, 90)
    assert len(launches) == 8
    assert {str(launch.device) for launch in launches} == {"cuda:1"}


def test_grids_fill_the_device_and_stay_within_its_limits():
    for cells in (1, 32, 8000):
        for launch in resources.attention_launches((cells, *resources.REAL[1:]), torch.bfloat16, False, 90):
            programs = torch.tensor(launch.grid).prod()
            assert programs >= min(132, cells * 10) and max(launch.grid[1:]) <= 2**31 - 1


@pytest.mark.slow
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", resources.CHIPS)
def test_every_kernel_compiles_fits_and_uses_tensor_cores(target, dtype, dim):
    size = (8, 10, 16_907, dim, 266)
    launches = resources.attention_launches(size, DTYPES[dtype], False, target)
    masked = resources.attention_launches(size, DTYPES[dtype], True, target)
    for launch in (*launches, *(x for x in masked if x.options.get("HAS_MASK"))):
        row = resources.resources(launch, target)
        assert row["fits"] and row["programs"] >= 1, row
        assert row["spilled"] <= MAX_SPILLED, row
        assert row["scalar_dots"] == 0, row
        operand = "bf16" if dtype == "bfloat16" else "tf32"
        assert row["kernel"].startswith("table") or all(operand in name for name in row["products"]), row
        assert row["kernel"].startswith("table") or row["products"], row
