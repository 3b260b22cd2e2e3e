"""The directive ``leaderboard``: a table of all kept standard evaluations, which a few lines of script make sortable.

Each file ``data/results/leaderboard_NAME.json`` is a :class:`robustood.evaluate.StandardReport`, and gives one row for
each of its sets of outliers.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import NamedTuple

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from robustood import artefacts
from robustood.evaluate import StandardReport
from robustood.metrics import Estimate

PREFIX = "leaderboard_"
HEADS = (
    "detector", "network", "data", "outliers", "set", "protocol", "AUROC clean", "in attacked", "out attacked",
    "both attacked", "FPR (both)", "findings", "passes",
)  # fmt: skip
RADIUS = re.compile(r"(\w+)\(eps=([\d.e-]+), box=[(\[]0, 1[)\]]\)")


class Cell(NamedTuple):
    """What a cell shows, and the number by which its column is sorted, if it is one."""

    text: str
    number: float | None = None


def names() -> list[str]:
    """The kept results that are rows of the table."""
    return [name for name in artefacts.names("results") if name.startswith(PREFIX)]


def rows(report: StandardReport) -> Iterator[list[Cell]]:
    """The cells of a report, for each set of outliers."""
    settings = report["both"].settings
    known = [settings["detector"], settings.get("network", "")]
    for row in report["both"].rows:
        areas = [each[row["set"]]["auroc"] for each in report.reports.values()]
        yield [
            *map(Cell, known),
            Cell(f"{settings.get('data', '')} ({row['n_in']:,})".strip()),
            Cell(f"{row['set']} ({row['n_out']:,})"),
            Cell(radius(settings["within"])),
            Cell(report.version),
            *map(rate, areas),
            rate(row["fpr"]),
            findings(report),
            passes(report),
        ]


def rate(value: Estimate) -> Cell:
    """A rate with its interval."""
    return Cell(f"{value:.3f}", value.value)


def radius(within: str) -> str:
    """A perturbation set in short; radii that are whole grey levels as fractions."""

    def short(found: re.Match[str]) -> str:
        levels = 255 * float(found[2])
        whole = abs(levels - round(levels)) < 1e-6
        return f"{found[1]} {round(levels)}/255" if whole else f"{found[1]} {float(found[2]):g}"

    return RADIUS.sub(short, within)


def findings(report: StandardReport) -> Cell:
    """What the checks found: errors, then warnings."""
    errors, warnings = report.findings.errors, report.findings.warnings
    told = [
        f"{len(found)} {kind}{'s' * (len(found) > 1)}: {', '.join(each.check for each in found)}"
        for kind, found in (("error", errors), ("warning", warnings))
        if found
    ]
    return Cell("; ".join(told) or "none", 1000 * len(errors) + len(warnings))


def passes(report: StandardReport) -> Cell:
    """Forward and backward passes per input, over all attacks."""
    spent = sum(row["forwards"] + row["backwards"] for row in report.attacks)
    each = spent / report.attacks[0]["inputs"]
    return Cell(f"{each:,.0f}", each)


def table() -> str:
    """The table as HTML; without a script it is a plain one."""
    kept = [StandardReport.from_json(artefacts.find("results", name)) for name in names()]
    lines = [line for report in kept for line in rows(report)]
    lines.sort(key=lambda line: -(line[HEADS.index("both attacked")].number or 0))
    head = "".join(f'<th scope="col">{html.escape(each)}</th>' for each in HEADS)
    body = "".join(f"<tr>{''.join(map(marked, line))}</tr>" for line in lines)
    caption = "<caption>Detectors by the standard evaluation, most robust first</caption>"
    return (
        f'<div class="leaderboard" tabindex="0"><table class="table">{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def marked(cell: Cell) -> str:
    """A cell as HTML."""
    key = "" if cell.number is None else f' data-number="{cell.number:.6g}"'
    return f"<td{key}>{html.escape(cell.text)}</td>"


class Leaderboard(SphinxDirective):
    """``{leaderboard}`` without arguments."""

    def run(self) -> list[nodes.Node]:
        for name in names():
            self.env.note_dependency(str(artefacts.find("results", name)))
        return [nodes.raw("", table(), format="html")]


def add_script(
    app: Sphinx, page: str, template: str, context: dict[str, object], doctree: nodes.document
) -> None:
    """Load the script on pages that show the table."""
    if doctree and any("leaderboard" in raw.astext() for raw in doctree.findall(nodes.raw)):
        app.add_js_file("leaderboard.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("leaderboard", Leaderboard)
    app.connect("html-page-context", add_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
