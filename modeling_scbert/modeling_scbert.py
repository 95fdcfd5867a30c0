"""The scBERT family: a pre-LayerNorm encoder over gene tokens, and its heads."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.pytorch_utils import apply_chunking_to_forward
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_scbert import ScBertConfig
from .embeddings_scbert import ScBertEmbeddings, ScBertGeneEmbeddings
from .favor_scbert import ScBertFavorAttention, draw_projection
from .lsh_scbert import ScBertLshAttention
from .reversible_scbert import reversible_encode


class ScBertSoftmaxAttention(nn.Module):
    """Exact multi-head attention, for short sequences and as the yardstick of the approximate ones."""

    def __init__(self, config: ScBertConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        inner_size = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.config.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (proj(hidden_states).view(shape).transpose(1, 2) for proj in projections)
        keep = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        if output_attentions:
            scores = query @ key.mT * self.config.head_dim**-0.5
            if keep is not None:
                scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
            context = nn.functional.dropout(weights, dropout) @ value
        else:
            weights = None
            context = nn.functional.scaled_dot_product_attention(query, key, value, keep, dropout)
        return self.o_proj(context.transpose(1, 2).flatten(-2)), weights


ATTENTION_CLASSES = {
    "favor": ScBertFavorAttention,
    "softmax": ScBertSoftmaxAttention,
    "lsh": ScBertLshAttention,
}


class ScBertLayer(GradientCheckpointingLayer):
    """Pre-LayerNorm block: x += attention(norm(x)); x += feed-forward(norm(x))."""

    def __init__(self, config: ScBertConfig, layer_idx: int):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ATTENTION_CLASSES[config.attention_type](config, layer_idx)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def attend(self, hidden_states, attention_mask=None, output_attentions=False) -> torch.Tensor:
        """First residual branch, norm and attention: ``[batch, length, hidden]`` to the same shape."""
        return self.attention(self.attention_norm(hidden_states), attention_mask, output_attentions)[0]

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Second residual branch, norm and position-wise network; same shapes."""
        return apply_chunking_to_forward(self._feed_forward, self.chunk_size_feed_forward, 1, hidden_states)

    def _feed_forward(self, hidden_states):
        hidden_states = self.activation(self.intermediate(self.ffn_norm(hidden_states)))
        return self.dropout(self.output(hidden_states))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attend(hidden_states, attention_mask, output_attentions)
        return hidden_states + self.feed_forward(hidden_states)


class ScBertReversibleLayer(ScBertLayer):
    """The same branches on two residual streams: y1 = x1 + attention(x2); y2 = x2 + feed-forward(y1)."""

    def forward(self, hidden_states, attention_mask=None, output_attentions=False, streams=None):
        """Mean of both streams, and the streams; they start as ``hidden_states``."""
        first, second = (hidden_states.float(),) * 2 if streams is None else streams
        dtype = hidden_states.dtype
        first = first + self.attend(second.to(dtype), attention_mask, output_attentions).float()
        second = second + self.feed_forward(first.to(dtype)).float()
        return ((first + second) / 2).to(dtype), (first, second)


