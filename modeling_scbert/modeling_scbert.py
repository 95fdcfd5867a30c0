"""The scBERT family: a pre-LayerNorm encoder over gene tokens, and its heads."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_scbert import ScBertFavorAttention
from .cell_scbert import ScBertCell, ScBertCellDecoder, whole_cell_loss
from .configuration_scbert import ScBertConfig
from .embeddings_scbert import ScBertEmbeddings
from .favor_scbert import draw_projection
from .heads_scbert import ScBertClassificationHead, share_of_batches
from .layers_scbert import ATTENTION_CLASSES, ScBertLayer, ScBertReversibleLayer
from .outputs_scbert import ScBertCellClassificationOutput, ScBertMaskedExpressionOutput
from .packing_scbert import is_packed
from .positions_scbert import labelled_positions, rows_at
from .resize_scbert import ResizeEmbeddingsMixin
from .reversible_scbert import reversible_encode


def align_weights(model: nn.Module):
    """
    Copy CPU weights that start off a cache line, 64 bytes, in place.

    Weights mapped from a safetensors file start wherever its header ends, and there matrix products take another
    path: the logits of a reloaded model differed in the last bit from those of the model that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


class ScBertPreTrainedModel(ResizeEmbeddingsMixin, PreTrainedModel):
    """Weight initialisation and what `from_pretrained` needs to know of every scBERT class."""

    config: ScBertConfig
    base_model_prefix = "scbert"
    supports_gradient_checkpointing = True
    _input_embed_layer = "expression_embeddings"
    _no_split_modules = ["ScBertLayer", "ScBertReversibleLayer"]
    _can_record_outputs = {
        # of the embeddings, not of what the first layer is given: a model may have none
        "hidden_states": [
            OutputRecorder(cls, capture_initial_hidden_state=False) for cls in (ScBertEmbeddings, ScBertLayer)
        ],
        "attentions": [OutputRecorder(cls, index=1) for cls in ATTENTION_CLASSES.values()],
    }

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        # asked of a model and not of its class: attention_type decides
        if self.config.attention_type == "softmax":
            return True
        raise ValueError(
            'attn_implementation="sdpa" is a way to compute exact attention; this model has attention_type='
            f'"{self.config.attention_type}", which does without. Leave attn_implementation out.'
        )

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a checkpoint; see `transformers.PreTrainedModel.from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
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
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)


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
    _keys_to_ignore_on_load_unexpected = [r"^classifier\.", r"^(cell_|modality_)?decoder\."]

    def __init__(self, config: ScBertConfig):
        super().__init__(config)
        self.embeddings = ScBertEmbeddings(config)
        layer_class = ScBertReversibleLayer if config.reversible else ScBertLayer
        self.layers = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cell = ScBertCell(config) if config.pooling == "cell" else None
        self.gradient_checkpointing = False
        # stands in for the embeddings and the first layers where training keeps what frozen ones put out: a callable
        # (input_ids, attention_mask, gene_ids, modality_ids) -> (hidden states, layers they have passed)
        self.prefix = None
        buffers = (name for layer in self.layers for name, _ in layer.attention.named_buffers())
        # random features and the directions of a hash; what is taken off a large sum
        self._keep_in_fp32_modules_strict = {*buffers, *(("cell.offset", "cell.scale") if self.cell else ())}
        self.post_init()

    @torch.no_grad()
    def redraw_features(self, seed: int):
        """
        Draw the random features of every FAVOR+ layer anew.

        The seed decides the draw by itself, so that every rank that passes the same one gets the same features.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        for layer in self.layers:
            if isinstance(layer.attention, ScBertFavorAttention):
                matrix = layer.attention.projection_matrix
                matrix.copy_(draw_projection(*matrix.shape, generator))

    def _encode(
        self, hidden_states, attention_mask, output_attentions, record, first_layer=0, positions=None
    ):
        last_only = not (record or self.config.reversible or first_layer == len(self.layers))
        if positions is not None and not last_only:
            # what is recorded is recorded of every token
            encoded = self._encode(hidden_states, attention_mask, output_attentions, record, first_layer)
            return rows_at(positions, encoded)
        if not self.config.reversible:
            for layer in self.layers[first_layer:]:
                wanted = positions if layer is self.layers[-1] else None
                hidden_states = layer(hidden_states, attention_mask, output_attentions, positions=wanted)
            return hidden_states
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
        positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput | BaseModelOutputWithPooling:
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
        positions
            Tokens ``[batch, n]`` at which alone the last hidden states are wanted; saves most of the last layer.

        Returns
        -------
        BaseModelOutput, or with ``pooling="cell"`` BaseModelOutputWithPooling
            ``last_hidden_state [batch, length or n, hidden]`` after the final norm; on request ``hidden_states`` (one
            more than layers) and ``attentions`` (one ``[batch, heads, length, length]`` a layer). With
            ``pooling="cell"``, ``pooler_output [batch, hidden]``, unless ``positions`` leave tokens out.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        output_attentions = bool(kwargs.get("output_attentions", self.config.output_attentions))
        record = output_attentions or kwargs.get("output_hidden_states", self.config.output_hidden_states)
        first_layer = 0
        if self.prefix is None or record or input_ids is None:
            hidden_states = self.embeddings(input_ids, gene_ids, modality_ids, inputs_embeds)
        else:
            hidden_states, first_layer = self.prefix(input_ids, attention_mask, gene_ids, modality_ids)
        hidden_states = self._encode(
            hidden_states, attention_mask, output_attentions, record, first_layer, positions
        )
        hidden_states = self.final_norm(hidden_states)
        if self.cell is None:
            return BaseModelOutput(last_hidden_state=hidden_states)
        cells = None
        if positions is None:
            genes = self.embeddings.gene_embeddings.weight
            cells = self.cell(hidden_states, genes, input_ids, attention_mask, gene_ids)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=cells)


class ScBertForMaskedExpression(ScBertPreTrainedModel):
    """
    Masked expression modelling: predict the bins of masked genes, and where asked for, modalities and the whole cell.

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
        if config.cell_loss_weight:
            self.cell_decoder = ScBertCellDecoder(config)
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
        cell_targets: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ScBertMaskedExpressionOutput:
        """
        Encode and decode; arguments as in `ScBertModel`, and ``labels [batch, length]`` with -100 where no loss is
        taken. The modality of every token, masked or not, is predicted if ``modality_ids`` are given; the whole cell,
        if there are ``cell_targets [cells, genes]``, as in `whole_cell_loss`, and labels.

        Returns
        -------
        ScBertMaskedExpressionOutput
            ``logits [batch, length, vocab_size]``, or ``[n_labelled, vocab_size]`` with labels and
            ``config.sparse_prediction``.
        """
        whole = cell_targets is not None and labels is not None and self.config.cell_loss_weight > 0
        positions = None if whole else self._loss_positions(labels, modality_ids, kwargs)
        outputs = self.scbert(
            input_ids,
            attention_mask=attention_mask,
            gene_ids=gene_ids,
            modality_ids=modality_ids,
            inputs_embeds=inputs_embeds,
            positions=positions,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if positions is not None:
            labels = rows_at(positions, labels)
        logits, loss = self._decode_expression(hidden_states, labels, kwargs)
        parts = {}
        if self.config.num_modalities > 1 and modality_ids is not None:
            parts = self._decode_modality(hidden_states, modality_ids, attention_mask, labels, kwargs)
        if whole:
            cell_loss = whole_cell_loss(self.cell_decoder(outputs.pooler_output, self.scbert), cell_targets)
            parts["cell_loss"] = share_of_batches(cell_loss, labels, kwargs)
        if loss is not None and parts:
            parts["masked_expression_loss"] = loss
            loss = loss + self.config.modality_loss_weight * parts.get("modality_loss", 0.0)
            loss = loss + self.config.cell_loss_weight * parts.get("cell_loss", 0.0)
        return ScBertMaskedExpressionOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **parts,
        )

    def _loss_positions(self, labels, modality_ids, kwargs):
        """Tokens that hold all labelled ones, if nobody looks at the others; else None."""
        recorded = (
            kwargs.get(x, getattr(self.config, x)) for x in ("output_hidden_states", "output_attentions")
        )
        all_needed = any(recorded) or (self.config.num_modalities > 1 and modality_ids is not None)
        if labels is None or not self.config.sparse_prediction or all_needed:
            return None
        return labelled_positions(labels)

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
        return {"modality_loss": share_of_batches(loss, labels, kwargs), "modality_logits": logits}


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
    ) -> ScBertCellClassificationOutput:
        """
        Encode and classify; arguments as in `ScBertModel`, and ``labels [batch]``.

        Returns
        -------
        ScBertCellClassificationOutput
            ``logits [batch, num_labels]``, and in evaluation mode ``probabilities``.
        """
        outputs = self.scbert(
            input_ids,
            attention_mask=attention_mask,
            gene_ids=gene_ids,
            modality_ids=modality_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        cells = outputs.get("pooler_output")
        found = self.classifier(outputs.last_hidden_state, attention_mask, gene_ids, cells)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=found["logits"], config=self.config, **kwargs
            )
        return ScBertCellClassificationOutput(
            loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions, **found
        )
