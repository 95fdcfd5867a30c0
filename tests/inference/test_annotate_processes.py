"""Several processes annotate as one does; what is finished stays."""

import json
import os
import subprocess
import sys
from queue import SimpleQueue

import anndata
import numpy as np
import pytest

from scbert.inference import annotate_cells, annotate_file, annotate_processes
from scbert.tokenization import InputError


@pytest.fixture
def query(adata, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate_processes, "SHARD_CELLS", 25)
    adata.X[7] = 0
    adata.write_h5ad(tmp_path / "query.h5ad")
    return tmp_path / "query.h5ad"


def equal(one, other):
    one, other = anndata.read_h5ad(one), anndata.read_h5ad(other)
    np.testing.assert_allclose(
        one.obsm["scbert_probabilities"], other.obsm["scbert_probabilities"], rtol=0, atol=1e-6
    )
    assert list(one.obs_names) == list(other.obs_names)
    assert (one.obs["scbert_cell_type"] == other.obs["scbert_cell_type"]).all()
    return True


def test_two_processes_annotate_as_one_does(query, model_dir, tmp_path):
    one = annotate_file(query, model_dir, tmp_path / "one.h5ad", progress=False)
    two = annotate_file(query, model_dir, tmp_path / "two.h5ad", processes=2, progress=False)
    assert equal(tmp_path / "one.h5ad", tmp_path / "two.h5ad")
    assert one["cells_per_label"] == two["cells_per_label"] and one["unassigned"] == two["unassigned"]
    assert not (tmp_path / "two.h5ad.partial").exists()


def in_this_process(self, shards, n_cells, progress):
    self.write_shards(0, 1)


def test_interrupted_run_goes_on(query, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate_processes.ShardedPrediction, "_work", in_this_process)
    predict, calls = annotate_processes.predict_probabilities, []

    def dying(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments[1].shape[0])
        return predict(*arguments)

    monkeypatch.setattr(annotate_processes, "predict_probabilities", dying)
    output = tmp_path / "out.h5ad"
    with pytest.raises(KeyboardInterrupt):
        annotate_file(query, model_dir, output, processes=1, progress=False)
    assert not output.exists() and len(list((tmp_path / "out.h5ad.partial").glob("*.npz"))) == 3
    with pytest.raises(InputError, match="input"):
        annotate_file(query, model_dir, output, input="counts", resume=True, progress=False)
    weights = model_dir / "model.safetensors"
    written = weights.stat().st_mtime_ns
    os.utime(weights, ns=(written, written + 1))
    with pytest.raises(InputError, match=r"begun with other .*\(content of the model\)"):
        annotate_file(query, model_dir, output, resume=True, progress=False)
    os.utime(weights, ns=(written, written))
    again = []
    monkeypatch.setattr(
        annotate_processes, "predict_probabilities", lambda *a: (again.append(1), predict(*a))[1]
    )
    annotate_file(query, model_dir, output, resume=True, progress=False)
    assert len(again) == 2
    annotate_file(query, model_dir, tmp_path / "one.h5ad", progress=False)
    assert equal(output, tmp_path / "one.h5ad") and not (tmp_path / "out.h5ad.partial").exists()


def test_a_folder_of_others_is_left_as_it_is(query, model_dir, tmp_path):
    other = tmp_path / "out.h5ad.partial"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    for options in ({"processes": 1}, {"resume": True}):
        with pytest.raises(InputError, match="out.h5ad.partial .* Move it"):
            annotate_file(query, model_dir, tmp_path / "out.h5ad", progress=False, **options)
    assert (other / "thesis.tex").read_text() == "years of work"


def test_the_shards_are_this_runs_until_the_output_stands(query, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate_processes.ShardedPrediction, "_work", in_this_process)
    write, refused = annotate_cells.write_parts, []

    def beside_another(*arguments):
        with pytest.raises(InputError, match="Another process"):
            annotate_file(query, model_dir, tmp_path / "out.h5ad", processes=1, progress=False)
        refused.append(1)
        write(*arguments)

    monkeypatch.setattr(annotate_cells, "write_parts", beside_another)
    annotate_file(query, model_dir, tmp_path / "out.h5ad", processes=1, progress=False)
    assert refused and sorted(path.name for path in tmp_path.glob("out*")) == ["out.h5ad"]


def test_a_run_that_began_before_another_wrote_its_output_is_told_before_it_computes(
    query, model_dir, tmp_path, monkeypatch
):
    output, load = tmp_path / "out.h5ad", annotate_cells._load_annotator

    def written_meanwhile(*arguments):
        output.write_text("of another run")
        return load(*arguments)

    monkeypatch.setattr(annotate_cells, "_load_annotator", written_meanwhile)
    monkeypatch.setattr(annotate_processes.ShardedPrediction, "_work", None)
    with pytest.raises(InputError, match="already exists"):
        annotate_file(query, model_dir, output, processes=1, progress=False)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.h5ad"]


def test_dead_process_is_told(query, model_dir, tmp_path, monkeypatch):
    class Dead:
        exitcode = -9

    def killed(self, shards, n_cells, progress):
        annotate_processes._check([Dead()], SimpleQueue(), self.folder)

    monkeypatch.setattr(annotate_processes.ShardedPrediction, "_work", killed)
    with pytest.raises(InputError, match=r"code -9 \(killed.*--resume"):
        annotate_file(query, model_dir, tmp_path / "out.h5ad", processes=2, progress=False)
    assert not (tmp_path / "out.h5ad").exists()
    with pytest.raises(InputError, match="processes"):
        annotate_file(query, model_dir, tmp_path / "out.h5ad", processes=0, progress=False)


def test_the_module_takes_options_by_the_names_of_the_command():
    options = {
        "values": "log1p",
        "tissue": "blood",
        "coverage": "0.9",
        "report": "r.html",
        "threshold": "0.4",
    }
    given = {}

    def job(**arguments):
        given.update(arguments)
        return {}

    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert annotate_processes.main(job, ["q.h5ad", "--output", "out.h5ad", *words]) == 0
    wanted = {"input": "log1p", "tissue": "blood", "coverage": 0.9, "report": "r.html", "threshold": 0.4}
    assert wanted.items() <= given.items()


@pytest.mark.slow
def test_launched_by_accelerate(query, model_dir, tmp_path):
    config = os.path.join(
        os.path.dirname(annotate_processes.__file__), "..", "training", "accelerate", "cpu_2.yaml"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    job = [
        "-m",
        "scbert.inference.annotate_cells",
        query,
        "--model",
        model_dir,
        "--output",
        tmp_path / "two.h5ad",
    ]
    done = subprocess.run(
        [*map(str, [*launcher, "--main_process_port", "0", *job])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["cells"] == 120
    annotate_file(query, model_dir, tmp_path / "one.h5ad", progress=False)
    assert equal(tmp_path / "one.h5ad", tmp_path / "two.h5ad")
