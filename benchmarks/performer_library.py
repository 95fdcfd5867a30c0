"""
The stand-in for the original beside the library that the original's attention comes from, where that is installed.

    pip install --no-deps performer-pytorch==1.0.11 local-attention==1.4.4 axial-positional-embedding einops
    python benchmarks/performer_library.py --rounds 3

Times inference and a pretraining step of `PerformerLM` (lucidrains, MIT; the release of early 2021) and of our model
with `performer_attention`, of one size, in turn, and prints one line of JSON.
"""

import argparse
import json
import statistics

import torch

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
    options = parser.parse_args()
    print(json.dumps(compare(options.layers, options.length, options.rounds)))


def compare(n_layers: int, length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of the library and of the stand-in, by job."""
    model = library_model(n_layers, length)
    found = {}
    for job, library in (("inference", inference_of(model)), ("pretraining step", step_of(model))):
        stand_in = TASKS[job](build_config(n_layers, length), 1, length)
        ways = {"library": lambda _, run=library: run(cells(1, length)), "stand-in": stand_in}
        seconds = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, run in ways.items():
                seconds[name].append(timed(run, Variant(naive=True)))
        # the first round pays for what is set up once
        found[job] = {name: round(statistics.median(times[1:]), 2) for name, times in seconds.items()}
    return found


def library_model(n_layers: int, length: int) -> torch.nn.Module:
    """The library's language model with the published sizes."""
    try:
        from performer_pytorch import PerformerLM
    except ImportError as error:
        raise SystemExit(f"{error}. Install it with the command in this file's head.") from None
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
