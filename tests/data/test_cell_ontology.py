"""Labels and terms of the Cell Ontology: on a small graph made here, and on the real one where it is installed."""

import numpy as np
import pandas as pd
import pytest

from scbert.commands.cli import main
from scbert.data import cell_ontology
from scbert.data.cell_ontology import (
    TO_CONFIRM,
    CellOntology,
    map_labels,
    propose_terms,
    read_cell_ontology,
    read_terms,
)
from scbert.tokenization import InputError

NAMES = {
    "CL:0000000": "cell",
    "CL:0000738": "leukocyte",
    "CL:0000542": "lymphocyte",
    "CL:0000084": "T cell",
    "CL:0000624": "CD4-positive, alpha-beta T cell",
    "CL:0000625": "CD8-positive, alpha-beta T cell",
    "CL:0000236": "B cell",
    "CL:0000576": "monocyte",
}
ABOVE = {
    "CL:0000738": ["CL:0000000"],
    "CL:0000542": ["CL:0000738", "CL:0000000"],
    "CL:0000084": ["CL:0000542", "CL:0000738", "CL:0000000"],
    "CL:0000624": ["CL:0000084", "CL:0000542", "CL:0000738", "CL:0000000"],
    "CL:0000625": ["CL:0000084", "CL:0000542", "CL:0000738", "CL:0000000"],
    "CL:0000236": ["CL:0000542", "CL:0000738", "CL:0000000"],
    "CL:0000576": ["CL:0000738", "CL:0000000"],
}
SYNONYMS = {"CL:0000236": ["B lymphocyte", "B-cell"], "CL:0000084": ["T lymphocyte", "shared word"]}


@pytest.fixture
def ontology(monkeypatch):
    """A small part of the Cell Ontology, which the library is taken to hold."""
    synonyms = {term: SYNONYMS.get(term, []) for term in NAMES} | {"CL:0000576": ["shared word"]}
    small = CellOntology(NAMES, synonyms, {term: set(ABOVE.get(term, ())) for term in NAMES}, {"CL:0000084"})
    monkeypatch.setattr(cell_ontology, "read_cell_ontology", lambda: small)
    return small


@pytest.mark.parametrize(
    ("label", "term_id", "found"),
    [
        ("B cell", "CL:0000236", "name"),
        ("b cells", "CL:0000236", "name"),
        ("T-cells", "CL:0000084", "name"),
        ("B lymphocyte", "CL:0000236", "synonym"),
        ("B-lymphocyte", "CL:0000236", "synonym"),
        ("Mono", "CL:0000576", TO_CONFIRM),
        ("CD8 T", "CL:0000625", TO_CONFIRM),
        ("CD4+ T", "CL:0000624", TO_CONFIRM),
        ("A549", "", ""),
    ],
)
def test_proposals(ontology, label, term_id, found):
    row = propose_terms([label], ontology).iloc[0]
    assert [row["label"], row["term_id"], row["found"]] == [label, term_id, found]
    assert row["term_name"] == NAMES.get(term_id, "")


def test_what_two_terms_are_called_is_not_exact(ontology):
    assert propose_terms(["shared word"], ontology)["found"].tolist() == [TO_CONFIRM]


def test_a_hyphen_at_the_end_says_negative(ontology):
    ontology.names = {"CL:1": "CD25- T cell", "CL:2": "CD25 T cell"}
    assert propose_terms(["CD25- T cells", "CD25 T cells"], ontology)["term_id"].tolist() == ["CL:1", "CL:2"]


def test_the_table_is_written_corrected_and_read(ontology, adata, tmp_path, caplog):
    adata.obs["kind"] = np.array(["B cell", "T lymphocyte", "Mono", "A549", "unassigned"] * 24)
    path = tmp_path / "labels.csv"
    summary = map_labels(adata, "kind", path)
    assert (summary["by_name"], summary["by_synonym"], summary["to_confirm"], summary["without_term"]) == (
        1,
    ) * 4
    labels = ["A549", "B cell", "Mono", "T lymphocyte"]
    assert pd.read_csv(path)["label"].tolist() == labels

    # what is to be confirmed is not taken
    assert read_terms(path, labels, ontology) == {"B cell": "CL:0000236", "T lymphocyte": "CL:0000084"}
    assert "A549, Mono (1 still to confirm" in caplog.text
    # whatever a spreadsheet puts around it
    path.write_text(
        "\ufeff" + path.read_text().replace(TO_CONFIRM, "yes").replace("CL:0000576", " CL:0000576 ")
    )
    assert read_terms(path, labels, ontology)["Mono"] == "CL:0000576"
    with pytest.raises(InputError, match="already exists"):
        map_labels(adata, "kind", path)


def test_the_command(ontology, adata, tmp_path, capsys):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = [
        str(tmp_path / "cells.h5ad"),
        "--label-key",
        "cell_type",
        "--output",
        str(tmp_path / "labels.csv"),
    ]
    assert main(["map-labels", *words]) == 0
    assert "3 by name" in capsys.readouterr().err
    assert main(["map-labels", *words]) == 1
    assert main(["map-labels", *words, "--overwrite", "--json"]) == 0
    assert '"labels": 3' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("label\nB\n", "no column 'term_id'"),
        ("label,term_id\nB,CL:9999999\n", "'CL:9999999', which is no cell type"),
        ("label,term_id\nB,B cell\n", "'B cell', which is no cell type"),
        ("label,term_id\nB,CL:0000236\nB,CL:0000084\n", "more than one row for 'B'"),
        ("", "cannot be read"),
    ],
)
def test_tables_that_are_refused(ontology, tmp_path, table, words):
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(InputError, match=words):
        read_terms(tmp_path / "labels.csv", ["B", "T"], ontology)


def test_the_real_ontology():
    pytest.importorskip("cellxgene_ontology_guide")
    ontology = read_cell_ontology()
    assert len(ontology.names) > 3000
    for term_id, name in NAMES.items():
        assert ontology.names[term_id] == name
        assert ontology.ancestors[term_id] >= set(ABOVE.get(term_id, ()))
    # obsolete, and refused by CELLxGENE
    assert not {"CL:0000003", "CL:0000255", "CL:0000548"} & set(ontology.names)
    assert "B lymphocyte" in ontology.synonyms["CL:0000236"]
    assert "CL:0000084" in ontology.lineages
    found = propose_terms(["B cells", "NK cell", "CD8 T", "pDC", "CD14+ Monocyte", "HCC827"], ontology)
    assert found["term_id"].tolist() == [
        "CL:0000236", "CL:0000623", "CL:0000625", "CL:0000784", "CL:0001054", "",
    ]  # fmt: skip
    assert found["found"].tolist() == ["name", "synonym", TO_CONFIRM, "synonym", TO_CONFIRM, ""]
