"""The scBERT family: a pre-LayerNorm encoder over gene tokens, and its heads."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .alignment_scbert import align_memory
from .configuration_scbert import ScBertConfig
from .embeddings_scbert import ScBertEmbeddings
from .favor_scbert import ScBertFavorAttention, draw_projection
from .growth_scbert import GrowthMixin
from .layers_scbert import ATTENTION_CLASSES, ScBertLayer, ScBertReversibleLayer
from .packing_scbert import is_packed, unpacked
from .reversible_scbert import reversible_encode


class ScBertPreTrainedModel(GrowthMixin, PreTrainedModel):
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

    def as_pipeline(self, tokenizer, **options):
        """This model as the pipeline of its task: cell-type annotation with a classifier, embedding without."""
        # imported here for speed; being an import of this file, it makes the pipelines travel with every checkpoint
        from .pipeline_scbert import CellEmbeddingPipeline, CellTypeAnnotationPipeline

        pipeline_class = CellTypeAnnotationPipeline if hasattr(self, "classifier") else CellEmbeddingPipeline
        return pipeline_class(model=self, tokenizer=tokenizer, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if hasattr(module, "start_weights"):
            module.start_weights()


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

    # any head's checkpoint is a checkpoint of the encoder
    _keys_to_ignore_on_load_unexpected = [r"^classifier\.", r"^decoder\.", r"^modality_decoder\."]

    def __init__(self, config: ScBertConfig):
        super().__init__(config)
        self.embeddings = ScBertEmbeddings(config)
        layer_class = ScBertReversibleLayer if config.reversible else ScBertLayer
        self.layers = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        # stands in for the embeddings and the first layers where training keeps what frozen ones put out: a callable
        # (input_ids, attention_mask, gene_ids, modality_ids) -> (hidden states, layers they have passed)
        self.prefix = None
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

    def _encode(self, hidden_states, attention_mask, output_attentions, kwargs, first_layer=0):
        if not self.config.reversible:
            for layer in self.layers[first_layer:]:
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
            ``[batch, length]``, 1 for tokens, 0 for padding; or ``[cells + 1]``, see packing_scbert.py.
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
        records = output_attentions or kwargs.get("output_hidden_states", self.config.output_hidden_states)
        first_layer = 0
        if self.prefix is None or records or input_ids is None:
            hidden_states = self.embeddings(input_ids, gene_ids, modality_ids, inputs_embeds)
        else:
            hidden_states, first_layer = self.prefix(input_ids, attention_mask, gene_ids, modality_ids)
        hidden_states = self._encode(
            hidden_states, attention_mask, bool(output_attentions), kwargs, first_layer
        )
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states))


@dataclass
class ScBertMaskedExpressionOutput(MaskedLMOutput):
    """
    Output of masked expression modelling; with several modalities, also of modality prediction.

    Parameters
    ----------
    masked_expression_loss, modality_loss
        The two parts of ``loss = masked_expression_loss + modality_loss_weight * modality_loss``; scalars.
    modality_logits
        ``[batch, length, num_modalities]``.
    """

    masked_expression_loss: torch.FloatTensor | None = None
    modality_loss: torch.FloatTensor | None = None
    modality_logits: torch.FloatTensor | None = None


class ScBertForMaskedExpression(ScBertPreTrainedModel):
    """
    Masked expression modelling: predict the bins of masked genes and, with several modalities, every token's modality.

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
        if config.num_modalities > 1:
            self.modality_decoder = nn.Linear(config.hidden_size, config.num_modalities)
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
    ) -> ScBertMaskedExpressionOutput:
        """
        Encode and decode; arguments as in `ScBertModel`, and ``labels [batch, length]`` with -100 where no loss is
        taken. The modality of every token, masked or not, is predicted if ``modality_ids`` are given.

        Returns
        -------
        ScBertMaskedExpressionOutput
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
        logits, loss = self._decode_expression(hidden_states, labels, kwargs)
        parts = {}
        if self.config.num_modalities > 1 and modality_ids is not None:
            parts = self._decode_modality(hidden_states, modality_ids, attention_mask, labels, kwargs)
        if loss is not None and parts:
            parts["masked_expression_loss"] = loss
            loss = loss + self.config.modality_loss_weight * parts["modality_loss"]
        return ScBertMaskedExpressionOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **parts,
        )

    def _decode_expression(self, hidden_states, labels, kwargs):
        """Logits, and the loss where there are labels."""
        if labels is None:
            return self.decoder(hidden_states), None
        if self.config.sparse_prediction:
            labelled = labels != -100
            hidden_states, labels = hidden_states[labelled], labels[labelled]
        logits = self.decoder(hidden_states)
        return logits, self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)

    def _decode_modality(self, hidden_states, modality_ids, attention_mask, labels, kwargs):
        """Logits and mean loss over the unpadded tokens."""
        logits = self.modality_decoder(hidden_states)
        targets = modality_ids.expand(hidden_states.shape[:2])
        if attention_mask is not None and not is_packed(attention_mask):
            targets = targets.masked_fill(~attention_mask.bool(), -100)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        if labels is not None and kwargs.get("num_items_in_batch") is not None:
            # the other loss is a share of one mean over all accumulated batches; so must this one be
            loss = loss * (labels != -100).sum() / kwargs["num_items_in_batch"]
        return {"modality_loss": loss, "modality_logits": logits}


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
        pooled = self.pool(*unpacked(hidden_states, attention_mask, gene_ids))
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