def align_memory(model: nn.Module, boundary: int = 64):
    """
    Copy CPU weights that start off a cache line, in place.

    Weights mapped from a safetensors file start wherever its header ends, and there matrix products take another
    path: the logits of a reloaded model differed in the last bit from those of the model that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % boundary:
            tensor.data = tensor.data.clone()


class ScBertPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what `from_pretrained` needs to know of every scBERT class."""

    config: ScBertConfig
    base_model_prefix = "scbert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScBertLayer", "ScBertReversibleLayer"]
    _keep_in_fp32_modules_strict = ["projection_matrix", "hash_rotations"]
    _can_record_outputs = {
        "hidden_states": ScBertLayer,
        "attentions": [OutputRecorder(cls, index=1) for cls in ATTENTION_CLASSES.values()],
    }

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a checkpoint; see `transformers.PreTrainedModel.from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        align_memory(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ScBertGeneEmbeddings):
            init.normal_(module.weight, std=self.config.initializer_range)
            # a slice of the table loses its "already loaded" mark, so ask the table
            if not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[-1])
        elif isinstance(module, ScBertFavorAttention):
            init.copy_(module.projection_matrix, module.initial_projection())
        elif isinstance(module, ScBertLshAttention):
            init.copy_(module.hash_rotations, module.initial_rotations())


class ScBertModel(ScBertPreTrainedModel):
    """
    The bare encoder: expression bins in, one vector per gene out.

    Parameters
    ----------
    config : ScBertConfig

    Examples
    --------
    >>> import torch
    >>> from scbert import ScBertConfig, ScBertModel
    >>> config = ScBertConfig(hidden_size=32, num_hidden_layers=2, max_position_embeddings=101)
    >>> model = ScBertModel(config).eval()
    >>> model(torch.randint(0, 6, (2, 101))).last_hidden_state.shape
    torch.Size([2, 101, 32])
    """

    def __init__(self, config: ScBertConfig):
        super().__init__(config)
        self.embeddings = ScBertEmbeddings(config)
        layer_class = ScBertReversibleLayer if config.reversible else ScBertLayer
        self.layers = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.expression_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.expression_embeddings = value

    @torch.no_grad()
    def redraw_features(self, seed: int):
        """
        Draw the random features of every FAVOR+ layer anew.

        Parameters
        ----------
        seed
            Decides the draw by itself, so that every rank that passes the same seed gets the same features.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        for layer in self.layers:
            if isinstance(layer.attention, ScBertFavorAttention):
                matrix = layer.attention.projection_matrix
                matrix.copy_(draw_projection(*matrix.shape, generator))

    def _encode(self, hidden_states, attention_mask, output_attentions, kwargs):
        if not self.config.reversible:
            for layer in self.layers:
                hidden_states = layer(hidden_states, attention_mask, output_attentions)
            return hidden_states
        record = output_attentions or kwargs.get("output_hidden_states", self.config.output_hidden_states)
        # a compiled graph cannot hold the recomputing function, and gets the plain form: equal, but memory as usual
        if torch.is_grad_enabled() and not record and not torch.compiler.is_compiling():
            return reversible_encode(self.layers, hidden_states, attention_mask)
        streams = None
        for layer in self.layers:
            hidden_states, streams = layer(hidden_states, attention_mask, output_attentions, streams)
        return hidden_states

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        gene_ids: torch.LongTensor | None = None,
        modality_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Encode a batch of cells.

        Parameters
        ----------
        input_ids
            Expression bins ``[batch, length]``.
        attention_mask
            ``[batch, length]``, 1 for tokens, 0 for padding; all ones by default.
        gene_ids
            Rows of the gene table ``[batch, length]``; the panel's order by default.
        modality_ids
            Modality of every token ``[batch, length]``; zero by default.
        inputs_embeds
            Expression embeddings ``[batch, length, hidden]`` in place of ``input_ids``.

        Returns
        -------
        BaseModelOutput
            ``last_hidden_state [batch, length, hidden]`` after the final norm; on request ``hidden_states`` (one
            more than layers) and ``attentions`` (one ``[batch, heads, length, length]`` a layer).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        hidden_states = self.embeddings(input_ids, gene_ids, modality_ids, inputs_embeds)
        hidden_states = self._encode(hidden_states, attention_mask, bool(output_attentions), kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states))


class ScBertForMaskedExpression(ScBertPreTrainedModel):
    """
    Masked expression modelling: predict the bins of masked genes.

    Examples
    --------
    >>> import torch
    >>> from scbert import ScBertConfig, ScBertForMaskedExpression
    >>> config = ScBertConfig(hidden_size=32, num_hidden_layers=1, max_position_embeddings=101)
    >>> model = ScBertForMaskedExpression(config)
    >>> bins = torch.randint(0, 6, (2, 101))
    >>> model(bins, labels=bins).loss.shape
    torch.Size([])
    """

    def __init__(self, config: ScBertConfig):
        super().__init__(config)
        # our class names match nothing in transformers' table of losses: unset, the causal loss would be used
        self.loss_type = "ForMaskedLM"
        self.scbert = ScBertModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        gene_ids: torch.LongTensor | None = None,
        modality_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Encode and decode; arguments as in `ScBertModel`, and ``labels [batch, length]`` with -100 where no loss is
        taken.

        Returns
        -------
        MaskedLMOutput
            ``logits [batch, length, vocab_size]``, or ``[n_labelled, vocab_size]`` with labels and
            ``config.sparse_prediction``.
        """
        outputs = self.scbert(
            input_ids,
            attention_mask=attention_mask,
            gene_ids=gene_ids,
            modality_ids=modality_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if labels is not None and self.config.sparse_prediction:
            labelled = labels != -100
            hidden_states, labels = hidden_states[labelled], labels[labelled]
        logits = self.decoder(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ScBertClassificationHead(nn.Module):
    """Tokens to class logits: pool to one vector per cell, then a small perceptron."""

    def __init__(self, config: ScBertConfig):
        super().__init__()
        self.config = config
        if config.pooling == "conv":
            # a convolution with one output channel over the feature axis is a linear map of each token to a number
            self.conv = nn.Linear(config.hidden_size, 1)
        pooled_size = config.max_position_embeddings if config.pooling == "conv" else config.hidden_size
        sizes = [pooled_size, *config.classifier_hidden_sizes]
        self.dense = nn.ModuleList([nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False)])
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(sizes[-1], config.num_labels)

    def pool(self, hidden_states, attention_mask=None, gene_ids=None) -> torch.Tensor:
        """``[batch, length, hidden]`` to ``[batch, max_position_embeddings]`` (conv) or ``[batch, hidden]`` (mean)."""
        if self.config.pooling == "mean":
            if attention_mask is None:
                return hidden_states.mean(dim=1)
            weights = attention_mask.to(hidden_states.dtype).unsqueeze(-1)
            return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1)
        values = nn.functional.relu(self.conv(hidden_states).squeeze(-1))
        if attention_mask is not None:
            values = values * attention_mask.to(values.dtype)
        panel_size = self.config.max_position_embeddings
        if gene_ids is not None:
            # each gene has its own input of the perceptron, wherever it stands in the sequence
            gene_ids = gene_ids.expand(values.shape)
            return values.new_zeros(values.shape[0], panel_size).scatter_add(1, gene_ids, values)
        if values.shape[1] != panel_size:
            raise ValueError(
                f'The head with pooling="conv" was built for {panel_size} tokens and got {values.shape[1]}. '
                "Align cells to the model's own panel (its tokenizer does), or pass gene_ids."
            )
        return values

    def forward(self, hidden_states, attention_mask=None, gene_ids=None) -> torch.Tensor:
        pooled = self.pool(hidden_states, attention_mask, gene_ids)
        for dense in self.dense:
            pooled = self.dropout(nn.functional.relu(dense(pooled)))
        return self.out_proj(pooled)


class ScBertForCellClassification(ScBertPreTrainedModel):
    """
    Cell-type annotation: one label per cell.

    Examples
    --------
    >>> import torch
    >>> from scbert import ScBertConfig, ScBertForCellClassification
    >>> config = ScBertConfig(hidden_size=32, num_hidden_layers=1, max_position_embeddings=101, num_labels=4)
    >>> ScBertForCellClassification(config)(torch.randint(0, 6, (2, 101))).logits.shape
    torch.Size([2, 4])
    """

    def __init__(self, config: ScBertConfig):
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"
        self.num_labels = config.num_labels
        self.scbert = ScBertModel(config)
        self.classifier = ScBertClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        gene_ids: torch.LongTensor | None = None,
        modality_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """
        Encode and classify; arguments as in `ScBertModel`, and ``labels [batch]``.

        Returns
        -------
        SequenceClassifierOutput
            ``logits [batch, num_labels]``.
        """
        outputs = self.scbert(
            input_ids,
            attention_mask=attention_mask,
            gene_ids=gene_ids,
            modality_ids=modality_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state, attention_mask, gene_ids)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
