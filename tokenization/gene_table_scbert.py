"""Other names of a gene, by a table the user chose: previous symbols, aliases, Ensembl ids.

A name is resolved only where the table gives it one meaning; ambiguous names are reported, never guessed.
"""

import csv
import gzip
from collections import Counter, defaultdict
from dataclasses import dataclass

from .errors_scbert import InputError
from .genes_scbert import ENSEMBL_ID, open_text

HGNC_COLUMNS = ("hgnc_id", "symbol", "status", "alias_symbol", "prev_symbol", "ensembl_gene_id")
NCBI_COLUMNS = ("GeneID", "Symbol", "Synonyms", "dbXrefs")
REPORT_COLUMNS = ("gene", "status", "panel_gene", "via", "note")


class GeneTable:
    """Names of human genes, from records of (gene id, approved symbol, previous symbols, aliases, Ensembl ids).

    Examples
    --------
    >>> table = GeneTable([("HGNC:7133", "KMT2D", ["MLL2"], ["ALR"], ["ENSG00000167548"])])
    >>> table.resolve("ENSG00000167548.12")
    (('HGNC:7133',), 'ensembl')
    >>> table.symbols[table.resolve("MLL2")[0][0]]
    'KMT2D'
    """

    def __init__(self, records):
        self.symbols = {}
        self._approved = {}
        self._others = {"previous": defaultdict(set), "alias": defaultdict(set), "ensembl": defaultdict(set)}
        for gene_id, symbol, previous, aliases, ensembl_ids in records:
            self.symbols[gene_id] = symbol
            self._approved[symbol] = gene_id
            for kind, names in (("previous", previous), ("alias", aliases), ("ensembl", ensembl_ids)):
                for name in names:
                    self._others[kind][name].add(gene_id)

    def __len__(self):
        return len(self.symbols)

    @classmethod
    def from_file(cls, path):
        """Read the HGNC complete set (.txt) or NCBI's Homo_sapiens.gene_info, gzip-compressed or not."""
        try:
            with open_text(path) as handle:
                reader = csv.DictReader(handle, delimiter="\t")
                columns = set(reader.fieldnames or ())
                if columns.issuperset(HGNC_COLUMNS):
                    records = list(_hgnc_records(reader))
                elif columns.issuperset(NCBI_COLUMNS):
                    records = list(_ncbi_records(reader))
                else:
                    raise InputError(
                        f"{path} is not a gene table: its columns should be those of the HGNC complete set "
                        f"({', '.join(HGNC_COLUMNS)}) or of NCBI's gene_info ({', '.join(NCBI_COLUMNS)})."
                    )
        except FileNotFoundError:
            raise InputError(f"There is no gene table {path}.") from None
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, csv.Error) as error:
            raise InputError(f"{path} is damaged or not a text file ({error}).") from error
        if not records:
            raise InputError(f"The gene table {path} holds no human genes.")
        return cls(records)

    def resolve(self, name):
        """Ids of the genes a name may mean, and by which kind of name.

        Of ids there may be none, one, or several (ambiguous); a kind is ``"symbol"``, ``"ensembl"``, ``"previous"``,
        ``"alias"`` or ``""``. An approved symbol means its own gene, whatever else it has been called. Previous symbols
        and aliases count together, so a name with two meanings among them is ambiguous.
        """
        if name in self._approved:
            return (self._approved[name],), "symbol"
        if ENSEMBL_ID.fullmatch(name):
            # a version follows the dot; PAR_Y copies are the same gene
            found = self._others["ensembl"].get(name.split(".")[0].removesuffix("_PAR_Y"), ())
            return tuple(sorted(found)), "ensembl"
        previous = self._others["previous"].get(name, set())
        found = previous | self._others["alias"].get(name, set())
        return tuple(sorted(found)), "previous" if previous else "alias" if found else ""


def _hgnc_records(reader):
    for row in reader:
        if row["status"] == "Approved":
            names = [_split(row[column]) for column in ("prev_symbol", "alias_symbol", "ensembl_gene_id")]
            yield (row["hgnc_id"], row["symbol"], *names)


