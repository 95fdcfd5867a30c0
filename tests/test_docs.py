"""Commands that the documentation names exist, with their options; its links lead somewhere."""

import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from scbert import ScBertConfig
from scbert.commands import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])


def joined(page):
    """Its text, with lines that a backslash ends in one."""
    return page.read_text().replace("\\\n", " ")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", joined(page), re.MULTILINE | re.DOTALL)


def commands():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "scbert":
                    yield pytest.param(words[1:], id=f"{page.name}: {line.split('#')[0].strip()[:60]}")


@pytest.mark.parametrize("words", commands())
def test_a_command_of_the_docs_is_understood(words):
    group = typer.main.get_command(cli.app)
    # parsed, not run
    group.commands[words[0]].make_context(words[0], words[1:])


def scripts():
    """By script: its options that the documentation names."""
    found = {}
    for page in PAGES:
        for script, rest in re.findall(r"python ((?:scripts|benchmarks)/\w+\.py)([^\n`#]*)", joined(page)):
            found.setdefault(script, set()).update(re.findall(r"(?<!\S)--[\w-]+", rest))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(scripts()))
def test_a_script_of_the_docs_has_the_options_that_are_told(script):
    """Most of them take hours or a GPU; tests of their own run them on little."""
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [option for option in scripts()[script] if not re.search(rf"{option}\b", done.stdout)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_the_docs_compiles(page):
    for block in blocks(page, "python"):
        if "--8<--" not in block:
            compile(block, page.name, "exec")


def test_every_verb_is_documented():
    told = "".join(page.read_text() for page in PAGES)
    assert not [name for name in typer.main.get_command(cli.app).commands if f"scbert {name}" not in told]


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"- (\S+\.md)", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_docs_lead_somewhere(page):
    for target, _, anchor in (
        link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    ):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]+", "-", heading.lower()).strip("-") for heading in headings}, (
                anchor
            )


def configuration_table():
    fields = {field.name: field for field in dataclasses.fields(ScBertConfig)}
    rows = ["| field | type | default |", "|---|---|---|"]
    for name, kind in inspect.get_annotations(ScBertConfig).items():
        kind = kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")
        rows.append(f"| `{name}` | `{kind.replace('|', 'or')}` | `{fields[name].default!r}` |")
    return "\n".join(rows)


def test_types_and_defaults_of_the_configuration_are_told():
    # where this fails, the page takes the table that the message shows
    assert configuration_table() in (ROOT / "docs" / "api.md").read_text(), configuration_table()
