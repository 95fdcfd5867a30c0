"""The Triton kernels as Triton's own compiler makes them for GPUs that are not here; see kernel_resources.py."""

import pytest
import torch

pytest.importorskip("triton")

import kernel_resources as resources

# beyond this a loop feels what its registers do not hold
MAX_SPILLED = 512
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# of tensor cores; f16 stands for both half precisions where tensor memory is used
WITHOUT_PRODUCTS = ("table", "norm")
OPERANDS = {"bfloat16": {"bf16", "f16"}, "float32": {"tf32"}}


def test_launches_go_to_the_device_of_the_tensors():
    attention = resources.attention_launches((2, 3, 100, 16, 30), torch.float32, True, 90)
    block = resources.block_launches(200, 90)
    assert (len(attention), len(block)) == (8, 17)
    assert [{str(launch.device) for launch in x} for x in (attention, block)] == [{"cuda:1"}, {"cpu"}]


def test_grids_fill_the_device_and_stay_within_its_limits():
    for cells in (1, 32, 8000):
        for launch in resources.attention_launches((cells, *resources.REAL[1:]), torch.bfloat16, False, 90):
            programs = torch.tensor(launch.grid).prod()
            assert programs >= min(132, cells * 10) and max(launch.grid[1:]) <= 2**31 - 1


def assert_runs_well(row, operands):
    """Fits, spills little, and multiplies on tensor cores what it multiplies."""
    assert row["fits"] and row["programs"] >= 1, row
    assert row["spilled"] <= MAX_SPILLED, row
    assert row["scalar_dots"] == 0, row
    found = {name.split()[1] for name in row["products"]}
    assert found <= operands and bool(found) != row["kernel"].startswith(WITHOUT_PRODUCTS), row


@pytest.mark.slow
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", resources.CHIPS)
def test_every_kernel_of_attention_compiles_for(target, dtype, dim):
    size = (8, 10, 16_907, dim, 266)
    launches = resources.attention_launches(size, DTYPES[dtype], False, target)
    masked = resources.attention_launches(size, DTYPES[dtype], True, target)
    for launch in (*launches, *(x for x in masked if x.options.get("HAS_MASK"))):
        assert_runs_well(resources.resources(launch, target), OPERANDS[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [32, 64, 128, 200, 208])
@pytest.mark.parametrize("target", resources.CHIPS)
def test_every_kernel_of_a_block_compiles_for(target, hidden):
    launches = resources.block_launches(hidden, target)
    for launch in {launch.name: launch for launch in launches if "KEYS" not in launch.options}.values():
        assert_runs_well(resources.resources(launch, target), OPERANDS["bfloat16"])
