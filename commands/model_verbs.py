"""The verbs that judge, explain and show models; registered by cli.py, and as thin as its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .console import existing, run

PROTOCOL_HELP = (
    "cross-validation, leave-one-out (with --group-key), reference-size, few-shot, zero-shot (with --base), "
    "class-imbalance, novel-types, marker-deletion, modalities (RNA, ATAC, both) or hyperparameters."
)


def evaluate(
    protocol: Annotated[str, typer.Argument(metavar="PROTOCOL", help=PROTOCOL_HELP)],
    cells: Annotated[list[Path], typer.Argument(metavar="CELLS...", help="Labelled cells.")],
    label_key: opt.LabelKey,
    output: opt.OutputFolder,
    group_key: Annotated[
        str | None,
        typer.Option(help="Column of the groups to leave out, such as dataset or donor."),
    ] = None,
    label_map: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Other names for types: columns from and to.")
    ] = None,
    recipe: opt.Recipe = None,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pretrained model; its ablations join the baselines.")
    ] = None,
    epochs: opt.Epochs = None,
    settings: Annotated[
        str | None, typer.Option(metavar="JSON", help="Settings that go over the recipe's.")
    ] = None,
    variants: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Further models: names and their settings.")
    ] = None,
    baselines: Annotated[
        str | None, typer.Option(help="Baselines, separated by commas.", show_default="those installed")
    ] = None,
    folds: Annotated[int | None, typer.Option(min=1, help="Folds or draws.", show_default="5")] = None,
    folds_from: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of fold files to run instead.")
    ] = None,
    validate_on_group: Annotated[
        bool, typer.Option("--validate-on-group", help="Stop early on a held-out group (leave-one-out).")
    ] = False,
    markers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Genes that marker-deletion deletes, one a line.")
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Cells of a type in few-shot.", show_default="1,2,4,8,16"),
    ] = None,
    max_cells: Annotated[int | None, typer.Option(min=20, help="Take a part of the cells.")] = None,
    report: opt.Report = None,
    layer: opt.Layer = None,
    input: opt.Input = opt.InputKind.auto,
    seed: opt.Seed = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Compare a model with its baselines, on the same folds."""
    given = locals()
    existing(*cells, label_map, variants, folds_from, markers)
    from ..protocols import run_benchmark

    run(run_benchmark, listing=False, **given)


def explain(
    query: opt.Query,
    model: opt.Model,
    output: opt.OutputFolder,
    label_key: Annotated[
        str | None, typer.Option(help="Column of true types, for differential expression.")
    ] = None,
    cells_per_type: Annotated[
        int | None, typer.Option(min=1, help="Cells explained of each type.", show_default="20")
    ] = None,
    n_top: Annotated[
        int | None, typer.Option("--top", min=1, help="Genes listed of each type.", show_default="20")
    ] = None,
    n_steps: Annotated[
        int | None, typer.Option("--steps", min=2, help="Steps of the gradients.", show_default="32")
    ] = None,
    markers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Marker table: PanglaoDB, CellMarker, or your own.")
    ] = None,
    marker_names: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Names of the types in the marker table.")
    ] = None,
    gene_sets: Annotated[
        Path | None, typer.Option(metavar="FILE.gmt", help="Gene sets for enrichment, offline.")
    ] = None,
    layer: opt.Layer = None,
    input: opt.Input = opt.InputKind.auto,
    force: opt.Force = False,
    seed: opt.Seed = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Say which genes decide on each cell type, by three explanations, and which of them to trust."""
    given = locals()
    existing(query, markers, marker_names, gene_sets)
    from ..interpretation.explain_files import explain_file as job

    run(job, listing=False, **given)


def app(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|REPO_ID", help="Model to offer, repeatable (the shipped annotators without it)."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is open to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    max_cells: Annotated[int, typer.Option(min=1, help="Most cells of an upload.")] = 50_000,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest upload.")] = 500,
    mcp: Annotated[
        bool | None, typer.Option("--mcp", help="Serve the page's functions to agents (MCP) too.")
    ] = None,
    export_space: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the page as a Space of the Hub instead of serving it."),
    ] = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Annotate cells on a page in the browser: upload, look, download."""
    given = locals()
    from .app import serve_or_export

    given["models"] = given.pop("model")
    run(serve_or_export, **given)


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Model to send: a folder, or one that ships.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="NAME or OWNER/NAME on the Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Show it to everybody (private without it).")
    ] = False,
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "apache-2.0",
    message: Annotated[str, typer.Option(help="Title of the commit.")] = "Upload model",
    json: opt.Json = False,
) -> None:
    """Send a model, its code and its card to the Hugging Face Hub."""
    given = locals()
    from ..model_cards.push import push as job

    run(job, listing=False, **given)


def models(json: opt.Json = False) -> None:
    """List the annotators that ship, and what they know."""
    from ..inference.shipped import list_shipped as job

    run(job, listing=False, json=json)
