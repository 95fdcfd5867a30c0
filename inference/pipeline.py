"""The Hugging Face pipelines; their code lies with the model, to travel with every checkpoint."""

from ..modeling_scbert.pipeline_scbert import CellEmbeddingPipeline, CellTypeAnnotationPipeline

__all__ = ["CellEmbeddingPipeline", "CellTypeAnnotationPipeline"]
