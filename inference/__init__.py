"""Trained models at work: annotate and embed cells, Hugging Face pipelines."""

from .annotate import annotate, annotate_file
from .embed import embed, embed_file
from .loading import LoadedModel, load_model

__all__ = ["LoadedModel", "annotate", "annotate_file", "embed", "embed_file", "load_model"]
