"""What the script finds that studies differ in."""

import numpy as np
import pandas as pd
from anndata import AnnData
from safetensors.torch import load_file

import study_effects
from scbert.trained_model.model_folder import find_model, load_tokenizer
from scbert.training.initial_model import EFFECTS, pretrained_effects
from study_effects import DIRECTIONS, batch_effects, means_of, section


def test_effects_are_what_batches_differ_in():
    """Of types that two batches have; genes that one has not measured say nothing."""
    rng = np.random.default_rng(0)
    shift, types = rng.normal(size=30), ["B", "B", "T", "T", "NK"]
    means = rng.normal(size=(3, 30))[[0, 0, 1, 1, 2]] + np.array([[0], [1], [0], [1], [5]]) * shift
    means[1, 3] = np.nan
    found = batch_effects(means, types)
    direction = shift.copy()
    assert abs(np.corrcoef(found[0], direction)[0, 1]) > 0.98
    # half the squared difference is the variance between two
    np.testing.assert_allclose((found[:, 4] ** 2).sum(), shift[4] ** 2 / 2, rtol=1e-6)
    assert len(batch_effects(means[[0, 2, 4]], ["B", "T", "NK"])) == 0


def test_means_are_of_types_with_enough_cells_over_the_panel():
    counts = np.random.default_rng(0).poisson(2.0, (64, 3)).astype(np.float32)
    obs = pd.DataFrame({"label": ["B"] * 20 + ["T"] * 25 + ["NK"] * 19}, index=map(str, range(64)))
    cells = AnnData(counts, obs=obs, var=pd.DataFrame(index=["CD3D", "MS4A1", "LYZ"]))
    means = means_of(cells, ["LYZ", "no gene", "CD3D"])
    assert means.index.tolist() == ["B", "T"] and means.columns.tolist() == ["LYZ", "no gene", "CD3D"]
    assert means["no gene"].isna().all() and (means["LYZ"] > 0).all()


def test_the_card_of_scbert_mini_tells_what_its_folder_holds():
    """The directions are as long as they scatter, the longest first; the card names how many, and the studies."""
    folder = find_model("scbert-mini")
    effects = load_file(folder / EFFECTS)["effects"].float().numpy()
    panel = load_tokenizer(folder).gene_panel
    lengths = np.linalg.norm(effects, axis=1)
    assert effects.shape == (DIRECTIONS, len(panel)) and (np.diff(lengths) <= 1e-3).all() and lengths[0] < 1
    np.testing.assert_array_equal(pretrained_effects("scbert-mini", panel), effects)
    assert section(len(effects)) in (folder / "README.md").read_text()


def test_a_model_without_a_study_knows_nothing_of_it(tmp_path, monkeypatch):
    panel = load_tokenizer(find_model("scbert-mini")).gene_panel
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([["one", "two", "three"], ["blood: B cell"]], names=["study", "type"])
    means = pd.DataFrame(rng.normal(size=(3, len(panel))), index=index, columns=panel)
    monkeypatch.setattr(study_effects, "means_of_studies", lambda cells, panel: means)
    without = study_effects.model_without(["three"], tmp_path, tmp_path)
    found = pretrained_effects(without, panel)
    difference = means.loc["one"].to_numpy() - means.loc["two"].to_numpy()
    assert len(found) == 1 and abs(np.corrcoef(found[0], difference[0])[0, 1]) > 0.99
    # again, and with nothing left out
    assert study_effects.model_without(["three"], tmp_path, tmp_path) == without
    assert len(pretrained_effects(study_effects.model_without([], tmp_path, tmp_path), panel)) == 2
