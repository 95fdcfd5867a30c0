"""
What the compiler makes of the Triton kernels, for GPUs that need not be there.

    python benchmarks/kernel_resources.py --output benchmarks/results/kernel_resources.json

A block of the published size runs on tensors without memory that pass for CUDA ones; what it launches is compiled by
the compiler that Triton's wheel carries, with its own tiles, warps and dtypes. Nothing is run: a line says what a
kernel takes, not that it is right or fast. The times are how long a cell keeps an H100's schedulers, tensor cores and
units of special functions busy, counted in the machine code of the kernel's loop; it takes no less than the largest.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from scbert.modeling_scbert import ScBertConfig
from scbert.modeling_scbert import cuda_layer_scbert as blocks
from scbert.modeling_scbert import cuda_steps_scbert as steps
from scbert.modeling_scbert import favor_triton_scbert as launcher
from scbert.modeling_scbert.layers_scbert import ScBertLayer

KERNELS = {
    launcher: ("sum_kernel", "table_kernel", "apply_kernel", "gradient_kernel"),
    steps: ("norm_kernel", "feed_forward_kernel", "hidden_gradient_kernel", "norm_gradient_kernel"),
}
# cells, heads, tokens, head size, features
REAL = (32, 10, 16_907, 64, 266)
# an H100's multiprocessors and cycles a microsecond
PROCESSORS, CYCLES = 132, 1755


class Chip(NamedTuple):
    """Shared bytes of a program and of a multiprocessor, threads of one, multiprocessors."""

    program: int
    pool: int
    threads: int
    processors: int


CHIPS = {
    80: Chip(166_912, 167_936, 2048, 108),
    89: Chip(101_376, 102_400, 1536, 142),
    90: Chip(232_448, 233_472, 2048, 132),
    100: Chip(232_448, 233_472, 2048, 148),
    120: Chip(101_376, 102_400, 1536, 170),
}
# columns of tensor memory that a program may have, on the chips that have it
TENSOR_MEMORY = 512


class Launch(NamedTuple):
    """One launch of a kernel, and the device that was current."""

    kernel: object
    grid: tuple
    arguments: tuple
    options: dict
    device: torch.device | None

    @property
    def name(self) -> str:
        """The kernel, and whose rows it goes over."""
        name, options = self.kernel.__name__.removesuffix("_kernel"), self.options
        if "KEYS" in options:
            return f"{name}, {'keys' if options['KEYS'] else 'queries'}"
        return f"{name}, branch added" if options.get("HAS_BRANCH") else name


class _Recorder:
    """Stands in for a kernel of the launcher: keeps what it is launched with."""

    def __init__(self, kernel, launches: list[Launch], current: list[torch.device]):
        self.kernel, self.launches, self.current = kernel, launches, current

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            device = self.current[-1] if self.current else None
            self.launches.append(Launch(self.kernel, grid, arguments, options, device))

        return launch


@contextmanager
def recording(target: int):
    """The launches made within, as they would be on a GPU of the target; none is made."""
    launches, current = [], []

    @contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    with ExitStack() as stack:
        for module, names in KERNELS.items():
            for name in names:
                kernel = _Recorder(getattr(module, name), launches, current)
                stack.enter_context(patch.object(module, name, kernel))
            stack.enter_context(patch.object(module, "capability_of", lambda _: divmod(target, 10)))
            stack.enter_context(patch.object(module, "processors_of", lambda _: CHIPS[target].processors))
        for module in (launcher, blocks):
            stack.enter_context(patch.object(module, "on_device", on))
        yield launches


def attention_launches(size: tuple, dtype: torch.dtype, masked: bool, target: int) -> list[Launch]:
    """Launches of attention, forward and backward, on tensors without memory that pass for CUDA ones."""
    cells, heads, length, dim, features = size
    with recording(target) as launches, FakeTensorMode(), torch.device("cuda:1"):
        query, key, value = (
            torch.empty(cells, length, heads, dim, dtype=dtype).transpose(1, 2) for _ in range(3)
        )
        given = (query, key, value, torch.empty(features, dim))
        given += (torch.empty(cells, length, dtype=torch.bool) if masked else None,)
        output, *state = launcher.triton_forward(*given, 1e-4)
        launcher.triton_backward(torch.empty_like(output), *given, output, *state, 1e-4)
    return launches


def block_launches(hidden: int, target: int) -> list[Launch]:
    """Launches of a whole block of the published heads in bfloat16, forward and backward, for a few short cells."""
    config = ScBertConfig(hidden_size=hidden, intermediate_size=4 * hidden)
    layer, rows = ScBertLayer(config, 0), torch.zeros(2, 100, hidden, requires_grad=True)
    with recording(target) as launches, torch.autocast("cpu", torch.bfloat16):
        blocks.run_cuda(layer, rows).sum().backward()
    return launches


def compiled(launch: Launch, target: int):
    """The kernel as Triton would compile it at this launch."""
    gpu = GPUTarget("cuda", target, 32)
    backend = make_backend(gpu)
    # pointers as the allocator gives them: aligned
    arguments = [
        MockTensor(x.dtype, tuple(x.shape)) if isinstance(x, torch.Tensor) else x for x in launch.arguments
    ]
    extra = {"debug": False, "instrumentation_mode": ""}
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = binder(*arguments, **extra, **launch.options)
    parsed, signature, constants, attributes = launch.kernel._pack_args(
        backend, launch.options | extra, bound, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=gpu, options=parsed.__dict__)


def resources(launch: Launch, target: int) -> dict:
    """What a launch's kernel takes of a multiprocessor, and what its products became."""
    found = compiled(launch, target)
    ptx, chip, warps = found.asm["ptx"], CHIPS[target], found.metadata.num_warps
    registers, spilled, machine_code = assembled(ptx, target)
    shared, columns = found.metadata.shared, getattr(found.metadata, "tmem_size", None) or 0
    a_warp = -(-registers * 32 // 256) * 256
    by_shared = chip.pool // (-(-(shared + 1024) // 128) * 128)
    row = {"kernel": launch.name, "masked": bool(launch.options.get("HAS_MASK")), "target": f"sm_{target}"}
    row |= {"grid": list(launch.grid), "warps": warps, "registers": registers, "spilled": spilled}
    row |= {"shared": shared, "tensor_memory": columns}
    row["fits"] = shared <= chip.program and columns <= TENSOR_MEMORY
    row["programs"] = min(65_536 // a_warp // warps, by_shared, chip.threads // (32 * warps))
    row["scalar_dots"], row["products"] = scalar_dots(found.asm["ttgir"]), products(ptx)
    if target == 90 and row["products"] and launch.options.get("RESIDENT", True):
        row["microseconds"] = busy(launch, cycles(machine_code, warps))
    return row


def busy(launch: Launch, block_cycles: dict[str, int]) -> dict[str, float]:
    """Microseconds of a cell of the published size and length, from the cycles of the loop's body."""
    _, heads, length, _, features = REAL
    options = launch.options
    blocks = -(-length // options["BLOCK_N"])
    if "INNER" in options:
        blocks *= -(-options["INNER"] // options["BLOCK_I"])
    else:
        blocks *= heads * -(-features // (options.get("GROUP", features + 1) - 1))
    return {name: round(n * blocks / PROCESSORS / CYCLES, 1) for name, n in block_cycles.items()}


def assembled(ptx: str, target: int) -> tuple[int, int, str]:
    """Registers a thread, bytes of spill stores and loads, and the machine code, with Triton's own options."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        assembler = Path(get_ptxas(target).path)
        command = [str(assembler), "-lineinfo", "-v", "--regAllocOptLevel=2"]
        command += [f"--gpu-name={sm_arch_from_capability(target)}", str(source), "-o", str(output)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        disassembler = [str(assembler.with_name("cuobjdump")), "-sass", str(output)]
        machine_code = subprocess.run(disassembler, capture_output=True, text=True, check=True).stdout
    spilled = sum(int(x) for x in re.findall(r"(\d+) bytes spill", log))
    return int(re.search(r"Used (\d+) registers", log)[1]), spilled, machine_code


def scalar_dots(layouts: str) -> int:
    """Products of matrices that Triton's layouts leave to scalar arithmetic, not to tensor cores."""
    results = re.findall(r"\btt\.dot\b.*-> tensor<[^,]*, #(\w+)>", layouts)
    return sum(not name.startswith("mma") for name in results)


def products(ptx: str) -> dict[str, int]:
    """Tensor-core instructions by kind."""
    # tcgen05 counts bfloat16 among its f16
    kinds = re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*[.:](bf16|tf32|f16)\b", ptx)
    names = [f"{kind} {operand}" for kind, operand in kinds]
    return {name: names.count(name) for name in sorted(set(names))}


def cycles(machine_code: str, warps: int) -> dict[str, int]:
    """
    Cycles that the largest loop keeps parts of a Hopper multiprocessor busy.

    Four schedulers issue one instruction a cycle each; ``64 x n x 16`` products of a warpgroup take n / 2 cycles, those
    of a warp ``16 x 8 x 16`` two; sixteen exponentials or roots are ready a cycle.
    """
    pattern = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?(.*?);")
    lines = [(int(x[1], 16), x[2]) for x in pattern.finditer(machine_code)]
    loops = []
    for address, instruction in lines:
        jump = re.search(r"^BRA.*0x([0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) < address:
            loops.append([text for at, text in lines if int(jump[1], 16) <= at <= address])
    body = max(loops, key=len)
    widths = [int(x) for x in re.findall(r"HGMMA\.64x(\d+)x16", "\n".join(body))]
    single = sum(text.startswith("HMMA") for text in body)
    exponentials = sum(text.startswith("MUFU") for text in body)
    return {
        "issue": len(body) * warps // 4,
        "tensor": sum(widths) // 2 * warps // 4 + 2 * single * warps // 4,
        "special": exponentials * 32 * warps // 16,
    }


def main() -> int:
    """Compile, print, and 1 where something does not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    rows = []
    for target in arguments.targets:
        for dtype in ("bfloat16", "float32"):
            for launch in real_launches(dtype, target):
                rows.append({"dtype": dtype} | resources(launch, target))
                print(show(rows[-1]), flush=True)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        found = {"triton": triton.__version__, "size": REAL, "kernels": rows}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(row["fits"] for row in rows))


def real_launches(dtype: str, target: int) -> list[Launch]:
    """Those of a block in bfloat16, and of attention alone, which is all that float32 has; each kind once."""
    if dtype == "float32":
        return attention_launches(REAL, torch.float32, False, target)
    launches = block_launches(200, target)
    return list({launch.name: launch for launch in launches}.values())


def show(row: dict) -> str:
    """A line of the table."""
    busy = "".join(f", {name} {count} us" for name, count in row.get("microseconds", {}).items())
    return (
        f"{row['target']} {row['dtype']} {row['kernel']:18} {row['registers']:3} registers, {row['spilled']:,} spilled,"
        f" {row['shared'] // 1000} kB{'' if row['fits'] else ' TOO MUCH'}, {row['programs']} a multiprocessor{busy}"
    )


if __name__ == "__main__":
    sys.exit(main())
