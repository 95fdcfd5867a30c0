"""A trained model as an object: it annotates, embeds, explains, is saved and sent to the Hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from anndata import AnnData

from ..data.paths import partial_folder
from ..inference.annotate_cells import annotate
from ..inference.embed_cells import embed
from ..inference.shipped import model_or_shipped
from ..interpretation.explain_types import explain
from ..model_cards.push import push
from ..modeling_scbert import ScBertForCellClassification
from ..trained_model import model_folder
from ..trained_model.prediction import LoadedModel

METRICS = "metrics.json"


@dataclass(repr=False, eq=False)
class CellModel(LoadedModel):
    """
    A trained model, as `scbert.load_model`, `scbert.finetune` and `scbert.pretrain` return it.

    `model` and `tokenizer` are ordinary transformers objects.

    Attributes
    ----------
    folder : pathlib.Path
        Where its files are.
    metrics : dict
        What was measured when it was trained: the content of its ``metrics.json``; empty where there is none.

    Examples
    --------
    >>> import scbert
    >>> model = scbert.load_model()
    >>> model.labels[:3]
    ['B cell', 'CD14+ monocyte', 'CD34+ progenitor']
    """

    folder: Path = Path()
    metrics: dict[str, Any] = field(default_factory=dict)
    # a folder that lives as long as the model
    temporary: tempfile.TemporaryDirectory | None = None

    def __repr__(self) -> str:
        labels = self.labels if isinstance(self.model, ScBertForCellClassification) else []
        types = f"{len(labels)} cell types ({', '.join(labels)})" if labels else "no cell types"
        return (
            f"CellModel: {types}, {len(self.tokenizer.gene_panel):,} genes, of {self.folder} on {self.device}"
        )

    def annotate(
        self, cells: AnnData | str | Path, threshold: float | None = None, **options: Any
    ) -> AnnData:
        """Give every cell a type and a confidence: see `scbert.annotate`."""
        return annotate(cells, self, threshold, **options)

    def embed(self, cells: AnnData | str | Path, **options: Any) -> AnnData:
        """Give every cell a vector: see `scbert.embed`."""
        return embed(cells, self, **options)

    def explain(self, cells: AnnData | str | Path, **options: Any) -> pd.DataFrame:
        """The genes that decide on every type: see `scbert.explain`."""
        return explain(cells, self, **options)

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """
        Copy the model folder: weights, configuration, code, tokenizer, figures.

        Parameters
        ----------
        folder
            The folder to write; it appears when complete.
        overwrite
            Replace an earlier model there.

        Returns
        -------
        pathlib.Path
            The folder.

        Raises
        ------
        InputError
            When the folder exists and is not to be replaced.
        """
        with partial_folder(folder, overwrite) as partial:
            shutil.copytree(self.folder, partial, dirs_exist_ok=True)
        return Path(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> dict[str, Any]:
        """
        Send the model to the Hugging Face Hub; private unless ``public=True``.

        Parameters
        ----------
        repo_id
            ``NAME`` or ``OWNER/NAME``.
        **options
            ``public``, ``licence``, ``message`` and ``api``, as in `scbert.model_cards.push.push`.

        Returns
        -------
        dict
            ``url``, ``private``, ``files``.
        """
        return push(self.folder, repo_id, **options)


def load_model(
    model: str | Path | None = None, device: str | None = None, dtype: str | None = None
) -> CellModel:
    """
    Load a trained model.

    Parameters
    ----------
    model
        Model folder, or the ``user/name`` of one on the Hub; the annotator that ships with the package (human blood)
        if left out.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``...; by default the first GPU, or else the CPU.
    dtype
        ``"float32"`` or ``"bfloat16"``; by default bfloat16 on GPUs that have it, float32 elsewhere.

    Returns
    -------
    CellModel
        With `annotate`, `embed`, `explain`, `save`, `push_to_hub` and `metrics`.

    Raises
    ------
    InputError
        When the folder holds no complete scBERT model.

    Examples
    --------
    >>> import scbert
    >>> model = scbert.load_model("my_model")  # doctest: +SKIP
    >>> annotated = model.annotate(adata)  # doctest: +SKIP
    """
    if isinstance(model, CellModel):
        return model
    folder = model_folder.find_model(model_or_shipped(model))
    loaded = model_folder.load_model(folder, "any", device, dtype)
    metrics = folder / METRICS
    figures = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {}
    return CellModel(
        loaded.model, loaded.tokenizer, loaded.name, loaded.dtype, folder=folder, metrics=figures
    )
