"""What the page in the browser does with a file, without a browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from scbert import ScBertConfig, ScBertForCellClassification, ScBertTokenizer
from scbert.commands import app
from scbert.commands.cli import main
from scbert.inference.annotate_cells import annotate
from scbert.inference.report import types_table
from scbert.inference.shipped import SHIPPED
from scbert.inference.upload import (
    Limits,
    annotate_upload,
    drawn_cells,
    knows_sample,
    matrices_of,
    places_of,
    reassigned,
    write_report,
    write_sample,
)
from scbert.tokenization import InputError
from scbert.trained_model.model_folder import save_model

gradio = pytest.importorskip("gradio")
page = pytest.importorskip("scbert.commands.page")


@pytest.fixture
def annotated(adata, model_dir, tmp_path):
    # its own places, which are drawn: making some takes UMAP long
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    adata.layers["other"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "query.h5ad")
    return annotate_upload(tmp_path / "query.h5ad", model_dir, tmp_path)


def test_an_upload_comes_back_with_table_and_files(annotated):
    written = anndata.read_h5ad(annotated.path)
    assert annotated.path.name == "query_annotated.h5ad"
    table = types_table(annotated.labels, annotated.confidence)
    counts = {row[0]: int(row[1]) for row in table.rows}
    assert counts == written.obs["scbert_cell_type"].value_counts().to_dict()
    labels = pd.read_csv(annotated.csv, index_col="cell")
    assert list(labels["scbert_cell_type"]) == list(written.obs["scbert_cell_type"])
    assert "120 cells annotated" in page.result_message(annotated)


def test_the_sample_is_offered_for_models_that_know_its_genes(tmp_path):
    pytest.importorskip("scanpy")
    assert not knows_sample(str(SHIPPED["blood"]), tmp_path)
    genes = anndata.read_h5ad(write_sample(tmp_path)).var_names
    model, tokenizer = (
        tmp_path / "model",
        ScBertTokenizer(gene_panel=[*genes, *(f"X{i}" for i in range(400))]),
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 1, "head_dim": 4}
    config = ScBertConfig(max_position_embeddings=len(tokenizer.gene_panel) + 1, num_labels=2, **sizes)
    save_model(ScBertForCellClassification(config), tokenizer, model)
    assert knows_sample(str(model), tmp_path)


def test_another_threshold_moves_what_is_unassigned(annotated):
    different = np.unique(annotated.confidence)
    threshold = float(different[len(different) // 2])
    changed = reassigned(annotated, threshold)
    below = annotated.confidence < threshold
    assert ((changed.labels == "unassigned") == below).all() and 0 < below.sum() < 120
    written = anndata.read_h5ad(changed.path)
    assert list(written.obs["scbert_cell_type"]) == list(changed.labels)
    assert written.uns["scbert"]["threshold"] == threshold
    assert (written.X != anndata.read_h5ad(annotated.upload).X).nnz == 0
    assert list(pd.read_csv(changed.csv)["scbert_cell_type"]) == list(changed.labels)
    assert changed.summary["unassigned"] == below.sum()


def test_another_threshold_moves_what_is_said_and_reported(annotated, tmp_path):
    none, every = reassigned(annotated, 1.0), reassigned(annotated, 0.0)
    assert "90% of the cells are unassigned" in page.result_message(none)
    for back in (every, reassigned(none, 0.0)):
        assert "cells are unassigned" not in page.result_message(back)
    places = places_of(none)
    assert "confidence below 1)" in write_report(none, places).read_text()
    steps = page.build_page([str(annotated.model)], tmp_path).fns.values()
    assert [step.name for step in steps].count("_report") == 2


def test_another_threshold_moves_wider_types_and_terms(adata, make_model, tmp_path):
    adata.write_h5ad(tmp_path / "query.h5ad")
    options = {"label_ontology_ids": {"B cell": "CL:0000236"}, "label_parents": {"B cell": "lymphocyte"}}
    model = make_model(**options)
    first = annotate_upload(tmp_path / "query.h5ad", model, tmp_path)
    threshold = float(np.median(first.confidence))
    written = anndata.read_h5ad(reassigned(first, threshold).path)
    wanted = annotate(adata, model, threshold, progress=False)
    for name in ("", "_ontology_term_id", "_backoff", "_backoff_ontology_term_id"):
        column = f"scbert_cell_type{name}"
        assert list(written.obs[column]) == list(wanted.obs[column])


def test_cells_are_drawn_with_their_types_and_a_gene(annotated):
    places = places_of(annotated)
    table = drawn_cells(annotated, places, gene="CD3E")
    assert list(table["type"]) == list(annotated.labels) and len(table) == 120
    assert (table["CD3E"] > 0).any() and np.isfinite(table["CD3E"]).all()
    with pytest.raises(InputError, match="no gene 'NOTHING'"):
        drawn_cells(annotated, places, gene="NOTHING")
    assert "Cells by predicted type" in write_report(annotated, places).read_text()


def test_the_matrices_of_an_upload(annotated):
    assert matrices_of(annotated.upload) == ["X", "other"]


def test_an_upload_without_x_offers_its_layers(adata, model_dir, tmp_path):
    parts = {"layers": {"counts": adata.X}, "obsm": {"X_umap": np.zeros((adata.n_obs, 2))}}
    anndata.AnnData(obs=adata.obs, var=adata.var, **parts).write_h5ad(tmp_path / "query.h5ad")
    assert matrices_of(tmp_path / "query.h5ad") == ["counts"]
    found = annotate_upload(tmp_path / "query.h5ad", model_dir, tmp_path, layer="counts")
    assert len(drawn_cells(found, places_of(found), gene="CD3E")) == len(reassigned(found, 0.9).labels) == 120
    with pytest.raises(InputError, match="no matrix X.* has: counts"):
        annotate_upload(tmp_path / "query.h5ad", model_dir, tmp_path)


def test_large_uploads_are_refused(query, model_dir, tmp_path):
    with pytest.raises(InputError, match="holds 120 cells; this page takes up to 100"):
        annotate_upload(query, model_dir, tmp_path, Limits(cells=100))
    with pytest.raises(InputError, match="this page takes up to 0"):
        annotate_upload(query, model_dir, tmp_path, Limits(megabytes=0))
    with pytest.raises(InputError, match=r"no \.h5ad"):
        annotate_upload(model_dir / "config.json", model_dir, tmp_path)


def test_a_visitor_is_told_kindly_and_no_path(tmp_path, model_dir):
    upload = tmp_path / "cells.h5ad"
    upload.write_text("no HDF5 at all")
    with pytest.raises(InputError) as error:
        annotate_upload(upload, model_dir, tmp_path)
    told = page.kind_message(error.value, upload)
    assert "cells.h5ad is not valid HDF5" in told and str(tmp_path) not in told
    assert "ZeroDivision" not in page.kind_message(ZeroDivisionError("a bug"))


def test_a_visitor_is_not_told_of_options_that_the_page_does_not_have():
    error = InputError(
        "Values. Say input='counts' (--values counts). The input also has: raw (layer=NAME, or --layer NAME). "
        "To go on regardless: force=True, or --force."
    )
    told = page.kind_message(error)
    assert "--" not in told and "force" not in told and "'raw counts' above" in told


def test_old_files_are_swept_out(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.h5ad").touch()
    for path in (tmp_path / "old", tmp_path / "old.h5ad"):
        os.utime(path, (time.time() - 7200,) * 2)
    app.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "new.h5ad"}


def test_only_the_owners_models_can_be_chosen(model_dir, tmp_path):
    for any_model in (True, False):
        blocks = page.build_page([str(model_dir)], tmp_path, any_model=any_model)
        choices = [part for part in blocks.blocks.values() if isinstance(part, gradio.Dropdown)]
        (choice,) = [part for part in choices if part.label == "Model"]
        assert choice.allow_custom_value is any_model
    assert choice.preprocess("model") == "model"
    with pytest.raises(gradio.Error):
        choice.preprocess("elsewhere")


def test_agents_are_served_on_this_machine_only(model_dir, query, tmp_path):
    with pytest.raises(InputError, match="served on it alone"):
        app.serve([str(model_dir)], host="0.0.0.0", mcp=True)
    functions = page.Page({"model": str(model_dir)}, tmp_path, Limits())
    facts = functions.annotate_cells(str(query), values="counts")
    assert facts["cells"] == 120 and sum(facts["cells_per_label"].values()) == 120
    with pytest.raises(gradio.Error, match="no model 'elsewhere'"):
        functions.annotate_cells(str(query), model="elsewhere")


def test_a_space_is_complete(model_dir, tmp_path, capsys):
    space = tmp_path / "space"
    arguments = ["app", "--model", str(model_dir), "--model", "somebody/atlas", "--export-space", str(space)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "loaded_model", lambda model: None)
        assert main([*arguments, "--max-cells", "9000", "--json"]) == 0
        assert main(arguments) == 1
    assert json.loads(capsys.readouterr().out)["models"] == ["models/model", "somebody/atlas"]
    code = (space / "app.py").read_text()
    compile(code, "app.py", "exec")
    assert "serve(['models/model', 'somebody/atlas']" in code and "max_cells=9000" in code
    assert (space / "models/model/model.safetensors").is_file()
    assert (space / "scbert/training/recipes/default.json").is_file()
    assert not list(space.rglob("__pycache__")) and not (space / "scbert/tests").exists()
    front = (space / "README.md").read_text().split("---\n")[1]
    assert 'sdk: "gradio"' in front and f'sdk_version: "{gradio.__version__}"' in front
    wanted = (space / "requirements.txt").read_text()
    assert "torch>=" in wanted and "scbert" not in wanted


def test_without_a_model_those_that_ship_are_offered(monkeypatch):
    offered = []
    monkeypatch.setattr(app, "serve", lambda models, **options: offered.extend(models))
    assert main(["app"]) == 0
    assert offered == [str(folder) for folder in SHIPPED.values()]


@pytest.fixture
def browser():
    """A page of the machine's Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium.new_page(accept_downloads=True)
        chromium.close()


