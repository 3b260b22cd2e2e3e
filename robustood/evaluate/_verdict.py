"""What the standard evaluation found: four reports, the attacks one by one, and the findings of the checks."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from robustood import tables
from robustood.checkpoints import Json, as_csv
from robustood.evaluate._report import Report, Row, Side, in_order
from robustood.evaluate._text import as_text, flat, parsed, written
from robustood.inputs import check_flag, check_text
from robustood.sanity import Finding, Findings

_KEYS = ("version", "reports", "attacks", "findings", "sha256")


@dataclass(frozen=True)
class StandardReport:
    """The result of :func:`standard`: ``report["both"]`` is the :class:`Report` with both sides attacked.

    Attributes:
        version: of the protocol.
        reports: by side: ``"none"``, ``"in"``, ``"out"``, ``"both"``.
        attacks: one row per attack, the clean scores first: ``attack``; ``auroc``, the mean over the sets with both
            sides attacked, after this attack and all before it; ``inputs``, the number attacked; ``forwards`` and
            ``backwards``, the passes through the detector, counted in inputs.
        findings: of :func:`robustood.sanity.check`.
        sha256: of the weights and of each set of inputs.
    """

    version: str
    reports: dict[Side, Report]
    attacks: list[Row]
    findings: Findings
    sha256: dict[str, str]

    def __getitem__(self, side: str) -> Report:
        if side in self.reports:
            return self.reports[side]
        raise KeyError(f"no side {side!r}; choose one of: {', '.join(self.reports)}")

    def __iter__(self) -> Iterator[Side]:
        """The names of the sides, as of a dict."""
        return iter(self.reports)

    def labelled(self, **labels: str) -> StandardReport:
        """The same report with words for a reader among its settings, such as ``network="small CNN, ALOE"``."""
        for name, text in labels.items():
            check_text(text, f"labels[{name!r}]")
        named = {
            side: replace(each, settings=each.settings | labels)
            for side, each in self.reports.items()
        }
        return replace(self, reports=named)

    def to_json(self, path: str | Path | None = None, *, scores: bool = True) -> str:
        """The result as JSON.

        Args:
            path: file that receives it as well.
            scores: keep the scores; see :meth:`Report.to_json`.
        """
        check_flag(scores, "scores")
        kept = {
            "version": self.version,
            "sha256": self.sha256,
            "attacks": [dict(row) for row in self.attacks],
            "findings": [asdict(each) for each in self.findings],
            "reports": {side: each.to_dict(scores) for side, each in self.reports.items()},
        }
        return written(as_text(kept), path)

    @classmethod
    def from_json(cls, text_or_path: str | Path) -> StandardReport:
        """The result that :meth:`to_json` wrote.

        Args:
            text_or_path: the JSON, which begins with "{", or the path of its file.

        Raises:
            FileNotFoundError: for a path without a file.
            ValueError: for text or a file that is not the result of :func:`standard`.
        """
        return parsed(text_or_path, _KEYS, "StandardReport", cls.from_dict)

    @classmethod
    def from_dict(cls, kept: Json) -> StandardReport:
        """The result from the content of its JSON."""
        reports: dict[Side, Report] = {
            side: Report.from_dict(kept["reports"][side]) for side in get_args(Side)
        }
        rows = [Row(row) for row in kept["attacks"]]
        findings = Findings(tuple(Finding(**each) for each in kept["findings"]))
        return cls(kept["version"], reports, rows, findings, kept["sha256"])

    def to_csv(self, path: str | Path | None = None) -> str:
        """The rows of all sides as CSV, with the side in the first column; also written to ``path`` if given."""
        rows = [
            flat(Row(side=side, **in_order(row)))
            for side, each in self.reports.items()
            for row in each.rows
        ]
        return written(as_csv(rows), path)

    def cells(self) -> list[list[str]]:
        """Header and rows of the table by sets, as text."""
        head = ["outliers", *(_TITLES[side] for side in self.reports)]
        body = []
        for row in self["both"].rows:
            areas = [each[row["set"]]["auroc"] for each in self.reports.values()]
            shown = [f"{area.value:.3f}" for area in areas[:-1]] + [f"{areas[-1]:.3f}"]
            body.append([row["set"], *shown, f"{row['fpr']:.3f}", f"{row['fpr_attacked']:.3f}"])
        return [[*head, "FPR (clean threshold)", "FPR (threshold as attacked)"], *body]

    def attack_cells(self) -> list[list[str]]:
        """Header and rows of the table by attacks, as text."""
        head = [
            "after",
            "AUROC (both sides)",
            "inputs attacked",
            "forward passes",
            "backward passes",
        ]
        counts = ("inputs", "forwards", "backwards")
        body = [
            [row["attack"], f"{row['auroc']:.3f}", *(f"{row[key]:,}" for key in counts)]
            for row in self.attacks
        ]
        return [head, *body]

    def title(self) -> str:
        """What was measured, in one line."""
        settings = self["both"].settings
        return f"{settings['detector']} within {settings['within']}, by {self.version}"

    def summary(self) -> str:
        """What the checks found, in one line or in a table."""
        found = [*self.findings.errors, *self.findings.warnings]
        if not found:
            return f"none of {len(self.findings)} checks found a fault"
        return str(Findings(tuple(found)))

    def __str__(self) -> str:
        parts = (
            self.title(),
            self.summary(),
            tables.text(self.cells()),
            tables.text(self.attack_cells()),
        )
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        words = [f"<p>{html.escape(line)}</p>" for line in (self.title(), self.summary())]
        return "".join([*words, tables.html(self.cells()), tables.html(self.attack_cells())])


_TITLES: dict[Side, str] = {
    "none": "AUROC clean",
    "in": "in attacked",
    "out": "out attacked",
    "both": "both attacked",
}
