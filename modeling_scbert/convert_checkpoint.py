"""Original scBERT checkpoints (`.pth`) to this format: one name map and small pure functions."""

import logging
import pickle
import re
import zipfile

import torch

from .configuration_scbert import ScBertConfig
from .modeling_scbert import ScBertForCellClassification, ScBertForMaskedExpression, ScBertPreTrainedModel

logger = logging.getLogger(__name__)

BODY_NAMES = {
    "token_emb": "scbert.embeddings.expression_embeddings",
    "pos_emb.emb": "scbert.embeddings.gene_embeddings",
    "norm": "scbert.final_norm",
}
LAYER_NAMES = {
    "0.norm": "attention_norm",
    "0.fn.fast_attention": "attention",
    "0.fn.to_q": "attention.q_proj",
    "0.fn.to_k": "attention.k_proj",
    "0.fn.to_v": "attention.v_proj",
    "0.fn.to_out": "attention.o_proj",
    "1.norm": "ffn_norm",
    "1.fn.fn.w1": "intermediate",
    "1.fn.fn.w2": "output",
}
PRETRAINED_HEAD_NAMES = {"to_out": "decoder"}
CLASSIFIER_NAMES = {
    "to_out.conv1": "classifier.conv",
    "to_out.fc1": "classifier.dense.0",
    "to_out.fc2": "classifier.dense.1",
    "to_out.fc3": "classifier.out_proj",
}
LAYER = re.compile(r"performer\.net\.layers\.(\d+)\.(.+)")
GENE_TABLE = "pos_emb.emb.weight"
# the opcode that pickles of protocol 2 and later begin with
PICKLE_START = b"\x80"
# counts the original's forwards since it last drew random features; the Trainer counts steps itself
COUNTER = "calls_since_last_redraw"


class CheckpointError(ValueError):
    """The file is no original scBERT checkpoint that can be converted; the message says why."""


def convert_checkpoint(path, num_genes: int | None = None, labels=None) -> ScBertPreTrainedModel:
    """Read an original checkpoint, a `.pth` file, pretrained or fine-tuned, and build the model it holds.

    `num_genes` of the panel is compared with the gene table, and needed where there is no table; `labels` are class
    names of a fine-tuned checkpoint, in its order, ``LABEL_0``... if left out. The model is in evaluation mode, in
    float32. A `CheckpointError` if the file is damaged or holds pickled objects, names or shapes are not the
    original's, or the number of genes or labels does not fit.

    Examples
    --------
    >>> model = convert_checkpoint("panglao_pretrain.pth", num_genes=16906)  # doctest: +SKIP
    """
    state = original_state(read_checkpoint(path))
    state = with_gene_table(state, num_genes)
    config = config_of(state, labels)
    model_class = ScBertForCellClassification if is_fine_tuned(state) else ScBertForMaskedExpression
    model = model_class(config)
    load_exactly(model, {new_name(name): new_value(name, value) for name, value in state.items()})
    return model.eval()


def read_checkpoint(path) -> dict:
    """What the file holds, read without running any code in it: tensors and plain values of a zip of torch's."""
    if not zipfile.is_zipfile(path):
        # a missing or unreadable file says so itself
        with open(path, "rb") as file:
            is_pickle = file.read(1) == PICKLE_START
        if is_pickle:
            raise CheckpointError(
                f"{path} is a bare pickle, as torch wrote before 1.6. Reading one is unsafe: it can run any code of "
                "whoever made it. If you trust it, load it with the torch that wrote it and save its tensors anew: "
                "torch.save({'model_state_dict': checkpoint['model_state_dict']}, 'clean.pth')."
            )
        raise CheckpointError(
            f"{path} is not a whole torch checkpoint (a zip file): it is truncated or something else. Fetch it again."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise CheckpointError(
                f"{path} is damaged (its part {broken} fails the checksum); fetch it again."
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        raise CheckpointError(
            f"{path} holds pickled objects{f' ({refused[1]})' if refused else ''} and not only tensors; "
            "loading them could run code. Keep its model_state_dict alone: "
            "torch.save({'model_state_dict': checkpoint['model_state_dict']}, 'clean.pth')."
        ) from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a torch checkpoint ({_first_line(error)})."
        ) from error


def original_state(checkpoint) -> dict[str, torch.Tensor]:
    """Name to tensor, without the wrapper's `module.` and the redraw counter; names must be the original's."""
    state = checkpoint.get("model_state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(
            "The checkpoint has no model_state_dict of tensors; an original scBERT one does."
        )
    state = {name.removeprefix("module."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.endswith(COUNTER)}
    unknown = [name for name in state if new_name(name) is None]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of the checkpoint's {len(state)} names are not the original scBERT's: "
            f"{', '.join(unknown[:5])}. Only the published model can be converted."
        )
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise CheckpointError(f"The weights {', '.join(broken[:5])} hold numbers that are not finite.")
    return state


def new_name(name: str) -> str | None:
    """Our name of an original weight; None for an unknown one.

    Examples
    --------
    >>> new_name("performer.net.layers.2.0.fn.to_q.weight")
    'scbert.layers.2.attention.q_proj.weight'
    """
    module, _, kind = name.rpartition(".")
    layer = LAYER.fullmatch(module)
    if layer is not None:
        new = LAYER_NAMES.get(layer[2])
        return new and f"scbert.layers.{layer[1]}.{new}.{kind}"
    new = (BODY_NAMES | PRETRAINED_HEAD_NAMES | CLASSIFIER_NAMES).get(module)
    return new and f"{new}.{kind}"


def original_name(name: str) -> str:
    """
    The original's name of one of our weights, for messages about its file.

    Examples
    --------
    >>> original_name("scbert.layers.2.attention.q_proj.weight")
    'performer.net.layers.2.0.fn.to_q.weight'
    """
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"scbert\.layers\.(\d+)\.(.+)", module)
    names = LAYER_NAMES if layer else BODY_NAMES | PRETRAINED_HEAD_NAMES | CLASSIFIER_NAMES
    original = {ours: theirs for theirs, ours in names.items()}.get(layer[2] if layer else module, module)
    return f"performer.net.layers.{layer[1]}.{original}.{kind}" if layer else f"{original}.{kind}"


