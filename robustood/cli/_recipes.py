"""Commands about runs of recipes: train, evaluate, slice, table, save, recipes."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

from robustood import artefacts, distributed, recipes, results
from robustood.cli._shell import DEVICE, FAILED, UNFINISHED, Add, chosen, minutes, place, say

_DEVICE = DEVICE.format("CUDA if available, else the CPU")


def add(command: Add) -> list[argparse.ArgumentParser]:
    """Add the commands; returns those that take --data."""
    trains = command(_train, "train", "train a recipe, or resume a run that was stopped")
    measures = command(_evaluate, "evaluate", "evaluate a finished run, clean and under attack")
    _add_run_options(trains, measures)
    slices = command(_slice, "slice", "test a borrowed GPU, then train and evaluate what fits")
    _add_slice_options(slices)
    tables = command(_table, "table", "show one row per run: accuracy, AUROC, cost")
    tables.add_argument(
        "runs",
        nargs="*",
        type=place,
        metavar="RUN_DIR",
        help="folders of runs (default: runs/* and the results that ship with the project)",
    )
    tables.add_argument("--markdown", action="store_true", help="print a Markdown table")
    command(_list, "recipes", "list the recipes")
    saves = command(_save, "save", "save finished runs in data/ of a checkout, to ship with it")
    saves.add_argument("runs", nargs="+", type=place, metavar="RUN_DIR", help="folders of runs")
    return [trains, measures, slices]


def _add_slice_options(slices: argparse.ArgumentParser) -> None:
    """Add the options of slice."""
    budget = (
        "minutes of this call (12); exit code 3 if recipes are left, and the same command resumes"
    )
    slices.add_argument("--minutes", type=minutes, default=12.0, help=budget)
    folder = "folder of the slice: runs, table and archive (default: runs/slice)"
    slices.add_argument(
        "--folder", type=place, default=Path("runs/slice"), metavar="DIR", help=folder
    )
    size = "full, or tiny for a dry run with small networks and few steps (full)"
    slices.add_argument("--budget", choices=("full", "tiny"), default="full", help=size)
    slices.add_argument("--device", help=_DEVICE)


def _add_run_options(trains: argparse.ArgumentParser, measures: argparse.ArgumentParser) -> None:
    """Add the options of train and evaluate."""
    trains.add_argument("recipe", help="a name from `robustood recipes`, or a .toml file")
    budget = "time budget; exit code 3 if it runs out, and the same command resumes the run"
    trains.add_argument("--minutes", type=minutes, default=math.inf, help=budget)
    folder = "folder of the run (default: runs/RECIPE); under torchrun, write --folder"
    trains.add_argument("--folder", "--run", dest="run", type=place, metavar="DIR", help=folder)
    run = "folder of the run, or the name of one that ships with the project"
    measures.add_argument("run", type=place, metavar="RUN_DIR", help=run)
    plan = f"another evaluation than the recipe's own: {', '.join(recipes.plans())}"
    measures.add_argument("--plan", default="", metavar="PLAN", help=plan)
    change = (
        "change one key of the recipe, such as training.epochs=3; may be repeated; for evaluate, only "
        "evaluation.* keys"
    )
    for added in (trains, measures):
        added.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=change)
        added.add_argument("--device", help=_DEVICE)


def _train(given: argparse.Namespace) -> int:
    """Train a recipe."""
    recipe = recipes.read(given.recipe, given.set)
    folder = given.run or Path("runs") / recipe.name
    device = chosen(given.device)
    run = recipes.train(recipe, folder, given.minutes, device, root=given.data, tell=say)
    return 0 if run["finished"] else UNFINISHED


def _evaluate(given: argparse.Namespace) -> int:
    """Evaluate a finished run."""
    for change in given.set:
        if not change.strip().startswith("evaluation."):
            raise ValueError(
                f"--set {change}: the training of a finished run is fixed; only evaluation.* may "
                "change here"
            )
    # One process copies, and none reads too early.
    (folder,) = distributed.each([partial(_measurable, given.run)])
    recipe = recipes.read(folder / "recipe.json", given.set, given.plan)
    device = chosen(given.device)
    report = recipes.evaluate(recipe, folder, device, root=given.data, tell=say)
    if distributed.rank() == 0:  # which wrote the files that are read here
        if not given.plan:
            say(results.table(results.load(folder)))
        ending = f"_{given.plan}" if given.plan else ""
        beside = f", scores in scores{ending}.npz beside it" if report["rows"] else ""
        say(f"full report: {folder / f'report{ending}.json'}{beside}")
    return 0


def _measurable(run: Path) -> Path:
    """The folder of a run; one that ships with the project is copied first."""
    shipped = {each["folder"] for each in results.load()}
    if not run.exists() and str(run) in shipped:
        name, run = str(run), Path("runs") / "shipped" / run
        if not run.exists():
            say(f"the run that ships with the project is copied to {artefacts.restore(name, run)}")
    if not (run / "recipe.json").is_file():
        raise ValueError(
            f"no run in {run}: there is no recipe.json; make a run with robustood train, or take one "
            f"that ships with the project: {', '.join(sorted(shipped))}"
        )
    return run


def _slice(given: argparse.Namespace) -> int:
    """Work through the recipes of a slice."""
    device = chosen(given.device)
    state = recipes.run_slice(
        given.folder, given.minutes, device, given.budget, root=given.data, tell=say
    )
    say(f"archive, for robustood table, evaluate and save: {given.folder}/archive.*.tar")
    for name, why in state["failed"].items():
        say(f"{name} failed: {why}")
    if state["unfinished"]:
        say(f"left for the same command: {', '.join(state['unfinished'])}")
    return FAILED if state["failed"] else UNFINISHED if state["unfinished"] else 0


def _table(given: argparse.Namespace) -> int:
    """Show one row per run."""
    folders = given.runs or ([Path("runs")] if Path("runs").is_dir() else [])
    runs = [run for folder in folders for run in results.load(folder)]
    if not given.runs:  # the folder of a run takes precedence over its saved results
        own = {run["folder"]: run["run"] for run in runs}
        for shipped in results.load():
            name = shipped["folder"]
            if name not in own:
                runs.append(shipped)
            elif shipped["run"] != own[name]:  # another run of the same name
                runs.append({**shipped, "folder": f"{name} (shipped)"})
    if not runs:
        raise ValueError("no runs here; make one with robustood train RECIPE")
    say(results.table(runs, markdown=given.markdown))
    return 0


def _save(given: argparse.Namespace) -> int:
    """Add finished runs to the results that ship with the project."""
    for run in given.runs:
        say(str(artefacts.save(run)))
    return 0


def _list(given: argparse.Namespace) -> int:
    """List the recipes, with a line about each."""
    width = max(map(len, recipes.names()))
    for name in recipes.names():
        say(f"{name:{width}}  {recipes.read(name).about}")
    return 0
