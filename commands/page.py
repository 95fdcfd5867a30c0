"""What `scbert app` shows: cells in; types, genes, a picture and files out."""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..data.labels import UNASSIGNED
from ..evaluation.embedding_plot import COLOURS, UNASSIGNED_COLOUR
from ..inference.report import types_table
from ..inference.upload import (
    OWN_MATRIX,
    AnnotatedUpload,
    Limits,
    annotate_upload,
    drawn_cells,
    knows_sample,
    loaded_model,
    matrices_of,
    places_of,
    reassigned,
    write_report,
    write_sample,
)
from ..interpretation.explain_types import explain as explain_types
from ..tokenization import InputError
from .console import explain

logger = logging.getLogger(__name__)

VALUES = {"detect": "auto", "raw counts": "counts", "log1p of counts per 10,000": "log1p"}
BY_TYPE, BY_CONFIDENCE, BY_GENE = "cell type", "confidence", "a gene"
AXES = {"x": "UMAP 1", "y": "UMAP 2", "tooltip": "all", "height": 460}
INTRODUCTION = """# Cell types by scBERT
Upload cells (.h5ad, or 10x .h5), press **Annotate**, and take the annotated file home. Up to {cells:,} cells and
{megabytes:,} MB. Files are deleted after an hour."""
WAITING = "The cell types will appear here."
# cells and steps that give the genes of a type in seconds
EXPLAINED = {"cells_per_type": 20, "n_steps": 16, "n_top": 20}
# what the command and Python are told, and a visitor cannot type
OPTIONS = (r"\s*\([^()]*--[^()]*\)", r"\s*To go on regardless:[^.]*\.", r"\s*The input also has:[^.]*\.")
CHOICES = {
    "input='counts'": "choose 'raw counts' above",
    "input='log1p'": "choose 'log1p of counts per 10,000' above",
    "layer='raw'": "choose 'raw' above",
}


def kind_message(error: Exception, upload: str | Path | None = None) -> str:
    """What a visitor is told of an error: the paragraph that mends it, without options and this machine's paths."""
    message = explain(error)
    if message is None:
        logger.error("".join(traceback.format_exception(error)))
        message = (
            "Something went wrong here, and it is not your file's fault. Please tell whoever runs this page."
        )
    for said, shown in CHOICES.items():
        message = message.replace(f"say {said}", shown).replace(said, shown)
    for pattern in OPTIONS:
        message = re.sub(pattern, "", message)
    if upload is not None:
        message = message.replace(str(upload), Path(upload).name)
    message = message.replace(tempfile.gettempdir(), "")
    return f"### This did not work\n{message}"


@contextlib.contextmanager
def errors_told_to_agents(cells: str) -> Iterator[None]:
    """What a visitor is told of an error, as the answer of a function for agents."""
    try:
        yield
    except Exception as error:
        raise gr.Error(kind_message(error, cells).partition("\n")[2], print_exception=False) from error


def build_page(
    models: Sequence[str],
    folder: str | Path,
    limits: Limits | None = None,
    any_model: bool = False,
    for_agents: bool = False,
) -> Any:
    """
    The page as `gradio.Blocks`, ready to be launched; results go to `folder`.

    With `any_model` visitors may type other folders and names than the `models`: for a page that only its owner can
    reach. For such a page only, too, are the functions `for_agents`: they take paths of this machine's files.
    """
    limits, offered = limits or Limits(), names_of(models)
    page = Page(offered, Path(folder), limits)
    with gr.Blocks(title="scBERT: cell types", analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION.format(cells=limits.cells, megabytes=limits.megabytes))
        page.lay_out_inputs(any_model)
        page.lay_out_results()
        page.connect()
        if for_agents:
            gr.api(page.annotate_cells, api_name="annotate_cells")
            gr.api(page.genes_of_types, api_name="genes_of_types")
    # one at a time: the model takes all cores as it is
    return blocks.queue(default_concurrency_limit=1, max_size=20)


def names_of(models: Sequence[str]) -> dict[str, str]:
    """Models by the name a visitor sees: of a folder its own, unless two are called the same."""
    short = [Path(model).resolve().name if Path(model).is_dir() else str(model) for model in models]
    return {name if short.count(name) == 1 else str(model): str(model) for name, model in zip(short, models)}


def known_types(model: str) -> str:
    """One line on what a model knows."""
    labels = loaded_model(model).labels
    return f"Knows {len(labels)} types: {', '.join(labels)}."


def result_message(annotated: AnnotatedUpload) -> str:
    """Sentences in Markdown on annotated cells."""
    summary = annotated.summary
    lines = [
        f"**{summary['cells']:,} cells annotated**, {summary['unassigned']:,} of them left unassigned (confidence "
        f"below {annotated.threshold:.2f}). {summary['genes_found']:,} of the model's {summary['genes_of_model']:,} "
        "genes were found.",
        *(f"⚠ {note}" for note in summary["notes"]),
        "Click a type to see the genes that decide on it.",
    ]
    return "\n\n".join(lines)


