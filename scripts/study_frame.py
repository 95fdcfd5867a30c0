"""What the studies have in common: their labelled cells, named on the command line, and how they end."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scbert.commands.console import existing, guarded, show_messages, silence_libraries
from scbert.protocols.cells import load_benchmark_cells
from scbert.protocols.run import show

CELLS = ("cells", "label_key", "label_map", "layer", "input", "max_cells")


def study_parser(description: str) -> argparse.ArgumentParser:
    """The options of every study; ``--help`` begins with `description`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("cells", nargs="+", type=Path, help="Labelled cells.")
    parser.add_argument("--label-key", required=True, help="Column of obs that holds the cell types.")
    parser.add_argument(
        "--label-map", type=Path, help="Other names for types: columns from and to of a .csv."
    )
    parser.add_argument("--layer", help="Layer that holds the values (X without it).")
    parser.add_argument("--values", dest="input", default="auto", choices=["auto", "counts", "log1p"])
    parser.add_argument("--max-cells", type=int, help="Take a part of the cells.")
    parser.add_argument("--output", type=Path, required=True, help="The folder to write.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing output.")
    return parser


def run_study(study: Callable[..., Any], parser: argparse.ArgumentParser, arguments: list[str] | None) -> int:
    """Call ``study(cells, **options)``, which gives a result and its tables, show them and return the exit code."""

    def job() -> None:
        options = vars(parser.parse_args(arguments))
        asked = {name: options.pop(name) for name in CELLS}
        existing(*asked["cells"])
        cells = load_benchmark_cells(asked.pop("cells"), **asked, seed=options["seed"])
        result, tables = study(cells, **options)
        show(tables, result)

    silence_libraries()
    show_messages()
    return guarded(job)
