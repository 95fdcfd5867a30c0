"""Corpora: what is kept of a file, restarts, damage, duplicates, checksums."""

import json

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from datasets import load_from_disk

from scbert.data import corpus_shards
from scbert.data.corpus_build import build_corpus
from scbert.data.corpus_manifest import read_manifest, shards_of
from scbert.data.corpus_sources import find_sources
from scbert.tokenization import InputError

SMALL = {"min_genes": 0, "shard_cells": 25}


@pytest.fixture
def files(adata, tmp_path):
    """Three files: counts, natural log1p with an obs column less, and one whose genes differ."""
    folder = tmp_path / "cells"
    folder.mkdir()
    adata[:60].write_h5ad(folder / "a.h5ad")
    logged = adata[60:100].copy()
    sums = np.asarray(logged.X.sum(axis=1)).ravel()
    logged.X = sp.csr_matrix(logged.X.multiply(1e4 / sums[:, None])).log1p().astype(np.float32)
    del logged.obs["donor"]
    logged.write_h5ad(folder / "b.h5ad")
    other = adata[100:, 50:200].copy()
    other.var_names = [f"X{i}" if i % 3 == 0 else name for i, name in enumerate(other.var_names)]
    other.write_h5ad(folder / "c.h5ad")
    return folder


def rows_of(corpus):
    return load_from_disk(str(corpus)).to_list()


def test_cells_come_back_as_they_stood(files, tmp_path):
    # as macOS leaves them beside every file of an archive
    (files / "._a.h5ad").write_bytes(b"\0\5\26\7")
    summary = build_corpus([files], tmp_path / "corpus", **SMALL)
    assert summary["cells"] == 120 and summary["shards"] == 3 + 2 + 1 and summary["files_skipped"] == 0
    manifest = read_manifest(tmp_path / "corpus")
    rows = rows_of(tmp_path / "corpus")
    at = 0
    for name in ("a", "b", "c"):
        adata = anndata.read_h5ad(files / f"{name}.h5ad")
        dense = sp.csr_matrix(adata.X).toarray()
        for cell, obs_name in zip(dense, adata.obs_names):
            row, at = rows[at], at + 1
            named = dict(zip([manifest["genes"][i] for i in row["gene_ids"]], row["values"]))
            wanted = {gene: value for gene, value in zip(adata.var_names, cell) if value}
            assert named == pytest.approx(wanted) and list(row["gene_ids"]) == sorted(row["gene_ids"])
            assert row["cell"] == obs_name and row["file"] == f"{name}.h5ad" and row["dataset"] == name
        assert (row["donor"] is None) == (name == "b")
    assert [source["kind"] for source in manifest["sources"]] == ["counts", "log1p", "counts"]


def test_side_by_side_gives_the_same(files, tmp_path):
    build_corpus([files], tmp_path / "one", **SMALL)
    build_corpus([files], tmp_path / "two", num_proc=2, **SMALL)
    one, two = (shards_of(read_manifest(tmp_path / name)) for name in ("one", "two"))
    assert one == two


def test_builds_of_two_names_are_one(adata, tmp_path):
    for name, build in (("a", "GRCh38"), ("b", "hg38")):
        part = adata[:60].copy() if name == "a" else adata[60:].copy()
        part.uns["genome_build"] = build
        part.write_h5ad(tmp_path / f"{name}.h5ad")
    sources = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    assert build_corpus(sources, tmp_path / "corpus", **SMALL)["cells"] == 120
    assert read_manifest(tmp_path / "corpus")["genome_build"] == "hg38"


def test_manifest_table(files, tmp_path):
    table = tmp_path / "files.csv"
    table.write_text("path,dataset,donor,species\ncells/a.h5ad,study,d9,human\ncells/b.h5ad,,,human\n")
    build_corpus([table], tmp_path / "corpus", columns=["cell_type"], **SMALL)
    first, last = (rows_of(tmp_path / "corpus")[i] for i in (0, -1))
    assert (first["dataset"], first["donor"], first["species"]) == ("study", "d9", "human")
    assert last["dataset"] == "b" and last["cell_type"] and "batch" not in last
    table.write_text("file\na.h5ad\n")
    with pytest.raises(InputError, match="column 'path'"):
        find_sources([table])


@pytest.mark.parametrize("option", [{"columns": ["batch", "celltype"]}, {"doublet_key": "celltype"}])
def test_a_mistyped_column_is_told_before_files_are_scanned(option, files, tmp_path):
    with pytest.raises(InputError, match="No file has a column celltype in obs"):
        build_corpus([files], tmp_path / "corpus", **option, **SMALL)
    assert not (tmp_path / "corpus.partial").exists()


def test_what_is_wrong_with_all_files_is_told_not_their_columns(files, tmp_path):
    with pytest.raises(InputError, match="layer"):
        build_corpus([files], tmp_path / "corpus", layer="nope", columns=["batch"], **SMALL)


