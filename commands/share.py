"""The verbs that show a model to others (a page in the browser, the Hub), and those that ship; see cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .console import existing, run


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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Model folder to send.")],
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
    existing(folder)
    from ..model_cards.push import push as job

    run(job, listing=False, **given)


def models(json: opt.Json = False) -> None:
    """List the annotators that ship, and what they know."""
    from ..inference.shipped import list_shipped as job

    run(job, listing=False, json=json)
