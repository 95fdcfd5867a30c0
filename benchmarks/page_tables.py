"""Tables of what was measured, between the markers of a page: `<!-- name:begin -->` and `<!-- name:end -->`."""

import argparse
from pathlib import Path


def table(header: list[str], rows: list[list[str]]) -> str:
    """Rows as Markdown, all columns but the first on the right."""
    aligned = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, aligned, *rows))


def put(text: str, name: str, page: Path) -> None:
    """Replace what stands between a page's markers of a name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begun, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise SystemExit(f"{page} needs the markers {begin} and {end}.")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def files_told(description: str) -> tuple[Path, Path]:
    """Figures to read (JSON) and page to write, from the command line."""
    parser = argparse.ArgumentParser(description=description.strip().partition("\n")[0])
    parser.add_argument("figures", type=Path, help="JSON of the benchmark.")
    parser.add_argument("page", type=Path, help="Markdown whose part between the markers is replaced.")
    options = parser.parse_args()
    return options.figures, options.page
