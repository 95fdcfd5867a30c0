"""Annotation beside celltypist: what is timed runs, and how the figures are put."""

import pytest
from rich.console import Console

import annotate_speed


def test_a_table_tells_the_start_from_the_cells():
    found = {
        "scbert": {"10": [2.0, 2.0, 9.0], "110": [4.0, 3.0, 3.0]},
        "celltypist": {"10": [3.0], "110": [2.0]},
    }
    console = Console(width=100, record=True)
    console.print(annotate_speed.table(found, [10, 110]))
    ours, theirs = console.export_text().splitlines()[4:6]
    assert ours.replace("│", "").split() == ["scbert", "2.00", "3.00", "100"]
    assert theirs.replace("│", "").split() == ["celltypist", "3.00", "2.00", "-"]


@pytest.mark.slow
def test_every_way_annotates_the_same_files(tmp_path):
    found = annotate_speed.compare(tmp_path, [20, 60], n_genes=17_000, n_expressed=900, rounds=1)
    assert set(found) >= {"scbert"}
    assert all(len(times) == 1 and min(times) > 0 for way in found.values() for times in way.values())


def test_what_fails_is_shown():
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        annotate_speed.timed(["-c", "1 / 0"])