def _ncbi_records(reader):
    for row in reader:
        # the first column is "#tax_id" in NCBI's own files
        if row.get("#tax_id", row.get("tax_id", "9606")) != "9606" or row["Symbol"] == "NEWENTRY":
            continue
        links = _split(row["dbXrefs"])
        ensembl = [link.removeprefix("Ensembl:") for link in links if link.startswith("Ensembl:")]
        yield f"NCBI:{row['GeneID']}", row["Symbol"], [], _split(row["Synonyms"]), ensembl


def _split(cell):
    names = [name.strip() for name in (cell or "").strip('"').split("|")]
    return [name for name in names if name not in ("", "-")]


@dataclass
class GeneMapping:
    """Names of a file brought to those of a panel; made by `map_genes`."""

    # the panel's name of each column of the file, or its own where it has none: for `align_genes`
    names: list[str]
    # (gene, status, panel_gene, via, note); status of the file's genes: matched by name, renamed by the table,
    # ambiguous (left out), unused (not in the panel); genes of the panel without a column follow as absent
    rows: list[tuple]

    @property
    def counts(self):
        """Number of genes by status."""
        return dict(Counter(row[1] for row in self.rows))

    def write(self, path):
        """Write the report as CSV."""
        with open(path, "w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(REPORT_COLUMNS)
            writer.writerows(self.rows)


def map_genes(gene_names, panel, table=None):
    """Bring a file's gene names to those of a panel.

    Names of the panel are matched exactly first. The others are renamed where the table gives both them and
    one gene of the panel the same single gene, whichever of the two uses the older name. A symbol is not
    renamed to a gene that stands in the file under its own name, nor are two symbols renamed to one gene: a
    file that tells them apart means different genes. Ensembl ids of one gene are summed.

    Without a `GeneTable` nothing is renamed.

    Examples
    --------
    >>> table = GeneTable([("HGNC:7133", "KMT2D", ["MLL2"], [], [])])
    >>> map_genes(["KMT2D", "CD3E"], ["CD3E", "MLL2"], table).names
    ['MLL2', 'CD3E']
    """
    names = [str(name) for name in gene_names]
    table = GeneTable(()) if table is None else table
    in_panel, by_gene = set(panel), _panel_by_gene(panel, table)
    rows = _refuse_collisions([_map_gene(name, table, in_panel, by_gene) for name in names])
    mapped = [row[2] if row[1] in ("matched", "renamed") else row[0] for row in rows]
    found = {row[2] for row in rows if row[1] in ("matched", "renamed")}
    rows += [("", "absent", gene, "", "") for gene in panel if gene not in found]
    return GeneMapping(mapped, rows)


def _panel_by_gene(panel, table):
    """Genes of the panel by gene id, for those with one meaning."""
    by_gene = defaultdict(list)
    for name in panel:
        ids, _ = table.resolve(name)
        if len(ids) == 1:
            by_gene[ids[0]].append(name)
    return by_gene


def _map_gene(name, table, in_panel, by_gene):
    """The report's row of one gene of the file."""
    if name in in_panel:
        return name, "matched", name, "name", ""
    ids, via = table.resolve(name)
    candidates = [gene for gene_id in ids for gene in by_gene.get(gene_id, ())]
    meanings = ", ".join(table.symbols[gene_id] for gene_id in ids)
    if not candidates:
        return name, "unused", "", "", meanings
    if len(ids) > 1 or len(candidates) > 1:
        return name, "ambiguous", "", via, f"may be {meanings if len(ids) > 1 else ', '.join(candidates)}"
    return name, "renamed", candidates[0], via, ""


def _refuse_collisions(rows):
    """Renamings by symbol that would meet another column of the same gene become ambiguous."""
    claims = Counter(row[2] for row in rows if row[1] in ("matched", "renamed"))
    return [
        (row[0], "ambiguous", "", row[3], f"another column is {row[2]} too")
        if row[1] == "renamed" and row[3] != "ensembl" and claims[row[2]] > 1
        else row
        for row in rows
    ]
