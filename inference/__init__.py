"""Trained models at work: annotate and embed cells, Hugging Face pipelines."""

from ..trained_model.loaded_model import LoadedModel, load_model
from .annotate import annotate, annotate_file
from .embed import embed, embed_file

__all__ = ["LoadedModel", "annotate", "annotate_file", "embed", "embed_file", "load_model"]
