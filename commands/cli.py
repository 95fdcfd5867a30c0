"""The command ``scbert``: one thin function per verb, no logic.

Every verb imports its job only when it runs, hands it the options that were given under their own names and
prints the summary (a dict) that the job returns: as ``name: value`` lines on stderr, or as one JSON line on
stdout with ``--json``. Errors, signals and exit codes are handled in console.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..data.paths import ANNOTATION_FORMATS, check_cells_path, check_output_folder, check_output_path
from . import labels, share
from . import options as opt
from .console import existing, few_collections, guarded, run, show_messages, silence_libraries
from .options import (
    BatchSize,
    ClassBalance,
    Force,
    GenesReport,
    GeneTable,
    Input,
    InputKind,
    Json,
    Layer,
    MajorityVote,
    OutputFile,
    OutputFolder,
    Overwrite,
    Query,
    Recipe,
    Report,
    Resume,
    Seed,
    Threshold,
)
from .studies import evaluate, explain

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
    json: Json = False,
) -> None:
    """Fine-tune a small model on real cells, annotate held-out ones and show the scores."""
    given = locals()
    from ..inference.demo import run_demo

    run(run_demo, listing=False, **given)


@app.command()
def finetune(
    reference: Annotated[
        Path, typer.Argument(metavar="REF", help="Labelled cells: .h5ad, 10x .h5, .zarr.", show_default=False)
    ],
    label_key: Annotated[
        str, typer.Option(help="Column of obs that holds the cell types.", show_default=False)
    ],
    output: OutputFolder,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pretrained model; without it, the default recipe.")
    ] = None,
    recipe: Recipe = None,
    epochs: opt.Epochs = None,
    batch_size: BatchSize = None,
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
        ClassBalance | None, typer.Option(help="How class imbalance is handled.", show_default=False)
    ] = None,
    train_all: Annotated[
        bool | None,
        typer.Option("--train-all", help="Train every weight of a pretrained base.", show_default=False),
    ] = None,
    layer: Layer = None,
    input: opt.RecipeInput = None,
    min_genes: Annotated[
        int | None, typer.Option(min=0, help="Expressed genes a training cell needs.", show_default=False)
    ] = None,
    cache_frozen: Annotated[
        opt.CacheFrozen | None, typer.Option(help="Where the frozen layers' outputs are kept between epochs.")
    ] = None,
    seed: Seed = None,
    device: opt.TrainingDevice = None,
    dtype: opt.TrainingDtype = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Teach a model the cell types of a labelled reference."""
    given = locals()
    existing(reference, base, genes, test, ontology, label_tree, *(unlabelled or ()))
    check_output_folder(output, overwrite)
    from ..training.run_finetune import finetune as job

    run(job, listing=False, **given)


@app.command()
def annotate(
    query: Query,
    output: opt.AnnotationFile,
    model: opt.Annotator = None,
    tissue: opt.ShippedFor = None,
    threshold: Threshold = None,
    coverage: opt.Coverage = None,
    majority_vote: MajorityVote = None,
    report: Report = None,
    layer: Layer = None,
    input: Input = InputKind.auto,
    batch_size: BatchSize = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    gene_table: GeneTable = None,
    genes_report: GenesReport = None,
    processes: opt.Processes = None,
    resume: Resume = False,
    force: Force = False,
    overwrite: Overwrite = False,
    json: Json = False,
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
    query: Query,
    output: OutputFile,
    model: opt.Embedder = None,
    layer: Layer = None,
    input: Input = InputKind.auto,
    batch_size: BatchSize = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    gene_table: GeneTable = None,
    genes_report: GenesReport = None,
    force: Force = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write each cell's embedding to obsm["X_scbert"]."""
    given = locals()
    check_cells_path(query)
    check_output_path(output, overwrite, inputs=(query,), suffix=".h5ad")
    from ..inference.embed_cells import embed_file

    run(partial(embed_file, model=given.pop("model")), listing=False, **given)


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="ORIGINAL.pth", help="Original scBERT checkpoint.", show_default=False)
    ],
    genes: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Its gene panel: a symbol a line, .csv, .gz or .h5ad.", show_default=False
        ),
    ],
    output: OutputFolder,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one a line (LABEL_0... without).")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Convert an original checkpoint into a model folder."""
    given = locals()
    existing(checkpoint, genes)
    check_output_folder(output, overwrite)
    from ..inference.convert_original import convert as job

    run(job, **given)


@app.command()
def pretrain(
    corpus: Annotated[
        Path, typer.Argument(metavar="CORPUS", help="Cells, or a folder of files.", show_default=False)
    ],
    output: OutputFolder,
    recipe: Recipe = None,
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="Model to go on from.")] = None,
    genes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Gene panel (the expressed genes without it).")
    ] = None,
    gene_vectors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Gene vectors, from gene2vec.")
    ] = None,
    epochs: opt.Epochs = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps in place of epochs.", show_default=False)
    ] = None,
    batch_size: BatchSize = None,
    layer: Layer = None,
    input: opt.RecipeInput = None,
    min_genes: Annotated[
        int | None, typer.Option(min=0, help="Expressed genes a cell needs.", show_default=False)
    ] = None,
    streaming: opt.Streaming = None,
    seed: Seed = None,
    force: Force = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Teach a model to predict hidden expression, without labels."""
    given = locals()
    existing(corpus, base, genes, gene_vectors)
    check_output_folder(output, overwrite)
    from ..training.run_pretrain import pretrain as job

    run(job, listing=False, **given)


@app.command()
def gene2vec(
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Gene vectors to write: .txt, .gz, .npy.", show_default=False)
    ],
    corpus: Annotated[
        Path | None, typer.Argument(metavar="CORPUS", help="Cells, or a folder of files.", show_default=False)
    ] = None,
    import_file: Annotated[
        Path | None,
        typer.Option(
            "--import", metavar="FILE", help="Existing vectors to import: text or .npy.", show_default=False
        ),
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
    layer: Layer = None,
    input: Input = InputKind.auto,
    seed: Seed = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads; repeatable with 1 only.", show_default="1")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
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
    layer: Layer = None,
    input: Input = InputKind.auto,
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
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
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
            show_default=False,
        ),
    ],
    output: OutputFile,
    atac: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Peaks of the same cells, paired by cell name.")
    ] = None,
    genome: Annotated[str | None, typer.Option(help="Genome build of the peaks, such as GRCh38.")] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model whose regions the peaks are mapped to.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Bring RNA and ATAC of the same cells into one file, for the other commands to read."""
    given = locals()
    existing(cells, atac, model)
    from ..data.multiomics import combine_files

    run(combine_files, **given)


app.command()(share.push)
app.command()(share.app)
app.command()(share.models)
app.command()(evaluate)
app.command()(explain)
app.command("map-labels")(labels.map_labels)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    silence_libraries()
    show_messages()
    with few_collections(own_process=arguments is None):
        return guarded(lambda: app(args=arguments, prog_name="scbert"))
