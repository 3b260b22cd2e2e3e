"""What the runs gave: read what they left on record, and put it into one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from robustood.checkpoints import read_json

Run = dict[str, Any]
DEPLOYED = ("RejectClass", "ODIN")  # the detector of a row, by the first that was measured


def load(folder: str | Path | None = None) -> list[Run]:
    """The runs in a folder, sorted by recipe and seed.

    A run is what :meth:`robustood.recipes.Recipe.train` and ``evaluate`` wrote: ``{"folder", "run", "report"}``,
    where the report is None before the evaluation.

    Args:
        folder: of one run, of many, or of kept results, one JSON file each with "run" and "report"; default
            the results that ship with the project.

    Raises:
        ValueError: for a folder that does not exist.
    """
    if folder is None:
        here = Path(__file__).parent
        places = [here.parent / "data" / "results", here / "kept" / "results"]
    elif not Path(folder).is_dir():
        raise ValueError(f"no folder {folder}; runs are made by robustood train")
    else:
        places = [Path(folder)]
    found: dict[str, Run] = {}
    for place in places:
        for file in [place / "run.json", *sorted(place.glob("*/run.json"))]:
            if file.is_file():
                report = file.with_name("report.json")
                found[file.parent.name] = {
                    "run": read_json(file),
                    "report": read_json(report) if report.is_file() else None,
                }
        for file in sorted(place.glob("*.json")):
            kept = read_json(file)
            if isinstance(kept, dict) and {"run", "report"} <= kept.keys():
                found.setdefault(file.stem, {k: kept[k] for k in ("run", "report")})
    runs = [{"folder": name, **run} for name, run in found.items()]
    return sorted(runs, key=lambda r: (r["run"]["recipe"], r["run"]["seed"], r["folder"]))


def table(runs: Sequence[Run], markdown: bool = False) -> str:
    """One line a run: accuracy, mean AUROC over new outliers by the deployed detector, and the price.

    The detector is the reject class where there is one, else ODIN, else the first that was measured. What
    was not measured is left empty.

    Args:
        runs: from :func:`load`.
        markdown: with bars, for a text file.
    """
    cells = [[name for name, _ in COLUMNS]]
    cells += [[read(run) for _, read in COLUMNS] for run in runs]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in cells]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in lines)
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def detector(run: Run) -> str:
    """The detector of a run's row."""
    measured = [m["detector"] for m in (run["report"] or {}).get("means", [])]
    return next((d for d in (*DEPLOYED, *measured) if d in measured), "")


def auroc(attack: str, key: str = "auroc") -> Callable[[Run], str]:
    """A column: mean AUROC under an attack on the recipe's side."""

    def read(run: Run) -> str:
        if not (report := run["report"]):
            return ""
        sides = ("none", report["settings"]["side"])
        for mean in report["means"]:
            right = mean["detector"] == detector(run) and mean["attack"] == attack
            if right and mean["side"] in sides:
                return percent(mean[key])
        return ""

    return read


def rate(name: str) -> Callable[[Run], str]:
    """A column: an accuracy with its interval."""

    def read(run: Run) -> str:
        if not (found := (run["report"] or {}).get(name)):
            return ""
        ends = " ".join(percent(found[k]) for k in ("low", "high"))
        return f"{percent(found['value'])} [{ends}]"

    return read


def percent(value: float | None) -> str:
    """A rate in percent."""
    return "" if value is None else f"{100 * value:.1f}"


def plain(name: str, digits: int = 1) -> Callable[[Run], str]:
    """A column: a number of the run, or of its speed."""

    def read(run: Run) -> str:
        value = run["run"].get(name, run["run"].get("speed", {}).get(name))
        return f"{value:.{digits}f}" if isinstance(value, (int, float)) else ""

    return read


def done(run: Run) -> str:
    """Epochs trained, of all."""
    wanted = run["run"]["settings"]["training"]["epochs"]
    return f"{len(run['run']['history'])}/{wanted}"


COLUMNS: list[tuple[str, Callable[[Run], str]]] = [
    ("recipe", lambda run: run["run"]["recipe"]),
    ("seed", lambda run: str(run["run"]["seed"])),
    ("epochs", done),
    ("accuracy %", rate("accuracy")),
    ("attacked %", rate("attacked_accuracy")),
    ("detector", detector),
    ("AUROC %", auroc("none")),
    ("paper's attack", auroc("paper")),
    ("adaptive", auroc("adaptive")),
    ("seen", auroc("none", "seen_auroc")),
    ("seen, adaptive", auroc("adaptive", "seen_auroc")),
    ("minutes", plain("minutes")),
    ("images/s", plain("images_per_second", 0)),
    ("x floor", plain("over_floor", 2)),
]
