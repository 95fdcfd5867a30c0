"""What padding costs, and what batches of like length and packed cells save of it.

    python benchmarks/packing_speed.py CELLS --output packing.json

Masked expression steps of one model on the same cells, expressed genes only, in three kinds of batches: padded in
random order, padded with cells of like length together, and packed in random order. The three take turns, and time is
that of the process's CPU, so that other work on the machine counts little; quote the ratios.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from scbert.data.read import read_cells
from scbert.modeling_scbert import ScBertConfig, ScBertForMaskedExpression
from scbert.tokenization import ScBertTokenizer
from scbert.training.cell_batches import CellDataset, DataCollatorForMaskedExpression
from scbert.training.cell_order import LengthGroupedSampler

WAYS = ("padded, random order", "padded, by length", "packed, random order")
SIZES = {
    "small": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "intermediate_size": 128,
        "num_random_features": 64,
    },
    "published": {},
}


def batches_of(cells, batch_size, seed=0):
    """Kind of batch -> its batches, of the same cells."""
    tokenizer, bins = cells
    dataset, order = CellDataset(bins), np.random.default_rng(seed).permutation(bins.shape[0])
    grouped = list(LengthGroupedSampler(np.diff(bins.indptr), batch_size, seed))
    found = {}
    for way, rows in zip(WAYS, (order, grouped, order)):
        collate = DataCollatorForMaskedExpression(tokenizer, seed=seed, packing=way.startswith("packed"))
        found[way] = [
            collate(dataset.__getitems__(rows[start : start + batch_size]))
            for start in range(0, len(rows), batch_size)
        ]
    return found


def measure(model, batches, rounds):
    """Tokens computed, CPU seconds of a pass (median of rounds) and mean loss by kind of batch."""
    seconds = {way: [] for way in batches}
    losses = {}
    for _ in range(rounds):
        for way, steps in batches.items():
            start, total = time.process_time(), 0.0
            for batch in steps:
                model.zero_grad()
                loss = model(**{name: x for name, x in batch.items() if name != "draw"}).loss
                loss.backward()
                total += float(loss.detach()) * int((batch["labels"] != -100).sum())
            seconds[way].append(time.process_time() - start)
            losses[way] = total / sum(int((batch["labels"] != -100).sum()) for batch in steps)
    tokens = {way: sum(batch["input_ids"].numel() for batch in steps) for way, steps in batches.items()}
    return [
        {
            "way": way,
            "tokens": tokens[way],
            "seconds": float(np.median(seconds[way])),
            "loss": losses[way],
        }
        for way in batches
    ]


def markdown(result):
    """The figures as a table."""
    first = result["rows"][0]
    least = min(row["tokens"] for row in result["rows"])
    lines = ["| batches | tokens computed | of them padding | CPU seconds | |", "|---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        padding = 1 - least / row["tokens"]
        gain = f"{first['seconds'] / row['seconds']:.2f}x"
        lines.append(f"| {row['way']} | {row['tokens']:,} | {padding:.0%} | {row['seconds']:.1f} | {gain} |")
    return "\n".join(lines)


def main():
    """Read options, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", type=Path, help="file of cells")
    parser.add_argument("--n-cells", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--attention", choices=("favor", "lsh", "softmax"), default="favor")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    adata = read_cells(arguments.cells)
    chosen = np.random.default_rng(0).permutation(adata.n_obs)[: arguments.n_cells]
    tokenizer = ScBertTokenizer(gene_panel=list(dict.fromkeys(adata.var_names)), keep_zeros=False)
    bins = tokenizer.bin_cells(adata[np.sort(chosen)])
    torch.manual_seed(0)
    config = ScBertConfig(
        max_position_embeddings=len(tokenizer.gene_panel) + 1,
        attention_type=arguments.attention,
        sparse_prediction=True,
        **SIZES[arguments.size],
    )
    # evaluation mode: no dropout and a fixed hash, so that the losses can be compared
    model = ScBertForMaskedExpression(config).eval()
    rows = measure(model, batches_of((tokenizer, bins), arguments.batch_size), arguments.rounds)
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
    settings["cells"] = arguments.cells.name
    result = {
        "settings": settings,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    print(markdown(result), file=sys.stderr)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
