"""Training from Python: cells in, a trained model out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from anndata import AnnData

from ..data.write_h5ad import atomic_write_h5ad
from ..training import run_finetune, run_pretrain
from .cell_model import CellModel, load_model


def finetune(
    reference: AnnData | str | Path,
    label_key: str,
    output: str | Path | None = None,
    **options: Any,
) -> CellModel:
    """
    Teach a model the cell types of a labelled reference.

    Parameters
    ----------
    reference
        Labelled cells: an AnnData with gene symbols in `var_names`, which is left as it is, or a file.
    label_key
        Column of `obs` that holds the cell types.
    output
        The model folder to write. Left out, the model lives as long as the object (`CellModel.save` keeps it).
    **options
        ``base`` (a pretrained model), ``test`` (cells to test on), ``unlabelled`` (cells without labels, such as those
        to annotate, to learn from as well: an AnnData, a file, or a list of them), ``recipe``, ``epochs``,
        ``batch_size``, ``layer``, ``input``, ``seed``, ``device``, ``resume``, ``overwrite`` and every other setting of
        `scbert.training.run_finetune.finetune`.

    Returns
    -------
    CellModel
        With `annotate`, `save`, `push_to_hub` and `metrics`, such as ``metrics["cross_validation_accuracy"]``.

    Raises
    ------
    InputError
        For every fault of the input that a user can mend.

    Examples
    --------
    >>> import scbert
    >>> model = scbert.finetune(reference, "cell_type")  # doctest: +SKIP
    >>> model.metrics["cross_validation_macro_f1"]  # doctest: +SKIP
    >>> annotated = model.annotate(query)  # doctest: +SKIP
    """
    return _trained(partial(run_finetune.finetune, reference, label_key), output, options)


def pretrain(corpus: AnnData | str | Path, output: str | Path | None = None, **options: Any) -> CellModel:
    """
    Teach a model to predict hidden expression from the rest of the cell; labels are not needed.

    Parameters
    ----------
    corpus
        Cells: an AnnData, a file, or a folder of files.
    output
        The model folder to write. Left out, the model lives as long as the object (`CellModel.save` keeps it).
    **options
        ``base`` (a model to go on from), ``recipe``, ``gene_vectors``, ``epochs``, ``batch_size``, ``seed``,
        ``resume``, ``overwrite`` and every other setting of `scbert.training.run_pretrain.pretrain`.

    Returns
    -------
    CellModel
        To embed cells with, or to fine-tune from: ``scbert.finetune(..., base=model)``.

    Raises
    ------
    InputError
        For every fault of the input that a user can mend.

    Examples
    --------
    >>> import scbert
    >>> model = scbert.pretrain("corpus", "pretrained", epochs=5)  # doctest: +SKIP
    >>> model.metrics["masked_accuracy"], model.metrics["baseline_masked_accuracy"]  # doctest: +SKIP
    """
    if not isinstance(corpus, AnnData):
        return _trained(partial(run_pretrain.pretrain, corpus), output, options)
    with tempfile.TemporaryDirectory(prefix="scbert-corpus-") as cells:
        path = Path(cells) / "corpus.h5ad"
        atomic_write_h5ad(corpus, path, compression=None)
        return _trained(partial(run_pretrain.pretrain, path), output, options)


def _trained(job: Callable[..., Any], output: str | Path | None, options: dict[str, Any]) -> CellModel:
    """Run the job for a folder, a temporary one where none is named, and load what it wrote."""
    temporary = tempfile.TemporaryDirectory(prefix="scbert-model-") if output is None else None
    folder = Path(temporary.name) / "model" if temporary else Path(output)
    if isinstance(options.get("base"), CellModel):
        options["base"] = options["base"].folder
    job(folder, **options)
    model = load_model(folder, options.get("device"))
    model.temporary = temporary
    return model
