"""The options that several verbs share, each declared once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

InputKind = StrEnum("InputKind", ["auto", "counts", "log1p"])
CacheFrozen = StrEnum("CacheFrozen", ["auto", "memory", "disk", "off"])
DtypeName = StrEnum("DtypeName", ["auto", "float32", "bfloat16"])
Tissue = StrEnum("Tissue", ["blood", "tissue"])
ClassBalance = StrEnum("ClassBalance", ["none", "weights", "oversample"])

Query = Annotated[
    Path,
    typer.Argument(metavar="QUERY", help="Cells to read: .h5ad, .h5mu, .zarr, 10x .h5 or folder."),
]
Reference = Annotated[
    Path, typer.Argument(metavar="REF", help="Labelled cells: .h5ad, .h5mu, 10x .h5, .zarr.")
]
Model = Annotated[Path, typer.Option(metavar="DIR", help="Fine-tuned model folder.")]
Annotator = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Fine-tuned model folder.",
        show_default="the shipped annotator of human blood cells",
    ),
]
Embedder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Pretrained or fine-tuned model folder.",
        show_default="scbert-mini, which ships and was pretrained",
    ),
]
ShippedFor = Annotated[
    Tissue | None,
    typer.Option("--tissue", help="Without --model: the shipped annotator of it."),
]
OutputFile = Annotated[Path, typer.Option(metavar="FILE", help="The .h5ad to write.")]
AnnotationFile = Annotated[
    Path,
    typer.Option(metavar="FILE", help="The .h5ad to write, or a .csv of the labels."),
]
OutputFolder = Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")]
Recipe = Annotated[
    str | None, typer.Option(metavar="NAME|FILE", help="Settings: a shipped recipe's name or a .json file.")
]
LabelKey = Annotated[str, typer.Option(help="Column of obs that holds the cell types.")]
Report = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Write one HTML file with tables and pictures.")
]
MajorityVote = Annotated[
    str | None,
    typer.Option(
        metavar="KEY|leiden",
        help="Also give each group of this obs column one label (leiden: of clusters, which rarely helps).",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Cells below this confidence are 'unassigned'.",
        show_default="the model's, chosen on its validation cells, or 0.5",
    ),
]
Coverage = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Also write sets of types that hold the true one in this share of cells: 0.8, 0.9, 0.95 or 0.99.",
    ),
]
Layer = Annotated[str | None, typer.Option(help="Layer that holds the values (X without it).")]
Input = Annotated[InputKind, typer.Option("--values", help="What the values are; auto fails if ambiguous.")]
RecipeInput = Annotated[
    InputKind | None,
    typer.Option(
        "--values", help="What the values are; auto fails if ambiguous.", show_default="the recipe's, or auto"
    ),
]
Epochs = Annotated[float | None, typer.Option(min=0, help="Passes over the cells.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Cells per step.")]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|cuda|cuda:N", help="Where to compute.", show_default="auto: a GPU if there is one"
    ),
]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(
        help="Precision of the matrix products.", show_default="auto: bfloat16 on GPUs that have it"
    ),
]
TrainingDevice = Annotated[
    str | None,
    typer.Option(metavar="cpu|cuda", help="Where to compute.", show_default="auto: every GPU, or the CPU"),
]
TrainingDtype = Annotated[
    DtypeName | None, typer.Option(help="Precision of the matrix products.", show_default="the recipe's")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of splits, weights and order.")]
GeneTable = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|hgnc", help="Table of other gene names; 'hgnc' downloads the HGNC complete set once."
    ),
]
GenesReport = Annotated[
    Path | None, typer.Option(metavar="FILE.csv", help="Write which genes matched, and how.")
]
Force = Annotated[bool, typer.Option("--force", help="Go on where few genes of the panel are found.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of the same command.")]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON on stdout.")]

Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Number of workers that share the cells; restartable with --resume."),
]

Streaming = Annotated[
    bool | None,
    typer.Option("--streaming", help="Read neighbouring cells together, in bounded memory."),
]

# of `finetune`
SplitKey = Annotated[
    str | None,
    typer.Option(
        "--split-key", help="Column of obs that says 'train', 'validation' or 'test' for each cell."
    ),
]
Ontology = Annotated[
    Path | None,
    typer.Option(metavar="FILE.csv", help="Cell Ontology terms of the labels, of map-labels."),
]
LabelTree = Annotated[
    Path | None, typer.Option(metavar="FILE.csv", help="Wider types to back off to: label, parent.")
]
CoarseKey = Annotated[str | None, typer.Option(help="Column of obs with wider types to back off to.")]
Unlabelled = Annotated[
    list[Path] | None,
    typer.Option(
        "--unlabelled",
        metavar="FILE",
        help="Cells without labels to learn from as well, such as those to annotate; repeatable.",
    ),
]
TestFile = Annotated[
    Path | None,
    typer.Option("--test", metavar="FILE", help="Labelled cells to test on, in a file of their own."),
]

# of `build-corpus`
Sources = Annotated[
    list[Path],
    typer.Argument(metavar="SRC...", help="Files or folders of cells, or a manifest .csv."),
]
CorpusFolder = Annotated[Path | None, typer.Option("--output", metavar="CORPUS", help="The folder to write.")]
MinGenes = Annotated[int, typer.Option(min=0, help="Expressed genes a cell needs.")]
MinCells = Annotated[int, typer.Option(min=1, help="Cells of a file that must express a gene.")]
MaxMito = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Greatest mitochondrial share of a cell."),
]
DoubletKey = Annotated[
    str | None, typer.Option(help="Column of obs with doublet scores or calls: those cells are left out.")
]
ObsColumns = Annotated[
    list[str] | None, typer.Option("--column", help="Column of obs to keep, repeatable (all without it).")
]
KeepDuplicates = Annotated[bool, typer.Option("--keep-duplicates", help="Keep cells found more than once.")]
ShardCells = Annotated[int, typer.Option(min=1, help="Cells of a shard.")]
NumProc = Annotated[int, typer.Option(min=1, help="Files worked on side by side.")]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Stop with exit code 1 at a file that cannot be used. Without it such files are named, left out and "
        "counted as 'files skipped' (files_skipped, skipped_files of --json), and the exit code is 0.",
    ),
]
Verify = Annotated[bool, typer.Option("--verify", help="Compare a corpus (SRC) with its checksums.")]
