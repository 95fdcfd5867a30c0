"""Configuration of the scBERT family: one model, whose settings are scBERT, scMBERT and scReformer-BERT."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class ScBertConfig(PreTrainedConfig):
    r"""
    Configuration of every scBERT model. The defaults are the published scBERT (Yang et al. 2022).

    Only what differs from a standard encoder is documented here.

    Parameters
    ----------
    vocab_size
        Expression bins and the mask: ids ``0..vocab_size-2`` are bins, the last one is the mask token.
    head_dim
        Width of one attention head; ``num_attention_heads * head_dim`` need not equal ``hidden_size``.
    max_position_embeddings
        Genes of the panel plus the trailing token.
    attention_type
        ``"favor"`` (linear FAVOR+ attention, scBERT), ``"softmax"`` (exact) or ``"lsh"`` (Reformer). Part of the
        function the weights were trained for, hence a field here and not an attention implementation.
    num_random_features, feature_redraw_interval, kernel_epsilon
        FAVOR+: random features per layer, training batches between redraws (0: never), and the constant added to
        every feature. At random initialisation the last is not negligible, so it is a setting.
    lsh_num_hashes, lsh_num_buckets, lsh_chunk_length
        LSH attention: rounds of hashing (more: closer to exact, slower), buckets per round (even), and the chunk of
        sorted positions that attends to itself and its two neighbours, within the bucket. In training the hash is
        drawn anew at every pass, in evaluation it is fixed by ``seed``.
    reversible
        Two residual streams whose activations the backward pass recomputes, so that training memory does not grow
        with depth. A different function of the same weights; by default on with ``"lsh"`` only, as in Reformer.
    ordinal_expression
        New expression embeddings start in the order of the bins, on an arc, instead of anywhere: what the final norm
        leaves of a token along the arc's chord is then proportional to its bin, and a gene-resolved linear head is a
        regression on expression. Of no effect on weights that are loaded.
    freeze_gene_embeddings
        Keep the gene table (gene2vec) out of training: it is then a buffer, not a parameter.
    position_embedding_type
        ``"sinusoidal"`` adds fixed positions to the gene identities (scReformer-BERT).
    num_modalities, modality_loss_weight
        Above one modality, a modality embedding is added and pretraining also predicts the modality of every
        token, weighted by ``modality_loss_weight`` (scMBERT's lambda).
    classifier_hidden_sizes
        Widths of the hidden layers of the classification head; empty for a gene-resolved linear head.
    cell_vector_size
        Above 0, the classification head also makes a vector of this size of every cell, whose distance to the known
        types tells how likely the cell is of none of them; see `ScBertNovelty`.
    unassigned_threshold
        Confidence below which annotation calls a cell "unassigned" unless told otherwise; chosen on held-out
        cells. None: 0.5, scBERT's rule.
    label_ontology_ids
        Terms of the Cell Ontology by label, and by the names of the types above the labels.
    label_parents
        A tree of types above the labels, child -> parent, in which annotation backs off.
    conformal_quantiles
        By coverage, the largest score (one less the probability) of each label within a prediction set.
    pooling
        ``"conv"`` reduces each token to one number and keeps genes apart (scBERT); ``"mean"`` averages tokens;
        ``"cell"`` sums the genes' vectors by their expression, starts as linear axes of expression, and is also the
        encoder's ``pooler_output`` and its embedding of a cell; see `ScBertCell`. Needs ``ordinal_expression``; the
        residual branches of the layers then start at zero.
    cell_loss_weight
        Above 0, pretraining also predicts the expression of the whole cell from its vector, weighted by this. Needs
        ``pooling="cell"``; see `whole_cell_loss`.
    sparse_prediction
        With labels, decode the labelled positions only: logits are ``[n_labelled, vocab_size]``.
    seed
        Seeds the random features (and, with ``"lsh"``, the hash rotations) of every layer.

    Examples
    --------
    >>> from scbert import ScBertConfig
    >>> ScBertConfig(num_hidden_layers=2, max_position_embeddings=766).attention_type
    'favor'
    """

    model_type = "scbert"
    # what an evaluation loop should not gather over the whole set; a list, because the Trainer adds one to it
    keys_to_ignore_at_inference = [
        "hidden_states",
        "attentions",
        "probabilities",
        "cell_vectors",
        "masked_expression_loss",
        "cell_loss",
        "modality_loss",
        "modality_logits",
    ]

    vocab_size: int = 7
    hidden_size: int = 200
    num_hidden_layers: int = 6
    num_attention_heads: int = 10
    head_dim: int = 64
    intermediate_size: int = 800
    max_position_embeddings: int = 16907
    attention_type: Literal["favor", "lsh", "softmax"] = "favor"
    num_random_features: int = 266
    feature_redraw_interval: int = 1000
    kernel_epsilon: float | int = 1e-4
    lsh_num_hashes: int = 2
    lsh_num_buckets: int = 64
    lsh_chunk_length: int = 64
    reversible: bool | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    qkv_bias: bool = False
    ordinal_expression: bool = False
    freeze_gene_embeddings: bool = True
    position_embedding_type: Literal["none", "sinusoidal"] = "none"
    num_modalities: int = 1
    modality_loss_weight: float | int = 1.0
    classifier_hidden_sizes: list[int] | tuple[int, ...] = (512, 128)
    classifier_dropout: float | int = 0.0
    cell_vector_size: int = 0
    unassigned_threshold: float | int | None = None
    label_ontology_ids: dict | None = None
    label_parents: dict | None = None
    conformal_quantiles: dict | None = None
    pooling: Literal["conv", "mean", "cell"] = "conv"
    cell_loss_weight: float | int = 0.0
    sparse_prediction: bool = False
    pad_token_id: int | None = 0
    mask_token_id: int | None = 6
    seed: int = 0

    def __post_init__(self, **kwargs):
        self.classifier_hidden_sizes = list(self.classifier_hidden_sizes)
        if self.reversible is None:
            self.reversible = self.attention_type == "lsh"
        # every class of the family is listed, so that whichever is saved, the others load from the same folder
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_scbert.ScBertConfig",
                "AutoModel": "modeling_scbert.ScBertModel",
                "AutoModelForMaskedLM": "modeling_scbert.ScBertForMaskedExpression",
                "AutoModelForSequenceClassification": "modeling_scbert.ScBertForCellClassification",
            },
        )
        if not type(self).__module__.startswith("transformers_modules"):
            # where the package registers the pipelines, transformers would still ask for trust_remote_code
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    def __setattr__(self, name, value):
        before = getattr(self, "id2label", None)
        if name == "id2label" and before and value and len(value) != len(before):
            # what was chosen for other types, or on cells of theirs
            names = "unassigned_threshold label_ontology_ids label_parents conformal_quantiles"
            for chosen in names.split():
                super().__setattr__(chosen, None)
        super().__setattr__(name, value)

    def to_dict(self):
        """All fields, and the model's pipeline, whose code travels with a checkpoint."""
        # one task only, or transformers could not tell which is meant by pipeline(model=FOLDER)
        if "ScBertForCellClassification" in (self.architectures or []):
            task, impl = "cell-type-annotation", "CellTypeAnnotationPipeline"
            auto = "AutoModelForSequenceClassification"
        else:
            task, impl, auto = "cell-embedding", "CellEmbeddingPipeline", "AutoModel"
        pipelines = {task: {"impl": f"pipeline_scbert.{impl}", "pt": [auto]}}
        return super().to_dict() | {"custom_pipelines": pipelines}

    def validate_sizes(self):
        """Refuse sizes no model can be built from; run by ``@strict`` after initialisation."""
        positive = (
            "vocab_size hidden_size num_attention_heads head_dim intermediate_size max_position_embeddings "
            "num_random_features num_modalities lsh_num_hashes lsh_num_buckets lsh_chunk_length"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        not_negative = (
            "num_hidden_layers feature_redraw_interval kernel_epsilon cell_vector_size cell_loss_weight"
        )
        for name in not_negative.split():
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative.")
        if self.cell_loss_weight and self.pooling != "cell":
            raise ValueError('cell_loss_weight needs pooling="cell": the cell is predicted from that vector.')
        if self.pooling == "cell" and not self.ordinal_expression:
            raise ValueError('pooling="cell" reads bins off their arc: set ordinal_expression=True as well.')
        if self.pooling == "cell" and self.mask_token_id not in (None, self.vocab_size - 1):
            raise ValueError(
                f'pooling="cell" would take bin {self.mask_token_id} for the mask: set mask_token_id to '
                f"vocab_size - 1, which is {self.vocab_size - 1}, or to None."
            )
        if self.unassigned_threshold is not None and not 0 <= self.unassigned_threshold <= 1:
            raise ValueError(
                f"unassigned_threshold is {self.unassigned_threshold}; it must lie between 0 and 1."
            )
        if any(size < 1 for size in self.classifier_hidden_sizes):
            raise ValueError(
                f"classifier_hidden_sizes {self.classifier_hidden_sizes} must all be at least 1."
            )
        if self.lsh_num_buckets % 2:
            raise ValueError(f"lsh_num_buckets is {self.lsh_num_buckets}; it must be even, such as 64.")
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"Sinusoidal positions need an even hidden_size, not {self.hidden_size}.")
