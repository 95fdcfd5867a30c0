"""Gene set enrichment with a hand-worked hypergeometric p-value, and nothing from the web."""

import gzip
import socket

import pytest
from scipy.stats import hypergeom

from scbert.interpretation.enrichment import COLUMNS, enrich_by_type, enrich_genes, read_gmt
from scbert.tokenization import InputError

BACKGROUND = [f"G{i}" for i in range(20)]
SETS = {"first": BACKGROUND[:5], "second": BACKGROUND[5:15], "outside": ["X1", "X2", "X3"], "tiny": ["G1"]}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_p_values_by_hand():
    table = enrich_genes(["G0", "G1", "G2", "G5", "NOT_THERE"], SETS, BACKGROUND, min_size=3).set_index(
        "term"
    )
    assert table.index.tolist() == ["first", "second"]
    assert table.loc["first", ["n_overlap", "n_set", "genes"]].tolist() == [3, 5, "G0;G1;G2"]
    # 4 of the genes are in the background of 20; at least 3 of them among the 5 of the set.
    assert table.loc["first", "p_value"] == pytest.approx(hypergeom.sf(2, 20, 5, 4))
    assert table.loc["second", "p_value"] == pytest.approx(hypergeom.sf(0, 20, 10, 4))
    # Benjamini-Hochberg over the two.
    assert table.loc["first", "adjusted_p_value"] == pytest.approx(2 * hypergeom.sf(2, 20, 5, 4))


def test_sets_without_a_hit_were_tested_too():
    """Left out of the adjustment they would make one gene of a small set a finding."""
    sets = {f"set {i}": [f"A{i}", *BACKGROUND[5:10]] for i in range(20)}
    universe = [*BACKGROUND, *(f"A{i}" for i in range(20))]
    table = enrich_genes(["A0"], sets, universe)
    assert table["term"].tolist() == ["set 0"]
    assert table.loc[0, "p_value"] == pytest.approx(6 / 40) and table.loc[0, "adjusted_p_value"] == 1


def test_names_of_genes_may_be_numbers():
    table = enrich_genes(["101"], {"ids": ["101", "102"], "names": ["LYZ", "101"]}, ["101", "102", "LYZ"], 1)
    assert table["genes"].tolist() == ["101", "101"]


def test_no_overlap_is_an_empty_table(capfd):
    for genes in (["X1"], []):
        table = enrich_genes(genes, SETS, BACKGROUND)
        assert table.columns.tolist() == COLUMNS and not len(table)
    assert capfd.readouterr() == ("", "")


def test_gmt_plain_zipped_weighted_and_repeated(tmp_path):
    text = "first\thttp://x\tG0\tG1\tG0\nsecond\t\tG5,1.0\tG6,0.5\t\nfirst\t\tG2\n\n"
    plain, zipped = tmp_path / "sets.gmt", tmp_path / "sets.gmt.gz"
    plain.write_text(text)
    zipped.write_bytes(gzip.compress(text.encode()))
    assert read_gmt(plain) == read_gmt(zipped) == {"first": ["G0", "G1", "G2"], "second": ["G5", "G6"]}
    empty = tmp_path / "empty.gmt"
    empty.write_text("only a name\n")
    with pytest.raises(InputError, match="holds no gene set"):
        read_gmt(empty)
    empty.write_bytes(b"\x89HDF")
    with pytest.raises(InputError, match="is no text"):
        read_gmt(empty)


def test_by_type_joins_the_tables(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("\n".join("\t".join([name, "", *genes]) for name, genes in SETS.items()))
    sets = read_gmt(path)
    table = enrich_by_type({"T": ["G0", "G1"], "B": ["G6"], "none": ["X1"]}, sets, iter(BACKGROUND))
    assert table[["cell_type", "term"]].values.tolist() == [["T", "first"], ["B", "second"]]
    assert not len(enrich_by_type({"none": []}, sets, BACKGROUND))
