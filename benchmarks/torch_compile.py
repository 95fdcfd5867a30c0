"""
Our compiled blocks beside ``torch.compile`` of the same steps: is own C++ worth its lines?

    python benchmarks/torch_compile.py --rounds 5

A pass over keys and one over queries on chunks of positions, as pure functions that inductor compiles for the
processor; it may fuse what lies between two matrix products as it likes. Its chunks run one after another with all
threads on each, or on a thread each, compiled for one. The backward computes a chunk again. One block of the published
size, one cell, float32 products by oneDNN; all ways take turns, and a ratio is the median of those within rounds. With
one thread, time is that of the process's CPU, so that other work on the machine counts little.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter

import torch
from torch.nn import functional as F

from scbert.modeling_scbert import ScBertConfig
from scbert.modeling_scbert.chunked_layer_scbert import run_chunked
from scbert.modeling_scbert.compiled_layer_scbert import compiled_blocks, run_compiled
from scbert.modeling_scbert.favor_chunks_scbert import LOG2_E
from scbert.modeling_scbert.layers_scbert import ScBertLayer
from scbert.modeling_scbert.published_layer_scbert import WEIGHTS

HEADS, DIM, EPSILON, NORM_EPSILON = 10, 64, 1e-4, 1e-5
LENGTH, HIDDEN = 16_907, 200


def logarithms(x, matrix):
    """Of ``[length, heads * dim]``: logarithms ``[heads, length, m]`` and |x'|^2 / 2 ``[heads, length, 1]``."""
    x = x.view(len(x), HEADS, DIM).transpose(0, 1).contiguous()
    logs = torch.mm(x.view(-1, DIM), matrix).view(HEADS, x.shape[1], -1)
    return logs, x.square().sum(-1, keepdim=True) * (LOG2_E / 2 * DIM**-0.5)


def key_step(x, matrix, shift, norm_w, norm_b, key_w, value_w):
    """A chunk's share of the context ``[heads, dim + 1, m]`` and of its epsilon term, and its largest logarithm."""
    normed = F.layer_norm(x, x.shape[-1:], norm_w, norm_b, NORM_EPSILON)
    logs, half_square = logarithms(F.linear(normed, key_w), matrix)
    largest = logs.detach().amax(-1, keepdim=True)
    highest = largest.amax()
    shift = highest if shift is None else shift
    value = F.linear(normed, value_w).view(len(x), HEADS, DIM).transpose(0, 1)
    joined = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    table = torch.bmm((joined * torch.exp2(largest - half_square - shift)).mT, torch.exp2(logs - largest))
    return table, joined.sum(1), highest


def query_step(x, matrix, table, norm_w, norm_b, query_w, o_w, o_b, ffn_w, ffn_b, up_w, up_b, down_w, down_b):
    """A chunk's output."""
    normed = F.layer_norm(x, x.shape[-1:], norm_w, norm_b, NORM_EPSILON)
    logs, half_square = logarithms(F.linear(normed, query_w), matrix)
    joined = torch.bmm(torch.exp2(logs - logs.detach().amax(-1, keepdim=True)), table.mT)
    joined = joined * torch.exp2(-half_square) + EPSILON * table.sum(-1)[:, None]
    attended = (joined[..., :-1] / joined[..., -1:]).transpose(0, 1).reshape(len(x), -1)
    residual = x + F.linear(attended, o_w, o_b)
    normed = F.layer_norm(residual, x.shape[-1:], ffn_w, ffn_b, NORM_EPSILON)
    return residual + F.linear(F.gelu(F.linear(normed, up_w, up_b)), down_w, down_b)


