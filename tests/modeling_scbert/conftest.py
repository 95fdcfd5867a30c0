import importlib.util
from pathlib import Path

import pytest

from scbert import ScBertConfig
from scbert.modeling_scbert.backends_scbert import favor_backend
from scbert.modeling_scbert.compiled_layer_scbert import compiled_blocks
from scbert.modeling_scbert.layers_scbert import ScBertLayer


@pytest.fixture(scope="session")
def original_reference():
    """The module original_reference.py beside this file."""
    path = Path(__file__).with_name("original_reference.py")
    spec = importlib.util.spec_from_file_location("original_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compiled():
    """Blocks are the compiled ones, or an error; built once, some ten seconds where they have not been."""
    report = compiled_blocks(ScBertLayer, ScBertConfig)
    if report.operators is None:
        pytest.skip(str(report))
    with favor_backend("compiled"):
        yield
