import csv
import gzip

import pytest

from scbert.tokenization import GeneTable, InputError, map_genes

HGNC = """\
hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id
HGNC:1\tKMT2D\tx\tApproved\t"ALR|MLL4"\tMLL2\tENSG00000167548
HGNC:2\tKMT2B\tx\tApproved\tMLL4|MLL2\t\tENSG00000272333
HGNC:3\tPTPRC\tx\tApproved\tCD45|LCA\t\tENSG00000081237
HGNC:4\tTP53\tx\tApproved\tp53\t\tENSG00000141510
HGNC:5\tSLITRK2\tx\tApproved\t\tTMEM257\t
HGNC:6\tALR\tx\tEntry Withdrawn\tCD45\t\t
HGNC:7\tSEPTIN7\tx\tApproved\t\tSEPT7|CDC10\t
HGNC:8\tCD45\tx\tEntry Withdrawn\t\t\t
"""
NCBI = """\
#tax_id\tGeneID\tSymbol\tLocusTag\tSynonyms\tdbXrefs
9606\t1\tKMT2D\t-\tALR|MLL2\tMIM:1|HGNC:HGNC:1|Ensembl:ENSG00000167548
9606\t2\tTP53\t-\t-\t-
10090\t3\tTrp53\t-\tp53\tEnsembl:ENSMUSG00000059552
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "hgnc_complete_set.txt"
    path.write_text(HGNC, encoding="utf-8")
    return GeneTable.from_file(path)


@pytest.mark.parametrize(
    ("name", "symbols", "via"),
    [
        ("PTPRC", ["PTPRC"], "symbol"),
        ("CD45", ["PTPRC"], "alias"),
        ("SEPT7", ["SEPTIN7"], "previous"),
        ("MLL2", ["KMT2D", "KMT2B"], "previous"),
        ("MLL4", ["KMT2D", "KMT2B"], "alias"),
        ("ALR", ["KMT2D"], "alias"),
        ("ENSG00000141510", ["TP53"], "ensembl"),
        ("ENSG00000141510.18", ["TP53"], "ensembl"),
        ("ENSG00000141510.18_PAR_Y", ["TP53"], "ensembl"),
        ("ENSG99999999999", [], "ensembl"),
        ("ptprc", [], ""),
        ("Ptprc", [], ""),
        ("unknown", [], ""),
    ],
)
def test_resolve(table, name, symbols, via):
    ids, found_via = table.resolve(name)
    assert ([table.symbols[i] for i in ids], found_via) == (symbols, via)


def test_ncbi_table(tmp_path):
    path = tmp_path / "gene_info.gz"
    path.write_bytes(gzip.compress(NCBI.encode()))
    table = GeneTable.from_file(path)
    assert len(table) == 2
    assert table.resolve("MLL2") == (("NCBI:1",), "alias")
    assert table.resolve("ENSG00000167548.3") == (("NCBI:1",), "ensembl")
    assert table.resolve("p53") == ((), "")


def test_mapping_and_report(tmp_path, table):
    # the panel uses an older name for one gene, the file for others
    panel = ["PTPRC", "KMT2D", "KMT2B", "SEPT7", "SLITRK2", "TP53", "NKG7"]
    names = ["CD45", "MLL4", "SEPTIN7", "SLITRK2", "TMEM257", "ENSG00000141510.2", "ENSG00000141510", "novel"]
    mapping = map_genes(names, panel, table)
    assert mapping.names == ["PTPRC", "MLL4", "SEPT7", "SLITRK2", "TMEM257", "TP53", "TP53", "novel"]
    status = {row[0]: row[1] for row in mapping.rows if row[0]}
    assert status == {
        "CD45": "renamed", "MLL4": "ambiguous", "SEPTIN7": "renamed", "SLITRK2": "matched",
        # told apart from SLITRK2 in the same file, so it is another gene there
        "TMEM257": "ambiguous", "ENSG00000141510.2": "renamed", "ENSG00000141510": "renamed",
        "novel": "unused",
    }  # fmt: skip
    assert [row[2] for row in mapping.rows if row[1] == "absent"] == ["KMT2D", "KMT2B", "NKG7"]
    assert mapping.counts == {"renamed": 4, "ambiguous": 2, "matched": 1, "unused": 1, "absent": 3}
    mapping.write(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == ["gene", "status", "panel_gene", "via", "note"]
    assert rows[1]["note"] == "may be KMT2D, KMT2B"
    assert len(rows) == len(names) + 3


def test_two_old_names_of_one_gene_are_not_merged(table):
    mapping = map_genes(["SEPT7", "CDC10"], ["SEPTIN7"], table)
    assert mapping.names == ["SEPT7", "CDC10"] and mapping.counts["ambiguous"] == 2


def test_without_a_table_names_are_exact():
    mapping = map_genes(["CD3E", "cd3e"], ["CD3E", "NKG7"])
    assert mapping.counts == {"matched": 1, "unused": 1, "absent": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,b\n1,2\n", "not a gene table"),
        (b"", "not a gene table"),
        (b"\xff\xfe\x00", "damaged"),
        (gzip.compress(HGNC.encode(), mtime=0)[:40], "damaged"),
        ("\t".join(["hgnc_id", *HGNC.splitlines()[0].split("\t")[1:]]).encode() + b"\n", "no human genes"),
    ],
)
def test_bad_tables_are_refused(tmp_path, content, words):
    path = tmp_path / "table.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        GeneTable.from_file(path)


def test_missing_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="no gene table"):
        GeneTable.from_file(tmp_path / "none.txt")
