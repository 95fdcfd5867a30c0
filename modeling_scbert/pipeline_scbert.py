"""Hugging Face pipelines over cells: "cell-type-annotation" and "cell-embedding". Pushed with every checkpoint."""

import importlib
import os
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Pipeline

from .heads_scbert import probabilities_of


@dataclass
class BinnedCells(Dataset):
    """Expression bins [cells, panel], sparse, an item a cell; and whether their genes tell if they are novel."""

    bins: Any
    tells_novelty: bool

    def __len__(self):
        return self.bins.shape[0]

    def __getitem__(self, index):
        return BinnedCells(self.bins[index : index + 1], self.tells_novelty)


def mean_of_expressed(
    hidden: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_
) -> torch.Tensor:
    """
    One vector per cell: the mean of the last hidden states over its expressed genes and the trailing token.

    Unexpressed genes are left out: there are many times more of them, and they would drown the cell in what all
    cells share. The trailing token, the last one that is no padding, gives a cell without any expressed gene a vector
    too. From ``[batch, length, hidden]`` and bins ``[batch, length]`` to float32 ``[batch, hidden]``.

    Examples
    --------
    >>> hidden = torch.tensor([[[2.0], [7.0], [4.0]]])
    >>> mean_of_expressed(hidden, torch.tensor([[3, 0, 0]]))
    tensor([[3.]])
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    trailing = places == (places * attention_mask).argmax(dim=1, keepdim=True)
    weights = ((input_ids > 0) & attention_mask.bool() | trailing).float()
    return torch.einsum("bl,blh->bh", weights, hidden.float()) / weights.sum(dim=1, keepdim=True)


def cell_embedding(outputs, **inputs) -> torch.Tensor:
    """
    One vector per cell, float32 ``[batch, hidden]``, from what the encoder returns for ``inputs``: its own vector of
    the cell where it makes one (``pooling="cell"``), else `mean_of_expressed`.
    """
    cells = outputs.get("pooler_output")
    return mean_of_expressed(outputs.last_hidden_state, **inputs) if cells is None else cells.float()


class CellPipeline(Pipeline):
    """
    What both pipelines share: cells of any kind in, one result per cell out, in order.

    Inputs are many cells: an AnnData, the path of an .h5ad, ``{"X": matrix, "gene_names": [...]}``, a sparse or
    dense matrix [cells, genes], a list or (streamed) a generator of cells; or one cell, a vector [genes].
    """

    _load_tokenizer = True
    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False

    def _sanitize_parameters(self, gene_names=None, input=None, layer=None, **options):
        given = {"gene_names": gene_names, "input": input, "layer": layer}
        return {name: value for name, value in given.items() if value is not None}, {}, options

    def __call__(self, cells, **options):
        """
        Run the pipeline.

        Parameters
        ----------
        cells
            See the class.
        batch_size
            Cells per step; 1 by default. It does not change the results.
        gene_names
            Names of the columns of a matrix or vector; the model's own panel by default.
        input
            What the values are: "auto" (default), "counts" or "log1p".
        layer
            Layer of the AnnData to take.

        Returns
        -------
        A list with one result per cell; for a vector the result itself; for a generator an iterator.
        """
        # a model that was trained last would go on dropping out
        self.model.eval()
        if isinstance(cells, (GeneratorType, list)) or getattr(cells, "ndim", 2) == 1:
            return super().__call__(cells, **options)
        binning = self._preprocess_params | self._sanitize_parameters(**options)[0]
        return list(super().__call__(self._binned(_read(cells), **binning), **options))

    def preprocess(self, cell, **binning):
        found = cell if isinstance(cell, BinnedCells) else self._binned(cell, **binning)
        if len(found) != 1:
            raise ValueError(
                f"A generator or list gives one cell at a time; found {len(found)}. Pass many cells as one AnnData "
                "or matrix."
            )
        encoded = self.tokenizer.encode_bins(found.bins)
        return {
            **{name: torch.from_numpy(array) for name, array in encoded.items()},
            "tells_novelty": torch.tensor([found.tells_novelty]),
        }

    def _binned(self, cells, input="auto", **named):
        alignment = self.tokenizer.align(cells, **named)
        alignment.check()
        novelty = getattr(getattr(self.model, "classifier", None), "novelty", None)
        tells_novelty = novelty is None or novelty.tells_without(alignment.absent)
        return BinnedCells(self.tokenizer.bin_cells(cells, input=input, **named), tells_novelty)

    def save_pretrained(self, save_directory, **options):
        """Save model, tokenizer and code; the configuration names both pipelines."""
        self.model.save_pretrained(save_directory, **options)
        self.tokenizer.save_pretrained(save_directory, **options)


class CellTypeAnnotationPipeline(CellPipeline):
    """
    Cell types with scores: per cell a list of ``{"label", "score"}``, the likeliest first.

    ``top_k`` (5 by default, None for all) says how many. Of a cell whose likeliest type is below the ``threshold`` (the
    model's own by default), the list begins with ``"unassigned"`` and that type's score. A cell that expresses no gene
    of the model gets ``[{"label": "unassigned", "score": 0.0}]``.

    Examples
    --------
    >>> from transformers import pipeline  # doctest: +SKIP
    >>> annotator = pipeline("cell-type-annotation", model="my_model")  # doctest: +SKIP
    >>> annotator(adata, batch_size=16, top_k=1)[0]  # doctest: +SKIP
    [{'label': 'B cell', 'score': 0.98}]
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "classifier") or "CellClassification" not in "".join(
            self.model.config.architectures or ["CellClassification"]
        ):
            raise ValueError(
                "This model has no cell types yet, its classifier would be random: fine-tune it first."
            )

    def _forward(self, inputs):
        tells_novelty = inputs.pop("tells_novelty")
        found = self.model(**inputs)
        # a cell that lacks too many genes is not called novel
        known = probabilities_of(found.logits, self.model.config)
        probabilities = torch.where(tells_novelty.unsqueeze(-1), found.probabilities, known)
        return {"probabilities": probabilities, "expressed": (inputs["input_ids"] > 0).any(dim=1)}

    def postprocess(self, outputs, top_k=5, threshold=None):
        if not outputs["expressed"].item():
            return [{"label": "unassigned", "score": 0.0}]
        config = self.model.config
        if threshold is None:
            threshold = 0.5 if config.unassigned_threshold is None else config.unassigned_threshold
        best = outputs["probabilities"][0].topk(min(top_k or config.num_labels, config.num_labels))
        found = [
            {"label": config.id2label[index], "score": score}
            for score, index in zip(best.values.tolist(), best.indices.tolist())
        ]
        unsure = found[0]["score"] < threshold
        return [{"label": "unassigned", "score": found[0]["score"]}, *found] if unsure else found


