"""Text tables for a terminal, for Markdown and for a notebook.

>>> print(text([["outliers", "AUROC"], ["letters", "0.9"]]))
outliers  AUROC
letters   0.9
"""

from __future__ import annotations

import html as markup
from collections.abc import Sequence

from robustood.inputs import check_flag, check_several, check_text

__all__ = ["html", "text"]

Cells = Sequence[Sequence[str]]


def text(cells: Cells, markdown: bool = False) -> str:
    """A table with aligned columns; its first row is the header.

    Args:
        cells: rows of equal length.
        markdown: as a Markdown table.
    """
    check_flag(markdown, "markdown")
    lines = _lines(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def html(cells: Cells) -> str:
    """The same table as HTML, for a notebook."""
    head, *body = [[markup.escape(cell) for cell in line] for line in _lines(cells)]
    rows = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in body]
    top = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _lines(cells: Cells) -> list[list[str]]:
    check_several(cells, "cells", "lines, each a list of cells")
    for line in cells:
        check_several(line, "cells: each", "texts", 0)
        for cell in line:
            check_text(cell, "cells: each of each line")
    if len({len(line) for line in cells}) > 1:
        raise ValueError(f"cells must be lines of equal length, got {[*map(len, cells)]}")
    return [list(line) for line in cells]
