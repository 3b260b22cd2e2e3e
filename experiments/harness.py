"""Declare an experiment, measure its rows, save its table.

An experiment is a function that measures one row: it takes the settings of the row and a seed, and returns what it
measured. The decorator :func:`experiment` names the rows, the settings that all of them share, and the seeds:

    @experiment(grid(train_eps=(0.0, 0.1)), {"epochs": 40}, seeds=(0, 1))
    def gradients(train_eps: float, seed: int) -> Row: ...

A row is saved as soon as it is measured, and rows that are there are skipped, so a run can be stopped and resumed. On
one machine the numbers are a function of the settings. Only ``seconds`` differs: the CPU time of training, or of the
whole row where the function does not return it.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

from robustood import data
from robustood.checkpoints import read_json, write_json
from robustood.training import Objective, fit

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "data" / "results"
Row = dict[str, Any]  # settings, or what was measured; everything in it goes into JSON
OPTIMISER: Row = {
    "optimiser": "Adam",
    "schedule": "15 % linear warm-up, then half a cosine to zero",
}

digits = lru_cache(data.digits)


def train(model: nn.Module, objective: Objective, data: data.Data, **how: Any) -> float:
    """Fit a model; returns the CPU seconds that it took."""
    began = time.process_time()
    fit(model, objective, data, **how)
    return time.process_time() - began


def grid(**values: Iterable[object]) -> list[Row]:
    """The settings of all combinations of values, the last changing fastest."""
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


def plain(value: Any) -> Any:
    """As JSON holds it: estimates are dicts, tuples are lists, numbers have four digits."""
    text = json.dumps(value, default=asdict)
    return json.loads(text, parse_float=lambda number: round(float(number), 4))


@dataclass(frozen=True)
class Experiment:
    """How a table is made; the arguments are those of :func:`experiment`."""

    function: FunctionType
    rows: list[Row] | Callable[[int], list[Row]]
    settings: Row
    seeds: Sequence[int]

    @property
    def made_by(self) -> str:
        """The script and the function."""
        return f"{self.function.__module__.replace('.', '/')}.py: {self.function.__name__}"

    @property
    def scale(self) -> str:
        """The prefix of the table's name: the first word of the script's name."""
        return self.function.__module__.rpartition(".")[2].split("_")[0]

    @property
    def name(self) -> str:
        """The table's name, and its file's."""
        return f"{self.scale}_{self.function.__name__}"

    def wanted(self, seed: int) -> list[Row]:
        """The settings of the rows of a seed."""
        return self.rows if isinstance(self.rows, list) else self.rows(seed)

    def table(self) -> Row:
        """The table as far as it is measured, with no rows where its settings have changed."""
        path, settings = FOLDER / f"{self.name}.json", plain(self.settings)
        old = read_json(path) if path.exists() else {}
        packages = ("torch", "numpy", "scikit-learn")
        return {
            "name": self.name,
            "what": str(self.function.__doc__).splitlines()[0],
            "made_by": self.made_by,
            "scale": self.scale,
            "settings": settings,
            "versions": {"python": sys.version.split()[0]} | {p: version(p) for p in packages},
            "rows": old["rows"] if old.get("settings") == settings else [],
        }

    def row(self, seed: int, settings: Row) -> Row:
        """Measure one row; a setting ``made for`` is the function's argument ``made_for``."""
        began = time.process_time()
        named = {key.replace(" ", "_"): value for key, value in settings.items()}
        metrics = self.function(seed=seed, **named)
        seconds = round(metrics.pop("seconds", time.process_time() - began), 1)
        return plain({"settings": settings, "seed": seed, "metrics": metrics, "seconds": seconds})

    def measure(self, seed: int, *, again: bool = False) -> None:
        """Measure and save the rows of one seed: those that are not there, or all of them again."""
        table = self.table()
        table["rows"] = [r for r in table["rows"] if not (again and r["seed"] == seed)]
        there = [row["settings"] for row in table["rows"] if row["seed"] == seed]
        if there:
            print(f"{self.name}  seed {seed}: {len(there)} rows are there (--again repeats them)")
        for settings in (each for each in self.wanted(seed) if plain(each) not in there):
            row = self.row(seed, settings)
            table["rows"] = sorted([*table["rows"], row], key=lambda r: r["seed"])
            FOLDER.mkdir(parents=True, exist_ok=True)
            write_json(FOLDER / f"{self.name}.json", table)
            print(f"{self.name}  seed {seed}  {settings}  {row['seconds']} s", flush=True)


def experiment(
    rows: list[Row] | Callable[[int], list[Row]], settings: Row, *, seeds: Sequence[int] = (0, 1, 2)
) -> Callable[[FunctionType], Experiment]:
    """Make an :class:`Experiment` of the function below, which measures one row.

    Args:
        rows: settings of the rows, for every seed or as a function of it.
        settings: what all rows have in common.
        seeds: those that are measured.
    """
    return partial(Experiment, rows=rows, settings=settings, seeds=seeds)
