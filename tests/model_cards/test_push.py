"""Pushing, against a Hub that lives in this process: nothing here touches the network."""

import json
import os
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from scbert.model_cards import push as push_module
from scbert.model_cards.push import push
from scbert.tokenization import InputError

SECRET = "hf_abcdefgh12345678"
NEEDED = {
    "README.md", "config.json", "model.safetensors", "tokenizer_config.json", "gene_panel.txt", "metrics.json",
    "configuration_scbert.py", "modeling_scbert.py", "tokenization_scbert.py", "pipeline_scbert.py",
}  # fmt: skip


class FakeHub:
    """What `push` and `Trainer` ask of HfApi; fails as often as it is told to."""

    def __init__(self, failures=(), private=True):
        self.failures, self.private = list(failures), private
        self.repos, self.files, self.uploads = {}, {}, 0

    def _maybe_fail(self):
        if self.failures:
            raise self.failures.pop(0)

    def create_repo(self, repo_id, private=None, exist_ok=False, repo_type="model", token=None):
        self._maybe_fail()
        self.repos[repo_id] = private
        full = repo_id if "/" in repo_id else f"somebody/{repo_id}"
        return SimpleNamespace(repo_id=full, __str__=lambda self: full)

    def repo_info(self, repo_id, repo_type="model"):
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo_id, operations, commit_message, repo_type="model"):
        self._maybe_fail()
        self.uploads += 1
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(repo_url=f"https://hub.invalid/{repo_id}")

    def upload_folder(self, repo_id, folder_path, **options):
        for name in os.listdir(folder_path):
            if os.path.isfile(os.path.join(folder_path, name)):
                with open(os.path.join(folder_path, name), "rb") as file:
                    self.files[name] = file.read()


def http_error(status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, f"{status} Error for url https://hub.invalid (Authorization: Bearer {SECRET})")
    error.response = response
    return error


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(push_module, "WAITS", (0, 0, 0))
    monkeypatch.setenv("HF_TOKEN", SECRET)


def test_sends_model_code_tokenizer_and_card_and_nothing_else(model_folder):
    hub = FakeHub()
    summary = push(model_folder, "somebody/pbmc", api=hub)
    assert summary["private"] is True and hub.repos == {"somebody/pbmc": True}
    assert NEEDED <= set(hub.files) == set(summary["files"])
    assert not {"training_args.bin", "optimizer.pt", "cells.h5ad"} & set(hub.files)
    assert hub.uploads == 1
    everything = b"".join(hub.files.values())
    assert b"hf_abcdefgh" not in everything and b"secret-project" not in everything
    assert hub.files["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    assert not (model_folder / "README.md").exists()


def test_what_a_pretrained_model_knows_of_studies_is_sent(model_folder):
    hub, effects = FakeHub(), model_folder / "batch_effects.safetensors"
    effects.write_bytes((model_folder / "model.safetensors").read_bytes())
    push(model_folder, "somebody/mini", api=hub)
    assert hub.files[effects.name] == effects.read_bytes()


def test_what_was_sent_loads_again(model_folder, tmp_path):
    hub = FakeHub()
    push(model_folder, "somebody/pbmc", api=hub)
    (tmp_path / "downloaded").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "downloaded" / name).write_bytes(content)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "downloaded").num_labels == 3


def test_public_only_when_said(model_folder):
    hub = FakeHub(private=False)
    with pytest.raises(InputError, match=r"is public.*--public"):
        push(model_folder, "somebody/pbmc", api=hub)
    assert not hub.files
    assert push(model_folder, "somebody/pbmc", public=True, api=hub)["private"] is False


def test_network_faults_are_tried_again(model_folder, caplog):
    hub = FakeHub([ConnectionError("no route to host"), http_error(503), TimeoutError("timed out")])
    assert push(model_folder, "somebody/pbmc", api=hub)["url"]
    assert hub.uploads == 1
    assert caplog.text.count("trying again") == 3
    assert SECRET not in caplog.text


def test_a_hub_out_of_reach_is_one_clear_message(model_folder, caplog):
    hub = FakeHub([ConnectionError(f"proxy refused {SECRET}")] * 9)
    with pytest.raises(OSError, match=r"could not be reached after 4 attempts.*Nothing incomplete") as caught:
        push(model_folder, "somebody/pbmc", api=hub)
    assert SECRET not in str(caught.value) + caplog.text


@pytest.mark.parametrize("status", [401, 403])
def test_no_rights_are_told_at_once(model_folder, status):
    hub = FakeHub([http_error(status)] * 2)
    with pytest.raises(InputError, match="hf auth login") as caught:
        push(model_folder, "somebody/pbmc", api=hub)
    assert len(hub.failures) == 1
    assert SECRET not in str(caught.value)


def test_bad_names_and_incomplete_folders_are_refused(model_folder):
    with pytest.raises(InputError, match="is no name for the Hub"):
        push(model_folder, "a/b/c", api=FakeHub())
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="weights"):
        push(model_folder, "somebody/pbmc", api=FakeHub())


def test_a_head_that_lacks_weights_is_refused(model_folder):
    weights = load_file(model_folder / "model.safetensors")
    del weights["classifier.out_proj.weight"]
    save_file(weights, model_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 .*classifier\.out_proj\.weight"):
        push(model_folder, "me/tiny", api=FakeHub())


def test_code_that_a_folder_lacks_is_sent_along(model_folder):
    (model_folder / "pipeline_scbert.py").unlink()
    hub = FakeHub()
    push(model_folder, "somebody/pbmc", api=hub)
    assert b"CellTypeAnnotationPipeline" in hub.files["pipeline_scbert.py"]
    assert "auto_map" in json.loads(hub.files["config.json"])
    assert not (model_folder / "pipeline_scbert.py").exists()


def test_a_model_that_ships_is_sent_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = FakeHub()
    push("scbert-mini-pbmc", "somebody/pbmc", api=hub)
    assert {*NEEDED, "gene_levels.txt"} <= set(hub.files)


def test_a_card_written_by_hand_is_kept(model_folder):
    (model_folder / "README.md").write_text("# Mine\n", encoding="utf-8")
    hub = FakeHub()
    push(model_folder, "somebody/pbmc", api=hub)
    assert hub.files["README.md"] == b"# Mine\n"


def test_trainer_pushes_code_and_tokenizer(tiny, model_folder, tmp_path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    model, tokenizer = tiny
    output = tmp_path / "run"
    arguments = TrainingArguments(
        output_dir=str(output), report_to="none", hub_model_id="somebody/run", use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, processing_class=tokenizer)
    trainer.push_to_hub()
    assert set(hub.files) >= NEEDED - {"README.md", "metrics.json"}
    assert "AutoModelForSequenceClassification" in json.loads(hub.files["config.json"])["auto_map"]
