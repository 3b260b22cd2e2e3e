"""How the tools for the book's tables keep what they measure.

A table is a file ``data/results/SCALE_NAME.json``, which ``robustood.artefacts.result`` reads. It holds the versions,
the common settings, and one row for each setting and seed. A row is written as soon as it is measured,
and rows that are there are skipped, so a run can be stopped and goes on. On one machine the numbers are a
function of the settings; only ``seconds`` (CPU time of training) differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from robustood.checkpoints import write_whole
from robustood.metrics import Estimate

FOLDER = Path(__file__).resolve().parents[2] / "data" / "results"
Task = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
# An experiment yields the tasks of one seed: settings of a row, and a function that measures it.
Experiment = tuple[Callable[[int], Iterator[Task]], dict[str, Any]]


def plain(value: Any) -> Any:
    """Estimates as dicts, numbers to four digits."""
    if isinstance(value, Estimate):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def measure(scale: str, name: str, experiment: Experiment, seed: int, *, again: bool) -> None:
    """Fill one experiment's file with the rows of one seed."""
    tasks, settings = experiment
    path = FOLDER / f"{scale}_{name}.json"
    packages = ("torch", "numpy", "scikit-learn")
    kept: dict[str, Any] = {
        "name": f"{scale}_{name}",
        "what": (tasks.__doc__ or "").strip(),
        "scale": scale,
        "settings": plain(settings),
        "versions": {"python": sys.version.split()[0]} | {p: version(p) for p in packages},
        "rows": [],
    }
    if path.exists():
        old = json.loads(path.read_text("utf-8"))
        if old["settings"] == kept["settings"]:
            kept["rows"] = [r for r in old["rows"] if not (again and r["seed"] == seed)]
    there = [row["settings"] for row in kept["rows"] if row["seed"] == seed]
    for setting, task in tasks(seed):
        if setting in there:
            continue
        measured = task()
        seconds = round(measured.pop("seconds"), 1)
        row = {"settings": setting, "seed": seed, "metrics": measured, "seconds": seconds}
        kept["rows"] = sorted([*kept["rows"], plain(row)], key=lambda r: r["seed"])
        write_whole(path, (json.dumps(kept, indent=1) + "\n").encode())
        print(f"{name}  seed {seed}  {setting}  {seconds} s of training", flush=True)


def main(
    about: str, scale: str, experiments: Mapping[str, Experiment], needs: Callable[[], object] = int
) -> int:
    """The command line of a tool.

    Args:
        about: its help.
        scale: the files' names begin with it.
        experiments: by name.
        needs: raises ValueError where something is missing, saying how to get it.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(experiments)}; none means all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--again", action="store_true", help="measure anew what is kept")
    args = parser.parse_args()
    if unknown := set(args.names) - experiments.keys():
        parser.error(f"no experiment {', '.join(sorted(unknown))}; known: {', '.join(experiments)}")
    try:
        needs()
    except ValueError as missing:
        parser.error(str(missing))
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:  # all experiments of one seed first: they share networks
        for name in args.names or experiments:
            measure(scale, name, experiments[name], seed, again=args.again)
    return 0