@pytest.fixture
def served(tmp_path):
    """Function that runs `scbert app` in a folder of its own and returns its address; when it ends, nothing stays."""
    processes = []
    folder, temporary = tmp_path / "cwd", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()

    def start(*options):
        command = [sys.executable, "-m", "scbert", "app", *map(str, options), "--port", str(free_port())]
        log = open(tmp_path / "log", "w")  # noqa: SIM115 - the process writes into it
        environment = os.environ | {"TMPDIR": str(temporary)}
        processes.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and processes[-1].poll() is None:
            if address := re.search(r"http://\S+", (tmp_path / "log").read_text()):
                return address[0]
            time.sleep(0.2)
        pytest.fail((tmp_path / "log").read_text())

    yield start
    for process in processes:
        process.terminate()
        assert process.wait(timeout=30) == 143
    assert not list(temporary.iterdir())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_the_page_in_a_real_browser(query, model_dir, browser, tmp_path, served):
    folder = tmp_path / "cwd"
    url = served("--model", model_dir)
    browser.goto(url)
    browser.get_by_text("Cell types by scBERT").first.wait_for()

    bad = tmp_path / "bad.h5ad"
    bad.write_text("no cells in here")
    browser.set_input_files("input[type=file]", bad)
    browser.get_by_text("bad.h5ad").first.wait_for()
    browser.get_by_role("button", name="Annotate", exact=True).click()
    browser.get_by_text("This did not work").wait_for(timeout=60_000)
    told = browser.inner_text("body")
    assert "bad.h5ad is not valid HDF5" in told and "Traceback" not in told and str(tmp_path) not in told

    clear = browser.get_by_role("button", name="Remove").or_(browser.get_by_label("Clear")).first
    clear.click()
    # the field is drawn anew: a file given to the old one would be lost
    clear.wait_for(state="hidden")
    browser.set_input_files("input[type=file]", query)
    browser.get_by_text("query.h5ad").first.wait_for()
    browser.get_by_role("button", name="Annotate", exact=True).click()
    browser.get_by_text("120 cells annotated").wait_for(timeout=120_000)
    browser.get_by_text("120 cells: ").wait_for(timeout=120_000)
    browser.locator("svg.marks, canvas").first.wait_for()
    browser.get_by_role("gridcell", name="B cell").first.click()
    browser.get_by_text("Genes: B cell").wait_for(timeout=60_000)
    threshold = browser.locator("input[type=number]").first
    threshold.fill("1")
    threshold.press("Enter")
    browser.get_by_text("confidence below 1.00").wait_for(timeout=60_000)
    browser.screenshot(path=tmp_path / "shot.png", full_page=True)
    with browser.expect_download() as download:
        browser.get_by_text("Download the annotated file").click()
    download.value.save_as(tmp_path / "out.h5ad")
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert np.isfinite(written.obs["scbert_confidence"]).all()
    assert written.n_obs == 120
    assert not list(folder.iterdir())


def documented_options():
    """What stands behind `scbert app` in the documentation, where it serves the page."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "howto_app.md").read_text()
    lines = re.findall(r"^scbert app(.*)$", text, re.MULTILINE)
    return [line.split() for line in lines if "--export-space" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("options", documented_options(), ids=" ".join)
def test_the_page_is_served_as_documented(options, model_dir, served, tmp_path):
    """On another port; names of models are folders here."""
    for name in ("my_model", "OWNER/my-model"):
        shutil.copytree(model_dir, tmp_path / "cwd" / name)
    with urllib.request.urlopen(served(*options)) as answer:
        assert "gradio" in answer.read().decode()
    assert ("gradio_api/mcp" in (tmp_path / "log").read_text()) == ("--mcp" in options)
