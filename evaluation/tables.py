"""A table of text, shown in a terminal, in Markdown and in HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..extras import require


@dataclass(frozen=True)
class TextTable:
    """
    Rows of text under a title; the first column is text, the others are numbers and stand on the right.

    `marked` are the rows that need attention, coloured where colours are.

    Examples
    --------
    >>> print(TextTable("Scores", ["model", "accuracy"], [["scBERT", "0.9"]]).markdown())
    **Scores**
    <BLANKLINE>
    | model | accuracy |
    |---|---:|
    | scBERT | 0.9 |
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()

    def markdown(self) -> str:
        """The table as GitHub's Markdown."""
        rule = "|---|" + "---:|" * (len(self.columns) - 1)
        lines = [_markdown_row(self.columns), rule, *map(_markdown_row, self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(lines)

    def rich(self) -> Any:
        """The table for a `rich.console.Console`."""
        table = require("rich.table").Table(title=self.title)
        text = require("rich.text").Text
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=not number)
        for number, row in enumerate(self.rows):
            table.add_row(*map(text, row), style="yellow" if number in self.marked else None)
        return table

    def html(self) -> str:
        """The table as HTML, every text escaped."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join(
            f"<tr{' class=marked' if number in self.marked else ''}>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in row)
            + "</tr>"
            for number, row in enumerate(self.rows)
        )
        return (
            f"<h3>{escape(self.title)}</h3><div class=wide><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>"
        )


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