class CellEmbeddingPipeline(CellPipeline):
    """
    Embeddings: per cell a float32 array, the cell vector of a classifier that has one, else [hidden_size] as in
    `cell_embedding`.

    Examples
    --------
    >>> from transformers import pipeline  # doctest: +SKIP
    >>> adata.obsm["X_scbert"] = np.stack(pipeline("cell-embedding", model="my_model")(adata))  # doctest: +SKIP
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        bare = self.model.config.cell_vector_size and not hasattr(self.model, "classifier")
        if bare and self.model.name_or_path:
            # the task has the encoder loaded, and it is the classifier that makes the vectors
            encoder = self.model
            classes = importlib.import_module(type(encoder).__module__)
            given = {"dtype": encoder.dtype, "revision": getattr(encoder.config, "_commit_hash", None)}
            classifier = classes.ScBertForCellClassification.from_pretrained(encoder.name_or_path, **given)
            self.model = classifier.to(self.device).eval()

    def _forward(self, inputs):
        inputs.pop("tells_novelty")
        if self.model.config.cell_vector_size and hasattr(self.model, "classifier"):
            return {"embeddings": self.model(**inputs).cell_vectors}
        return {"embeddings": cell_embedding(self.model.base_model(**inputs), **inputs)}

    def postprocess(self, outputs):
        return outputs["embeddings"][0].numpy()


def _read(cells):
    """The AnnData of a path; anything else as it is."""
    if not isinstance(cells, (str, os.PathLike)):
        return cells
    # by name, or loading the checkpoint would demand anndata of those who pass matrices
    return importlib.import_module("anndata").read_h5ad(cells)
