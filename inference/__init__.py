"""Trained models at work: annotate and embed cells, Hugging Face pipelines."""

from .annotate_cells import annotate, annotate_file
from .embed_cells import embed, embed_file

__all__ = ["annotate", "annotate_file", "embed", "embed_file"]
