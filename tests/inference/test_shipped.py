"""Annotating without naming a model: the annotator that ships introduces itself, and says when not to be believed."""

import csv
import gzip
import json

import anndata
import numpy as np
import pandas as pd
import pytest

from scbert.commands.cli import main
from scbert.data.read_gene_table import ENSEMBL_IDS
from scbert.inference import annotate, shipped
from scbert.inference.shipped import SHIPPED, doubts, few_genes, introduction, list_shipped, model_or_shipped
from scbert.tokenization import InputError, align_genes, read_gene_panel

BLOOD, TISSUE = SHIPPED["blood"], SHIPPED["tissue"]
LABELS = list(json.loads((BLOOD / "config.json").read_text())["id2label"].values())


@pytest.fixture
def blood():
    """Cells that express the genes of T cells or of B cells, and a background."""
    panel = read_gene_panel(BLOOD / "gene_panel.txt")
    counts = np.random.default_rng(0).poisson(0.08, (12, len(panel))).astype(np.float32)
    # what every cell is full of
    counts[:, [gene.startswith(("RPL", "RPS")) for gene in panel]] += 12
    place = {gene: i for i, gene in enumerate(panel)}
    markers = (
        ("CD3D", "CD3E", "IL7R", "LTB", "IL32", "CD2"),
        ("MS4A1", "CD79A", "CD79B", "CD74", "HLA-DRA", "CD37"),
    )
    for rows, genes in zip((range(6), range(6, 12)), markers):
        for gene in genes:
            counts[list(rows), place[gene]] = 8
    return anndata.AnnData(counts, var=pd.DataFrame(index=panel))


def test_annotating_without_a_model(blood, tmp_path, capsys):
    blood.write_h5ad(tmp_path / "cells.h5ad")
    assert main(["annotate", str(tmp_path / "cells.h5ad"), "--output", str(tmp_path / "out.h5ad")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "human blood" in said and all(label in said for label in LABELS)
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(found.uns["scbert"]["labels"]) == LABELS
    best = np.array(LABELS)[found.obsm["scbert_probabilities"].argmax(axis=1)]
    assert set(best[6:]) == {"B cell"} and "B cell" not in best[:6]


def test_few_genes_and_few_answers_are_said(blood, caplog):
    part = blood[:, : int(0.4 * blood.n_vars)].copy()
    part.X[:] = np.random.default_rng(1).poisson(0.2, part.shape)
    annotated = annotate(part, threshold=1.0, progress=False)
    assert (annotated.obs["scbert_cell_type"] == "unassigned").all()
    # its model takes the others at their usual level
    assert "40%" in caplog.text and "unexpressed" not in caplog.text
    assert "100% of the cells are unassigned" in caplog.text


def test_doubts_are_rare():
    assert few_genes(align_genes(["A", "B", "C"], ["A", "B", "C", "D"])) == []
    assert doubts(np.array(["T", "T", "unassigned"]), ["T"]) == []
    assert len(few_genes(align_genes(["A"], ["A", "B"]))) == len(doubts(np.array(["unassigned"]), ["T"])) == 1


def test_another_tissue_is_suspected():
    (said,) = doubts(np.array(["not a blood cell", "unassigned", "T"]), ["T", "not a blood cell"])
    assert "looks like another tissue" in said and said.startswith("33%") and "tissue='tissue'" in said


def test_ensembl_ids_are_mapped_by_the_table_that_ships(blood, caplog):
    symbols = annotate(blood, threshold=0, progress=False)
    with gzip.open(ENSEMBL_IDS, "rt") as table:
        ids = {row["symbol"]: row["ensembl_id"] for row in csv.DictReader(table)}
    blood.var_names = [ids.get(name, f"ENSG{99999000000 + i}") for i, name in enumerate(blood.var_names)]
    with caplog.at_level("INFO"):
        annotated = annotate(blood, threshold=0, progress=False)
    assert "By the table of Ensembl ids that ships" in caplog.text
    assert annotated.uns["scbert"]["gene_overlap"]["share"] > 0.8
    assert list(annotated.obs["scbert_cell_type"][6:]) == list(symbols.obs["scbert_cell_type"][6:])


def test_an_installation_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED", {"blood": tmp_path})
    assert model_or_shipped("mine") == "mine"
    with pytest.raises(InputError, match="--model DIR"):
        model_or_shipped(None)


def test_the_introduction_names_the_tissue():
    assert "blood" in introduction(BLOOD) and "--tissue tissue" in introduction(BLOOD)


def test_a_tissue_picks_its_annotator_and_only_a_choice_by_itself_is_introduced(caplog):
    assert model_or_shipped(None, "tissue") == TISSUE and model_or_shipped(None, "blood") == BLOOD
    assert not caplog.text
    assert model_or_shipped(None) == BLOOD
    assert "No --model was given" in caplog.text


def test_a_model_and_a_tissue_contradict_and_unknown_tissues_are_refused():
    with pytest.raises(InputError, match="one of them"):
        model_or_shipped("mine", "blood")
    with pytest.raises(InputError, match="there are: blood, tissue"):
        model_or_shipped(None, "liver")


def test_cells_of_tissue_by_the_command(tmp_path):
    panel = read_gene_panel(TISSUE / "gene_panel.txt")
    counts = np.random.default_rng(0).poisson(0.08, (8, len(panel))).astype(np.float32)
    counts[:, [gene.startswith(("RPL", "RPS")) for gene in panel]] += 12
    stromal = "COL1A1 COL1A2 COL3A1 COL6A1 COL6A2 COL6A3 DCN LUM FBLN1 PCOLCE MMP2 C1S C1R".split()
    counts[:, np.isin(panel, stromal)] = 15
    cells = anndata.AnnData(counts, var=pd.DataFrame(index=panel))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["--tissue", "tissue", "--threshold", "0", "--output", str(tmp_path / "out.h5ad")]
    assert main(["annotate", str(tmp_path / "cells.h5ad"), *arguments]) == 0
    found = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert set(found["scbert_cell_type"]) == {"fibroblast"}
    assert set(found["scbert_cell_type_ontology_term_id"]) == {"CL:0000057"}
    assert main(["annotate", str(tmp_path / "cells.h5ad"), "--model", "mine", *arguments]) == 1


def test_what_ships_is_listed_with_its_scores(capsys):
    assert main(["models", "--json"]) == 0
    captured = capsys.readouterr()
    listed = json.loads(captured.out)
    assert listed == json.loads(json.dumps(list_shipped()))
    assert list(listed) == ["scbert-mini-pbmc", "scbert-mini-tissue"]
    for name, about in listed.items():
        assert name in captured.err and about["tissue"] in captured.err
        assert len(about["types"]) >= 9 and about["trained_on"] and about["left_out"]
        assert all({"scbert", "logistic_l1", "logistic_l2"} == set(row) for row in about["left_out"].values())
