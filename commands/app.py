"""
Serves the page in the browser for people who do not code: upload cells, choose a model, look, download.

Uploads and results stand in one temporary folder that is removed when the page ends, and are swept out of it after an
hour. Cells are read from HDF5 and weights from safetensors: nothing that a visitor sends is unpickled or run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..extras import require
from ..inference.shipped import SHIPPED
from ..inference.upload import Limits, loaded_model
from ..model_cards.space import export_space as write_space
from ..tokenization import InputError
from .console import say

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEPT_SECONDS = 3600


def sweep(folder: str | Path) -> None:
    """Remove what has stood in `folder` for too long."""
    for path in Path(folder).iterdir():
        if time.time() - path.stat().st_mtime <= KEPT_SECONDS:
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
    mcp: bool = False,
) -> None:
    """
    Serve the page until Ctrl-C or SIGTERM; an `OSError` where the port is taken.

    The models are those to choose from; on a loopback address any other can be typed too. With `mcp`, on such an
    address only, the page's functions are served to agents too, by the Model Context Protocol.
    """
    if mcp and host not in LOOPBACK:
        raise InputError(
            f"Agents name files of this machine, so they are served on it alone, not on {host}. Leave out mcp or "
            "host (--mcp, --host)."
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="scbert-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        # it makes its folder when it is imported
        gr = require("gradio")
        from .page import build_page

        if mcp:
            require("mcp")
        limits = Limits(max_cells, max_megabytes)
        page = build_page(models, folder, limits, any_model=host in LOOPBACK, for_agents=mcp)
        closed = threading.Event()
        # the fonts of the machine: others would be fetched from elsewhere
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        try:
            page.launch(
                server_name=host, server_port=port, max_file_size=f"{max_megabytes}mb", allowed_paths=[folder],
                prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False, theme=theme, footer_links=[],
                mcp_server=mcp,
            )  # fmt: skip
            threading.Thread(target=_keep_sweeping, args=(folder, closed), daemon=True).start()
            say(f"Open {page.local_url} in a browser; Ctrl-C ends the page.")
            if mcp:
                say(f"Agents find the same functions at {page.local_url.rstrip('/')}/gradio_api/mcp/")
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
    models = models or [str(folder) for folder in SHIPPED.values()]
    for model in models:
        loaded_model(str(model))
    if export_space is not None:
        limits = {name: options[name] for name in ("max_cells", "max_megabytes") if name in options}
        return write_space(export_space, models, limits, overwrite)
    serve(models, **options)
    return {}