class Page:
    """The parts of the page and what they do, in the order in which a visitor meets them."""

    def __init__(self, offered: dict[str, str], folder: Path, limits: Limits):
        self.offered, self.folder, self.limits = offered, folder, limits

    def lay_out_inputs(self, any_model: bool) -> None:
        with gr.Row():
            with gr.Column():
                self.upload = gr.File(label="Cells", file_types=[".h5ad", ".h5"], type="filepath", height=170)
                names = list(self.offered)
                known = knows_sample(self.offered[names[0]], self.folder)
                self.sample = gr.Button("Try a sample: 700 blood cells", size="sm", visible=known)
            with gr.Column():
                self.model = gr.Dropdown(names, label="Model", allow_custom_value=any_model)
                self.knows = gr.Markdown(known_types(self.offered[names[0]]))
                with gr.Row():
                    self.values = gr.Radio(list(VALUES), value="detect", label="The values are")
                    self.matrix = gr.Dropdown([OWN_MATRIX], label="They stand in", visible=False)
        self.button = gr.Button("Annotate", variant="primary")

    def lay_out_results(self) -> None:
        self.annotated, self.places = gr.State(), gr.State()
        # high enough for the bar that is drawn over it
        self.status = gr.Markdown(WAITING, min_height=110, container=True)
        with gr.Column(visible=False) as self.results:
            with gr.Row():
                self.h5ad = gr.DownloadButton("Download the annotated file", variant="primary")
                self.csv = gr.DownloadButton("Labels as CSV")
                self.report = gr.DownloadButton("Report", visible=False)
            with gr.Row():
                self.table = gr.Dataframe(label="Cell types", interactive=False, scale=3)
                self.genes = gr.Dataframe(label="Genes", interactive=False, visible=False, scale=2)
            self.threshold = gr.Slider(
                0, 1, step=0.01, label="Threshold", info="Cells whose confidence is below it are unassigned."
            )
        with gr.Column(visible=False) as self.picture:
            with gr.Row():
                self.colour = gr.Radio([BY_TYPE, BY_CONFIDENCE, BY_GENE], value=BY_TYPE, label="Colour by")
                self.gene = gr.Textbox(label="Gene", placeholder="CD3E", submit_btn="Show", visible=False)
            self.plot = gr.ScatterPlot(**AXES)

    def connect(self) -> None:
        private = {"api_visibility": "private"}
        facts = [self.table, self.h5ad, self.csv]
        told = [self.knows, self.sample]
        drawing = {
            "fn": self._draw,
            "inputs": [self.annotated, self.places, self.colour, self.gene],
            "outputs": [self.status, self.plot],
            **private,
        }
        reporting = (self._report, [self.annotated, self.places], self.report)
        self.model.change(self._tell_known, self.model, told, show_progress="hidden", **private)
        self.upload.change(self._offer_matrices, self.upload, self.matrix, show_progress="hidden", **private)
        self.sample.click(self._take_sample, None, [self.upload, self.values], **private)
        self.button.click(
            self._annotate,
            [self.upload, self.model, self.values, self.matrix],
            [self.status, self.results, self.picture, *facts, self.annotated, self.threshold, self.genes],
            show_progress_on=self.status,
            **private,
        ).success(self._place, self.annotated, [self.places, self.picture], **private).success(
            **drawing
        ).success(*reporting, **private)
        self.threshold.input(
            self._reassign,
            [self.annotated, self.threshold],
            [self.status, *facts, self.annotated],
            trigger_mode="always_last",
            **private,
        ).success(**drawing).success(*reporting, **private)
        for change in (self.colour.change, self.gene.submit):
            change(lambda by: gr.update(visible=by == BY_GENE), self.colour, self.gene, **private).success(
                **drawing
            )
        self.table.select(self._explain, self.annotated, [self.status, self.genes], **private)

    def _tell_known(self, model: str) -> tuple[str, Any]:
        model = self.offered.get(model, model)
        try:
            return known_types(model), gr.update(visible=knows_sample(model, self.folder))
        except Exception as error:
            return kind_message(error), gr.update(visible=False)

    def _offer_matrices(self, upload: str | None) -> Any:
        names = [OWN_MATRIX]
        if upload is not None:
            try:
                names = matrices_of(upload) or names
            except Exception:
                # what is wrong with the file is told when it is to be annotated
                logger.debug("no matrices could be listed", exc_info=True)
        return gr.update(choices=names, value=names[0], visible=names != [OWN_MATRIX])

    def _take_sample(self) -> tuple[str, str]:
        return str(write_sample(self.folder)), "log1p of counts per 10,000"

    def _annotate(self, upload, model, values, matrix, progress=gr.Progress(track_tqdm=True)) -> tuple:  # noqa: B008 - gradio looks for it there
        shown, hidden = gr.update(visible=True), gr.update(visible=False)
        try:
            if upload is None:
                raise InputError("Choose a file first.")
            progress(0, desc="Reading")
            annotated = self._annotated(upload, self.offered.get(model, model), VALUES[values], matrix)
        except Exception as error:
            return kind_message(error, upload), hidden, hidden, *[gr.update()] * 3, None, gr.update(), hidden
        return (
            result_message(annotated), shown, hidden, *self._facts(annotated), annotated, annotated.threshold, hidden
        )  # fmt: skip

    def _annotated(self, upload: str, model: str, values: str, matrix: str) -> AnnotatedUpload:
        return annotate_upload(upload, model, self.folder, self.limits, values, matrix)

    def _facts(self, annotated: AnnotatedUpload) -> tuple:
        table = types_table(annotated.labels, annotated.confidence)
        value = {"headers": list(table.columns), "data": [list(row) for row in table.rows]}
        return value, str(annotated.path), str(annotated.csv)

    def _place(self, annotated: AnnotatedUpload | None) -> tuple:
        places = None if annotated is None else places_of(annotated)
        found = places is not None and places[0] is not None
        return places if found else None, gr.update(visible=found)

    def _report(self, annotated: AnnotatedUpload | None, places: tuple | None) -> Any:
        if places is None:
            return gr.update(visible=False)
        return gr.update(value=str(write_report(annotated, places)), visible=True)

    def _draw(self, annotated: AnnotatedUpload | None, places: tuple | None, colour: str, gene: str) -> tuple:
        if annotated is None or places is None or (colour == BY_GENE and not gene):
            return gr.update(), gr.update()
        gene = gene.strip() if colour == BY_GENE else None
        try:
            cells = drawn_cells(annotated, places, gene)
        except InputError as error:
            return kind_message(error), gr.update()
        types = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(annotated.names)}
        types[UNASSIGNED] = UNASSIGNED_COLOUR
        column = {BY_TYPE: "type", BY_CONFIDENCE: "confidence"}.get(colour, gene)
        plot = gr.ScatterPlot(
            cells,
            color=column,
            color_map=types if column == "type" else None,
            title=f"{len(cells):,} cells: {places[2]}",
            **AXES,
        )
        return gr.update(), plot

    def _reassign(self, annotated: AnnotatedUpload | None, threshold: float) -> tuple:
        if annotated is None:
            return (*[gr.update()] * 4, None)
        annotated = reassigned(annotated, threshold)
        return result_message(annotated), *self._facts(annotated), annotated

    def _explain(self, annotated: AnnotatedUpload, event: gr.SelectData) -> tuple:
        cell_type = str(event.row_value[0])
        if cell_type == UNASSIGNED:
            return gr.update(), gr.update(visible=False)
        try:
            genes = self._genes(annotated, [cell_type])
        except Exception as error:
            return kind_message(error, annotated.upload), gr.update(visible=False)
        columns = ["gene", "score", "z_score"]
        return gr.update(), gr.update(
            value=genes[columns].round(2), label=f"Genes: {cell_type}", visible=True
        )

    def _genes(self, annotated: AnnotatedUpload, cell_types: list[str] | None) -> Any:
        return explain_types(
            annotated.path, loaded_model(annotated.model), cell_types=cell_types, layer=annotated.layer,
            input=annotated.values, force=True, **EXPLAINED,
        )  # fmt: skip

    def annotate_cells(self, cells: str, model: str = "", values: str = "auto", layer: str = "X") -> dict:
        """Name the cell type of every cell of a single-cell file.

        Args:
            cells: path of an .h5ad or 10x .h5 file of human cells.
            model: one of the models that the page offers; the first of them if left out.
            values: what the values are: "auto", "counts" or "log1p".
            layer: where the values stand: "X", "raw" or the name of a layer.

        Returns:
            cells, cells per type, mean confidence, warnings, and the paths of the annotated .h5ad and a .csv of labels.
        """
        with errors_told_to_agents(cells):
            annotated = self._annotated(cells, self._model(model), values, layer)
            kept = ("cells", "cells_per_label", "mean_confidence", "genes_found", "genes_of_model", "notes")
            facts = {name: annotated.summary[name] for name in kept}
            return {**facts, "annotated": str(annotated.path), "csv": str(annotated.csv)}

    def genes_of_types(self, cells: str, model: str = "", values: str = "auto", layer: str = "X") -> dict:
        """Name the genes that decide on each cell type that is found in a single-cell file.

        Args:
            cells: path of an .h5ad or 10x .h5 file of human cells.
            model: one of the models that the page offers; the first of them if left out.
            values: what the values are: "auto", "counts" or "log1p".
            layer: where the values stand: "X", "raw" or the name of a layer.

        Returns:
            cell type -> its genes, the most important first.
        """
        with errors_told_to_agents(cells):
            table = self._genes(self._annotated(cells, self._model(model), values, layer), None)
            return {name: list(rows["gene"]) for name, rows in table.groupby("cell_type", sort=False)}

    def _model(self, name: str) -> str:
        if name and name not in self.offered:
            raise InputError(f"There is no model {name!r} here; there are: {', '.join(self.offered)}.")
        return self.offered[name or next(iter(self.offered))]
