"""The command ``scbert``: one thin function per verb, no logic.

Every verb imports its job only when it runs, hands it the options that were given under their own names and
prints the summary (a dict) that the job returns: as ``name: value`` lines on stderr, or as one JSON line on
stdout with ``--json``. Errors, signals and exit codes are handled in console.py.
"""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..data.paths import ANNOTATION_FORMATS, check_cells_path, check_output_folder, check_output_path
from . import model_verbs
from . import options as opt
from .console import existing, guarded, run, show_messages, silence_libraries

# verbs and options that were called otherwise: the old spelling is understood, and not shown
RENAMED = {
    "build": "build-corpus",
    "combine": "combine-modalities",
    "controls": "baselines",
    "input": "values",
    "test-key": "split-key",
}

app = typer.Typer(
    name="scbert",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: RENAMED.get(name, name),
    },
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"scbert {__version__}")
        raise typer.Exit


@app.callback()
def _scbert(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Cell-type annotation of single cells with scBERT models."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the demo's files.")] = Path("demo"),
    json: opt.Json = False,
) -> None:
    """Fine-tune a small model on real cells, annotate held-out ones and show the scores."""
    given = locals()
    from ..inference.demo import run_demo

    run(run_demo, listing=False, **given)


@app.command()
def finetune(
    reference: opt.Reference,
    label_key: opt.LabelKey,
    output: opt.OutputFolder,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pretrained model; without it, the default recipe.")
    ] = None,
    recipe: opt.Recipe = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = None,
    genes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Gene panel without a base (expressed genes if left out)."),
    ] = None,
    test: opt.TestFile = None,
    test_key: opt.SplitKey = None,
    unlabelled: opt.Unlabelled = None,
    ontology: opt.Ontology = None,
    label_tree: opt.LabelTree = None,
    coarse_key: opt.CoarseKey = None,
    class_balance: Annotated[
        opt.ClassBalance | None, typer.Option(help="How class imbalance is handled.")
    ] = None,
    train_all: Annotated[
        bool | None,
        typer.Option("--train-all", help="Train every weight of a pretrained base."),
    ] = None,
    layer: opt.Layer = None,
    input: opt.RecipeInput = None,
    min_genes: Annotated[
        int | None, typer.Option(min=0, help="Expressed genes a training cell needs.")
    ] = None,
    cache_frozen: Annotated[
        opt.CacheFrozen | None, typer.Option(help="Where the frozen layers' outputs are kept between epochs.")
    ] = None,
    seed: opt.Seed = None,
    device: opt.TrainingDevice = None,
    dtype: opt.TrainingDtype = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Teach a model the cell types of a labelled reference."""
    given = locals()
    existing(reference, genes, test, ontology, label_tree, *(unlabelled or ()))
    check_output_folder(output, overwrite)
    from ..training.run_finetune import finetune as job

    run(job, listing=False, **given)


@app.command()
def annotate(
    query: opt.Query,
    output: opt.AnnotationFile,
    model: opt.Annotator = None,
    tissue: opt.ShippedFor = None,
    threshold: opt.Threshold = None,
    coverage: opt.Coverage = None,
    majority_vote: opt.MajorityVote = None,
    report: opt.Report = None,
    layer: opt.Layer = None,
    input: opt.Input = opt.InputKind.auto,
    batch_size: opt.BatchSize = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    gene_table: opt.GeneTable = None,
    genes_report: opt.GenesReport = None,
    processes: opt.Processes = None,
    resume: opt.Resume = False,
    force: opt.Force = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Give every cell a cell type and a confidence."""
    given = locals()
    check_cells_path(query)
    check_output_path(output, overwrite, inputs=(query,), suffix=ANNOTATION_FORMATS)
    from ..inference.annotate_cells import annotate_file

    # None is an answer here: the shipped annotator
    run(partial(annotate_file, model=given.pop("model")), listing=False, **given)


@app.command()
def embed(
    query: opt.Query,
    output: opt.OutputFile,
    model: opt.Embedder = None,
    layer: opt.Layer = None,
    input: opt.Input = opt.InputKind.auto,
    batch_size: opt.BatchSize = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    gene_table: opt.GeneTable = None,
    genes_report: opt.GenesReport = None,
    force: opt.Force = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Write each cell's embedding to obsm["X_scbert"]."""
    given = locals()
    check_cells_path(query)
    check_output_path(output, overwrite, inputs=(query,), suffix=".h5ad")
    from ..inference.embed_cells import embed_file

    run(partial(embed_file, model=given.pop("model")), listing=False, **given)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="ORIGINAL.pth", help="Original scBERT checkpoint.")],
    genes: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Its gene panel: a symbol a line, .csv, .gz or .h5ad."),
    ],
    output: opt.OutputFolder,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one a line (LABEL_0... without).")
    ] = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Convert an original checkpoint into a model folder."""
    given = locals()
    existing(checkpoint, genes)
    check_output_folder(output, overwrite)
    from ..inference.convert_original import convert as job

    run(job, **given)


@app.command()
def pretrain(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="Cells, or a folder of files.")],
    output: opt.OutputFolder,
    recipe: opt.Recipe = None,
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="Model to go on from.")] = None,
    genes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Gene panel (the expressed genes without it).")
    ] = None,
    gene_vectors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Gene vectors, from gene2vec.")
    ] = None,
    epochs: opt.Epochs = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps in place of epochs.")] = None,
    batch_size: opt.BatchSize = None,
    layer: opt.Layer = None,
    input: opt.RecipeInput = None,
    min_genes: Annotated[int | None, typer.Option(min=0, help="Expressed genes a cell needs.")] = None,
    streaming: opt.Streaming = None,
    seed: opt.Seed = None,
    force: opt.Force = False,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Teach a model to predict hidden expression, without labels."""
    given = locals()
    existing(corpus, genes, gene_vectors)
    check_output_folder(output, overwrite)
    from ..training.run_pretrain import pretrain as job

    run(job, listing=False, **given)


