import gzip

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scbert.tokenization import InputError, align_genes, gene_names_of, read_gene_panel, write_gene_panel
from scbert.tokenization.genes_scbert import looks_like_ensembl, read_panel_rows

NAMES = st.lists(st.sampled_from(["A", "B", "C", "D", "E", "x", "y"]), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(names=NAMES, panel=st.permutations(["A", "B", "C", "D", "E"]), data=st.data())
def test_alignment_equals_dense_reference(names, panel, data):
    rows = data.draw(
        st.lists(
            st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names)), min_size=1, max_size=4
        )
    )
    dense = np.array(rows)
    expected = np.zeros((len(rows), len(panel)))
    for j, name in enumerate(names):
        if name in panel:
            expected[:, panel.index(name)] += dense[:, j]
    alignment = align_genes(names, panel)
    aligned = alignment.apply(sp.csr_matrix(dense))
    np.testing.assert_array_equal(aligned.toarray(), expected)
    assert aligned.has_sorted_indices
    assert alignment.n_matched == len(set(names) & set(panel))
    assert alignment.n_matched + alignment.n_duplicates + alignment.n_unused == len(names)
    assert alignment.n_absent == len(panel) - alignment.n_matched


def test_small_integers_are_summed_without_overflow():
    aligned = align_genes(["A", "A"], ["A"]).apply(sp.csr_matrix(np.array([[200, 100]], dtype=np.uint8)))
    assert aligned[0, 0] == 300


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ENSG00000141510", "ENSG00000012048.23"], "Ensembl"),
        (["cd3e", "ms4a1"], "never guessed"),
        (["Cd3e", "Ms4a1", "Gm12345"], "never guessed"),
        (["chr1-100-200", "chr2-5-90"], "ATAC"),
        (["foo", "BAR1", "BAR2"], "var_names"),
    ],
)
def test_low_overlap_shows_both_sides(names, words):
    alignment = align_genes(names, ["CD3E", "MS4A1", "NKG7"])
    with pytest.raises(InputError, match=words) as error:
        alignment.check()
    assert names[0] in str(error.value) and "CD3E" in str(error.value)
    # nothing in common cannot be forced
    with pytest.raises(InputError):
        alignment.check(force=True)


def test_overlap_may_be_forced():
    alignment = align_genes(["CD3E", "x"], ["CD3E", *(f"G{i}" for i in range(9))])
    with pytest.raises(InputError, match="--force"):
        alignment.check()
    alignment.check(force=True)
    alignment.check(minimum=0.1)
    assert alignment.overlap == 0.1


def test_duplicates_are_told():
    assert align_genes(["CD3E", "x", "x"], ["CD3E", "MS4A1"]).notes() == []
    names = ["CD3E", "CD3E", "CD3E", *(f"G{i}" for i in range(6)), *(f"G{i}" for i in range(6))]
    (note,) = align_genes(names, ["MS4A1", "CD3E", *(f"G{i}" for i in range(9))]).notes()
    assert note.startswith("8 column(s) repeat the gene name of another (CD3E, G0, G1, G2, G3, ...)")


def test_a_hint_comes_before_the_look_of_the_names():
    alignment = align_genes(["ENSG00000141510"], ["CD3E"])
    alignment.hint = "Take the other one."
    with pytest.raises(InputError, match=r"of the model: CD3E. Take the other one.$"):
        alignment.check()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".csv"])
def test_panels_are_read_from_text(tmp_path, suffix, encoding):
    path = tmp_path / f"panel{suffix}"
    text = "CD3E\n\nMS4A1\r\n" if suffix != ".csv" else 'gene,score\n"CD3E",1\nMS4A1,2\n'
    opener = gzip.open if suffix.endswith("gz") else open
    with opener(path, "wt", encoding=encoding, newline="") as handle:
        handle.write(text)
    assert read_gene_panel(path) == ["CD3E", "MS4A1"]


