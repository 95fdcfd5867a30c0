"""Models by name: those that ship, and those of a Hub repository, without the Hub."""

from pathlib import Path

import pytest

from scbert.tokenization import InputError
from scbert.trained_model import model_folder
from scbert.trained_model.model_folder import load_model


def test_a_hub_id_is_downloaded_without_its_code(monkeypatch, tmp_path):
    asked = {}

    def download(repo_id, allow_patterns):
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return tmp_path

    monkeypatch.setattr(model_folder, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert model_folder.find_model("lab/scbert-pbmc") == tmp_path
    assert asked["repo_id"] == "lab/scbert-pbmc"
    assert not any(pattern.endswith(".py") for pattern in asked["allow_patterns"])


def test_a_local_folder_comes_before_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(model_folder, "snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab" / "model").mkdir(parents=True)
    assert model_folder.find_model("lab/model").is_dir()
    # a mistyped path in a folder that exists is a mistyped path
    assert str(model_folder.find_model("lab/modle")) == "lab/modle"
    assert str(model_folder.find_model(tmp_path / "nothing")) == str(tmp_path / "nothing")


def test_a_model_that_ships_has_a_name_unless_a_folder_has_it(tmp_path, monkeypatch):
    name = "scbert-mini-tissue"
    assert (
        model_folder.find_model(name)
        == model_folder.find_model(Path(name))
        == model_folder.SHIPPED_MODELS / name
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert model_folder.find_model(name) == Path(name)


def test_an_unknown_hub_id_is_one_clear_message(monkeypatch, tmp_path):
    def download(*_, **__):
        raise OSError("401 Client Error: Repository Not Found\nmore lines")

    monkeypatch.setattr(model_folder, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no model folder lab/none.*Repository Not Found"):
        load_model("lab/none")
