"""What a run starts from: tokenizer and model of a base, or new ones; which weights are trained; pretrained vectors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..modeling_scbert import ScBertConfig, ScBertForCellClassification, ScBertForMaskedExpression
from ..modeling_scbert.embeddings_scbert import arc_radius, expression_plane
from ..tokenization import InputError, ScBertTokenizer, align_genes
from ..trained_model.model_folder import check_model_folder, find_model, load_tokenizer, load_weights

# fields of the head, which is new: a recipe may set them over what the base says
HEAD_FIELDS = ("classifier_hidden_sizes", "classifier_dropout", "pooling", "hidden_dropout_prob")
# what a fine-tuned base says of its own types and held-out cells holds for that base
UNCALIBRATED = {
    "cell_vector_size": 0,
    "unassigned_threshold": None,
    "label_ontology_ids": None,
    "label_parents": None,
    "conformal_quantiles": None,
}
WEIGHTS, GENE_TABLE = "model.safetensors", "embeddings.gene_embeddings.weight"
# what studies of the same types differ in, for a solved head: [n, genes of the panel]
EFFECTS = "batch_effects.safetensors"
# a panel that shares fewer genes with pretrained vectors takes none
FEWEST_GENES = 50


def base_tokenizer(base: str | Path, genes: str | None = None) -> ScBertTokenizer:
    """The tokenizer of a base, its folder checked first; it takes no panel file (`genes`), which is for new models."""
    folder = find_model(base)
    check_model_folder(folder)
    if genes:
        raise InputError(
            "A panel file (genes) makes the panel of a new model; a base has its own. Leave one of them out."
        )
    return load_tokenizer(folder)


def new_tokenizer(
    options: dict[str, Any],
    panel: Sequence[str],
    modalities: Sequence[int] | None = None,
    genome_build: str | None = None,
) -> ScBertTokenizer:
    """
    A tokenizer over a panel, with the recipe's options of `ScBertTokenizer`; one that is unknown is an `InputError`.

    Modalities are of every feature of the panel, the genome build is that of its peaks; with genes only, None.
    """
    if modalities is not None:
        options = {**options, "feature_modalities": list(modalities), "genome_build": genome_build}
    try:
        return ScBertTokenizer(gene_panel=list(panel), **options)
    except TypeError as error:
        raise InputError(f"The recipe's tokenizer options do not work: {error}.") from error


def load_base(base: str | Path, labels: list[str], changes: dict[str, Any]) -> PreTrainedModel:
    """
    A pretrained encoder, all of whose weights must be there, with a head for `labels`, the classes in order.

    Of the recipe's `changes` of the model only those of the head are taken.
    """
    folder = find_model(base)
    architectures = check_model_folder(folder).get("architectures")
    head = {name: value for name, value in changes.items() if name in HEAD_FIELDS}
    fields = {**label_names(labels), **UNCALIBRATED, **head}
    model = load_weights(ScBertForCellClassification, folder, new="classifier.", **fields)
    if architectures != [ScBertForCellClassification.__name__]:
        start_head(model)
    return model


def load_masked_model(base: str | Path) -> PreTrainedModel:
    """A model of any head to go on pretraining; without the head of masked expression it gets a new one."""
    folder = find_model(base)
    check_model_folder(folder)
    new = ("decoder.", "cell_decoder.", "modality_decoder.")
    return load_weights(ScBertForMaskedExpression, folder, new=new, **UNCALIBRATED)


def label_names(labels: list[str]) -> dict[str, dict]:
    """The fields of the configuration that name the classes, in order."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


def new_model(
    fields: dict[str, Any], tokenizer: ScBertTokenizer, labels: list[str], seed: int
) -> PreTrainedModel:
    """
    A model of the recipe's `fields` with random weights, for the tokenizer's panel and bins and the classes in order.

    The seed is that of the random features, unless the fields have one; weights follow torch's own generator.
    """
    model = ScBertForCellClassification(new_config(fields, tokenizer, seed, **label_names(labels)))
    start_head(model)
    return model


@torch.no_grad()
def start_head(model: PreTrainedModel) -> None:
    """
    Begin a new head where every gene can be learnt and none has been heard yet.

    The output layer starts at zero: genes that few training cells express would otherwise keep random votes. The
    convolution's bias starts at 0.5: below zero its ReLU hides a gene from the head, and no gradient brings it back.
    With ``ordinal_expression`` the convolution reads along the chord of the bins' arc instead: a gene's number is
    then its bin, as long as no layer changes the tokens.
    """
    model.classifier.out_proj.weight.zero_()
    if model.config.pooling == "conv":
        model.classifier.conv.bias.fill_(0.5)
        if model.config.ordinal_expression:
            config = model.config
            radius, size = arc_radius(config), config.hidden_size
            # the norm divides a token by its length (of two parts of one radius), and makes that sqrt(size)
            read = radius * size**0.5 / (2 * radius**2 + config.layer_norm_eps * size) ** 0.5
            chord = expression_plane(config)[0] * (config.vocab_size - 2) / read
            model.classifier.conv.weight.copy_(chord[None])
            model.classifier.conv.bias.zero_()


