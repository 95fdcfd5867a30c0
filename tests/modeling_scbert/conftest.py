import importlib.util
from pathlib import Path

import pytest

from scbert.modeling_scbert.compiled_layer_scbert import restore_layers, use_compiled_layers


@pytest.fixture(scope="session")
def original_reference():
    """The module original_reference.py beside this file."""
    path = Path(__file__).with_name("original_reference.py")
    spec = importlib.util.spec_from_file_location("original_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compiled_blocks():
    """Compiled blocks are in use in the module; built once, some ten seconds where they have not been."""
    report = use_compiled_layers()
    if not report.enabled:
        pytest.skip(str(report))
    yield
    restore_layers()
