import errno

import pytest

from scbert.data.write_output import atomic_path, partial_folder
from scbert.tokenization import InputError


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_link_keeps_pointing(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    with atomic_path(tmp_path / "link.csv", overwrite=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").read_text() == "new"


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.csv", overwrite=True) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert entries(tmp_path) == ["a.csv"] and (tmp_path / "a.csv").read_text() == "old"


def build(path, text="1", **options):
    with partial_folder(path, **options) as folder:
        assert folder.name == path.name + ".partial"
        (folder / "config.json").write_text(text)


def test_folder_appears_when_complete(tmp_path):
    build(tmp_path / "model")
    assert entries(tmp_path) == ["model"]
    with pytest.raises(InputError, match="--overwrite"):
        build(tmp_path / "model")
    build(tmp_path / "model", "2", overwrite=True)
    assert (tmp_path / "model" / "config.json").read_text() == "2" and entries(tmp_path) == ["model"]


def test_interrupted_folder_is_resumed_or_begun_anew(tmp_path, caplog):
    for resume, kept in ((True, True), (False, False)):
        with pytest.raises(KeyboardInterrupt), partial_folder(tmp_path / "model", overwrite=True) as folder:
            (folder / "checkpoint").write_text("x")
            raise KeyboardInterrupt
        assert "model.partial" in entries(tmp_path)
        with partial_folder(tmp_path / "model", resume=resume, overwrite=True) as folder:
            assert (folder / "checkpoint").exists() == kept
            (folder / "config.json").write_text("1")
        assert entries(tmp_path) == ["model"]
    assert "--resume" in caplog.text


def test_folders_of_others_are_never_removed(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    for path in (home, home / "thesis.tex"):
        with pytest.raises(InputError):
            build(path, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(home)
    with pytest.raises(InputError):
        build(link, overwrite=True)
    assert (home / "thesis.tex").read_text() == "years of work"
    (home / "thesis.tex").unlink()
    build(home, overwrite=True)


def test_full_disk_in_a_folder(tmp_path):
    with pytest.raises(OSError, match="disk is full"), partial_folder(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not (tmp_path / "model").exists()
