"""What the runs gave: read what they left on record, and put it into one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from robustood.checkpoints import read_json, write_whole
from robustood.inputs import (
    check_flag,
    check_mapping,
    check_path,
    check_several,
    check_text,
    numbers,
)

Run = dict[str, Any]
Scores = Float32[np.ndarray, " _"]  # each set has a size of its own
HERE = Path(__file__).parent
KEPT = (HERE.parent / "data", HERE / "kept")  # in a checkout; in an installed package
RECORDED = ("recipe", "seed", "settings", "data", "history", "finished")  # in every run.json
MEASURED = ("settings", "means")  # in every report.json
DEPLOYED = ("RejectClass", "ODIN")  # the detector of a row, by the first that was measured


def load(folder: str | Path | None = None) -> list[Run]:
    """The runs in a folder, sorted by recipe and seed.

    A run is what :meth:`robustood.recipes.Recipe.train` and ``evaluate`` wrote: ``{"folder", "run", "report",
    "plans"}``, where the report is None before the evaluation and the plans are the further reports by name.

    Args:
        folder: of one run, of many, or of kept results, one JSON file each with "run" and "report"; default
            the results that ship with the project.

    Raises:
        ValueError: for a folder that does not exist.
    """
    if folder is not None:
        check_path(folder, "folder")
    if folder is None:
        places = [place / "results" for place in KEPT]
    elif not (place := Path(folder).expanduser()).is_dir():
        raise ValueError(f"no folder {folder}; runs are made by robustood train")
    else:
        places = [place]
    found: dict[str, Run] = {}
    for place in places:
        for file in [place / "run.json", *sorted(place.glob("*/run.json"))]:
            if file.is_file():
                found[file.resolve().parent.name] = gather(file.parent)
        for file in sorted(place.glob("*.json")):
            kept = read_json(file)
            if isinstance(kept, dict) and {"run", "report"} <= kept.keys():
                check_whole(file, kept)
                found.setdefault(file.stem, {"plans": {}, **kept})
    runs = [{"folder": name, **run} for name, run in found.items()]
    return sorted(runs, key=lambda r: (r["run"]["recipe"], r["run"]["seed"], r["folder"]))


def gather(folder: Path) -> Run:
    """What a run's folder has on record."""
    report = folder / "report.json"
    return {
        "run": read_json(folder / "run.json", RECORDED),
        "report": read_json(report, MEASURED) if report.is_file() else None,
        "plans": {
            file.stem.removeprefix("report_"): read_json(file, MEASURED)
            for file in sorted(folder.glob("report_*.json"))
        },
    }


def check_whole(
    file: Path, kept: Run, run: Sequence[str] = RECORDED, report: Sequence[str] = MEASURED
) -> None:
    """Refuse a kept result whose run or report lacks some keys, by default those that the table needs.

    Raises:
        ValueError: naming the file and the keys.
    """
    for part, keys in {"run": run, "report": report}.items():
        held = kept[part]
        missing = [key for key in keys if not isinstance(held, dict) or key not in held]
        if missing and (part == "run" or held is not None):
            raise ValueError(
                f"{file} is damaged (its {part} lacks {', '.join(missing)}); delete it or fetch it again"
            )


def scores(name: str, plan: str | None = None) -> dict[str, Scores]:
    """The score of each image of a kept run, float32, by "detector attack set"; "in" is in-distribution.

    Args:
        name: of the run, such as "aloe_cifar10_cpu".
        plan: of the evaluation, such as "strong"; default the one of the run's own recipe.

    Raises:
        ValueError: if there are none.
    """
    check_text(name, "name")
    if plan is not None:
        check_text(plan, "plan")
    file = f"{name}.{plan}.npz" if plan else f"{name}.npz"
    file = kept_file("scores", file, "robustood evaluate makes them")
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def pooled(
    scores: Mapping[str, Scores], detector: str, attack: str, sets: Sequence[str]
) -> tuple[Scores, Scores]:
    """In-distribution scores, and those of several sets of outliers as one, equally many of each.

    AUROC and false positive rate are linear in the distribution of the outliers. So these scores give the
    unweighted mean over sets of one size, with an interval (:func:`robustood.metrics.confidence_interval`). Of a
    larger set every so many images are taken, so that no class drops out of a set that is sorted by class.

    Args:
        scores: of one run, from :func:`scores`.
        detector, attack: as in its report.
        sets: names of sets of outliers.

    Raises:
        ValueError: for what was not measured.
    """
    check_mapping(scores, "scores", "results.scores(name)")
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


