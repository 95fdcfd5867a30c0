import os

import pytest

from scbert.data.check_paths import check_cells_path, check_output_path
from scbert.data.write_output import atomic_path
from scbert.tokenization import InputError


@pytest.mark.parametrize("kind", ["same", "relative", "link", "hard link"])
def test_output_equal_to_input_is_refused_always(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in.h5ad"
    source.write_text("x")
    output = {"same": source, "relative": "in.h5ad", "link": tmp_path / "l", "hard link": tmp_path / "h"}[
        kind
    ]
    if kind == "link":
        output.symlink_to(source)
    if kind == "hard link":
        os.link(source, output)
    with pytest.raises(InputError, match="input itself"):
        check_output_path(output, overwrite=True, inputs=(source,))


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        check_output_path(tmp_path / "none" / "out.h5ad")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="is a folder"), atomic_path(folder, overwrite=True):
        pass
    folder.chmod(0o500)
    if not os.access(folder, os.W_OK):
        with pytest.raises(InputError, match="not writable"):
            check_output_path(folder / "out.h5ad")
    folder.chmod(0o700)


def test_outputs_have_the_suffix_of_their_format(tmp_path):
    assert check_output_path(tmp_path / "out.H5AD", suffix=".h5ad")
    with pytest.raises(InputError, match=r"out.csv must be named .h5ad"):
        check_output_path(tmp_path / "out.csv", suffix=".h5ad")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cells.csv", "Convert it to .h5ad"),
        ("cells.loom", ".loom files are not read"),
        ("cells.h5ad.gz", ".gz files are not read"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, name, words):
    (tmp_path / name).write_text("something")
    with pytest.raises(InputError, match=words):
        check_cells_path(tmp_path / name)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        check_cells_path(tmp_path / "cells.h5ad")
    (tmp_path / "cells.h5ad").touch()
    with pytest.raises(InputError, match="is empty"):
        check_cells_path(tmp_path / "cells.h5ad")


def test_folders_above_the_cells_name_what_is_below(tmp_path):
    with pytest.raises(InputError, match=r"is a folder without a 10x matrix.mtx"):
        check_cells_path(tmp_path)
    matrix = tmp_path / "outs" / "filtered_feature_bc_matrix"
    matrix.mkdir(parents=True)
    (matrix / "matrix.mtx.gz").touch()
    assert check_cells_path(matrix) == matrix
    for above in (tmp_path, tmp_path / "outs"):
        with pytest.raises(InputError, match=f"is a folder above the cells.*: {matrix}[.]$"):
            check_cells_path(above)
    for i in range(5):
        (tmp_path / f"{i}.h5ad").touch()
    with pytest.raises(InputError, match=r"0.h5ad, .*3.h5ad and 2 more"):
        check_cells_path(tmp_path)
