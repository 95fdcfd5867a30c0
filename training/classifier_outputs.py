"""What a classifier makes of binned cells: logits and embeddings, without a Trainer."""

import numpy as np
import scipy.sparse as sp
import torch

from ..modeling_scbert.pipeline_scbert import mean_of_expressed
from ..tokenization import ScBertTokenizer

# tokens of a batch: enough to keep two cores busy, few enough for a laptop
TOKENS_AT_ONCE = 2**16


@torch.inference_mode()
def classifier_outputs(
    model: torch.nn.Module, tokenizer: ScBertTokenizer, bins: sp.csr_matrix
) -> tuple[np.ndarray | None, np.ndarray]:
    """
    Logits and mean embeddings of binned cells, in their order.

    Parameters
    ----------
    model
        Any scBERT model; one without a classifier has no logits.
    tokenizer
        Its tokenizer.
    bins
        Of ``tokenizer.bin_cells``, [cells, panel].

    Returns
    -------
    tuple
        float32 [cells, classes] (None without a classifier) and float32 [cells, hidden], the mean of the last
        hidden states over expressed genes and the trailing token.

    Examples
    --------
    >>> from scbert import ScBertConfig, ScBertForCellClassification
    >>> tokenizer = ScBertTokenizer(gene_panel=["CD3E", "MS4A1"])
    >>> config = ScBertConfig(hidden_size=8, num_hidden_layers=1, max_position_embeddings=3, num_labels=4)
    >>> bins = sp.csr_matrix(np.array([[0, 2], [3, 1]], dtype=np.int8))
    >>> logits, embeddings = classifier_outputs(ScBertForCellClassification(config), tokenizer, bins)
    >>> logits.shape, embeddings.shape
    ((2, 4), (2, 8))
    """
    model.eval()
    device = next(model.parameters()).device
    head = getattr(model, "classifier", None)
    # by length: batches of cells that need little padding
    lengths = np.diff(bins.indptr) if not tokenizer.keep_zeros else np.full(bins.shape[0], bins.shape[1])
    order = np.argsort(lengths, kind="stable")
    logits, embeddings, start = [], [], 0
    while start < len(order):
        size = max(1, TOKENS_AT_ONCE // (int(lengths[order[min(start + 63, len(order) - 1)]]) + 1))
        rows = order[start : start + min(size, 64)]
        encoded = tokenizer.encode_bins(bins[rows])
        inputs = {name: torch.from_numpy(array).to(device) for name, array in encoded.items()}
        hidden = model.base_model(**inputs).last_hidden_state
        embeddings.append(mean_of_expressed(hidden, **inputs).cpu().numpy())
        if head is not None:
            logits.append(head(hidden, inputs.get("attention_mask"), inputs.get("gene_ids")).cpu().numpy())
        start += len(rows)
    back = np.argsort(order)
    return (np.concatenate(logits)[back] if logits else None), np.concatenate(embeddings)[back]
