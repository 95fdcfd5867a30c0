"""One self-contained HTML file of tables and pictures: no link leaves it."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from .tables import TextTable

STYLE = """
:root { color-scheme: light dark; --line: #8884; --warn: #b25b00; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.marked td { color: var(--warn); }
.warning { border-left: 4px solid var(--warn); padding: .2rem .8rem; margin: .6rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; background: #fff; color: #222; padding: .6rem; border: 1px solid var(--line); max-width: 100%;
  box-sizing: border-box; }
figure img { max-width: 100%; height: auto; display: block; } figcaption { font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { opacity: .7; } dd { margin: 0; }
"""


@dataclass
class Section:
    """
    A part of a report, in the order of its fields.

    Warnings stand out, facts are shown as a list; `pictures` are paths of PNGs or matplotlib figures, by caption.
    """

    title: str
    sentences: Sequence[str] = ()
    warnings: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    tables: Sequence[TextTable] = ()
    pictures: dict[str, Any] = field(default_factory=dict)

    def html(self) -> str:
        """The section; every text is escaped."""
        parts = [f"<section><h2>{escape(self.title)}</h2>"]
        parts += [f"<p>{escape(sentence)}</p>" for sentence in self.sentences]
        parts += [f'<p class="warning">⚠ {escape(warning)}</p>' for warning in self.warnings]
        if self.facts:
            rows = (f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in self.facts.items())
            parts.append(f"<dl>{''.join(rows)}</dl>")
        parts += [table.html() for table in self.tables]
        if self.pictures:
            drawn = (_figure(caption, picture) for caption, picture in self.pictures.items())
            parts.append(f'<div class="pictures">{"".join(drawn)}</div>')
        return "\n".join([*parts, "</section>"])


def report_html(title: str, sections: Sequence[Section]) -> str:
    """A whole page, pictures inside it as data."""
    body = "\n".join(section.html() for section in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _figure(caption: str, picture: Any) -> str:
    if isinstance(picture, str | Path):
        data = Path(picture).read_bytes()
    else:
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", dpi=92)
        data = buffer.getvalue()
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    text = escape(caption, quote=True)
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'