def restore(name: str, folder: str | Path) -> Path:
    """Put a kept run back into a folder of its own, so that it can be measured again.

    Args:
        name: of the run.
        folder: gets ``recipe.json``, ``run.json``, the weights with their card, and the reports.

    Raises:
        ValueError: if the run or its weights are not there.
    """
    check_text(name, "name")
    check_path(folder, "folder")
    folder = Path(folder).expanduser()
    file = kept_file("results", f"{name}.json", "robustood table lists the runs")
    record = read_json(file, ("run", "report"))
    get = "they come with a checkout of the repository"
    weights = kept_file("weights", f"{name}.safetensors", get)
    check_whole(file, record, ("recipe", "about", "settings"), ("settings",))
    run = record["run"]
    recipe = {"name": run["recipe"], "about": run["about"], **run["settings"]}
    if record["report"]:  # measured as it was
        recipe["evaluation"] = record["report"]["settings"]
    folder.mkdir(parents=True, exist_ok=True)
    for ending in (".safetensors", ".json"):
        write_whole(folder / f"weights{ending}", weights.with_suffix(ending).read_bytes())
    plans = {f"report_{plan}": report for plan, report in record.get("plans", {}).items()}
    for own, content in {"recipe": recipe, "run": run, "report": record["report"], **plans}.items():
        if content:
            write_whole(folder / f"{own}.json", (json.dumps(content, indent=1) + "\n").encode())
    return folder


def kept_file(kind: str, name: str, how: str) -> Path:
    """A file that ships with the project.

    Raises:
        ValueError: if it is not there; the message says how to get it.
    """
    for place in KEPT:
        if (file := place / kind / name).is_file():
            return file
    raise ValueError(f"nothing kept as {kind}/{name}; {how}")


def table(runs: Sequence[Run], markdown: bool = False) -> str:
    """One line a run: accuracy, mean AUROC over new outliers by the deployed detector, and the price.

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
    parts = []
    if others or not learned:
        head = [name for name, _ in COLUMNS]
        parts.append([head, *([read(run) for _, read in COLUMNS] for run in others)])
    if learned:
        head = ["run", "seed", "pairs", "longest", *METRICS]
        parts.append([head, *(line for run in learned for line in metrics_of(run))])
    return "\n\n".join(lined(part, markdown) for part in parts)


def metrics_of(run: Run) -> list[list[str]]:
    """One line for each kind of pairs of a learned set."""
    start = [run["folder"], str(run["run"]["seed"])]
    return [
        [*start, pairs, f"{run['report']['radii']['maximum']:.2f}"]
        + [f"{found[key] * scale:.2f}" for key, scale in METRICS.values()]
        for pairs, found in run["report"]["sets"].items()
    ]


def lined(cells: Sequence[Sequence[str]], markdown: bool) -> str:
    """Cells under each other, the first line as the head."""
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


def protocol(run: Run) -> str:
    """A column: radius of the attacks, and the side that they change. Rows of one protocol compare."""
    if not (report := run["report"]):
        return ""
    return f"{255 * report['settings']['eps']:g}/255 {report['settings']['side']}"


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
    ("run", lambda run: run["folder"]),
    ("seed", lambda run: str(run["run"]["seed"])),
    ("epochs", done),
    ("attack", protocol),
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
