"""Thresholds stored with a model, groups with a confidence, and the report."""

import json
import re
import shutil
import subprocess

import anndata
import numpy as np
import pandas as pd
import pytest

from scbert.commands.cli import main
from scbert.inference import annotate
from scbert.inference.report import plot_confidence
from scbert.inference.voting import majority_vote


def with_threshold(model_dir, value):
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unassigned_threshold": value}))


def test_the_stored_threshold_holds_unless_another_is_given(adata, model_dir):
    with_threshold(model_dir, 0.83)
    annotated = annotate(adata, model_dir, progress=False)
    assert annotated.uns["scbert"]["threshold"] == 0.83
    unassigned = annotated.obs["scbert_cell_type"] == "unassigned"
    assert (unassigned == (annotated.obs["scbert_confidence"] < 0.83)).all()
    assert annotate(adata, model_dir, threshold=0.2, progress=False).uns["scbert"]["threshold"] == 0.2
    with_threshold(model_dir, None)
    assert annotate(adata, model_dir, progress=False).uns["scbert"]["threshold"] == 0.5


def test_groups_have_a_confidence_and_mixtures_are_told():
    labels = np.array(["B", "B", "T", "T", "T", "unassigned"], dtype=object)
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9], [0.4, 0.6], [0.45, 0.4]])
    vote = majority_vote(labels, ["x", "x", "x", "y", "y", "z"], probabilities, ["B", "T"])
    np.testing.assert_allclose(vote.confidences, [0.6, 0.6, 0.6, 0.75, 0.75, 0.45], rtol=1e-6)
    assert vote.table["group"].tolist() == ["x", "y", "z"]
    assert vote.table["runner_up"].tolist() == ["T", "", ""]
    assert vote.mixed.empty
    tied = majority_vote(labels[1:3], ["x", "x"], probabilities[1:3], ["B", "T"])
    assert tied.mixed["runner_up"].tolist() == ["B"] and tied.ties


def test_votes_survive_the_file(adata, model_dir, tmp_path, caplog):
    adata.obs["cluster"] = pd.Categorical(np.array(["a/b", "c"])[np.arange(120) % 2])
    adata.write_h5ad(tmp_path / "q.h5ad")
    arguments = [
        "annotate",
        str(tmp_path / "q.h5ad"),
        "--model",
        str(model_dir),
        "--majority-vote",
        "cluster",
    ]
    assert (
        main([*arguments, "--output", str(tmp_path / "out.h5ad"), "--report", str(tmp_path / "r.html")]) == 0
    )
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    vote = written.uns["scbert"]["majority_vote"]
    assert list(vote["group"]) == ["a/b", "c"]
    for group, share, sure in zip(vote["group"], vote["share"], vote["confidence"]):
        cells = written.obs[written.obs["cluster"] == group]
        np.testing.assert_allclose(cells["scbert_majority_share"], share)
        np.testing.assert_allclose(cells["scbert_majority_confidence"], sure)
    if vote["mixed"]:
        assert "mixed" in caplog.text
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64") == 4
    assert "Groups of cluster" in page and "a/b" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_names_of_types_stay_within_the_picture_of_their_confidence():
    names = np.array(["CD4-positive, alpha-beta regulatory T cell, " * 3, "B cell"])
    figure = plot_confidence(names, np.array([0.2, 0.9]), 0.5)
    figure.draw_without_rendering()
    assert figure.get_tightbbox().x0 >= 0


def test_a_report_is_not_overwritten(adata, model_dir, tmp_path, capsys):
    adata.write_h5ad(tmp_path / "q.h5ad")
    (tmp_path / "r.html").write_text("mine")
    arguments = ["annotate", str(tmp_path / "q.h5ad"), "--model", str(model_dir)]
    assert main([*arguments, "--output", str(tmp_path / "o.h5ad"), "--report", str(tmp_path / "r.html")]) == 1
    assert (tmp_path / "r.html").read_text() == "mine" and not (tmp_path / "o.h5ad").exists()


@pytest.mark.slow
def test_the_report_in_a_real_browser(adata, model_dir, tmp_path):
    browser = next(
        (shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome") if shutil.which(n)), None
    )
    if browser is None:
        pytest.skip("no Chromium is installed")
    adata.write_h5ad(tmp_path / "q.h5ad")
    page, picture = tmp_path / "r.html", tmp_path / "shot.png"
    arguments = ["annotate", str(tmp_path / "q.h5ad"), "--model", str(model_dir), "--report", str(page)]
    assert main([*arguments, "--output", str(tmp_path / "o.h5ad")]) == 0
    # what the page looks like to the browser, written into its title
    script = (
        "<script>onload=()=>{const i=[...document.images];document.title=JSON.stringify({n:i.length,"
        "drawn:i.every(x=>x.complete&&x.naturalWidth>100),wide:document.documentElement.scrollWidth>innerWidth,"
        "fetched:performance.getEntriesByType('resource').filter(e=>!e.name.startsWith('data:')).length})}</script>"
    )
    (tmp_path / "probe.html").write_text(page.read_text() + script)
    common = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    common += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,1600"]
    dom = subprocess.run(
        [*common, "--dump-dom", f"file://{tmp_path / 'probe.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))
    assert seen["n"] >= 2 and seen["drawn"] and not seen["wide"] and seen["fetched"] == 0
    subprocess.run([*common, f"--screenshot={picture}", f"file://{page}"], capture_output=True, timeout=120)
    from matplotlib.image import imread

    pixels = imread(picture)
    # something is drawn all over the page, not one colour
    assert pixels[..., :3].std() > 0.05
