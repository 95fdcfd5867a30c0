"""The models that ship: small, whole, loadable without a network, and with cards that say what their records say."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import make_mini
import make_pbmc
import make_tissue
import pretraining_effect
import scbert
from annotator_parts import NAMELESS
from blood_cells import BY_MARKERS, COHORTS
from scbert.model_cards.card import build_card

CARDS = Path(scbert.__file__).parent / "model_cards"
MINI, PBMC, TISSUE = (CARDS / name for name in ("scbert-mini", "scbert-mini-pbmc", "scbert-mini-tissue"))
MEGABYTE = 2**20


def record(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def some_cells(tokenizer, n=6):
    rng = np.random.default_rng(0)
    return sp.csr_matrix(rng.poisson(0.1, (n, len(tokenizer.gene_panel))).astype(np.float32))


@pytest.mark.parametrize("folder", [MINI, PBMC, TISSUE], ids=lambda folder: folder.name)
def test_a_released_folder_is_small_and_as_it_was_made(folder):
    assert (folder / "model.safetensors").stat().st_size <= 12 * MEGABYTE
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 14 * MEGABYTE
    sums = dict(reversed(line.split()) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert {"model.safetensors", "config.json", "gene_panel.txt", "tokenizer_config.json"} <= set(sums)
    for name, expected in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, name


@pytest.mark.parametrize("folder", [MINI, PBMC, TISSUE], ids=lambda folder: folder.name)
def test_a_card_is_what_the_records_make_it(folder):
    written = (folder / "README.md").read_text(encoding="utf-8")
    assert written == str(build_card(folder, folder.name))
    assert ModelCard(written).data.license == "apache-2.0"
    assert "/work" not in written and "/tmp" not in written and "None" not in written


def test_the_tables_of_mini_are_its_records():
    panel = AutoTokenizer.from_pretrained(MINI).gene_panel
    assert (MINI / "card_1_corpus.md").read_text() == make_mini.corpus_section(
        record(MINI, "corpus"), len(panel)
    )
    text = (MINI / "card_3_fine_tuning.md").read_text()
    assert text == pretraining_effect.section(record(MINI, "fine_tuning"))


def test_the_tables_of_the_annotator_of_blood_are_its_records():
    rows, alone, others = (record(PBMC, name) for name in ("left_out", "cohorts_alone", "strangers"))
    assert (PBMC / "card_2_left_out.md").read_text() == make_pbmc.left_out_section(rows, alone)
    assert (PBMC / "card_3_strangers.md").read_text() == make_pbmc.stranger_section(others)
    assert record(PBMC, "annotator") == json.loads(json.dumps(make_pbmc.about(rows)))
    assert {row["study"] for row in rows} == {*COHORTS, *BY_MARKERS}
    assert {row["study"] for row in alone} == set(BY_MARKERS)


def test_the_tables_of_the_annotator_of_tissue_are_its_records():
    rows = record(TISSUE, "left_out")
    assert (TISSUE / "card_2_left_out.md").read_text() == make_tissue.left_out_section(rows)
    assert record(TISSUE, "annotator") == json.loads(json.dumps(make_tissue.about(rows)))
    assert {row["study"] for row in rows} >= set(make_tissue.TESTED)


@pytest.mark.parametrize("folder", [PBMC, TISSUE], ids=lambda folder: folder.name)
def test_an_annotator_that_ships_is_small_and_its_card_begins_with_what_it_is(folder):
    assert (folder / "model.safetensors").stat().st_size <= 4 * MEGABYTE
    summary = record(folder, "annotator")["summary"]
    assert f"# {folder.name}\n\n{summary}\n" in (folder / "README.md").read_text(encoding="utf-8")
    assert not [gene for gene in AutoTokenizer.from_pretrained(folder).gene_panel if NAMELESS.search(gene)]


def test_no_cell_of_an_evaluation_was_pretrained_on():
    files = {row["file"] for row in record(MINI, "corpus")["files"]}
    assert not files & {"pbmc3k_10x.h5ad", "zheng_facs_pbmc.h5ad", "scmixology_celseq_dropseq.h5ad"}


def test_mini_tells_a_cell_from_the_mean_one():
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(MINI), AutoTokenizer.from_pretrained(MINI)
    encoded = tokenizer(some_cells(tokenizer), return_tensors="pt")
    with torch.no_grad():
        logits = model(**encoded).logits
    assert logits.shape == (*encoded["input_ids"].shape, tokenizer.vocab_size)
    assert torch.isfinite(logits).all()
    metrics = record(MINI, "metrics")
    assert metrics["cell_loss"] < metrics["baseline_cell_loss"] - 0.1


def test_the_annotator_is_calibrated_and_runs_as_a_pipeline():
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(PBMC),
        AutoTokenizer.from_pretrained(PBMC),
    )
    assert 0.5 <= model.config.unassigned_threshold < 1
    assert model.config.num_hidden_layers == 0 and model.config.cell_vector_size
    labels = set(model.config.id2label.values())
    assert {"B cell", "NK cell", "CD14+ monocyte"} <= labels
    found = pipeline("cell-type-annotation", model=model, tokenizer=tokenizer)(some_cells(tokenizer))
    best = [cell[0] if isinstance(cell, list) else cell for cell in found]
    assert len(best) == 6 and {cell["label"] for cell in best} <= labels | {"unassigned"}