def new_value(name: str, value: torch.Tensor) -> torch.Tensor:
    """The weight as our module holds it: float32, and the convolution over features as a linear map."""
    if name == "to_out.conv1.weight":
        value = value.reshape(1, -1)
    return value.to(torch.float32, copy=True).contiguous()


def is_fine_tuned(state: dict[str, torch.Tensor]) -> bool:
    """Whether the checkpoint has the classification head."""
    return any(name.startswith("to_out.fc") for name in state)


def with_gene_table(state: dict[str, torch.Tensor], num_genes: int | None) -> dict[str, torch.Tensor]:
    """The state with a gene table that fits the panel, a row a gene and one more; zeros, and a warning, without one."""
    if GENE_TABLE in state:
        rows = _shape(state, GENE_TABLE, 2)[0]
        if num_genes is not None and rows != num_genes + 1:
            raise CheckpointError(
                f"The gene panel has {num_genes:,} genes and the checkpoint's gene table {rows:,} rows; "
                f"{rows - 1:,} genes are needed (the last row belongs to the trailing token), in the order "
                "the checkpoint was trained with."
            )
        return state
    if num_genes is None:
        raise CheckpointError("The checkpoint has no gene table, so the number of genes has to be given.")
    logger.warning(
        "The checkpoint has no gene table (%s): genes are given zeros, as in a model trained without gene2vec.",
        GENE_TABLE,
    )
    return {**state, GENE_TABLE: torch.zeros(num_genes + 1, _shape(state, "token_emb.weight", 2)[1])}


def config_of(state: dict[str, torch.Tensor], labels=None) -> ScBertConfig:
    """The configuration that the tensors' shapes tell; there must be as many labels as classes."""
    vocab_size, hidden_size = _shape(state, "token_emb.weight", 2)
    first = "performer.net.layers.0"
    num_random_features, head_dim = _shape(state, f"{first}.0.fn.fast_attention.projection_matrix", 2)
    inner_size, _ = _shape(state, f"{first}.0.fn.to_q.weight", 2)
    if inner_size % head_dim:
        raise CheckpointError(
            f"Queries of width {inner_size} do not split into heads of dimension {head_dim}."
        )
    classes = {}
    if is_fine_tuned(state):
        num_labels = _shape(state, "to_out.fc3.weight", 2)[0]
        classes["classifier_hidden_sizes"] = [_shape(state, f"to_out.fc{i}.weight", 2)[0] for i in (1, 2)]
        classes["id2label"] = dict(enumerate(label_names(labels, num_labels)))
        classes["label2id"] = {label: index for index, label in classes["id2label"].items()}
    elif labels is not None:
        raise CheckpointError("Labels are given, but the checkpoint is a pretrained one without classes.")
    return ScBertConfig(
        vocab_size=vocab_size,
        mask_token_id=vocab_size - 1,
        hidden_size=hidden_size,
        num_hidden_layers=1 + max(int(match[1]) for match in map(LAYER.match, state) if match),
        num_attention_heads=inner_size // head_dim,
        head_dim=head_dim,
        num_random_features=num_random_features,
        intermediate_size=_shape(state, f"{first}.1.fn.fn.w1.weight", 2)[0],
        max_position_embeddings=_shape(state, GENE_TABLE, 2)[0],
        qkv_bias=f"{first}.0.fn.to_q.bias" in state,
        attention_type="favor",
        architectures=None,
        **classes,
    )


def label_names(labels, num_labels: int) -> list[str]:
    """The given class names if they are as many as the classes, `LABEL_0`... without them."""
    if labels is None:
        return [f"LABEL_{index}" for index in range(num_labels)]
    labels = list(labels)
    if len(labels) != num_labels:
        raise CheckpointError(
            f"{len(labels)} labels are given and the checkpoint tells {num_labels} classes apart."
        )
    if len(set(labels)) < num_labels:
        raise CheckpointError("A label stands twice among the labels; every class needs a name of its own.")
    return labels


def load_exactly(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load a converted state into a model; every weight, of exactly its shape."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = sorted(wanted.keys() - state.keys())
    surplus = sorted(state.keys() - wanted.keys())
    if missing or surplus:
        few, many = (", ".join(map(original_name, names[:3])) or "none" for names in (missing, surplus))
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} weights ({few}) and has {len(surplus)} too many ({many})."
        )
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"{original_name(name)} has the shape {list(state[name].shape)} in the checkpoint, {list(shape)} is "
                "needed: its weights do not belong to one model."
            )
    model.load_state_dict(state)


def _shape(state: dict[str, torch.Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state or state[name].dim() != dimensions:
        found = f"has shape {list(state[name].shape)}" if name in state else "is missing"
        raise CheckpointError(
            f"{name} {found} in the checkpoint; an original scBERT one holds it as a matrix."
        )
    return tuple(state[name].shape)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
