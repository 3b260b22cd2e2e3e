"""The results of runs: read their records, and put them into one table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from robustood import artefacts, metrics, tables
from robustood.artefacts import Scores
from robustood.checkpoints import Json, read_json
from robustood.inputs import (
    check_choice,
    check_flag,
    check_instance,
    check_mapping,
    check_path,
    check_several,
    check_text,
    numbers,
)
from robustood.metrics import Estimate

__all__ = ["Kept", "Shown", "detector", "kept", "learned_cells", "load", "pooled", "shown", "table"]

_DEPLOYED = ("RejectClass", "ODIN")  # a row shows the first of these that was measured
_CELL = (str, int, float, Estimate)
# Where no line of a table should end: within an interval, and around the slash of two numbers.
_WITHIN = re.compile(r"(?<=\d,) (?=-?\d)|(?<=\d) (?=/)|(?<=/) (?=\d)")
_COLUMNS = [
    "run", "seed", "epochs", "attack", "accuracy %", "attacked %", "detector", "AUROC %", "paper's attack",
    "adaptive", "seen", "seen, adaptive", "minutes", "images/s", "x floor",
]  # fmt: skip
# of a learned set: key in the report, and the factor by which it is shown
METRICS: dict[str, tuple[str, int]] = {
    "doing nothing": ("doing_nothing_per_pixel", 1000),
    "encoder": ("encoder_error_per_pixel", 1000),
    "PGD": ("pgd_error_per_pixel", 1000),
    "expected": ("expected_error_per_pixel", 1000),
    "over": ("over_error_per_pixel", 1000),
    "reconstruction": ("reconstruction_per_pixel", 1000),
    "KL, nats": ("kl_nats_per_sample", 1),
}


def load(folder: str | Path | None = None) -> list[Json]:
    """The runs in a folder, sorted by recipe and seed.

    A run is what :func:`robustood.recipes.train` and ``evaluate`` wrote: ``{"folder", "run", "report",
    "plans"}``. The report is None before the evaluation; the plans are the reports of further evaluations by name.

    Args:
        folder: that of one run, of many runs, or of saved results, one JSON file per run with "run" and "report";
            default: the results that ship with the project.

    Raises:
        ValueError: for a folder that does not exist.
    """
    if folder is None:
        places = [place / "results" for place in artefacts.FOLDERS]
    else:
        check_path(folder, "folder")
        places = [Path(folder).expanduser()]
        if not places[0].is_dir():
            raise ValueError(f"no folder {folder}; runs are made by robustood train")
    found: dict[str, Json] = {}
    for place in places:
        for file in [place / "run.json", *sorted(place.glob("*/run.json"))]:
            if file.is_file():
                found[file.resolve().parent.name] = artefacts.read_run(file.parent)
        for file in sorted(place.glob("*.json")):
            record = read_json(file)
            if isinstance(record, dict) and {"run", "report"} <= record.keys():
                artefacts.check_whole(file, record)
                found.setdefault(file.stem, {"plans": {}, **record})
    runs = [{"folder": name, **run} for name, run in found.items()]
    return sorted(runs, key=lambda r: (r["run"]["recipe"], r["run"]["seed"], r["folder"]))


def pooled(
    scores: Mapping[str, Scores], detector: str, attack: str, sets: Sequence[str]
) -> tuple[Scores, Scores]:
    """In-distribution scores, and scores of several sets of outliers pooled, equally many of each set.

    AUROC and false positive rate are linear in the distribution of the outliers. These scores therefore give the
    unweighted mean over the sets, with an interval (:func:`robustood.metrics.confidence_interval`). Of larger
    sets evenly spaced images are taken, so that a set sorted by class keeps all its classes.

    Args:
        scores: those of one run, from :func:`robustood.artefacts.scores`.
        detector, attack: named as in its report.
        sets: names of sets of outliers.

    Raises:
        ValueError: if one of these was not measured.
    """
    check_mapping(scores, "scores", "artefacts.scores(name)")
    for name, value in (("detector", detector), ("attack", attack)):
        check_text(value, name)
    check_several(sets, "sets", "names of sets of outliers")
    for name in sets:
        check_text(name, "sets: each")
    names = [f"{detector} {attack} {name}" for name in ("in", *sets)]
    if missing := [name for name in names if name not in scores]:
        raise ValueError(
            f"no scores of this detector, attack or sets: {missing}; there are: {', '.join(scores)}"
        )
    for name in names:
        if numbers(scores[name], f"scores[{name!r}]").ndim != 1:
            raise ValueError(f"scores[{name!r}] must have one axis, with one score per image")
    inside, *outside = (scores[name] for name in names)
    fewest = min(map(len, outside))
    spread = (np.linspace(0, len(each) - 1, fewest).astype(int) for each in outside)
    return inside, np.concatenate([each[at] for each, at in zip(outside, spread)])


@dataclass(frozen=True)
class Kept:
    """A run that ships with the project, in one test: its report, and the score of each image. Made by :func:`kept`.

    Each rate is a mean over sets of outliers, by default over those that training has not seen, with the interval of
    :func:`pooled` scores. The detector is by default the first one of the report: the reject class, or MSP.

    Attributes:
        report: what :func:`robustood.recipes.evaluate` wrote.
        scores: those of :func:`robustood.artefacts.scores`.
    """

    report: Json
    scores: Mapping[str, Scores]

    @property
    def detector(self) -> str:
        """The first detector of the report."""
        return self.report["means"][0]["detector"]

    @property
    def unseen(self) -> list[str]:
        """The sets of outliers that are not the seen distribution."""
        return list(dict.fromkeys(row["set"] for row in self.report["rows"] if not row["seen"]))

    def pair(
        self, attack: str = "none", sets: Sequence[str] | None = None, detector: str | None = None
    ) -> tuple[Scores, Scores]:
        """In-distribution scores, and pooled scores of sets of outliers; arguments as for :func:`pooled`."""
        wanted = self.unseen if sets is None else sets
        return pooled(self.scores, self.detector if detector is None else detector, attack, wanted)

    def auroc(
        self, attack: str = "none", sets: Sequence[str] | None = None, detector: str | None = None
    ) -> Estimate:
        """Mean AUROC over sets of outliers."""
        return metrics.confidence_interval(metrics.auroc, *self.pair(attack, sets, detector))

    def fpr(
        self, attack: str = "none", sets: Sequence[str] | None = None, detector: str | None = None
    ) -> Estimate:
        """Mean share of outliers accepted, at the threshold that accepts 95 % of these in-distribution scores."""
        rate = partial(metrics.fpr_at_tpr, positive="in")
        return metrics.confidence_interval(rate, *self.pair(attack, sets, detector), resamples=200)

    def rate(self, name: str) -> Estimate:
        """A rate of the whole network: "accuracy" or "attacked_accuracy"."""
        check_choice(name, "name", ("accuracy", "attacked_accuracy"))
        return Estimate(**self.report[name])


def kept(name: str, plan: str | None = None) -> Kept:
    """A run that ships with the project, in the test of its own recipe or under another plan.

    Args:
        name: that of the run, such as "aloe_cifar10_cpu".
        plan: that of the evaluation, such as "atom".

    Raises:
        ValueError: if the run does not ship, or was not measured under this plan.

    >>> print(f"{kept('aloe_cifar10_cpu').auroc('adaptive'):.2f}")
    0.68 [0.65, 0.70]
    """
    artefacts.find("scores", name)  # refuses a result that is no run
    record = artefacts.result(name)
    tests = {None: record["report"]} | {k: r for k, r in record["plans"].items() if r.get("rows")}
    if plan is not None:
        check_choice(plan, "plan", [test for test in tests if test])
    return Kept(tests[plan], artefacts.scores(name, plan))


class Shown:
    """A table that Jupyter shows, and that prints as text. Made by :func:`shown`."""

    def __init__(self, cells: Sequence[Sequence[str]]):
        self._cells = cells

    def _repr_markdown_(self) -> str:
        whole = [[_WITHIN.sub("\u00a0", cell) for cell in line] for line in self._cells]
        return tables.text(whole, markdown=True)

    def __repr__(self) -> str:
        return tables.text(self._cells)


def shown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Shown:
    """A table of a page. Estimates stand there in per cent with their intervals, other cells as they print.

    Args:
        head: one title per column.
        rows: of as many cells.
    """
    check_several(head, "head", "titles of columns")
    check_several(rows, "rows", "rows of cells", 0)
    for title in head:
        check_text(title, "head: each")
    for row in rows:
        check_several(row, "rows: each", "cells", 0)
        for cell in row:
            check_instance(cell, "rows: each cell", _CELL, "a text, a number or an Estimate")
        if len(row) != len(head):
            raise ValueError(f"rows must have {len(head)} cells like head, got {row!r:.80}")
    written = [[f"{c:.1%}" if isinstance(c, Estimate) else str(c) for c in row] for row in rows]
    return Shown([list(head), *written])


def table(runs: Sequence[Json], markdown: bool = False) -> str:
    """One row per run: accuracy, mean AUROC of the deployed detector over unseen outlier sets, and cost.

    A run has the name of its folder, as for ``robustood evaluate``. The detector is the reject class if there is
    one, else ODIN, else the first that was measured. Values that were not measured are left empty. Learned
    perturbation sets follow in a table of their own: one row per kind of pairs, squared errors per 1000 pixels.
    "x floor" is the time of a training step relative to its minimum time (:mod:`robustood.engine`).

    Args:
        runs: from :func:`load`.
        markdown: as a Markdown table.
    """
    check_several(runs, "runs", "runs, such as results.load() gives", 0)
    for run in runs:
        check_mapping(run, "runs: each", "results.load() gives")
    check_flag(markdown, "markdown")
    learned = [run for run in runs if "sets" in (run["report"] or {})]
    others = [run for run in runs if run not in learned]
    parts = [[_COLUMNS, *map(_cells, others)]] if others or not learned else []
    if learned:
        parts.append(learned_cells(learned))
    return "\n\n".join(tables.text(part, markdown) for part in parts)


def learned_cells(runs: Sequence[Json]) -> list[list[str]]:
    """A header, and one row per kind of pairs of each learned set."""
    lines = [["run", "seed", "pairs", "longest", *METRICS]]
    for run in runs:
        start, report = [run["folder"], str(run["run"]["seed"])], run["report"]
        for pairs, found in report["sets"].items():
            errors = [f"{found[key] * scale:.2f}" for key, scale in METRICS.values()]
            lines.append([*start, pairs, f"{report['radii']['maximum']:.2f}", *errors])
    return lines


def detector(run: Json) -> str:
    """The detector that the row of a run shows."""
    measured = [m["detector"] for m in (run["report"] or {}).get("means", [])]
    return next((d for d in (*_DEPLOYED, *measured) if d in measured), "")


def _cells(run: Json) -> list[str]:
    """The row of a run. Rows with the same attack, radius and attacked side can be compared."""
    own, report, shown = run["run"], run["report"] or {}, detector(run)
    settings, speed = report.get("settings", {}), own.get("speed", {})
    means = {
        mean["attack"]: mean
        for mean in reversed(report.get("means", []))
        if mean["detector"] == shown and mean["side"] in ("none", settings["side"])
    }

    def rate(name: str) -> str:
        return f"{Estimate(**report[name]):.1%}" if report.get(name) else ""

    def auroc(attack: str, key: str = "auroc") -> str:
        value = means.get(attack, {}).get(key)
        return "" if value is None else f"{100 * value:.1f}"

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        run["folder"],
        str(own["seed"]),
        f"{len(own['history'])}/{own['settings']['training']['epochs']}",
        f"{255 * settings['eps']:g}/255 {settings['side']}" if settings else "",
        rate("accuracy"),
        rate("attacked_accuracy"),
        shown,
        auroc("none"),
        auroc("paper"),
        auroc("adaptive"),
        auroc("none", "seen_auroc"),
        auroc("adaptive", "seen_auroc"),
        number(own.get("minutes"), 1),
        number(speed.get("images_per_second"), 0),
        number(speed.get("over_floor"), 2),
    ]
