"""Resizing a trained model's vocabularies: more genes or other features, more modalities.

Rows that were there keep their bits; only what is new is initialised. A new gene goes in front of the trailing token,
whose row stays the last one, so a tokenizer with the longer panel (old genes first, new ones appended) fits as it is.
"""

import torch
from torch import nn

from .embeddings_scbert import across_arc


class ResizeEmbeddingsMixin:
    """`resize_gene_embeddings` and `resize_modality_embeddings` of every scBERT class."""

    @torch.no_grad()
    def resize_gene_embeddings(self, num_genes: int, new_vectors: torch.Tensor | None = None):
        """
        Make room for genes (or peaks, proteins) appended to the panel.

        Parameters
        ----------
        num_genes
            Size of the new panel, trailing token not counted; its first genes are the model's own.
        new_vectors
            Rows for the new genes ``[new genes, hidden]``; if left out random, or with ``pooling="cell"`` zeros.

        Raises
        ------
        ValueError
            If the panel would shrink, or the vectors do not fit.

        Examples
        --------
        >>> from scbert import ScBertConfig, ScBertModel
        >>> model = ScBertModel(ScBertConfig(hidden_size=16, num_hidden_layers=1, max_position_embeddings=11))
        >>> model.resize_gene_embeddings(12)
        >>> model.config.max_position_embeddings
        13
        """
        old = self.config.max_position_embeddings
        added = num_genes + 1 - old
        if added < 0:
            raise ValueError(f"The model has {old - 1} genes; it can grow, not shrink to {num_genes}.")
        if added == 0:
            return
        table = self.base_model.embeddings.gene_embeddings
        shape = (added, table.weight.shape[1])
        if new_vectors is None:
            # on no axis of cells: random vectors would drown a cell's
            std = 0.0 if self.config.pooling == "cell" else self.config.initializer_range
            new_vectors = torch.empty(shape).normal_(std=std)
            if self.config.ordinal_expression:
                new_vectors = across_arc(new_vectors, self.config)
        elif tuple(new_vectors.shape) != shape:
            raise ValueError(f"new_vectors has the shape {tuple(new_vectors.shape)}; {shape} is needed.")
        table.weight = _like(table.weight, _insert(table.weight, new_vectors, dim=0))
        classifier = getattr(self, "classifier", None)
        if classifier is not None and self.config.pooling == "conv":
            first = classifier.dense[0] if len(classifier.dense) else classifier.out_proj
            # of new genes nothing is known: they have no vote, and no part in what was fitted to the others
            unheard = torch.zeros(first.out_features, added)
            first.weight = _like(first.weight, _insert(first.weight, unheard, dim=1))
            first.in_features += added
            if classifier.novelty is not None:
                unknown = torch.zeros(self.config.cell_vector_size, added)
                classifier.novelty.projection = _insert(classifier.novelty.projection, unknown, dim=1)
        if hasattr(self, "cell_decoder"):
            # as common as genes are in the mean
            bias = self.cell_decoder.bias
            self.cell_decoder.bias = _like(bias, torch.cat([bias, bias.mean().expand(added)]))
        self.config.max_position_embeddings = num_genes + 1

    @torch.no_grad()
    def resize_modality_embeddings(self, num_modalities: int):
        """
        Make room for modalities; their ids follow those in use.

        A model of one modality has no modality embedding: its first row becomes zero, so that what the model
        computes for that modality stays as it is.

        Parameters
        ----------
        num_modalities
            Modalities in all.

        Raises
        ------
        ValueError
            If there would be fewer than now.
        """
        old = self.config.num_modalities
        if num_modalities < old:
            raise ValueError(f"The model has {old} modalities; it can grow, not shrink to {num_modalities}.")
        if num_modalities == old:
            return
        embeddings = self.base_model.embeddings
        known = embeddings.expression_embeddings.weight
        rows = known.new_empty(num_modalities, known.shape[1]).normal_(std=self.config.initializer_range)
        rows[:old] = embeddings.modality_embeddings.weight if old > 1 else 0
        embeddings.modality_embeddings = nn.Embedding.from_pretrained(rows, freeze=False)
        if hasattr(self, "decoder"):
            grown = nn.Linear(self.config.hidden_size, num_modalities).to(self.decoder.weight)
            grown.weight.normal_(std=self.config.initializer_range)
            grown.bias.zero_()
            if old > 1:
                grown.weight[:old] = self.modality_decoder.weight
                grown.bias[:old] = self.modality_decoder.bias
            self.modality_decoder = grown
        self.config.num_modalities = num_modalities


def _insert(weight, new, dim):
    """``weight`` with ``new`` in front of its last row (or column), which belongs to the trailing token."""
    kept, trailing = weight.split([weight.shape[dim] - 1, 1], dim=dim)
    return torch.cat([kept, new.to(weight), trailing], dim=dim)


def _like(old, values):
    """A parameter in place of a parameter, a buffer in place of a buffer."""
    return nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values
