"""Optional libraries: which extra of setup.cfg brings one, and how it is installed."""

import importlib
from types import ModuleType

DISTRIBUTION = "scbert-transformers"
# importable library -> the extra that brings it
EXTRAS = {
    "scanpy": "scanpy",
    "igraph": "scanpy",
    "leidenalg": "scanpy",
    "gensim": "gene2vec",
    "captum": "explain",
    "celltypist": "evaluate",
    "evaluate": "evaluate",
    "bioframe": "multiomics",
    "mudata": "multiomics",
    "cellxgene_ontology_guide": "ontology",
    "pooch": "genes",
    "gradio": "app",
    "mcp": "app",
}


class MissingLibrary(ImportError):
    """An optional library is not installed; the message says how to get it."""


def require(module: str, extra: str | None = None) -> ModuleType:
    """
    Import a module of an optional library by its dotted name, or say how to get it by a `MissingLibrary`.

    The `extra` that brings it is looked up if left out. An error *inside* an installed library is passed on as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        message = f"{library} is needed here and is not installed: {how_to_install(library, extra)}"
        raise MissingLibrary(message) from error


def how_to_install(library: str, extra: str | None = None) -> str:
    """
    Say how an optional library is installed, with everything else its extra brings, which is looked up if left out.

    The libraries are named rather than ``scbert-transformers[extra]``: that holds however this package was
    installed, from a clone, a wheel or an index.

    Examples
    --------
    >>> how_to_install("gensim")
    "pip install 'gensim>=4.3' (the extra gene2vec)"
    """
    extra = extra or EXTRAS.get(library)
    # the missing one first
    names = sorted(_requirements(extra) or [library], key=lambda name: not name.startswith(library))
    command = "pip install " + " ".join(f"'{name}'" for name in names)
    return f"{command} (the extra {extra})" if extra else command


def _requirements(extra: str | None) -> list[str]:
    """What an extra asks for, extras within it resolved; empty where the metadata does not say."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []
    found: list[str] = []
    for requirement in map(Requirement, lines):
        if not extra or requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.marker.evaluate({"extra": ""}):
            continue  # of another marker, not of the extra
        if requirement.name == DISTRIBUTION:
            found += [name for inner in sorted(requirement.extras) for name in _requirements(inner)]
        else:
            found.append(f"{requirement.name}{requirement.specifier}")
    return found
