"""The house's rules, read from the files: who may import whom, what is flat, what setup.cfg lists."""

import ast
import configparser
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

ROOT = Path(__file__).resolve().parents[1]
PUSHED = ("modeling_scbert", "tokenization")
# what stands beside the package: run by its path, in no wheel
BESIDE = ("tests", "docs", "examples", "benchmarks", "scripts")
# the modules of a row may import those of the rows below, and their own folder
LEVELS = (
    {"extras"},
    {"tokenization", "modeling_scbert"},
    {"data"},
    {"evaluation"},
    {"trained_model"},
    {"training"},
    {"inference", "model_cards", "protocols"},
    {"interpretation"},
    {"api"},
    # the names of `import scbert`
    {"__init__"},
    {"commands"},
    {"__main__"},
)
THIRD_PARTY = {
    "modeling_scbert": {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "triton"},
    "tokenization": {"numpy", "scipy", "transformers"},
}
MAX_LINES = 400


def project_files(suffix=""):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = (ROOT / name for name in listed.stdout.splitlines() if name.endswith(suffix))
    return sorted(path for path in files if path.is_file())


def package_files():
    return [path for path in project_files(".py") if path.relative_to(ROOT).parts[0] not in BESIDE]


def unit(path):
    """The name under which LEVELS knows a file: its folder, or its own name at the root."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def level(name):
    return next(number for number, names in enumerate(LEVELS) if name in names)


def imported_paths(path):
    """Files and folders of this project that a file imports, also inside functions."""
    package = ("scbert", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        for name in names:
            if name[0] == "scbert" and len(name) > 1:
                yield ROOT.joinpath(*name[1:])


def imported_distributions(tree):
    """Top-level names of every absolute import."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return [name.partition(".")[0] for name in names]


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path):
    own = unit(path)
    for target in imported_paths(path):
        # a name that is no file is one of scbert/__init__.py, such as __version__
        other = unit(target) if any(unit(target) in names for names in LEVELS) else "__init__"
        assert other == own or level(other) < level(own), f"{own} imports {other}"


def imported_files(path):
    """Files of this project that a file imports, also inside functions."""
    for target in imported_paths(path):
        # the last part may be a name that the module defines
        for place in (target, target.parent):
            found = [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
            if found:
                yield found[0]
                break


@pytest.mark.parametrize("folder", sorted({unit(path) for path in package_files()}))
def test_no_import_circles(folder):
    graph = {path: set(imported_files(path)) - {path} for path in package_files() if unit(path) == folder}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(str(path.relative_to(ROOT)) for path in error.args[1]))


@pytest.mark.parametrize("folder", PUSHED)
def test_pushed_folders_are_flat(folder):
    assert not [path for path in package_files() if unit(path) == folder and path.parent != ROOT / folder]
    names = {path.stem for path in (ROOT / folder).glob("*.py")}
    for path in (ROOT / folder).glob("*.py"):
        # transformers copies what its regular expression finds, in docstrings too
        assert set(get_relative_imports(path)) <= names, path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, (
                    f"{path.name}:{node.lineno}"
                )


def test_pushed_basenames_are_unique():
    names = [path.name for folder in PUSHED for path in (ROOT / folder).glob("*.py")]
    names = [name for name in names if name != "__init__.py"]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("folder", PUSHED)
def test_pushed_folders_import_little(folder):
    allowed = THIRD_PARTY[folder] | set(sys.stdlib_module_names)
    for path in (ROOT / folder).glob("*.py"):
        found = set(imported_distributions(ast.parse(path.read_text())))
        assert found <= allowed, f"{path.name} imports {sorted(found - allowed)}"


def test_triton_is_optional():
    """What imports it is found by name, by `from_package`, and imported by nothing that the model itself imports."""
    needed, found = [ROOT / "modeling_scbert" / "__init__.py"], set()
    while needed:
        path = needed.pop()
        if path not in found:
            found.add(path)
            needed += imported_files(path)
    assert ROOT / "modeling_scbert" / "blocks_scbert.py" in found
    assert not [
        path.name for path in found if "triton" in imported_distributions(ast.parse(path.read_text()))
    ]


def test_setup_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    folders = {path.parent.relative_to(ROOT) for path in package_files() if path.name == "__init__.py"}
    assert sorted(listed) == sorted(".".join(("scbert", *folder.parts)) for folder in folders)


def test_no_folder_is_named_after_a_dependency():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = {line.split(">")[0].strip() for line in config["options"]["install_requires"].splitlines()}
    assert not {unit(path) for path in package_files()} & (required | {"evaluate", "scanpy"})


def test_files_stay_short():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in project_files(".py")}
    assert not {name: lines for name, lines in long.items() if lines > MAX_LINES}


def test_no_path_of_one_machine():
    private = ["/".join(["", name, ""]) for name in ("work", "root")]
    for path in project_files():
        text = path.read_bytes()
        assert not any(name.encode() in text for name in private), path.relative_to(ROOT)


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