@torch.no_grad()
def start_cell(model: PreTrainedModel, vectors: np.ndarray, center: np.ndarray) -> None:
    """
    Let the cell token begin as linear axes of expression: ``bins @ vectors - center``, turned into the hidden space.

    The vectors [genes, axes], zeros for genes on no axis, become the gene table, as its trailing row zeros, in
    directions across the arc of ordinal expression, and with zero means, so that reading the bins stays exact; all are
    scaled alike, so that the longest is as long as a bin's embedding. No layer changes the cell token until it has
    learnt to. An `InputError` if the model has no cell token (``pooling="cell"``), or is not wide enough.
    """
    encoder, config = model.base_model, model.config
    if config.pooling != "cell":
        raise InputError(f'Axes of cells are for models of pooling "cell"; this one has "{config.pooling}".')
    n_axes = vectors.shape[1]
    if n_axes > config.hidden_size - 3:
        raise InputError(
            f"{n_axes} axes need a hidden_size of {n_axes + 3} or more; the model's is {config.hidden_size}."
        )
    basis = across_the_arc(config)[:, :n_axes]
    vectors, center = (torch.as_tensor(x, dtype=torch.float64) for x in (vectors, center))
    factor = arc_radius(config) / vectors.norm(dim=1).max().clamp(min=1e-12)
    rows = torch.nn.functional.pad(vectors @ basis.T * factor, (0, 0, 0, 1))
    encoder.embeddings.gene_embeddings.weight.copy_(rows)
    encoder.cell.scale.copy_(1 / factor)
    encoder.cell.offset.copy_(basis @ center)


def across_the_arc(config: ScBertConfig) -> torch.Tensor:
    """An orthonormal basis, float64 [hidden, hidden - 3], across the plane of ordinal expression and of zero means."""
    kept = torch.cat([torch.ones(1, config.hidden_size), expression_plane(config)]).double()
    generator = torch.Generator().manual_seed(config.seed + 2)
    more = torch.randn(config.hidden_size - 3, config.hidden_size, generator=generator)
    return torch.linalg.qr(torch.cat([kept, more.double()]).T)[0][:, 3:]


def new_config(fields: dict[str, Any], tokenizer: ScBertTokenizer, seed: int, **more: Any) -> ScBertConfig:
    """The configuration of a recipe's fields, sizes decided by the tokenizer; an `InputError` if it cannot be."""
    modalities = tokenizer.feature_modalities
    unknown = sorted(set(fields) - set(ScBertConfig().to_dict()))
    if unknown:
        raise InputError(f"The recipe's model has the unknown field(s) {', '.join(unknown)}.")
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "mask_token_id": tokenizer.mask_token_id,
        "max_position_embeddings": len(tokenizer.gene_panel) + 1,
        "num_modalities": 1 if modalities is None else int(max(modalities)) + 1,
    }
    try:
        return ScBertConfig(**{"seed": seed, **fields, **sizes, **more})
    # @strict raises types of huggingface_hub's own, all of them about values
    except Exception as error:
        raise InputError(f"The recipe's model cannot be built: {error}") from error


def freeze_first_layers(model: PreTrainedModel, n_layers: int) -> None:
    """Keep the first layers from being trained (scMBERT keeps one); embeddings and all else are trained."""
    depth = len(model.scbert.layers)
    if not 0 <= n_layers <= depth:
        raise InputError(f"frozen_layers is {n_layers}; the model has {depth} layers.")
    model.scbert.layers[:n_layers].requires_grad_(False)


def freeze_whole_encoder(model: PreTrainedModel) -> None:
    """Leave only the final norm and the head to be trained: for few cells, or little time."""
    model.scbert.requires_grad_(False)
    model.scbert.final_norm.requires_grad_(True)


def freeze_for_finetuning(model: PreTrainedModel) -> None:
    """
    Leave only the final norm, the block before the last and the head to be trained, as the original does.

    A model of one block trains that block.
    """
    freeze_whole_encoder(model)
    model.scbert.layers[-2:][:1].requires_grad_(True)


def pretrained_vectors(model: str | Path, panel: Sequence[str]) -> np.ndarray | None:
    """
    Vectors of the genes of a panel by a model pretrained with ``pooling="cell"``, float32 [genes, hidden].

    Zeros for genes that it does not know; None where fewer than `FEWEST_GENES` have a vector. An `InputError` if the
    model's gene table holds no axes of cells.
    """
    folder = find_model(model)
    if check_model_folder(folder).get("pooling") != "cell" or not (folder / WEIGHTS).is_file():
        raise InputError(
            f'{model} holds no axes of cells in its gene table; a model pretrained with pooling "cell" was needed, '
            f"such as scbert-mini, its weights in one file ({WEIGHTS})."
        )
    # the table alone: nothing else of the model is used
    with safe_open(folder / WEIGHTS, "pt") as weights:
        names = weights.keys()
        table = weights.get_tensor(next(name for name in names if name.endswith(GENE_TABLE))).float().numpy()
    places = align_genes(list(panel), load_tokenizer(folder).gene_panel).target
    vectors = np.where(places[:, None] >= 0, table[places], 0).astype(np.float32)
    return vectors if vectors.any(axis=1).sum() >= FEWEST_GENES else None


def pretrained_effects(model: str | Path, panel: Sequence[str]) -> np.ndarray | None:
    """
    Directions in which studies differ, as a pretrained model's folder has them, [n, genes]; None if it has none.

    Of genes that the model does not know nothing is said. An `InputError` if the file does not hold directions over the
    genes of the model's panel.
    """
    folder = find_model(model)
    if not (folder / EFFECTS).is_file():
        return None
    genes = load_tokenizer(folder).gene_panel
    try:
        effects = load_file(folder / EFFECTS)["effects"].float().numpy()
    except (SafetensorError, KeyError) as error:
        raise InputError(
            f"{folder / EFFECTS} holds no tensor `effects`: {error}. Make it anew, or delete it."
        ) from error
    if effects.ndim != 2 or effects.shape[1] != len(genes):
        raise InputError(
            f"{folder / EFFECTS} holds {list(effects.shape)} numbers; [directions, {len(genes)}] were needed, "
            "one for each gene of the model's panel. Make it anew, or delete it."
        )
    places = align_genes(list(panel), genes).target
    return np.where(places >= 0, effects[:, places], 0)
