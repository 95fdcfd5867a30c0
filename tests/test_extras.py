"""What is said where an optional library is missing."""

import configparser
import re
from pathlib import Path

import pytest

from scbert.extras import EXTRAS, MissingLibrary, how_to_install, require

ROOT = Path(__file__).resolve().parents[1]


def extras_of_setup():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config["options.extras_require"]


@pytest.mark.parametrize("library", EXTRAS)
def test_every_library_is_in_its_extra(library):
    assert re.search(rf"^{library}\b", extras_of_setup()[EXTRAS[library]], re.MULTILINE)


@pytest.mark.parametrize("library", EXTRAS)
def test_the_command_names_the_library_and_no_index_entry_of_ours(library):
    told = how_to_install(library)
    assert re.fullmatch(rf"pip install '.+' \(the extra {EXTRAS[library]}\)", told)
    assert f"'{library}" in told and "scbert" not in told


def test_extras_within_extras_are_resolved(monkeypatch):
    lines = [
        "torch>=2.6",
        'scbert-transformers[scanpy]; extra == "explain"',
        'captum>=0.8; extra == "explain"',
        'scanpy>=1.10; extra == "scanpy"',
        'tqdm>=4; python_version >= "3"',
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert how_to_install("captum") == "pip install 'captum>=0.8' 'scanpy>=1.10' (the extra explain)"


def test_without_metadata_the_library_alone_is_named(monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: None)
    assert how_to_install("captum") == "pip install 'captum' (the extra explain)"
    assert how_to_install("something") == "pip install 'something'"


def test_a_missing_library_is_an_import_error():
    with pytest.raises(MissingLibrary, match="no_such_library is needed here .* pip install"):
        require("no_such_library.part")
