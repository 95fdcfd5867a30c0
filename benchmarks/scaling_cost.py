"""Cost of a million cells: floating-point operations counted, seconds a cell measured here, GPU-hours derived.

    python benchmarks/scaling_cost.py
    python benchmarks/scaling_cost.py --tflops 990 --utilisation 0.3 --json

The model is scBERT's (6 layers, 16,907 tokens) with random weights. Seconds are of one cell at a time on the CPU,
processor time over all cores; the GPU columns assume that a share `--utilisation` of `--tflops` is reached.
"""

import argparse
import json
import time

import numpy as np
import torch

from scbert.modeling_scbert import ScBertConfig, ScBertForCellClassification, ScBertForMaskedExpression
from scbert.training.initial_model import freeze_for_finetuning

JOBS = ("annotating", "annotating, expressed genes only", "fine-tuning, an epoch", "pretraining, an epoch")


def forward_flops(config, n_tokens):
    """Floating-point operations of all layers for one cell of `n_tokens`; embeddings and head are small beside."""
    inner = config.num_attention_heads * config.head_dim
    features = 2 * inner * config.num_random_features
    projections = 2 * config.hidden_size * inner * 4
    block = 2 * 2 * config.hidden_size * config.intermediate_size
    # random features of query and key; context and output
    return config.num_hidden_layers * n_tokens * (projections + 4 * features + block)


def job_flops(config, job, n_expressed):
    """Floating-point operations of a cell: a backward pass costs two forward ones."""
    whole = forward_flops(config, config.max_position_embeddings)
    if job == JOBS[1]:
        return forward_flops(config, n_expressed + 1)
    # gradients pass the last layer and end in the one before it, as the original fine-tunes
    factor = {JOBS[0]: 1, JOBS[2]: 1 + 2 * 2 / config.num_hidden_layers, JOBS[3]: 3}[job]
    return whole * factor


def build_step(job, config, n_expressed):
    """A function that does a job for one drawn cell."""
    generator = np.random.default_rng(0)
    ids = torch.zeros(1, config.max_position_embeddings, dtype=torch.long)
    chosen = torch.from_numpy(generator.choice(ids.shape[1] - 1, n_expressed, replace=False))
    ids[0, chosen] = torch.from_numpy(generator.integers(1, 6, n_expressed))
    if job == JOBS[3]:
        config.sparse_prediction = True
        model = ScBertForMaskedExpression(config).train()
        labels = torch.full_like(ids, -100)
        labels[0, chosen[: n_expressed // 7]] = 1
        return lambda: model(ids, labels=labels).loss.backward()
    model = ScBertForCellClassification(config)
    if job == JOBS[2]:
        freeze_for_finetuning(model.train())
        return lambda: model(ids, labels=torch.zeros(1, dtype=torch.long)).loss.backward()
    model.eval()
    inputs = {"input_ids": ids}
    if job == JOBS[1]:
        genes = chosen.sort().values[None]
        inputs = {"input_ids": ids[:, genes[0]], "gene_ids": genes}
    return torch.inference_mode()(lambda: model(**inputs))


def measure(job, n_expressed, repeats):
    """Processor seconds of a cell: the best of several."""
    torch.manual_seed(0)
    config = ScBertConfig(num_labels=10)
    if job == JOBS[1]:
        config.pooling, config.classifier_hidden_sizes = "mean", ()
    step = build_step(job, config, n_expressed)
    step()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return config, min(seconds)


def main():
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expressed", type=int, default=2_000, help="expressed genes of a cell")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tflops", type=float, default=790, help="what a GPU's products reach, in TFLOP/s")
    parser.add_argument("--utilisation", type=float, default=0.3, help="share of it that a run reaches")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    args = parser.parse_args()
    rows = []
    for job in JOBS:
        config, seconds = measure(job, args.expressed, args.repeats)
        flops = job_flops(config, job, args.expressed)
        gpu_seconds = flops / (args.tflops * 1e12 * args.utilisation)
        rows.append(
            {
                "job": job,
                "gflop_per_cell": round(flops / 1e9, 1),
                "core_seconds_per_cell": round(seconds, 3),
                "core_gflop_per_second": round(flops / 1e9 / seconds),
                "core_hours_per_million": round(seconds * 1e6 / 3600),
                "gpu_cells_per_second": round(1 / gpu_seconds),
                "gpu_hours_per_million": round(gpu_seconds * 1e6 / 3600, 2),
            }
        )
    if args.json:
        print(json.dumps({"tflops": args.tflops, "utilisation": args.utilisation, "jobs": rows}))
        return
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
