"""scBERT, scMBERT and scReformer-BERT in Hugging Face form: cell-type annotation of single cells.

The public names are imported when they are first used; ``import scbert`` by itself takes milliseconds and
makes transformers' Auto classes and pipelines know the model.
"""

# type checkers see the names as imports, others by `_HOME`
# ruff: noqa: F401

from typing import TYPE_CHECKING

from .trained_model import registration

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api.cell_model import load_model
    from .api.train_models import finetune, pretrain
    from .inference.annotate_cells import annotate
    from .inference.embed_cells import embed
    from .interpretation.explain_types import explain
    from .modeling_scbert import (
        ScBertConfig,
        ScBertForCellClassification,
        ScBertForMaskedExpression,
        ScBertModel,
    )
    from .tokenization import InputError, ScBertTokenizer

_HOME = {
    "InputError": "tokenization.errors_scbert",
    "ScBertConfig": "modeling_scbert",
    "ScBertForCellClassification": "modeling_scbert",
    "ScBertForMaskedExpression": "modeling_scbert",
    "ScBertModel": "modeling_scbert",
    "ScBertTokenizer": "tokenization",
    "annotate": "inference.annotate_cells",
    "embed": "inference.embed_cells",
    "explain": "interpretation.explain_types",
    "finetune": "api.train_models",
    "load_model": "api.cell_model",
    "pretrain": "api.train_models",
}
# reached as scbert.NAME without an import of their own, and not shown
_FOLDERS = {
    "data",
    "evaluation",
    "inference",
    "interpretation",
    "modeling_scbert",
    "tokenization",
    "training",
}

__all__ = [*_HOME, "__version__"]

# pytest also imports the repository root under its folder's name: that copy must not register its own classes
if __name__ == "scbert":
    registration.install()


def __getattr__(name: str):
    from importlib import import_module

    if name in _FOLDERS:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
