"""Trees of types: of a table, of a coarser column, of the Cell Ontology, which is no tree."""

import numpy as np
import pytest

from scbert.data.cell_ontology import CellOntology, read_cell_ontology
from scbert.data.label_tree import ancestors_of, tree_from_column, tree_from_ontology, tree_from_table
from scbert.tokenization import InputError


@pytest.fixture
def table(tmp_path):
    """Function that reads a tree for B, CD4, CD8 from the text of a table."""

    def read(text):
        (tmp_path / "tree.csv").write_text(text)
        return tree_from_table(tmp_path / "tree.csv", ["B", "CD4", "CD8"])

    return read


def test_table_of_several_levels(table):
    found = table("label,parent\nCD4,T\nCD8, T\nT,lymphocyte\nB,lymphocyte\nlymphocyte,\nmonocyte,myeloid\n")
    assert found == {"B": "lymphocyte", "CD4": "T", "T": "lymphocyte", "CD8": "T"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label,parent\nCD4,T\nCD4,B\n", "two parents, 'T' and 'B'"),
        ("label,parent\nCD4,T\nT,CD4\n", "in a circle: T > CD4 > T"),
        ("label,parent\nmonocyte,myeloid\n", "Nothing in .* stands above"),
        ("label,parent\nCD4,unassigned\n", "'unassigned', the word for"),
        ("name,parent\nCD4,T\n", "no column 'label'"),
    ],
)
def test_tables_that_are_refused(table, text, words):
    with pytest.raises(InputError, match=words):
        table(text)


def test_column_goes_by_the_most_cells_and_says_where_that_is_unclear(caplog):
    labels = np.array(["CD4"] * 10 + ["CD8"] * 10 + ["B", None], dtype=object)
    coarse = np.array(["T"] * 17 + ["NK"] * 3 + ["B", "T"], dtype=object)
    assert tree_from_column(labels, coarse, ["B", "CD4", "CD8"], "lineage") == {"CD4": "T", "CD8": "T"}
    assert "Only 70% of the cells of CD8 are T in lineage" in caplog.text
    with pytest.raises(InputError, match="the column 'same'"):
        tree_from_column(labels, labels, ["B", "CD4", "CD8"], "same")


# a graph with a term of two parents: macrophages are myeloid, and they present antigens as B cells do
ABOVE = {
    "leu": {"CL:0000000"},
    "lym": {"leu", "CL:0000000"},
    "mye": {"leu", "CL:0000000"},
    "apc": {"CL:0000000"},
    "T": {"lym", "leu", "CL:0000000"},
    "CD4": {"T", "lym", "leu", "CL:0000000"},
    "CD8": {"T", "lym", "leu", "CL:0000000"},
    "B": {"lym", "leu", "apc", "CL:0000000"},
    "mac": {"mye", "leu", "apc", "CL:0000000"},
    "neu": {"mye", "leu", "CL:0000000"},
    "CL:0000000": set(),
}


@pytest.fixture
def graph():
    return CellOntology({term: f"{term} cell" for term in ABOVE}, {}, ABOVE, {"lym", "mye", "T"})


def test_tree_of_a_graph(graph):
    terms = {"b": "B", "c4": "CD4", "c8": "CD8", "m": "mac", "n": "neu"}
    parents, term_ids = tree_from_ontology(terms, graph, [*terms, "new"])
    assert parents == {
        "b": "lym cell", "c4": "T cell", "c8": "T cell", "m": "mye cell", "n": "mye cell",
        "T cell": "lym cell", "lym cell": "leu cell", "mye cell": "leu cell",
    }  # fmt: skip
    assert term_ids == terms | {f"{name} cell": name for name in ("T", "lym", "mye", "leu")}


def test_a_label_may_stand_above_others(graph):
    parents, term_ids = tree_from_ontology({"c4": "CD4", "any T": "T"}, graph, ["c4", "any T"])
    assert parents == {"c4": "any T"}
    assert term_ids == {"c4": "CD4", "any T": "T"}


def test_labels_of_one_term_stand_below_it(graph):
    assert tree_from_ontology({"b1": "B", "b2": "B"}, graph, ["b1", "b2"])[0] == {
        "b1": "B cell",
        "b2": "B cell",
    }


def test_a_label_without_a_term_is_not_taken_for_the_type_of_its_name(graph):
    parents, term_ids = tree_from_ontology({"c4": "CD4", "c8": "CD8"}, graph, ["c4", "c8", "T cell"])
    assert parents == {"c4": "T cell (T)", "c8": "T cell (T)"}
    assert "T cell" not in term_ids


def test_labels_with_nothing_in_common_have_no_tree(graph):
    assert tree_from_ontology({"T": "T", "apc": "apc"}, graph, ["T", "apc"])[0] == {}
    assert tree_from_ontology({}, graph, ["T"]) == ({}, {})


def test_tree_of_blood_in_the_real_ontology():
    pytest.importorskip("cellxgene_ontology_guide")
    ontology = read_cell_ontology()
    terms = {
        "B": "CL:0000236",
        "CD4": "CL:0000895",
        "CD4m": "CL:0000897",
        "CD8": "CL:0000625",
        "NK": "CL:0000623",
    }
    terms |= {"mono": "CL:0001054", "DC": "CL:0000451", "platelet": "CL:0000233"}
    parents, term_ids = tree_from_ontology(terms, ontology, list(terms))
    assert ancestors_of("CD4", parents)[:3] == ["CD4-positive, alpha-beta T cell", "T cell", "lymphocyte"]
    assert ancestors_of("B", parents) == ["lymphocyte", "leukocyte", "hematopoietic cell"]
    assert ancestors_of("platelet", parents) == ["hematopoietic cell"]
    # whatever was taken, it is above in the graph too
    for child, parent in parents.items():
        assert term_ids[parent] in ontology.ancestors[term_ids[child]]
    for name, term_id in term_ids.items():
        assert name in terms or ontology.names[term_id] == name
