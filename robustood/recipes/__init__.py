"""Recipes: whole experiments as short texts, from the images' names to the table.

A recipe is a TOML file with the sections ``[data]``, ``[model]``, ``[objective]``, ``[training]`` and
``[evaluation]``. It may extend others, which are merged key by key in the order named, the later one
winning. Every key is checked before any data are read (``schema.py`` lists them). The
recipes of the papers and their smaller versions lie beside this file; names that begin with ``_`` are parts.

>>> recipe = read("aloe_cifar10_fast", ["training.epochs=3"])
>>> recipe.settings["training"]["epochs"]
3
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robustood.checkpoints import read_json
from robustood.data import Data
from robustood.inputs import check_path, check_several, check_text
from robustood.objectives import Objective
from robustood.recipes import pairs, running, schema, testing
from robustood.recipes.schema import SECTIONS, Section

FOLDER = Path(__file__).parent
PLAN = "_plan_"
Changes = Sequence[str]


def names() -> list[str]:
    """The recipes that ship with the library."""
    return sorted(file.stem for file in FOLDER.glob("*.toml") if not file.stem.startswith("_"))


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        name: of its file.
        about: one line.
        settings: section by section, with all defaults filled in and fractions as numbers.
        plan: of the evaluation, where it is not the recipe's own.
    """

    name: str
    about: str
    settings: dict[str, Section]
    plan: str = ""

    def objective(self) -> Objective:
        """The training rule."""
        return schema.objective(self.settings["objective"])

    def model(self) -> Any:
        """The untrained network, a classifier or an autoencoder; the seed of the training draws its weights."""
        given = {k: v for k, v in self.settings["model"].items() if k != "name"}
        try:
            return schema.network(self.settings["model"]["name"])(
                **given, seed=self.settings["training"]["seed"]
            )
        except ValueError as error:
            raise ValueError(f"recipe {self.name}: model: {error}") from error

    def data(self, root: str | Path | None = None) -> Data:
        """All images of the recipe, in 8 bits; the seen distribution stands first in ``ood``.

        Args:
            root: the folder of the packs; default as in :func:`robustood.data.load`.
        """
        return running.everything(self, root)

    def train(
        self,
        folder: str | Path,
        minutes: float = math.inf,
        device: torch.device | str | None = None,
        *,
        root: str | Path | None = None,
        tell: Callable[[str], None] = running.silent,
    ) -> dict[str, Any]:
        """Train, or go on where the run in ``folder`` stopped (``running.train``)."""
        return running.train(self, folder, minutes, device, root, tell)

    def evaluate(
        self,
        folder: str | Path,
        device: torch.device | str | None = None,
        *,
        root: str | Path | None = None,
        tell: Callable[[str], None] = running.silent,
    ) -> dict[str, Any]:
        """Measure the run in ``folder`` (``testing.evaluate``, or ``pairs.measure``)."""
        measure = pairs.measure if "pairs" in self.settings["data"] else testing.evaluate
        return measure(self, folder, device, root, tell)

    def to_json(self) -> str:
        """The whole recipe, such as :func:`read` takes it."""
        return json.dumps({"name": self.name, "about": self.about, **self.settings}, indent=1)


def plans() -> list[str]:
    """The further evaluations that ship with the library: parts named ``_plan_NAME``."""
    return sorted(file.stem.removeprefix(PLAN) for file in FOLDER.glob(f"{PLAN}*.toml"))


def read(name_or_path: str | Path, changes: Changes = (), plan: str = "") -> Recipe:
    """Read and check a recipe; no data are loaded.

    Args:
        name_or_path: one of :func:`names`, or a file that ends in ``.toml``, or in ``.json`` as a run's
            folder holds it.
        plan: one of :func:`plans`, whose evaluation is merged into the recipe's.
        changes: such as ``"training.epochs=3"``; the value is TOML, a bare word is a text.

    Raises:
        ValueError: for an unknown recipe, section, key or name, or a wrong value; the message says
            which recipe and key, what was seen and what there is.
    """
    check_path(name_or_path, "name_or_path")
    check_several(changes, "changes", 'texts such as "training.epochs=3"', 0)
    for change in changes:
        check_text(change, "changes: each")
    check_text(plan, "plan")
    path = Path(name_or_path).expanduser()
    whole = path.suffix == ".json"
    if whole and not path.is_file():
        raise ValueError(f"no recipe file {path}; a run's folder holds its recipe.json")
    merged = (
        schema.recorded(read_json(path, ("data",)))
        if whole
        else gather(str(name_or_path), None, ())
    )
    name, about = str(merged.pop("name", path.stem)), merged.pop("about", "")
    if not isinstance(about, str):
        raise ValueError(f"recipe {name}: about must be one line of text, got {about!r}")
    if plan and plan not in plans():
        raise ValueError(f"no plan {plan!r}; {schema.suggest(plan, plans())}")
    if plan:
        if "pairs" in merged.get("data", {}):
            raise ValueError(f"recipe {name} learns a perturbation set; plans are for classifiers")
        merged = merge(merged, gather(f"{PLAN}{plan}", None, ()))
    for change in changes:
        merged = merge(merged, parse(change))
    return Recipe(name, about, schema.resolve(name, merged), plan)


def gather(name: str, beside: Path | None, chain: tuple[str, ...]) -> dict[str, Any]:
    """A recipe with those that it extends merged in, first to last, then itself."""
    if name in chain:
        raise ValueError(f"recipe {name} extends itself: {' -> '.join([*chain, name])}; cut one")
    path = find(name, beside)
    try:
        own = tomllib.loads(path.read_text("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {name} is not TOML: {error}") from error
    bases = own.pop("extends", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f'recipe {name}: extends must be a list such as ["_fast"], got {bases!r}')
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, gather(base, path.parent, (*chain, name)))
    merged.pop("about", None)
    return merge(merged, own)


def find(name: str, beside: Path | None) -> Path:
    """The file of a recipe: a path, or a name that ships with the library."""
    if name.endswith(".toml"):
        path = Path(name).expanduser() if beside is None else beside / name
        if not path.is_file():
            raise ValueError(f"no recipe file {name}; the shipped ones are named without .toml")
        return path
    if (path := FOLDER / f"{name}.toml").is_file() and Path(name).name == name:
        return path
    raise ValueError(
        f"no recipe {name!r}; {schema.suggest(name, names())}. A file of your own ends in .toml"
    )


def merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Tables key by key, anything else replaced."""
    both = {
        key: {**base[key], **own[key]}
        for key in base.keys() & own.keys()
        if isinstance(base[key], dict) and isinstance(own[key], dict)
    }
    return {**base, **own, **both}


def parse(change: str) -> dict[str, Any]:
    """``section.key=value`` as a piece of a recipe."""
    key, equals, text = change.partition("=")
    section, dot, key = key.strip().partition(".")
    if not (equals and dot and key):
        where = [s for s in SECTIONS if section in getattr(schema, s.upper(), {})]
        hint = f"{where[0]}.{section}=..." if where else "training.epochs=3"
        raise ValueError(f"--set needs section.key=value, got {change!r}; write {hint}")
    try:
        value = tomllib.loads(f"value = {text.strip()}")
    except tomllib.TOMLDecodeError:
        value = {"value": text.strip()}
    if list(value) != ["value"]:
        raise ValueError(f"--set takes one value, got {change!r}")
    return {section: {key: value["value"]}}
