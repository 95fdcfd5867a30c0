"""The model: configuration, embeddings, attention, heads. Pushed to the Hub with every checkpoint."""

from .configuration_scbert import ScBertConfig
from .modeling_scbert import (
    ScBertForCellClassification,
    ScBertForMaskedExpression,
    ScBertModel,
    ScBertPreTrainedModel,
)

# a saved checkpoint carries this code, so that it loads where the package is not installed
ScBertConfig.register_for_auto_class("AutoConfig")
ScBertModel.register_for_auto_class("AutoModel")
ScBertForMaskedExpression.register_for_auto_class("AutoModelForMaskedLM")
ScBertForCellClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "ScBertConfig",
    "ScBertForCellClassification",
    "ScBertForMaskedExpression",
    "ScBertModel",
    "ScBertPreTrainedModel",
]
