"""transformers' own common tests, from the source distribution of the installed version, pass without a failure."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

SUITE = Path(__file__).with_name("transformers_common_suite.py")
# what the distribution leaves out and the common tests import: mixins for exporters and for models that generate text
LEFT_OUT = {
    "exporters/test_export.py": "class ExportTesterMixin: ...",
    "generation/test_utils.py": "class GenerationTesterMixin: ...",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}",
}


def pip(*words):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)


@pytest.fixture
def upstream(tmp_path):
    """A folder in which transformers' tests are the package ``upstream``, with the one module more that they import."""
    source = f"transformers=={transformers.__version__}"
    pip("download", "--no-deps", "--no-binary", "transformers", "--dest", str(tmp_path), source)
    pip("install", "--no-deps", "--target", str(tmp_path), "parameterized")
    with tarfile.open(next(tmp_path.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    package = tmp_path / "upstream"
    shutil.move(next(tmp_path.glob("transformers-*/tests")), package)
    for name, content in LEFT_OUT.items():
        path = package / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(content + "\n")
    for folder in {package, *(path.parent for path in package.rglob("*.py"))}:
        (folder / "__init__.py").touch()
    shutil.copy(SUITE, tmp_path / "test_suite.py")
    return tmp_path


@pytest.mark.slow
@pytest.mark.network
def test_no_common_test_fails(upstream):
    # an empty configuration, for this project's knows nothing of their markers
    options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(upstream), "test_suite.py"]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pytest", *options],
        cwd=upstream,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    passed = re.search(r"(\d+) passed", run.stdout.splitlines()[-1])
    assert int(passed[1]) > 150, run.stdout[-500:]