@app.command()
def gene2vec(
    output: Annotated[Path, typer.Option(metavar="FILE", help="Gene vectors to write: .txt, .gz, .npy.")],
    corpus: Annotated[
        Path | None, typer.Argument(metavar="CORPUS", help="Cells, or a folder of files.")
    ] = None,
    import_file: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", help="Existing vectors to import: text or .npy."),
    ] = None,
    genes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Genes to keep to (of an .npy: its genes).")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Length of a vector.", show_default="200")] = None,
    cutoff: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Least correlation of a pair.", show_default="0.9")
    ] = None,
    top_pairs: Annotated[
        int | None, typer.Option(min=1, help="Keep the N most correlated pairs of each file instead.")
    ] = None,
    min_cells: Annotated[
        int | None, typer.Option(min=1, help="Cells that must express a gene.", show_default="20")
    ] = None,
    max_cells: Annotated[
        int | None, typer.Option(min=2, help="Larger files are sampled.", show_default="20000")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Passes over the pairs.", show_default="10")
    ] = None,
    layer: opt.Layer = None,
    input: opt.Input = opt.InputKind.auto,
    seed: opt.Seed = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads; repeatable with 1 only.", show_default="1")
    ] = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Train gene vectors on co-expression, or import existing ones."""
    given = locals()
    existing(corpus, import_file, genes)
    from ..training.run_gene2vec import gene2vec as job

    run(job, **given)


@app.command("build-corpus")
def build_corpus(
    sources: opt.Sources,
    output: opt.CorpusFolder = None,
    layer: opt.Layer = None,
    input: opt.Input = opt.InputKind.auto,
    min_genes: opt.MinGenes = 200,
    min_cells: opt.MinCells = 1,
    max_mito_fraction: opt.MaxMito = None,
    doublet_key: opt.DoubletKey = None,
    columns: opt.ObsColumns = None,
    keep_duplicates: opt.KeepDuplicates = False,
    shard_cells: opt.ShardCells = 16_384,
    num_proc: opt.NumProc = 1,
    strict: opt.Strict = False,
    verify: opt.Verify = False,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Bring many files of cells into one corpus to train on, or verify one."""
    given = locals()
    from ..data.corpus_build import build_corpus as job

    run(job, **given)


@app.command("combine-modalities")
def combine_modalities(
    cells: Annotated[
        Path,
        typer.Argument(
            metavar="CELLS",
            help="Cells: RNA (with --atac), .h5mu, 10x multiome .h5, or .h5ad with var['feature_types'].",
        ),
    ],
    output: opt.OutputFile,
    atac: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Peaks of the same cells, paired by cell name.")
    ] = None,
    genome: Annotated[str | None, typer.Option(help="Genome build of the peaks, such as GRCh38.")] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model whose regions the peaks are mapped to.")
    ] = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Bring RNA and ATAC of the same cells into one file, for the other commands to read."""
    given = locals()
    existing(cells, atac, model)
    from ..data.multiomics import combine_files

    run(combine_files, **given)


app.command()(model_verbs.push)
app.command()(model_verbs.app)
app.command()(model_verbs.models)
app.command()(model_verbs.evaluate)
app.command()(model_verbs.explain)


@app.command("map-labels")
def map_labels(
    reference: opt.Reference,
    label_key: opt.LabelKey,
    output: Annotated[Path, typer.Option(metavar="FILE.csv", help="The table to write, and to correct.")],
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Propose terms of the Cell Ontology for the labels, in a table to correct."""
    given = locals()
    check_cells_path(reference)
    check_output_path(output, overwrite, inputs=(reference,), suffix=".csv")
    from ..data.cell_ontology import map_labels as job

    run(job, listing=False, **given)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    silence_libraries()
    show_messages()
    own_process = arguments is None
    if own_process:
        # libraries leave no garbage when they are imported, and to look for it takes a third of a short command's time;
        # `run` begins to look before a job starts
        gc.disable()
    try:
        return guarded(lambda: app(args=arguments, prog_name="scbert"))
    finally:
        if own_process:
            # nor is any looked for when the process ends
            gc.freeze()
