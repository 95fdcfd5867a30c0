"""Which genes decide on a type: by attention, integrated gradients or GradientSHAP, of the cells of each type."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from ..data.read import read_cells
from ..inference.query import BinnedQuery
from ..inference.shipped import model_or_shipped
from ..modeling_scbert import ScBertForCellClassification
from ..tokenization import InputError, ScBertTokenizer
from ..trained_model.model_folder import load_model
from ..trained_model.prediction import LoadedModel, predict_cells
from .attribution import encoded_cells, gradient_shap, integrated_gradients
from .markers import top_genes_table
from .received_attention import RECEIVED, gene_attention

logger = logging.getLogger(__name__)

ATTENTION, GRADIENTS, SHAP = "attention", "integrated_gradients", "gradient_shap"


def explain(
    cells: AnnData | str | Path,
    model: str | Path | LoadedModel | None = None,
    *,
    cells_per_type: int = 20,
    n_top: int = 20,
    n_steps: int = 32,
    cell_types: str | Sequence[str] | None = None,
    layer: str | None = None,
    input: str = "auto",
    force: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """
    The genes that decide on every cell type that a model predicts, by integrated gradients.

    The command `scbert explain` does more: it compares three explanations, and tests which of them to trust.

    Parameters
    ----------
    cells
        An AnnData with gene symbols in `var_names`, which is left as it is, or a file.
    model
        Fine-tuned model: a folder, a name on the Hub, or a loaded one; the annotator that ships with the package if
        left out.
    cells_per_type
        Cells explained of each predicted type.
    n_top
        Genes of a type.
    n_steps
        Points on the path of integrated gradients.
    cell_types
        Types to explain; all that are predicted if left out.
    layer, input, force
        As in `scbert.annotate`.
    seed
        Of the choice of cells.

    Returns
    -------
    pandas.DataFrame
        ``cell_type, rank`` (from 1), ``gene, score`` (mean contribution to the type's logit), ``z_score`` (against all
        genes of that type) and ``specificity`` (against the same gene in all types).

    Raises
    ------
    InputError
        When model, genes or values do not fit; the message says how to mend it.

    Examples
    --------
    >>> import scanpy, scbert
    >>> adata = scanpy.datasets.pbmc68k_reduced().raw.to_adata()  # 765 genes: few for the annotator that ships
    >>> genes = scbert.explain(adata, input="log1p", force=True, cells_per_type=2, n_steps=4)
    >>> "CD79A" in set(genes[genes["cell_type"] == "B cell"]["gene"])
    True
    """
    check_sizes(cells_per_type, n_top, n_steps)
    loaded = load_model(model_or_shipped(model), "annotation")
    adata = read_cells(cells, layer=layer)
    bins = BinnedQuery(adata, loaded.tokenizer, layer, input, force, progress=False).all_bins()
    predicted = predict_cells(loaded, bins)["logits"].argmax(axis=1)
    usable = np.diff(bins.indptr) > 0
    if cell_types is not None:
        wanted = [cell_types] if isinstance(cell_types, str) else list(cell_types)
        if unknown := sorted(set(wanted) - set(loaded.labels)):
            raise InputError(
                f"The model has no cell type {', '.join(unknown)}; its types are: {', '.join(loaded.labels)}."
            )
        usable &= np.isin(np.array(loaded.labels)[predicted], wanted)
    rows = choose_cells(predicted, usable, cells_per_type, seed)
    found = integrated_gradients(loaded.model, loaded.tokenizer, bins[rows], predicted[rows], n_steps)
    return top_genes_table(mean_by_type(found.values, predicted[rows], loaded), n_top)


def check_sizes(cells_per_type: int, n_top: int, n_steps: int) -> None:
    """An `InputError` for numbers of cells, genes and steps that explain nothing."""
    for value, least, name in (
        (cells_per_type, 1, "cells_per_type (--cells-per-type)"),
        (n_top, 1, "n_top (--top)"),
        (n_steps, 2, "n_steps (--steps)"),
    ):
        if value < least:
            raise InputError(f"{name} must be {least} or more; found {value}.")


def choose_cells(predicted: np.ndarray, usable: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Sorted rows of up to n usable cells of every predicted type."""
    rng, chosen = np.random.default_rng(seed), []
    for target in np.unique(predicted[usable]):
        rows = np.flatnonzero((predicted == target) & usable)
        chosen.append(rng.permutation(rows)[:n])
    if not chosen:
        raise InputError("No cell of these types expresses a gene of the panel: there is nothing to explain.")
    return np.sort(np.concatenate(chosen))


def explanations(
    loaded: LoadedModel, bins: sp.csr_matrix, targets: np.ndarray, n_steps: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Explanation -> scores [cells, genes] (attention first, where the model has any), and completeness errors."""
    model, tokenizer, found = loaded.model, loaded.tokenizer, {}
    if model.config.attention_type in RECEIVED and len(model.scbert.layers):
        found[ATTENTION] = attention_by_gene(model, tokenizer, bins)
    else:
        logger.warning("The model has no attention matrix over genes: attention is left out.")
    gradients = integrated_gradients(model, tokenizer, bins, targets, n_steps)
    shap = gradient_shap(model, tokenizer, bins, targets, seed=seed)
    found |= {GRADIENTS: gradients.values, SHAP: shap.values}
    completeness = {GRADIENTS: gradients.relative_error, SHAP: shap.relative_error}
    if gradients.relative_error > 0.05:
        # the logit jumps where a token changes its bucket, and between two jumps no gradient sees it
        of_lsh = model.config.attention_type == "lsh"
        jumps = ", but with LSH attention only a part of it goes away" if of_lsh else ""
        missed = f"{gradients.relative_error:.1%}"
        logger.warning("Integrated gradients miss %s of what they explain; raise --steps%s.", missed, jumps)
    return found, completeness


def attention_by_gene(
    model: ScBertForCellClassification, tokenizer: ScBertTokenizer, bins: sp.csr_matrix, batch: int = 16
) -> np.ndarray:
    """`gene_attention` with every token at its gene's place, [cells, genes]; 0 where a cell lacks the gene."""
    n_genes = len(tokenizer.gene_panel)
    weights = np.zeros((bins.shape[0], n_genes), dtype=np.float32)
    for start in range(0, bins.shape[0], batch):
        ids, mask, genes, modalities = encoded_cells(model, tokenizer, bins[start : start + batch])
        received = gene_attention(model, ids, mask, gene_ids=genes, modality_ids=modalities).cpu().numpy()
        # without the trailing token, and the pads, which share a gene id with a real token
        kept = ((mask > 0) & (genes < n_genes)).cpu().numpy()
        for row, tokens, places, keep in zip(weights[start:], received, genes.cpu().numpy(), kept):
            row[places[keep]] = tokens[keep]
    return weights


def mean_by_type(values: np.ndarray, targets: np.ndarray, loaded: LoadedModel) -> pd.DataFrame:
    """Mean scores [genes, types predicted], named on both axes."""
    present = np.unique(targets)
    means = np.stack([values[targets == target].mean(axis=0) for target in present], axis=1)
    types = [loaded.labels[target] for target in present]
    return pd.DataFrame(means, index=loaded.tokenizer.gene_panel, columns=types)