class InductorBlock:
    """A block whose steps are compiled; ``workers`` threads take a chunk each, or one takes them in turn."""

    def __init__(self, layer, chunk: int, workers: int):
        weights = dict(zip(WEIGHTS, (attrgetter(name)(layer) for name in WEIGHTS), strict=True))
        self.query_names = [name for name in WEIGHTS if "k_proj" not in name and "v_proj" not in name]
        self.key_names = [*WEIGHTS[:2], "attention.k_proj.weight", "attention.v_proj.weight"]
        self.query_weights = [weights[name] for name in self.query_names]
        self.key_weights = [weights[name] for name in self.key_names]
        self.matrix = (layer.attention.projection_matrix * (LOG2_E * DIM**-0.25)).T.contiguous()
        # chunks of one size: a graph each
        count = -(-LENGTH // chunk)
        count += -count % workers
        self.bounds = [(i * LENGTH // count, (i + 1) * LENGTH // count) for i in range(count)]
        self.threads = torch.get_num_threads() // workers
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(self.threads,))
        # a function object of its own for every block: what is compiled depends on its threads
        key, query = (lambda *given: key_step(*given)), (lambda *given: query_step(*given))
        self.key, self.query = (torch.compile(step, dynamic=True) for step in (key, query))
        self.workers = workers

    def map(self, function, *items):
        return list(self.pool.map(function, *items))

    def context(self, chunks):
        with torch.no_grad():
            parts = self.map(lambda x: self._key(x, None), chunks)
            highest = torch.stack([part[2] for part in parts]).amax()
            table = sum(part[0] * torch.exp2(part[2] - highest) for part in parts)
            return table + EPSILON * sum(part[1] for part in parts).unsqueeze(-1), highest

    def _key(self, x, shift):
        return self.key(x, self.matrix, shift, *self.key_weights)

    def _query(self, x, table):
        with torch.no_grad():
            return self.query(x, self.matrix, table, *self.query_weights)

    def inference(self, x):
        chunks = [x[0, a:b] for a, b in self.bounds]
        table, _ = self.context(chunks)
        return torch.cat(self.map(lambda chunk: self._query(chunk, table), chunks))[None]

    def step(self, x, grad):
        chunks, grads = ([y[0, a:b] for a, b in self.bounds] for y in (x, grad))
        table, highest = self.context(chunks)
        output = torch.cat(self.map(lambda chunk: self._query(chunk, table), chunks))[None]

        def query_backward(chunk, grad):
            inputs = [y.detach().requires_grad_() for y in (chunk, table)]
            with torch.enable_grad():
                output = self.query(inputs[0], self.matrix, inputs[1], *self.query_weights)
            return torch.autograd.grad(output, [*inputs, *self.query_weights], grad)

        found = self.map(query_backward, chunks, grads)
        table_grad = sum(y[1] for y in found)
        plain_grad = EPSILON * table_grad.sum(-1)

        def key_backward(chunk):
            chunk = chunk.detach().requires_grad_()
            with torch.enable_grad():
                pair = self._key(chunk, highest)[:2]
            return torch.autograd.grad(pair, [chunk, *self.key_weights], [table_grad, plain_grad])

        keys = self.map(key_backward, chunks)
        total = {name: 0 for name in WEIGHTS}
        for names, shares in (
            (self.query_names, [y[2:] for y in found]),
            (self.key_names, [y[1:] for y in keys]),
        ):
            for place, name in enumerate(names):
                total[name] = total[name] + sum(share[place] for share in shares)
        hidden = torch.cat([a[0] + b[0] for a, b in zip(found, keys)])[None]
        return output, [hidden, *(total[name] for name in WEIGHTS)]


def by_autograd(run, layer, x, grad):
    x = x.detach().requires_grad_()
    output = run(layer, x)
    return output.detach(), list(
        torch.autograd.grad(output, [x, *(attrgetter(n)(layer) for n in WEIGHTS)], grad)
    )


def ways(layer):
    """Name -> functions of an inference (of x) and of a training step (of x and a gradient)."""
    found = {}
    for name, run in (("compiled", run_compiled), ("portable", run_chunked)):

        def infer(x, run=run):
            with torch.no_grad():
                return run(layer, x)

        found[name] = infer, lambda x, grad, run=run: by_autograd(run, layer, x, grad)
    threads = torch.get_num_threads()
    for chunk, workers in ((768, 1), (256, threads)):
        block = InductorBlock(layer, chunk, workers)
        found[f"inductor, chunks of {chunk}, {workers} at a time"] = block.inference, block.step
    return found


def main() -> None:
    """Compile, compare, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.manual_seed(0)
    layer = ScBertLayer(ScBertConfig(), 0)
    print(compiled_blocks(ScBertLayer, ScBertConfig))
    x, grad = torch.randn(1, LENGTH, HIDDEN), torch.randn(1, LENGTH, HIDDEN)
    found = ways(layer)
    exact = None
    for name, (infer, step) in found.items():
        start = time.perf_counter()
        output, grads = step(x, grad)
        infer(x)
        values = [infer(x), output, *grads]
        exact = exact or values
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(values, exact, strict=True))
        print(f"{name}: ready after {time.perf_counter() - start:.0f} s, difference {error:.0e}", flush=True)
    for task, place, given in (("inference", 0, (x,)), ("training step", 1, (x, grad))):
        seconds = {name: [] for name in found}
        for _ in range(arguments.rounds):
            for name, pair in found.items():
                start = clock()
                pair[place](*given)
                seconds[name].append(clock() - start)
        for name, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(times, seconds["compiled"], strict=True))
            print(f"{task}, {name}: {statistics.median(times):.3f} s, {ratio:.2f} times ours", flush=True)


if __name__ == "__main__":
    main()
