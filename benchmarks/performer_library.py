"""
Our full-length model beside the library that the original's attention comes from, and beside the stand-in for it.

    pip install --no-deps performer-pytorch==1.0.11 local-attention==1.4.4 axial-positional-embedding einops
    python benchmarks/performer_library.py --rounds 3

Times inference and a pretraining step of `PerformerLM` (lucidrains, MIT; the release of early 2021), of our model with
`performer_attention`, and of our model as it comes (oneDNN and compiled blocks where they serve, float32), of one size,
in turn, and prints a table. Without the library it says so and times nothing.
"""

import argparse
import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from scbert.modeling_scbert import ScBertConfig
from scbert.modeling_scbert.compiled_layer_scbert import compiled_blocks
from scbert.modeling_scbert.cpu_matmul_scbert import restore_matmul, use_onednn
from scbert.modeling_scbert.layers_scbert import ScBertLayer
from speed import timed
from speed_tasks import FULL_LENGTH, TASKS, Variant, build_config, cells


def main() -> None:
    """Time both, print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=FULL_LENGTH)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    if find_spec("performer_pytorch") is None:
        print(
            "Skipped: performer-pytorch is not installed; the command is in this file's head.",
            file=sys.stderr,
        )
        return
    found = compare(options.layers, options.length, options.rounds)
    title = f"Seconds, one cell of {options.length:,} tokens, {options.layers} layers"
    table = Table("job", *next(iter(found.values())), title=title)
    for job, seconds in found.items():
        table.add_row(job, *(f"{median:.2f}" for median in seconds.values()))
    Console().print(table)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


def compare(n_layers: int, length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of the library, of the stand-in and of our model, by job."""
    model = library_model(n_layers, length)
    ours = Variant(
        onednn=use_onednn().enabled,
        compiled=compiled_blocks(ScBertLayer, ScBertConfig).operators is not None,
    )
    restore_matmul()
    found = {}
    for job, library in (("inference", inference_of(model)), ("pretraining step", step_of(model))):
        run = TASKS[job](build_config(n_layers, length), 1, length)
        ways = {
            "library": (lambda _, run=library: run(cells(1, length)), Variant(naive=True)),
            "stand-in": (run, Variant(naive=True)),
            "scbert": (run, ours),
        }
        seconds = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                seconds[name].append(timed(*way))
        # the first round pays for what is set up once
        found[job] = {name: round(statistics.median(times[1:]), 2) for name, times in seconds.items()}
    return found


def library_model(n_layers: int, length: int) -> torch.nn.Module:
    """The library's language model with the published sizes."""
    from performer_pytorch import PerformerLM

    sizes = {
        "num_tokens": 7,
        "max_seq_len": length,
        "dim": 200,
        "depth": n_layers,
        "heads": 10,
        "dim_head": 64,
    }
    return PerformerLM(**sizes, rotary_position_emb=False)


def inference_of(model):
    """Logits of a batch, without gradient."""

    def run(input_ids):
        model.eval()
        with torch.no_grad():
            return model(input_ids)

    return run


def step_of(model):
    """Forward, backward and Adam on the expressed genes of a batch, one in seven labelled."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def run(input_ids):
        model.train()
        optimizer.zero_grad()
        labels = torch.where((input_ids > 0) & (torch.rand(input_ids.shape) < 0.15), input_ids, -100)
        loss = torch.nn.functional.cross_entropy(model(input_ids).transpose(1, 2), labels)
        loss.backward()
        optimizer.step()
        return loss

    return run


if __name__ == "__main__":
    main()
