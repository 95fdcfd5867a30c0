"""Write data/ensembl_ids.csv.gz: Ensembl ids of the genes of the models that ship, for files that have no symbols.

    python scripts/ensembl_table.py hgnc_complete_set.txt Homo_sapiens.gene_info.gz --panels PANEL.txt...

Ids that one table lacks are taken from the next.
"""

import argparse
import csv
import gzip
import io
import re
from pathlib import Path

from scbert.tokenization import GeneTable, map_genes, read_gene_panel
from scbert.tokenization.genes_scbert import open_text

TABLE = Path(__file__).parents[1] / "data" / "ensembl_ids.csv.gz"


def ensembl_ids(tables, panel):
    """Ensembl id -> gene of the panel, by the first table that knows exactly one."""
    found = {}
    for path in tables:
        with open_text(path) as handle:
            ids = sorted(set(re.findall(r"ENSG\d{11}", handle.read())))
        rows = map_genes(ids, panel, GeneTable.from_file(path)).rows
        new = {gene: panel_gene for gene, status, panel_gene, *_ in rows if status == "renamed"}
        found = {**new, **found}
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", help="HGNC complete set, NCBI gene_info")
    parser.add_argument("--panels", nargs="+", required=True, help="gene panels, a symbol a line")
    options = parser.parse_args()
    panel = list(dict.fromkeys(gene for path in options.panels for gene in read_gene_panel(path)))
    found = ensembl_ids(options.tables, panel)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ensembl_id", "symbol"])
    writer.writerows(sorted(found.items()))
    # without a time in it, the same table is the same file
    TABLE.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    print(f"{len(found):,} ids of {len(set(found.values())):,} of {len(panel):,} genes: {TABLE}")


if __name__ == "__main__":
    main()
