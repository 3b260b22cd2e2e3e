"""Recipes from files: merged parts, files that extend others, and changes from the command line.

Most recipes combine several parts: ``aloe_cifar10_fast`` is the method ``methods/aloe.toml`` on the images of
``sets/cifar10.toml`` at the scale ``scales/fast.toml``, evaluated by the plan that the method names. A table such as
``[scales.paper.objective]`` in a part applies only if the part is merged with ``scales/paper.toml``.
"""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

from robustood.checkpoints import Json, read_json
from robustood.inputs import check_mapping, check_path, check_several, check_text, suggest
from robustood.recipes.reading import Table
from robustood.recipes.recipe import SECTIONS, Recipe, settings

__all__ = ["KINDS", "commands", "load", "names", "parts", "plans", "read"]

FOLDER = Path(__file__).parent
KINDS = ("sets", "plans", "scales", "methods")  # of parts, merged in this order
_GREY = ("within", "step_size", "eps")  # what readers think of in grey levels


def names() -> list[str]:
    """The names of the recipes that ship with the library."""
    return sorted([*_products(), *(file.stem for file in FOLDER.glob("*.toml"))])


def plans() -> list[str]:
    """The names of the evaluation plans, which apply to any classifier besides its own evaluation."""
    return parts("plans")


def parts(kind: str) -> list[str]:
    """The names of the parts of one kind."""
    return sorted(file.stem for file in (FOLDER / kind).glob("*.toml"))


@cache
def _products() -> dict[str, Table]:
    """Each recipe that combines a method, a set and a scale, as the content of a file."""
    found = {}
    for method, images, scale in product(parts("methods"), parts("sets"), parts("scales")):
        own = load(f"methods/{method}")
        if f"{images}_{scale}" not in own.get("without", []):
            chosen = zip(KINDS, (images, own["plan"], scale, method))
            bases = {kind: f"{kind}/{name}" for kind, name in chosen}
            about = (load(bases[kind])["about"] for kind in ("methods", "sets", "scales"))
            found[f"{method}_{images}_{scale}"] = {
                "about": ", ".join(about),
                "extends": list(bases.values()),
            }
    return found


def read(name_or_path: str | Path, changes: Sequence[str] = (), plan: str = "") -> Recipe:
    """Read and check a recipe; no data are loaded.

    Args:
        name_or_path: one of :func:`names`, a ``.toml`` file, or the ``recipe.json`` in the folder of a run.
        changes: such as ``"training.epochs=3"``; values are TOML, and a bare word is a string.
        plan: one of :func:`plans`, whose evaluation is merged into the recipe's.

    Raises:
        ValueError: for an unknown recipe, section, key or name, or an invalid value; the message names recipe,
            key and value, and the known alternatives.
    """
    check_path(name_or_path, "name_or_path")
    check_several(changes, "changes", 'texts such as "training.epochs=3"', 0)
    for change in changes:
        check_text(change, "changes: each")
    check_text(plan, "plan")
    path = Path(name_or_path).expanduser()
    whole = path.suffix == ".json"
    if whole and not path.is_file():
        raise ValueError(f"no recipe file {path}; pass the recipe.json in the folder of a run")
    merged = read_json(path, ("data",)) if whole else _gather(str(name_or_path))
    name, about = str(merged.pop("name", path.stem)), merged.pop("about", "")
    if not isinstance(about, str):
        raise ValueError(f"recipe {name}: about must be one line of text, got {about!r}")
    if plan and plan not in plans():
        raise ValueError(f"no plan {plan!r}; {suggest(plan, plans())}")
    if plan:
        if "pairs" in merged.get("data", {}):
            raise ValueError(f"recipe {name} learns a perturbation set; plans are for classifiers")
        merged = _merge(merged, _gather(f"plans/{plan}"))
    for change in changes:
        merged = _merge(merged, _parse(change))
    try:
        return Recipe(name, about, settings(merged), plan)
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from error


