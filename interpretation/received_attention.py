"""Attention each gene receives in the model's own forward pass, in memory linear in the panel."""

from contextlib import ExitStack

import torch

from ..modeling_scbert.favor_scbert import favor_attention_received
from ..tokenization import InputError

# queries whose exact attention is held at a time by the softmax type
QUERIES_AT_ONCE = 512
TOKENS_AT_ONCE = 2**15


def gene_attention(model, input_ids, attention_mask=None, **inputs) -> torch.Tensor:
    """Attention each token receives: the column sums of the attention matrix, averaged over heads and layers.

    What is summed is the attention *used in the forward pass*. The columns of a cell add up to its
    number of (unmasked) tokens, so 1 is the share of a gene that is looked at like any other.

    Parameters
    ----------
    model : ScBertModel or a model with a head
        Of any attention type; for ``"lsh"`` in evaluation mode, whose hash is fixed.
    input_ids : torch.Tensor
        [batch, length] expression bins.
    attention_mask : torch.Tensor, optional
        [batch, length], 1 for tokens and 0 for pads; pads neither give nor receive attention.
    **inputs
        Further inputs of the model such as `gene_ids`.

    Returns
    -------
    torch.Tensor
        [batch, length] float32, zero at pads.

    Raises
    ------
    InputError
        If the model has no layers.

    Source: Yang et al. 2022, "attention per gene"; its published code took the attention of a second
    pass over the already updated residual, which is another quantity.

    Examples
    --------
    >>> from scbert import ScBertConfig, ScBertModel
    >>> config = ScBertConfig(hidden_size=32, num_hidden_layers=1, max_position_embeddings=11)
    >>> gene_attention(ScBertModel(config).eval(), torch.zeros(2, 11, dtype=torch.long)).shape
    torch.Size([2, 11])
    """
    encoder = model.base_model
    kind = encoder.config.attention_type
    if not len(encoder.layers):
        raise InputError("The model has no layers, so there is no attention to report.")
    total = torch.zeros(input_ids.shape, dtype=torch.float32, device=input_ids.device)

    def add(layer, arguments):
        # a reversible layer attends on the second of its two streams
        streams = arguments[3] if len(arguments) > 3 else None
        hidden_states = arguments[0] if streams is None else streams[1].to(arguments[0].dtype)
        states = layer.attention_norm(hidden_states)
        # the features of many long cells at once would not fit
        cells = max(1, TOKENS_AT_ONCE // states.shape[1])
        for start in range(0, len(states), cells):
            some = slice(start, start + cells)
            mask = None if attention_mask is None else attention_mask[some]
            total[some] += RECEIVED[kind](layer.attention, states[some], mask).mean(dim=1)

    with torch.no_grad(), ExitStack() as hooks:
        # on the layers and not on their attention, which fast inference passes by
        for layer in encoder.layers:
            hooks.enter_context(layer.register_forward_pre_hook(add))
        encoder(input_ids, attention_mask=attention_mask, **inputs)
    return total / len(encoder.layers)


def _favor_received(attention, hidden_states, attention_mask):
    query, key, _ = attention.project(hidden_states)
    epsilon = attention.config.kernel_epsilon
    return favor_attention_received(query, key, attention.projection_matrix, attention_mask, epsilon)


def _softmax_received(attention, hidden_states, attention_mask):
    query, key, _ = attention.project(hidden_states)
    if attention_mask is None:
        attention_mask = torch.ones(hidden_states.shape[:2], device=hidden_states.device)
    keep = attention_mask.bool()
    received = 0
    for start in range(0, query.shape[2], QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        scores = (query[:, :, rows] @ key.mT).float() * attention.config.head_dim**-0.5
        weights = scores.masked_fill(~keep[:, None, None, :], torch.finfo(scores.dtype).min).softmax(-1)
        received = received + (weights * keep[:, None, rows, None]).sum(dim=2)
    return received


RECEIVED = {
    "favor": _favor_received,
    "softmax": _softmax_received,
    "lsh": lambda attention, hidden_states, mask: attention.received(hidden_states, mask),
}
