"""Ontology columns of annotated files by CELLxGENE's rules: a term of the Cell Ontology it takes, or "unknown"."""

import json
import re

import anndata
import numpy as np
import pandas as pd
import pytest

from scbert.commands.cli import main
from scbert.data.cell_ontology import REFUSED, ROOT, read_cell_ontology
from scbert.data.label_tree import ancestors_of
from scbert.inference.shipped import NO_TYPE, SHIPPED
from scbert.tokenization import read_gene_panel

COLUMNS = ("scbert_cell_type_ontology_term_id", "scbert_cell_type_backoff_ontology_term_id")
FOLDERS = pytest.mark.parametrize("folder", SHIPPED.values(), ids=lambda folder: folder.name)


def check_column(column):
    """The schema's rules for cell_type_ontology_term_id of human cells."""
    assert isinstance(column.dtype, pd.CategoricalDtype)
    assert all(isinstance(value, str) for value in column.cat.categories)
    assert not column.isna().any()
    check_terms(set(column))


def check_terms(terms):
    """Ids of the right form that the schema does not refuse; known to the ontology, where it is installed."""
    terms = terms - {"unknown"}
    assert all(re.fullmatch(r"CL:\d{7}", term) for term in terms)
    assert not terms & REFUSED
    try:
        known = read_cell_ontology().names
    except ImportError:
        return
    assert terms <= set(known)


@pytest.fixture(params=SHIPPED.items(), ids=lambda item: item[0])
def annotated(request, tmp_path):
    """A file annotated by a shipped model: cells of all kinds of depth, one without expression."""
    tissue, folder = request.param
    panel = read_gene_panel(folder / "gene_panel.txt")
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.lognormal(-3, 1.5, (60, len(panel)))).astype(np.float32)
    counts[0] = 0
    anndata.AnnData(counts, var=pd.DataFrame(index=panel)).write_h5ad(tmp_path / "cells.h5ad")
    output = tmp_path / "annotated.h5ad"
    # no real cells: the models say so, and are asked for a type all the same
    arguments = ["--tissue", tissue, "--threshold", "0", "--output", str(output)]
    assert main(["annotate", str(tmp_path / "cells.h5ad"), *arguments]) == 0
    return folder, anndata.read_h5ad(output)


def test_an_annotated_file_keeps_the_rules(annotated):
    folder, cells = annotated
    terms = json.loads((folder / "config.json").read_text())["label_ontology_ids"]
    for name in COLUMNS:
        check_column(cells.obs[name])
        labels = cells.obs[name.removesuffix("_ontology_term_id")].astype(str)
        assert [terms.get(label, "unknown") for label in labels] == list(cells.obs[name])
        assert cells.obs[name].iloc[0] == "unknown"
    assert cells.obs[COLUMNS[0]].nunique() > 1


@FOLDERS
def test_every_label_that_ships_has_a_term(folder):
    config = json.loads((folder / "config.json").read_text())
    terms, parents = config["label_ontology_ids"], config["label_parents"]
    labels = set(config["id2label"].values()) - {NO_TYPE}
    assert labels | set(parents.values()) <= set(terms)
    check_terms(set(terms.values()))
    assert len(set(terms.values())) == len(terms)


@FOLDERS
def test_wider_types_that_ship_stand_above_in_the_ontology(folder):
    pytest.importorskip("cellxgene_ontology_guide")
    config, ontology = json.loads((folder / "config.json").read_text()), read_cell_ontology()
    terms, parents = config["label_ontology_ids"], config["label_parents"]
    for label in parents:
        above = {terms[name] for name in ancestors_of(label, parents)}
        assert above and above <= ontology.ancestors[terms[label]] - {ROOT}