def _gather(
    name: str, beside: Path | None = None, above: tuple[str, ...] = (), met: Sequence[str] = ()
) -> Table:
    """A recipe merged with those that it extends, first to last, then the recipe itself.

    Args:
        name: that of a shipped recipe or part, or a path.
        beside: the folder to which a path is relative.
        above: the chain of recipes that extend this one.
        met: the parts that this one is merged with.
    """
    if name in above:
        raise ValueError(f"recipe {name} extends itself: {' -> '.join([*above, name])}; remove one")
    path = None if name in _products() else _find(name, beside)
    own = dict(_products()[name]) if path is None else load(name, path)
    if path and path.parent.parent == FOLDER:
        return _holding(own, met)
    bases = own.pop("extends", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(
            f'recipe {name}: extends must be a list such as ["scales/fast"], got {bases!r}'
        )
    merged: Table = {}
    for base in bases:
        merged = _merge(merged, _gather(base, path and path.parent, (*above, name), bases))
    merged.pop("about", None)
    return _merge(merged, own)


def _holding(part: Table, met: Sequence[str]) -> Table:
    """The sections of a part, including those that apply only together with the other merged parts."""
    own = {section: part[section] for section in SECTIONS if section in part}
    for kind, name in (other.split("/") for other in met if other.count("/") == 1):
        if name in part.get(kind, {}):
            own = _merge(own, _holding(part[kind][name], met))
    return own


def _find(name: str, beside: Path | None) -> Path:
    """The file of a recipe or a part, given by a path or by the name of one that ships with the library."""
    if name.endswith(".toml"):
        path = Path(name).expanduser() if beside is None else beside / name
        if not path.is_file():
            raise ValueError(f"no recipe file {name}; names of shipped recipes do not end in .toml")
        return path
    known = [file.relative_to(FOLDER).with_suffix("") for file in FOLDER.rglob("*.toml")]
    if Path(name) in known:
        return FOLDER / f"{name}.toml"
    kind = name.split("/")[0]
    near = [f"{kind}/{part}" for part in parts(kind)] if kind in KINDS else names()
    raise ValueError(f"no recipe {name!r}; {suggest(name, near)}. Your own files must end in .toml")


def load(name: str, path: Path | None = None) -> Table:
    """The content of a file; by default that of a part."""
    try:
        return tomllib.loads((path or FOLDER / f"{name}.toml").read_text("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {name} is not valid TOML: {error}") from error


def _merge(base: Table, own: Table) -> Table:
    """Merge two tables: their subtables key by key, other values replaced."""
    both = {
        key: {**base[key], **own[key]}
        for key in base.keys() & own.keys()
        if isinstance(base[key], dict) and isinstance(own[key], dict)
    }
    return {**base, **own, **both}


def _parse(change: str) -> Table:
    """``section.key=value`` as a part of a recipe."""
    key, equals, text = change.partition("=")
    section, dot, key = key.strip().partition(".")
    if not (equals and dot and key):
        where = [
            name
            for name, kind in SECTIONS.items()
            if section in getattr(kind, "__annotations__", {})
        ]
        hint = f"{where[0]}.{section}=..." if where else "training.epochs=3"
        raise ValueError(f"--set needs section.key=value, got {change!r}; write {hint}")
    try:
        value = tomllib.loads(f"value = {text.strip()}")
    except tomllib.TOMLDecodeError:
        value = {"value": text.strip()}
    if list(value) != ["value"]:
        raise ValueError(f"--set takes a single value, got {change!r}; repeat --set for more keys")
    return {section: {key: value["value"]}}


def commands(run: Json) -> list[str]:
    """The two commands that repeat a run, training and evaluation, with all that it set differently from its recipe.

    Args:
        run: one of those from :func:`robustood.results.load`, with its report.
    """
    check_mapping(run, "run", "results.load()[0]")
    for part in ("run", "report"):
        check_mapping(run.get(part), f"run[{part!r}]", "results.load()[0]")
    own, folder = run["run"], f"runs/{run['folder']}"
    now = read(own["recipe"]).settings.to_dict()
    trained = _changes(now, {key: own["settings"][key] for key in now if key != "evaluation"})
    measured = _changes(now, {"evaluation": run["report"]["settings"]})
    return [
        f"robustood train {own['recipe']}{trained} --folder {folder}",
        f"robustood evaluate {folder}{measured}",
    ]


def _changes(now: Table, then: Table) -> str:
    """The flags that turn a recipe's sections into earlier ones."""
    flags = [
        f"{section}.{key}={f'{255 * value:g}/255' if key in _GREY else json.dumps(value)}"
        for section, values in then.items()
        for key, value in values.items()
        if now[section].get(key) != value
    ]
    attack = then.get("objective", {})
    if "within" in attack and "step_size" in now["objective"].keys() - attack.keys():
        # then the size was the library's own
        flags.append(f"objective.step_size={2.5 * 255 * attack['within'] / attack['steps']:g}/255")
    return "".join(f" --set {shlex.quote(flag)}" for flag in flags)
