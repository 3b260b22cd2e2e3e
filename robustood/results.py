"""What the runs gave: read what they left on record, and put it into one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from robustood import artefacts, tables
from robustood.artefacts import Json, Scores
from robustood.checkpoints import read_json
from robustood.inputs import (
    check_flag,
    check_mapping,
    check_path,
    check_several,
    check_text,
    numbers,
)
from robustood.metrics import Estimate

__all__ = ["detector", "learned_cells", "load", "pooled", "table"]

_DEPLOYED = ("RejectClass", "ODIN")  # the detector of a row, by the first that was measured
_COLUMNS = [
    "run", "seed", "epochs", "attack", "accuracy %", "attacked %", "detector", "AUROC %", "paper's attack",
    "adaptive", "seen", "seen, adaptive", "minutes", "images/s", "x floor",
]  # fmt: skip
# of a learned set: key in the report, and what it counts in
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
    "plans"}``, where the report is None before the evaluation and the plans are the further reports by name.

    Args:
        folder: of one run, of many, or of saved results, one JSON file each with "run" and "report"; default
            the results that ship with the project.

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
    """In-distribution scores, and those of several sets of outliers as one, equally many of each.

    AUROC and false positive rate are linear in the distribution of the outliers. So these scores give the
    unweighted mean over sets of one size, with an interval (:func:`robustood.metrics.confidence_interval`). Of a
    larger set every so many images are taken, so that no class drops out of a set that is sorted by class.

    Args:
        scores: of one run, from :func:`robustood.artefacts.scores`.
        detector, attack: as in its report.
        sets: names of sets of outliers.

    Raises:
        ValueError: for what was not measured.
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
            raise ValueError(f"scores[{name!r}] must have one axis, one score an image")
    inside, *outside = (scores[name] for name in names)
    fewest = min(map(len, outside))
    spread = (np.linspace(0, len(each) - 1, fewest).astype(int) for each in outside)
    return inside, np.concatenate([each[at] for each, at in zip(outside, spread)])


def table(runs: Sequence[Json], markdown: bool = False) -> str:
    """One line per run: accuracy, mean AUROC over new outliers by the deployed detector, and the price.

    A run is called by its folder, as by ``robustood evaluate``. The detector is the reject class where there is
    one, else ODIN, else the first that was measured. What was not measured is left empty. Learned perturbation
    sets stand below, in a table of their own: one line for each kind of pairs, squared errors per 1000 pixels.

    Args:
        runs: from :func:`load`.
        markdown: with bars, for a text file.
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
    """Head, and one line for each kind of pairs of each learned set."""
    lines = [["run", "seed", "pairs", "longest", *METRICS]]
    for run in runs:
        start, report = [run["folder"], str(run["run"]["seed"])], run["report"]
        for pairs, found in report["sets"].items():
            errors = [f"{found[key] * scale:.2f}" for key, scale in METRICS.values()]
            lines.append([*start, pairs, f"{report['radii']['maximum']:.2f}", *errors])
    return lines


def detector(run: Json) -> str:
    """The detector of a run's row."""
    measured = [m["detector"] for m in (run["report"] or {}).get("means", [])]
    return next((d for d in (*_DEPLOYED, *measured) if d in measured), "")


def _cells(run: Json) -> list[str]:
    """A run's row. Rows of one attack, its radius and the side that it changes, compare."""
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
