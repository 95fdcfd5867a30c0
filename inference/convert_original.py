"""The job behind `scbert convert`: an original checkpoint and its gene panel in, a model folder out."""

from ..data.paths import check_output_folder, partial_folder
from ..data.read import read_gene_names
from ..modeling_scbert.convert_checkpoint import CheckpointError, convert_checkpoint
from ..tokenization import InputError, ScBertTokenizer
from ..tokenization.genes_scbert import open_text
from ..trained_model.model_folder import save_model


def convert(checkpoint, genes, output, labels=None, overwrite: bool = False) -> dict:
    """Convert an original scBERT checkpoint into a folder that the Auto classes load.

    Parameters
    ----------
    checkpoint : path
        The original `.pth`, pretrained or fine-tuned.
    genes : path
        The gene panel in the checkpoint's order: one symbol a line (`.txt`, `.csv`, compressed or
        not), or the `var_names` of an `.h5ad`.
    output : path
        The folder to write; it appears only when complete.
    labels : path, optional
        Class names of a fine-tuned checkpoint, one a line.
    overwrite : bool
        Replace an existing model folder.

    Returns
    -------
    dict
        output, the class of the model, genes, layers, parameters and labels.

    Raises
    ------
    InputError
        If a file does not hold what it should or they do not belong together.

    Examples
    --------
    >>> convert("panglao_pretrain.pth", "panglao_genes.txt", "scbert-panglao")  # doctest: +SKIP
    """
    check_output_folder(output, overwrite)
    panel = read_gene_names(genes)
    names = None if labels is None else read_labels(labels)
    try:
        model = convert_checkpoint(checkpoint, num_genes=len(panel), labels=names)
    except CheckpointError as problem:
        raise InputError(str(problem)) from problem
    tokenizer = ScBertTokenizer(gene_panel=panel, n_bins=model.config.vocab_size - 2)
    with partial_folder(output, overwrite) as folder:
        save_model(model, tokenizer, folder)
    summary = {
        "output": str(output),
        "model": type(model).__name__,
        "genes": len(panel),
        "layers": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
    }
    if "Classification" in type(model).__name__:
        summary["labels"] = list(model.config.id2label.values())
    return summary


def read_labels(path) -> list[str]:
    """Class names, one a line, in the checkpoint's order; an `InputError` if the file holds none or is no text."""
    try:
        with open_text(path) as handle:
            labels = [line.strip() for line in handle if line.strip()]
    except (UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{path} is not a text file with one label a line ({error}).") from error
    if not labels:
        raise InputError(f"{path} holds no labels; one per line was needed.")
    return labels
