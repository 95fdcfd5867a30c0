"""What each gene contributes to a cell's type: layer integrated gradients and GradientSHAP, by captum."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from transformers import PreTrainedModel

from ..extras import require
from ..tokenization import ScBertTokenizer

# cells whose path of steps is computed at a time
CELLS_AT_ONCE = 2
# of GradientSHAP: random points per cell, and the noise as a share of the standard deviation of the embeddings' weights
N_SAMPLES, SPREAD = 16, 0.1


@dataclass
class Attribution:
    """Contributions of genes, and how far their sum is from what they should explain."""

    # float32 [cells, genes]: summed over the embedding's dimensions; 0 for genes outside a cell's sequence
    values: np.ndarray
    # [cells]: |sum of the contributions - (logit of the cell - logit of the baseline)|; integrated gradients promise 0,
    # GradientSHAP only on average
    completeness_error: np.ndarray
    # [cells]: that difference of logits
    explained: np.ndarray

    @property
    def relative_error(self) -> float:
        """Sum of the errors over the sum of the absolute differences explained."""
        return float(self.completeness_error.sum() / max(np.abs(self.explained).sum(), 1e-12))


def integrated_gradients(
    model: PreTrainedModel,
    tokenizer: ScBertTokenizer,
    bins: sp.csr_matrix,
    targets: np.ndarray,
    n_steps: int = 32,
) -> Attribution:
    """
    Layer integrated gradients of the target's logit over the expression embeddings.

    The baseline is the same cell with every gene at bin 0 (the same tokens in the sequence): what is explained is
    that a gene is expressed as it is, not that it is there.

    The model is a `ScBertForCellClassification` in evaluation mode, `bins` [cells, panel] are of
    ``tokenizer.bin_cells``, and `targets` [cells] the classes explained. More `n_steps`, the points of the path
    (Gauss-Legendre), make a smaller completeness error.

    Source: Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017.
    """
    captum = require("captum.attr")

    def attribute(forward, inputs, baselines, target, others):
        method = captum.LayerIntegratedGradients(forward, model.base_model.embeddings.expression_embeddings)
        return method.attribute(
            inputs,
            baselines,
            target=target,
            additional_forward_args=others,
            n_steps=n_steps,
            internal_batch_size=CELLS_AT_ONCE * n_steps,
            return_convergence_delta=True,
        )

    return _attributions(model, tokenizer, bins, targets, attribute)


def gradient_shap(
    model: PreTrainedModel,
    tokenizer: ScBertTokenizer,
    bins: sp.csr_matrix,
    targets: np.ndarray,
    seed: int = 0,
) -> Attribution:
    """
    GradientSHAP of the target's logit over the expression embeddings: expected gradients between a cell and the
    same cell with every gene at bin 0, with noise; the `seed` is of the points and the noise.

    The background is the empty cell and not other cells, whose genes would stand at other places of the sequence where
    zeros are left out.

    Source: Lundberg & Lee, NeurIPS 2017; Erion et al. 2021.
    """
    captum = require("captum.attr")
    layer = model.base_model.embeddings.expression_embeddings
    noise = SPREAD * float(layer.weight.detach().std())

    def attribute(forward, inputs, baselines, target, others):
        # on the embeddings themselves: captum's layer variant cannot keep several inputs of a batch together
        def of_embeddings(embedded, mask, genes, modalities):
            return model(None, mask, genes, modalities, inputs_embeds=embedded).logits

        method = captum.GradientShap(of_embeddings)
        values, delta = method.attribute(
            layer(inputs).detach(),
            layer(baselines[:1]).detach(),
            target=target,
            additional_forward_args=others,
            n_samples=N_SAMPLES,
            stdevs=noise,
            return_convergence_delta=True,
        )
        return values, delta.view(len(inputs), N_SAMPLES).mean(dim=1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # captum draws the points of the path by numpy
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            return _attributions(model, tokenizer, bins, targets, attribute)
        finally:
            np.random.set_state(state)


def _attributions(model, tokenizer, bins, targets, attribute) -> Attribution:
    """Cells in small batches of like length, in and out of captum."""
    n_genes = len(tokenizer.gene_panel)
    values = np.zeros((bins.shape[0], n_genes), dtype=np.float32)
    errors, explained = np.zeros(bins.shape[0]), np.zeros(bins.shape[0])

    def forward(ids, mask, genes, modalities):
        return model(ids, attention_mask=mask, gene_ids=genes, modality_ids=modalities).logits

    order = np.argsort(np.diff(bins.indptr), kind="stable")
    for start in range(0, len(order), CELLS_AT_ONCE):
        rows = order[start : start + CELLS_AT_ONCE]
        inputs, *others = encoded_cells(model, tokenizer, bins[rows])
        mask, genes, _ = others
        target = torch.as_tensor(np.asarray(targets)[rows], device=model.device)
        empty = torch.zeros_like(inputs)
        per_token, delta = attribute(forward, inputs, empty, target, tuple(others))
        per_token = (per_token.sum(dim=-1) * mask).detach().cpu().numpy()
        for row, tokens, ids in zip(rows, per_token, genes.cpu().numpy()):
            # the trailing token is no gene
            np.add.at(values[row], ids[ids < n_genes], tokens[ids < n_genes])
        with torch.no_grad():
            pick = target[:, None]
            change = forward(inputs, *others).gather(1, pick) - forward(empty, *others).gather(1, pick)
        explained[rows] = change[:, 0].cpu().numpy()
        errors[rows] = delta.detach().abs().cpu().numpy()
    return Attribution(values, errors, explained)


def encoded_cells(model: PreTrainedModel, tokenizer: ScBertTokenizer, bins: sp.csr_matrix):
    """Input ids, attention mask, gene ids and modality ids of cells, [cells, length] each."""
    arrays = tokenizer.encode_bins(bins).items()
    encoded = {name: torch.from_numpy(array).to(model.device) for name, array in arrays}
    ids = encoded["input_ids"]
    mask = encoded.get("attention_mask", torch.ones_like(ids))
    genes = encoded.get("gene_ids", torch.arange(ids.shape[1], device=ids.device).expand(ids.shape))
    modalities = encoded.get("modality_ids", torch.zeros_like(ids))
    return ids, mask, genes.contiguous(), modalities.expand(ids.shape).contiguous()