def test_duplicates_are_found_across_files(adata, tmp_path):
    adata[:50].write_h5ad(tmp_path / "a.h5ad")
    # the same cells with their genes in another order
    adata[40:60, ::-1].copy().write_h5ad(tmp_path / "b.h5ad")
    sources = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    summary = build_corpus(sources, tmp_path / "corpus", **SMALL)
    assert (summary["cells"], summary["duplicates"]) == (60, 10)
    kept = build_corpus(sources, tmp_path / "all", keep_duplicates=True, **SMALL)
    assert (kept["cells"], kept["duplicates"]) == (70, 10)


def test_rules_of_quality(adata, tmp_path):
    adata.obs["doublet"] = np.arange(adata.n_obs) < 7
    adata.write_h5ad(tmp_path / "a.h5ad")
    expressed = np.asarray((adata.X > 0).sum(axis=1)).ravel()
    limit = int(np.median(expressed))
    options = {"min_genes": limit, "doublet_key": "doublet", "min_cells": 60}
    summary = build_corpus([tmp_path / "a.h5ad"], tmp_path / "corpus", **options)
    source = read_manifest(tmp_path / "corpus")["sources"][0]
    assert source["few_genes"] == (expressed < limit).sum() and source["doublets"] > 0
    assert summary["cells"] == source["kept"] == 120 - source["few_genes"] - source["doublets"]
    assert summary["genes"] == int((np.asarray((adata.X > 0).sum(axis=0)) >= 60).sum())
    assert (tmp_path / "corpus" / "report.csv").is_file()


def test_killed_build_goes_on(files, tmp_path, monkeypatch):
    build_corpus([files], tmp_path / "whole", **SMALL)
    write, written = corpus_shards._write_shard, []

    def dying(path, batches, schema):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, batches, schema)

    monkeypatch.setattr(corpus_shards, "_write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        build_corpus([files], tmp_path / "corpus", **SMALL)
    assert not (tmp_path / "corpus").exists()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus.partial").glob("*.arrow")}
    monkeypatch.setattr(corpus_shards, "_scan", None)
    again = []
    monkeypatch.setattr(
        corpus_shards, "_write_shard", lambda path, *args: (again.append(path.name), write(path, *args))[1]
    )
    build_corpus([files], tmp_path / "corpus", resume=True, **SMALL)
    assert len(times) == 4 and not set(again) & set(written) and len(again) == 2
    assert all((tmp_path / "corpus" / path.name).stat().st_mtime_ns == time for path, time in times.items())
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "corpus")]
    assert names[0] == names[1]
    assert shards_of(read_manifest(tmp_path / "whole")) == shards_of(read_manifest(tmp_path / "corpus"))


def test_going_on_otherwise_is_refused(files, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_shards, "_write_shard", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_corpus([files], tmp_path / "corpus", **SMALL)
    with pytest.raises(InputError, match="shard_cells"):
        build_corpus([files], tmp_path / "corpus", min_genes=0, shard_cells=10, resume=True)
    (files / "a.h5ad").touch()
    with pytest.raises(InputError, match="sources"):
        build_corpus([files], tmp_path / "corpus", resume=True, **SMALL)


def test_damaged_files(files, adata, tmp_path):
    whole = (files / "a.h5ad").read_bytes()
    (files / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    (files / "no.h5ad").write_bytes(b"nothing")
    adata.X.data[5] = np.nan
    adata.write_h5ad(files / "nan.h5ad")
    summary = build_corpus([files], tmp_path / "corpus", **SMALL)
    assert (summary["files"], summary["files_skipped"], summary["cells"]) == (6, 3, 120)
    names = ["cut.h5ad", "nan.h5ad", "no.h5ad"]
    assert summary["skipped_files"] == [str(files / name) for name in names]
    problems = [source["problem"] for source in read_manifest(tmp_path / "corpus")["sources"]]
    assert [problem is not None for problem in problems] == [False, False, False, True, True, True]
    with pytest.raises(InputError, match=r"cut\.h5ad"):
        build_corpus([files], tmp_path / "strict", strict=True, **SMALL)
    with pytest.raises(InputError, match="None of 1"):
        build_corpus([files / "no.h5ad"], tmp_path / "none", **SMALL)


def test_verify(files, tmp_path):
    corpus = tmp_path / "corpus"
    build_corpus([files], corpus, **SMALL)
    assert build_corpus([corpus], verify=True)["cells"] == 120
    shard = corpus / shards_of(read_manifest(corpus))[1]["file"]
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    (corpus / "cells-00002-00000.arrow").unlink()
    with pytest.raises(InputError, match=r"2 of 7 .*cells-00002-00000.arrow is missing") as caught:
        build_corpus([corpus], verify=True)
    assert f"{shard.name} differs" in str(caught.value)
    (corpus / "corpus.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        build_corpus([corpus], verify=True)


def test_full_disk(files, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_shards, "_write_shard", full)
    with pytest.raises(OSError, match="disk is full"):
        build_corpus([files], tmp_path / "corpus", **SMALL)
    assert not (tmp_path / "corpus").exists()


def test_command_line(files, tmp_path, capsys):
    from scbert.commands.cli import main

    arguments = ["build", str(files), "--output", str(tmp_path / "corpus"), "--min-genes", "0", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 120
    assert main(["build", str(tmp_path / "corpus"), "--verify"]) == 0
    assert main(["build", str(files)]) == 1
