"""A model's page as a Space of the Hugging Face Hub: a folder that `hf upload` sends as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ..data.paths import partial_folder
from ..extras import DISTRIBUTION

PACKAGE = Path(__file__).resolve().parents[1]
APP = '''"""The page of this Space; the folder `scbert` beside it is the package it runs."""

from scbert.commands.app import serve

serve({models!r}, host="0.0.0.0", port=7860{limits})
'''
README = """---
{front}---

# Cell types by scBERT

Upload single cells (.h5ad, or 10x .h5), look at their types, and take the annotated file home. Files are deleted
after an hour. Written by `scbert app --export-space`; send it with

    hf upload OWNER/NAME . . --repo-type space
"""


def export_space(
    output: str | Path,
    models: Sequence[str],
    limits: Mapping[str, int] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """
    Write the page as a Space: app.py, README.md with its front matter, requirements.txt, package and models.

    The package itself goes along, so that the Space does not depend on an index having it. A model folder is copied; a
    model named as on the Hub is fetched by the Space. That they can be used is not looked into. `limits` are
    ``max_cells`` and ``max_megabytes`` of an upload. Returns ``output``, ``models`` and ``files``, their number.
    """
    with partial_folder(output, overwrite, marker="app.py") as folder:
        _copy_package(folder / "scbert")
        named = [_copy_model(model, folder / "models") for model in models]
        given = "".join(f", {name}={value}" for name, value in (limits or {}).items())
        (folder / "app.py").write_text(APP.format(models=named, limits=given), encoding="utf-8")
        (folder / "README.md").write_text(README.format(front=_front_matter(named)), encoding="utf-8")
        (folder / "requirements.txt").write_text("\n".join(_requirements()) + "\n", encoding="utf-8")
    files = sum(path.is_file() for path in Path(output).rglob("*"))
    return {"output": str(output), "models": named, "files": files}


def _copy_package(target: Path) -> None:
    """The package's modules and data files: of a clone too, where tests and documents stand beside them."""
    target.mkdir()
    for path in PACKAGE.glob("*.py"):
        shutil.copy(path, target)
    for folder in (path.parent for path in PACKAGE.glob("*/__init__.py")):
        shutil.copytree(folder, target / folder.name, ignore=_unwanted)


def _unwanted(folder: str, names: list[str]) -> list[str]:
    """Compiled modules, pictures, and the released models: those that the page offers are copied by themselves."""
    path = Path(folder)
    models = [name for name in names if (path / name / "config.json").is_file()]
    return [*models, *(name for name in names if name == "__pycache__" or name.endswith(".png"))]


def _copy_model(model: str, folder: Path) -> str:
    """The name under which the Space finds the model."""
    if not Path(model).is_dir():
        return str(model)
    name = Path(model).resolve().name
    shutil.copytree(model, folder / name)
    return f"{folder.name}/{name}"


def _front_matter(models: Sequence[str]) -> str:
    fields = {
        "title": "Cell types by scBERT",
        "emoji": "🧫",
        "colorFrom": "green",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": "3.12",
        "app_file": "app.py",
        "license": "apache-2.0",
        "tags": ["biology", "single-cell", "cell-type-annotation"],
    }
    on_hub = [name for name in models if not name.startswith("models/")]
    fields |= {"models": on_hub} if on_hub else {}
    # what is JSON is YAML
    return "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in fields.items())


def _requirements() -> list[str]:
    """What the package and its page ask for; gradio comes with the Space."""
    wanted = []
    for requirement in map(Requirement, requires(DISTRIBUTION) or []):
        of_extra = requirement.marker is not None
        if of_extra and not any(requirement.marker.evaluate({"extra": name}) for name in ("app", "scanpy")):
            continue
        if requirement.name not in (DISTRIBUTION, "gradio"):
            wanted.append(f"{requirement.name}{requirement.specifier}")
    return wanted
