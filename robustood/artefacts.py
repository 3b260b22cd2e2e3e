"""The files that ship with the project: results, the scores behind them, and weights.

A checkout holds ``data/results/NAME.json``, ``data/scores/NAME.npz`` and ``data/weights/NAME.safetensors``; an
installed package has the first two, and of the weights those of :mod:`robustood.challenge`. :func:`save` copies the
folder of a run (:func:`robustood.recipes.train`) to these places, and :func:`restore` rebuilds the folder from them.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from robustood.checkpoints import Json, read_json, write_json, write_whole
from robustood.inputs import check_choice, check_count, check_path, check_text, suggest

__all__ = [
    "check_whole",
    "find",
    "names",
    "pack",
    "read_run",
    "restore",
    "result",
    "save",
    "scores",
]

Scores = Float32[np.ndarray, " _"]  # sets differ in size
_HERE = Path(__file__).parent
FOLDERS = (_HERE.parent / "data", _HERE / "shipped")  # in a checkout; in an installed package
_ENDINGS = {"results": ".json", "scores": ".npz", "weights": ".safetensors"}
_KEPT = (  # of the folder of a run: all but the state of its training and the notes of its evaluation
    "recipe.json",
    "run.json",
    "log.csv",
    "weights.safetensors",
    "weights.json",
    "report*.json",
    "scores*.npz",
)
_BLOCK = 512  # of a tar file, in bytes; its end fills ten of them twice over
RECORDED = ("recipe", "seed", "settings", "data", "history", "finished")  # in every run.json
MEASURED = ("settings", "means")  # in every report.json


def names(kind: str) -> list[str]:
    """The names of the results, scores or weights that ship with the project."""
    check_choice(kind, "kind", list(_ENDINGS))
    files = (file for folder in FOLDERS for file in (folder / kind).glob(f"*{_ENDINGS[kind]}"))
    return sorted({file.name.removesuffix(_ENDINGS[kind]) for file in files})


def find(kind: str, name: str) -> Path:
    """The file of a result, of scores, or of weights (with their card beside it).

    Args:
        kind: "results", "scores" or "weights".
        name: such as "aloe_cifar10_cpu"; for scores under another plan, such as "aloe_cifar10_cpu.strong".

    Raises:
        ValueError: if it does not ship with the project; the message lists what does.
    """
    check_choice(kind, "kind", list(_ENDINGS))
    check_text(name, "name")
    for folder in FOLDERS:
        if (file := folder / kind / f"{name}{_ENDINGS[kind]}").is_file():
            return file
    checkout = "; weights come with a checkout of the repository" if kind == "weights" else ""
    raise ValueError(
        f"nothing ships as {kind}/{name}{_ENDINGS[kind]}; {suggest(name, names(kind))}{checkout}"
    )


def result(name: str) -> Json:
    """A result that ships with the project: the measurements of one experiment or run.

    Raises:
        ValueError: if there is no such result; the message lists those that exist.
    """
    return read_json(find("results", name), fix="fetch it again")


def scores(name: str, plan: str | None = None) -> dict[str, Scores]:
    """The float32 scores of all images of a shipped run, by "detector attack set"; the set "in" is in-distribution.

    Args:
        name: that of the run, such as "aloe_cifar10_cpu".
        plan: that of the evaluation, such as "strong"; default: the one in the run's own recipe.

    Raises:
        ValueError: if there are no such scores.
    """
    check_text(name, "name")
    if plan is not None:
        check_text(plan, "plan")
    with np.load(find("scores", f"{name}.{plan}" if plan else name), allow_pickle=False) as arrays:
        return dict(arrays)


def read_run(folder: Path) -> Json:
    """The records in the folder of a run: ``{"run", "report", "plans"}``.

    Raises:
        ValueError: for a damaged file; the message names it.
    """
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
    file: Path, record: Json, run: Sequence[str] = RECORDED, report: Sequence[str] = MEASURED
) -> None:
    """Refuse a record whose run or report lacks some keys, by default those that the table needs.

    Raises:
        ValueError: if keys are missing; the message names the file and the keys.
    """
    for part, keys in {"run": run, "report": report}.items():
        held = record[part]
        missing = [key for key in keys if not isinstance(held, dict) or key not in held]
        if missing and (part == "run" or held is not None):
            raise ValueError(
                f"{file} is damaged (its {part} lacks {', '.join(missing)}); delete it or fetch it again"
            )


def save(folder: str | Path) -> Path:
    """Add a finished run to the files that ship with the project: results, scores and weights, named like its folder.

    Returns:
        The JSON file with its results.

    Raises:
        ValueError: if the run is not finished, if a report measured other weights, or outside a checkout.
    """
    check_path(folder, "folder")
    folder, place = Path(folder).expanduser().resolve(), FOLDERS[0]
    record = read_run(folder)
    if not place.is_dir():
        raise ValueError(f"no folder {place}; runs are saved into a checkout of the repository")
    if not record["run"]["finished"]:
        raise ValueError(f"{folder} is not finished; run its robustood train command again")
    weights = read_json(folder / "weights.json", ("sha256",))["sha256"]
    reports = {"": record["report"], **{f"_{plan}": r for plan, r in record["plans"].items()}}
    for plan, report in reports.items():
        if report and report["weights"] != weights:
            raise ValueError(f"{folder}: report{plan} measured other weights; evaluate it again")
    copies = {f"weights/{folder.name}{end}": f"weights{end}" for end in (".safetensors", ".json")}
    for plan, report in reports.items():
        if report and report.get("rows"):  # neither a curve nor a learned set has scores
            copies[f"scores/{folder.name}{plan.replace('_', '.', 1)}.npz"] = f"scores{plan}.npz"
    for kind in _ENDINGS:
        (place / kind).mkdir(exist_ok=True)
    for there, here in copies.items():
        shutil.copyfile(folder / here, place / there)
    write_json(file := place / "results" / f"{folder.name}.json", record)
    return file


def restore(name: str, folder: str | Path) -> Path:
    """Rebuild the folder of a shipped run, so that it can be evaluated again.

    Args:
        name: that of the run.
        folder: receives ``recipe.json``, ``run.json``, the weights with their card, and the reports.

    Raises:
        ValueError: if the run or its weights are missing.
    """
    check_path(folder, "folder")
    file, weights = find("results", name), find("weights", name)
    folder = Path(folder).expanduser()
    record = read_json(file, ("run", "report"))
    check_whole(file, record, ("recipe", "about", "settings"), ("settings",))
    run, report = record["run"], record["report"]
    recipe = {"name": run["recipe"], "about": run["about"], **run["settings"]}
    if report:  # evaluate as before
        recipe["evaluation"] = report["settings"]
    folder.mkdir(parents=True, exist_ok=True)
    for ending in (".safetensors", ".json"):
        write_whole(folder / f"weights{ending}", weights.with_suffix(ending).read_bytes())
    plans = {f"report_{plan}": each for plan, each in record.get("plans", {}).items()}
    for own, content in {"recipe": recipe, "run": run, "report": report, **plans}.items():
        if content:
            write_json(folder / f"{own}.json", content)
    return folder


def pack(
    folder: str | Path, limit: int = 16 * 10**6, most: int = 8, name: str = "archive"
) -> list[Path]:
    """Collect the runs in a folder in a few tar files: records, weights and scores, no pickles.

    Each part can be opened alone; extracted into one folder they give the folders of the runs, which ``robustood
    table``, ``evaluate`` and ``save`` take.

    Args:
        folder: its subfolders are runs; JSON and text files beside them are included.
        limit: bytes of a part, at most.
        most: number of parts, at most.
        name: of the parts, ``NAME.1.tar`` and so on; earlier ones are replaced.

    Returns:
        The parts.

    Raises:
        ValueError: if there is nothing to collect, or it does not fit.
    """
    check_path(folder, "folder")
    check_text(name, "name")
    limit, most = check_count(limit, "limit", low=1), check_count(most, "most", low=1)
    folder = Path(folder).expanduser()
    runs = (file.parent for file in folder.glob("*/run.json"))
    found = {file for run in runs for pattern in _KEPT for file in run.glob(pattern)}
    found |= {file for pattern in ("*.json", "*.txt") for file in folder.glob(pattern)}
    parts: list[list[Path]] = []
    room = 0
    for file in sorted(found):
        size = _BLOCK * (2 + file.stat().st_size // _BLOCK)  # a header, and whole blocks
        if not parts or size > room:
            parts.append([])
            room = limit - 20 * _BLOCK
        if size > room:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes, more than a part; raise limit"
            )
        parts[-1].append(file)
        room -= size
    if not 0 < len(parts) <= most:
        raise ValueError(
            f"{folder} holds {len(found)} files for {len(parts)} parts, but there must be 1 to {most}; raise "
            "limit or most, or choose a folder of runs"
        )
    for old in folder.glob(f"{name}.*.tar"):
        old.unlink()
    return [_tar(folder, files, folder / f"{name}.{i}.tar") for i, files in enumerate(parts, 1)]


def _tar(folder: Path, files: Sequence[Path], place: Path) -> Path:
    """Write one part of an archive; equal files give an equal part."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in files:
            content = file.read_bytes()
            entry = tarfile.TarInfo(file.relative_to(folder).as_posix())
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    write_whole(place, buffer.getvalue())
    return place
