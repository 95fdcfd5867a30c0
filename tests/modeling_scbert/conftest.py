import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def original_reference():
    """The module original_reference.py beside this file."""
    path = Path(__file__).with_name("original_reference.py")
    spec = importlib.util.spec_from_file_location("original_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