def test_panel_round_trip_with_modalities(tmp_path):
    write_gene_panel(tmp_path / "p.txt", ["A", "chr1:5-9"], [0, 1])
    assert read_panel_rows(tmp_path / "p.txt") == [["A", "0"], ["chr1:5-9", "1"]]
    assert read_gene_panel(tmp_path / "p.txt") == ["A", "chr1:5-9"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no gene names"), (b"A\nB\nA\n", "more than once"), (b"\xff\xfe\x00\x01", "not a readable")],
)
def test_bad_panels_are_refused(tmp_path, content, words):
    path = tmp_path / "panel.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_gene_panel(path)


def test_folder_and_cut_gzip_are_refused(tmp_path):
    with pytest.raises(InputError, match="folder"):
        read_gene_panel(tmp_path)
    path = tmp_path / "panel.txt.gz"
    path.write_bytes(gzip.compress(b"CD3E\n" * 1000)[:30])
    with pytest.raises(InputError, match="readable"):
        read_gene_panel(path)


def test_ensembl_ids_are_told_from_symbols():
    assert looks_like_ensembl(["ENSG00000141510", "ENSG00000012048.23", "MT-CO1"])
    assert looks_like_ensembl(["ENSMUSG00000064351"])
    assert not looks_like_ensembl(["TP53", "BRCA1", "ENSA"])
    assert not looks_like_ensembl([])


@pytest.mark.parametrize("column", ["gene_symbols", "feature_name", "gene_name"])
def test_symbols_are_found_in_var(column):
    ids = ["ENSG00000141510", "ENSG00000012048.23", "ENSG00000000003"]
    var = pd.DataFrame({column: pd.Categorical(["TP53", "BRCA1", None])}, index=ids)
    assert gene_names_of(var, ids) == ["TP53", "BRCA1", "ENSG00000000003"]


def test_a_panel_of_ids_keeps_the_ids_and_one_of_symbols_takes_these():
    ids = ["ENSG00000141510", "ENSG00000012048.23", "ENSG00000000003"]
    var = pd.DataFrame({"gene_symbols": ["TP53", "BRCA1", "TSPAN6"]}, index=ids)
    assert gene_names_of(var, ids, ["ENSG00000141510.2", "ENSG00000012048"]) == ids
    for panel in (["TP53", "BRCA1"], ["CD3E"]):
        assert gene_names_of(var, ids, panel) == ["TP53", "BRCA1", "TSPAN6"]


def test_versions_of_ensembl_ids_do_not_matter():
    panel = ["ENSG00000141510", "ENSG00000012048.23", "ENSG00000182378", "AC1.2"]
    names = ["ENSG00000012048", "ENSG00000141510.7", "ENSG00000182378.15_PAR_Y", "AC1.1"]
    # copies of the Y chromosome are columns of their own, and other names have dots that mean something
    assert align_genes(names, panel).target.tolist() == [1, 0, -1, -1]
    assert align_genes(["ENSG00000012048.23", "ENSG00000012048.1"], panel).n_duplicates == 1


def test_symbols_in_var_names_are_left_alone():
    var = pd.DataFrame({"gene_name": ["other", "names"]}, index=["TP53", "BRCA1"])
    assert gene_names_of(var, var.index) == ["TP53", "BRCA1"]
    ids = ["ENSG00000141510", "ENSG00000012048"]
    assert gene_names_of(pd.DataFrame({"gene_name": ids}, index=ids), ids) == ids


def test_proteins_named_as_genes_are_called_otherwise():
    """Even as genes that the file lacks, and once. Features whose kind was lost keep their names."""
    kinds = ["Gene Expression"] * 2 + ["Antibody Capture"] * 2 + ["Peaks", None, "Custom"]
    names = ["CD4", "LYZ", "CD4", "CD19", "chr1:1-9", "MS4A1", "LYZ"]
    var = pd.DataFrame({"feature_types": kinds}, index=names)
    proteins = ["CD4 (Antibody Capture)", "CD19 (Antibody Capture)"]
    for _ in range(2):
        var.index = gene_names_of(var, var.index)
        assert list(var.index) == ["CD4", "LYZ", *proteins, "chr1:1-9", "MS4A1", "LYZ (Custom)"]
