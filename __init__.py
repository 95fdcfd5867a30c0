"""scBERT, scMBERT and scReformer-BERT in Hugging Face form: cell-type annotation of single cells.

The public names are imported when they are first used; ``import scbert`` by itself takes milliseconds and
makes transformers' Auto classes and pipelines know the model.
"""

from typing import TYPE_CHECKING

from .trained_model import registration

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .modeling_scbert import (
        ScBertConfig,
        ScBertForCellClassification,
        ScBertForMaskedExpression,
        ScBertModel,
    )
    from .tokenization.tokenization_scbert import ScBertTokenizer

_HOME = {
    "ScBertConfig": "modeling_scbert",
    "ScBertModel": "modeling_scbert",
    "ScBertForMaskedExpression": "modeling_scbert",
    "ScBertForCellClassification": "modeling_scbert",
    "ScBertTokenizer": "tokenization",
}

__all__ = [
    "ScBertConfig",
    "ScBertForCellClassification",
    "ScBertForMaskedExpression",
    "ScBertModel",
    "ScBertTokenizer",
    "__version__",
]

# pytest also imports the repository root under its folder's name: that copy must not register its own classes
if __name__ == "scbert":
    registration.install()


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
