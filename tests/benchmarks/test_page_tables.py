"""Tables of the documentation: put between a page's markers; those of the kernels."""

from pathlib import Path

import pytest

import kernel_report
from page_tables import put, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def test_a_text_replaces_what_stands_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n")
    for text in ("first", "second"):
        put(text, "a", page)
    assert page.read_text() == "before\n<!-- a:begin -->\nsecond\n<!-- a:end -->\nafter\n"
    with pytest.raises(SystemExit, match="markers <!-- b:begin -->"):
        put("text", "b", page)


def test_numbers_stand_on_the_right():
    assert table(["way", "s"], [["ours", "1"]]) == "| way | s |\n| --- | ---: |\n| ours | 1 |"


@pytest.mark.parametrize("name", ["speed", "kernels", "encoders"])
def test_the_page_on_speed_has_its_markers(name):
    text = PAGE.read_text()
    assert -1 < text.find(f"<!-- {name}:begin -->") < text.find(f"<!-- {name}:end -->")


def test_a_kernel_has_a_row_and_a_gpu_a_column():
    row = {"dtype": "bfloat16", "kernel": "sum, keys", "registers": 254, "spilled": 1044, "shared": 51_200}
    row |= {"programs": 1}
    busy = {"microseconds": {"issue": 12.1, "tensor": 13.7}}
    rows = [row | {"target": "sm_80"}, row | busy | {"target": "sm_90", "spilled": 0}]
    text = kernel_report.markdown({"triton": "3.7", "kernels": rows})
    assert text.splitlines()[-1] == (
        "| sum, keys; bfloat16 | 254 / 1,044 / 51 / 1 | 254 / 0 / 51 / 1 | 14 (tensor) |"
    )
    assert "sm_90 (H100, H200)" in text and "sm_120" not in text
