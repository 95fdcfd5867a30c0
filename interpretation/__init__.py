"""Why a model says what it says: attention and attribution per gene, beside what is known of the types."""

from .received_attention import gene_attention

__all__ = ["gene_attention"]
