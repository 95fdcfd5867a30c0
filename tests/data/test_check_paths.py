import os

import pytest

from scbert.data.check_paths import check_output_path
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
