"""What is built from a clean copy of the tracked files installs and works from any directory."""

import configparser
import re
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# files of the package's folders that only a clone needs
NOT_INSTALLED = ("*.png",)


def data_files():
    """Tracked files of the package's folders that are no modules, as paths in the clone."""
    folders = {name.partition("/")[0] for name in tracked_files() if name.endswith("/__init__.py")}
    files = [
        name for name in tracked_files() if name.partition("/")[0] in folders and not name.endswith(".py")
    ]
    return {name for name in files if not any(fnmatch(name, pattern) for pattern in NOT_INSTALLED)}


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def setup():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def requirements(text):
    return [Requirement(line) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(target), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_every_requirement_is_pinned():
    pins = {
        Requirement(line).name.lower().replace("_", "-"): Requirement(line).specifier
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    config = setup()
    extras = config["options.extras_require"]
    tested = [config["options"]["install_requires"], *(extras[name] for name in extras)]
    for requirement in (item for text in tested for item in requirements(text)):
        name = requirement.name.lower().replace("_", "-")
        if name == "scbert-transformers":
            continue
        (pin,) = pins[name]
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} but {name}=={pin.version}"


def test_the_changelog_and_the_citation_name_this_version():
    import scbert

    dated = rf"^## \[{re.escape(scbert.__version__)}\] - \d{{4}}-\d\d-\d\d$"
    assert re.search(dated, (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^version: {re.escape(scbert.__version__)}$", citation, re.MULTILINE)


def test_the_core_stays_light():
    heavy = {"scanpy", "gensim", "captum", "celltypist", "mudata", "gradio", "evaluate", "triton"}
    assert not {item.name for item in requirements(setup()["options"]["install_requires"])} & heavy


def test_every_data_file_is_declared():
    declared = setup()["options.package_data"]
    found = set()
    for package, patterns in declared.items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns.split(","):
            found |= {str(path.relative_to(ROOT)) for path in folder.glob(pattern.strip())}
    wanted = data_files()
    assert {
        "training/recipes/scbert.json",
        "training/accelerate/ddp.yaml",
        "model_cards/card_template.md",
        "model_cards/scbert-mini/model.safetensors",
        "model_cards/scbert-mini-pbmc/model.safetensors",
        "model_cards/scbert-mini-pbmc/gene_panel.txt",
        "model_cards/scbert-mini-pbmc/labels.csv",
        "model_cards/scbert-mini-pbmc/SHA256SUMS",
        "model_cards/scbert-mini-tissue/model.safetensors",
        "model_cards/scbert-mini-tissue/terms.csv",
    } <= wanted
    assert wanted <= found


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {name.removesuffix("__init__.py") for name in tracked_files() if name.endswith("__init__.py")}
    scripts = [name for name in tracked_files() if name.endswith(".py")]
    modules = {f"scbert/{name}" for name in scripts if name[: name.rfind("/") + 1] in packages}
    assert {"scbert/commands/cli.py", "scbert/modeling_scbert/favor_scbert.py"} <= modules
    assert modules | {f"scbert/{name}" for name in data_files()} <= names
    assert not {name for name in names if "/" not in name}
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"scbert", "scbert_transformers"}


@pytest.mark.slow
def test_the_wheel_works_from_any_directory(wheel, tmp_path):
    # the dependencies of this environment, but the package from the wheel alone
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r});"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "import scbert; assert scbert.__file__.startswith(sys.path[0]), scbert.__file__;"
        "from scbert.commands.cli import main; sys.exit(main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("scbert ")


MAIN_JOBS = """
import anndata, numpy as np, pandas as pd
import scbert
from scbert.modeling_scbert.compiled_layer_scbert import compiled_blocks
from scbert.modeling_scbert.layers_scbert import ScBertLayer

types = np.arange(90) % 3
counts = np.random.default_rng(0).poisson(1 + 4 * np.eye(3)[types].repeat(20, axis=1)).astype(np.float32)
names = [f"GENE{number}" for number in range(60)]
cells = anndata.AnnData(counts, pd.DataFrame({"type": types.astype(str)}, [f"c{i}" for i in range(90)]))
cells.var_names = names
quick = {"device": "cpu", "disable_tqdm": True}
model = scbert.finetune(cells, "type", "model", **quick)
assert (model.annotate(cells).obs["scbert_cell_type"] == cells.obs["type"]).mean() > 0.9
sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 16}
scbert.pretrain(cells, "base", model=sizes, max_steps=2, **quick)
scbert.finetune(cells, "type", "tuned", base="base", epochs=1, **quick)
print(compiled_blocks(ScBertLayer, scbert.ScBertConfig))
"""


@pytest.mark.slow
@pytest.mark.network
def test_the_oldest_requirements_do(wheel, tmp_path):
    """Several GB, with the builds of torch for GPUs: what is promised is seldom what anybody has installed."""
    lines = setup()["options"]["install_requires"].split()
    oldest = [re.sub(r">=([\d.]+).*", r"==\1", line) for line in lines]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", str(wheel), *oldest], check=True)
    ran = subprocess.run([str(python), "-c", MAIN_JOBS], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Blocks compiled for this machine are in use" in ran.stdout
