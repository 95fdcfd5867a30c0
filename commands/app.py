"""
The page in the browser for people who do not code: upload cells, choose a model, look, download.

Uploads and results stand in one temporary folder that is removed when the page ends, and are swept out of it after an
hour. Cells are read from HDF5 and weights from safetensors: nothing that a visitor sends is unpickled or run.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..extras import require
from ..inference.shipped import model_or_shipped
from ..inference.upload import Limits, annotate_upload, loaded_model
from ..model_cards.space import export_space as write_space
from ..tokenization import InputError
from .console import explain, say

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEPT_SECONDS = 3600
VALUES = {"find out": "auto", "raw counts": "counts", "log1p of counts per 10,000": "log1p"}
INTRODUCTION = """# Cell types by scBERT
Upload cells (.h5ad, or 10x .h5), press **Annotate**, and take the annotated file home. Up to {cells:,} cells and
{megabytes:,} MB. Files are deleted after an hour."""


def kind_message(error: Exception, upload: str | Path | None = None) -> str:
    """What a visitor is told of an error: the paragraph that mends it, without this machine's paths."""
    message = explain(error)
    if message is None:
        logger.error("".join(traceback.format_exception(error)))
        message = (
            "Something went wrong here, and it is not your file's fault. Please tell whoever runs this page."
        )
    if upload is not None:
        message = message.replace(str(upload), Path(upload).name)
    message = message.replace(tempfile.gettempdir(), "")
    return f"### This did not work\n{message}"


def build_page(
    models: Sequence[str], folder: str | Path, limits: Limits | None = None, any_model: bool = False
) -> Any:
    """
    The page as `gradio.Blocks`, ready to be launched.

    Parameters
    ----------
    models
        Model folders or names on the Hub to choose from.
    folder
        For results.
    limits
        Of uploads.
    any_model
        Let visitors type other folders and names: for a page that only its owner can reach.
    """
    gr = require("gradio", "app")
    limits = limits or Limits()
    offered = _names(models)

    def annotate(upload, model, values, progress=gr.Progress(track_tqdm=True)):  # noqa: B008 - gradio looks for it there
        try:
            if upload is None:
                raise InputError("Choose a file first.")
            progress(0, desc="Reading")
            result = annotate_upload(upload, offered.get(model, model), folder, limits, VALUES[values])
        except Exception as error:
            return kind_message(error, upload), hidden(), hidden(), hidden()
        picture = gr.update(value=result.picture and str(result.picture), visible=result.picture is not None)
        table = gr.update(
            value={"headers": list(result.columns), "data": [list(row) for row in result.rows]}, visible=True
        )
        return result.message, picture, table, gr.update(value=str(result.path), visible=True)

    def hidden():
        return gr.update(value=None, visible=False)

    with gr.Blocks(title="scBERT: cell types", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION.format(cells=limits.cells, megabytes=limits.megabytes))
        with gr.Row():
            upload = gr.File(label="Cells", file_types=[".h5ad", ".h5"], type="filepath")
            with gr.Column():
                model = gr.Dropdown(list(offered), label="Model", allow_custom_value=any_model)
                values = gr.Radio(list(VALUES), value="find out", label="The values are")
                button = gr.Button("Annotate", variant="primary")
        status = gr.Markdown()
        picture = gr.Image(
            visible=False, show_label=False, type="filepath", buttons=["download", "fullscreen"]
        )
        table = gr.Dataframe(visible=False, show_label=False, interactive=False)
        download = gr.DownloadButton("Download the annotated file", visible=False)
        button.click(
            annotate, [upload, model, values], [status, picture, table, download], api_name="annotate"
        )
    # one at a time: the model takes all cores as it is
    return page.queue(default_concurrency_limit=1, max_size=20)


def _names(models: Sequence[str]) -> dict[str, str]:
    """Models by the name a visitor sees: of a folder its own, unless two are called the same."""
    short = [Path(model).resolve().name if Path(model).is_dir() else str(model) for model in models]
    return {name if short.count(name) == 1 else str(model): str(model) for name, model in zip(short, models)}


def sweep(folder: str | Path, seconds: float = KEPT_SECONDS) -> None:
    """Remove what has stood in `folder` for longer than `seconds`."""
    for path in Path(folder).iterdir():
        if time.time() - path.stat().st_mtime <= seconds:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _keep_sweeping(folder: str, closed: threading.Event) -> None:
    while not closed.wait(KEPT_SECONDS / 12):
        sweep(folder)


def serve(
    models: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 7860,
    max_cells: int = Limits.cells,
    max_megabytes: int = Limits.megabytes,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """
    Serve the page until Ctrl-C or SIGTERM.

    Parameters
    ----------
    models
        What can be chosen, loaded one after the other first. On a loopback address any other can be typed too.
    host, port
        Where to listen.
    max_cells, max_megabytes
        Limits of uploads.
    on_start
        Called with the address once the page answers.

    Raises
    ------
    InputError
        When a model cannot be used.
    OSError
        When the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="scbert-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        gr = require("gradio", "app")
        page = build_page(models, folder, Limits(max_cells, max_megabytes), any_model=host in LOOPBACK)
        closed = threading.Event()
        # the fonts of the machine: others would be fetched from elsewhere
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        try:
            page.launch(
                server_name=host, server_port=port, max_file_size=f"{max_megabytes}mb", allowed_paths=[folder],
                prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False, theme=theme, footer_links=[],
            )  # fmt: skip
            threading.Thread(target=_keep_sweeping, args=(folder, closed), daemon=True).start()
            (on_start or (lambda url: say(f"Open {url} in a browser; Ctrl-C ends the page.")))(page.local_url)
            page.block_thread()
        finally:
            closed.set()
            page.close(verbose=False)


def serve_or_export(
    models: Sequence[str] | None = None,
    export_space: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """What `scbert app` does: serve the page, or write it as a Space of the Hub."""
    models = models or [str(model_or_shipped(None))]
    for model in models:
        loaded_model(str(model))
    if export_space is not None:
        limits = {name: options[name] for name in ("max_cells", "max_megabytes") if name in options}
        return write_space(export_space, models, limits, overwrite)
    serve(models, **options)
    return {}
