"""Define an experiment, measure its rows, save its table.

An experiment is a function that measures one row: it takes the settings of the row and a seed, and returns its
measurements. The decorator :func:`experiment` takes the rows, their common settings and the seeds:

    @experiment(grid(train_eps=(0.0, 0.1)), {"epochs": 40}, seeds=(0, 1))
    def gradients(train_eps: float, seed: int) -> Row: ...

Each row is saved as soon as it is measured, and existing rows are skipped, so a run can be stopped and resumed. On
one machine the numbers are a function of the settings, except ``seconds``: the CPU time of training, or of the whole
row if the function does not return it.
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

from robustood import artefacts, data
from robustood.checkpoints import read_json, write_json
from robustood.objectives import Objective
from robustood.training import fit

ROOT = Path(__file__).resolve().parents[1]
FOLDER = artefacts.FOLDERS[0] / "results"
Row = dict[str, Any]  # settings or measurements; all values can be written as JSON
OPTIMISER: Row = {
    "optimiser": "Adam",
    "schedule": "15 % linear warm-up, then half a cosine to zero",
}

digits = lru_cache(data.digits)


def train(model: nn.Module, objective: Objective, data: data.Data, **how: Any) -> float:
    """Fit a model; returns the CPU time in seconds."""
    began = time.process_time()
    fit(model, objective, data, **how)
    return time.process_time() - began


def grid(**values: Iterable[object]) -> list[Row]:
    """Settings for all combinations of values; the last one varies fastest."""
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


def plain(value: Any) -> Any:
    """A value as JSON: estimates become dicts, tuples become lists, numbers are rounded to four decimals."""
    text = json.dumps(value, default=asdict)
    return json.loads(text, parse_float=lambda number: round(float(number), 4))


@dataclass(frozen=True)
class Experiment:
    """The definition of a table; arguments as for :func:`experiment`."""

    function: FunctionType
    rows: list[Row] | Callable[[int], list[Row]]
    settings: Row
    seeds: Sequence[int]

    @property
    def made_by(self) -> str:
        """The script and the function that make the table."""
        return f"{self.function.__module__.replace('.', '/')}.py: {self.function.__name__}"

    @property
    def scale(self) -> str:
        """The prefix of the table's name: the first word of the script's name."""
        return self.function.__module__.rpartition(".")[2].split("_")[0]

    @property
    def name(self) -> str:
        """The name of the table and of its file."""
        return f"{self.scale}_{self.function.__name__}"

    def wanted(self, seed: int) -> list[Row]:
        """The settings of all rows for a seed."""
        return self.rows if isinstance(self.rows, list) else self.rows(seed)

    def table(self) -> Row:
        """The table with the rows measured so far; without rows if the common settings have changed."""
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
        """Measure one row; a setting ``made for`` is passed as the argument ``made_for``."""
        began = time.process_time()
        named = {key.replace(" ", "_"): value for key, value in settings.items()}
        metrics = self.function(seed=seed, **named)
        seconds = round(metrics.pop("seconds", time.process_time() - began), 1)
        return plain({"settings": settings, "seed": seed, "metrics": metrics, "seconds": seconds})

    def measure(self, seed: int, *, again: bool = False) -> None:
        """Measure and save the rows of one seed: the missing ones, or all of them again."""
        table = self.table()
        table["rows"] = [r for r in table["rows"] if not (again and r["seed"] == seed)]
        there = [row["settings"] for row in table["rows"] if row["seed"] == seed]
        if there:
            print(f"{self.name}  seed {seed}: {len(there)} rows exist (--again repeats them)")
        for settings in (each for each in self.wanted(seed) if plain(each) not in there):
            row = self.row(seed, settings)
            table["rows"] = sorted([*table["rows"], row], key=lambda r: r["seed"])
            FOLDER.mkdir(parents=True, exist_ok=True)
            write_json(FOLDER / f"{self.name}.json", table)
            print(f"{self.name}  seed {seed}  {settings}  {row['seconds']} s", flush=True)


def experiment(
    rows: list[Row] | Callable[[int], list[Row]], settings: Row, *, seeds: Sequence[int] = (0, 1, 2)
) -> Callable[[FunctionType], Experiment]:
    """Make an :class:`Experiment` from the decorated function, which measures one row.

    Args:
        rows: the settings of the rows, either a list for all seeds or a function of the seed.
        settings: those that all rows share.
        seeds: the seeds to measure.
    """
    return partial(Experiment, rows=rows, settings=settings, seeds=seeds)
