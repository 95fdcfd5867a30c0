"""
A gene panel from the cells of a corpus: the genes that enough cells of enough files express.

    python scripts/corpus_panel.py CORPUS --output PANEL.txt [--within FILE] [--min-cells 10] [--min-files 4]
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from scbert.data.corpus_stream import corpus_parts
from scbert.data.paths import check_output_path
from scbert.tokenization import InputError, read_gene_panel
from scbert.tokenization.genes_scbert import write_gene_panel


def corpus_panel(
    corpus: str | Path,
    output: str | Path,
    within: str | Path | None = None,
    min_cells: int = 10,
    min_files: int = 4,
    overwrite: bool = False,
) -> list[str]:
    """
    Write the genes that at least `min_cells` cells of each of at least `min_files` files express.

    Parameters
    ----------
    corpus
        A folder of ``scbert build``; its files count one each, whatever their size.
    output
        Panel file, one symbol a line.
    within
        Another panel: only its genes are taken, in its order (that of the corpus without it).
    min_cells, min_files
        The rule.
    overwrite
        Replace an existing file.

    Returns
    -------
    list of str

    Raises
    ------
    InputError
        If no gene is left.

    Examples
    --------
    >>> corpus_panel("corpus", "panel.txt", within="scbert_gene_order_16906.txt.gz")  # doctest: +SKIP
    """
    check_output_path(output, overwrite, inputs=(corpus, within))
    files = Counter()
    for part in corpus_parts(corpus):
        values, names, _ = part.sample()
        cells = np.bincount(values.indices, minlength=len(names))
        files.update(name for name, n in zip(names, cells) if n >= min_cells)
    order = read_gene_panel(within) if within else list(files)
    panel = [name for name in order if files[name] >= min_files]
    if not panel:
        raise InputError(
            f"No gene is expressed in {min_cells} cells of {min_files} files of {corpus}; lower the two numbers."
        )
    write_gene_panel(output, panel)
    return panel


def main() -> int:
    """Entry of ``python scripts/corpus_panel.py``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="corpus_panel", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--within", type=Path, help="Only genes of this panel, in its order.")
    parser.add_argument("--min-cells", type=int, default=10, help="Cells of a file that must express a gene.")
    parser.add_argument("--min-files", type=int, default=4, help="Files in which they must.")
    parser.add_argument("--overwrite", action="store_true")
    try:
        panel = corpus_panel(**vars(parser.parse_args()))
    except (InputError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"{len(panel):,} genes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
