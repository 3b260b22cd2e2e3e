"""Tables line up, for a terminal, for Markdown and for a notebook."""

import pytest

from robustood import tables

CELLS = [["run", "AUROC"], ["a & b", "0.9"], ["c", ""]]


def test_columns_stand_under_their_heads():
    assert tables.text(CELLS) == "run    AUROC\na & b  0.9\nc"
    assert tables.text(CELLS, markdown=True).splitlines() == [
        "| run   | AUROC |",
        "| ----- | ----- |",
        "| a & b | 0.9   |",
        "| c     |       |",
    ]


def test_html_holds_the_same_cells():
    assert tables.html(CELLS) == (
        "<table><thead><tr><th>run</th><th>AUROC</th></tr></thead><tbody>"
        "<tr><td>a &amp; b</td><td>0.9</td></tr><tr><td>c</td><td></td></tr></tbody></table>"
    )


def test_lines_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"cells must be lines of equal length, got \[2, 1\]"):
        tables.text([["a", "b"], ["c"]])
    with pytest.raises(ValueError, match="cells must hold at least 1 of lines"):
        tables.html([])
