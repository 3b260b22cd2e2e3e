"""The command line: train and evaluate recipes, show tables of runs, and fetch, check and pack images."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from tqdm import tqdm

from robustood import __version__, artefacts, data, distributed, recipes, results

__all__ = ["main", "parser"]

_Raw = argparse.RawDescriptionHelpFormatter
_Command = Callable[[argparse.Namespace], int]
UNFINISHED, FAILED, INTERRUPTED = 3, 2, 130
_HELP = """\
examples:
  robustood recipes
  robustood train aloe_cifar10_cpu
  robustood train aloe_cifar10_fast --minutes 9 --set training.seed=1 --folder runs/aloe_1
  robustood evaluate runs/aloe_1 --set evaluation.n_in=200
  robustood table
  robustood data fetch cifar10 svhn:train
  robustood data pack photos/ --name mine:test
  torchrun --nproc-per-node 4 -m robustood train oe_cifar10_fast

To resume a run that was stopped, repeat its command. Exit codes: 0 done, 2 error (explained in one line),
3 the time given by --minutes ran out, 130 interrupted. ROBUSTOOD_DATA names the folder that holds the
images. ROBUSTOOD_DEBUG=1 shows the traceback of an error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: default: those of the process.

    Returns:
        The exit code: 0 done, 2 error, 3 out of time, 130 interrupted.
    """
    given = parser().parse_args(arguments)
    try:
        with _Terminable():
            if "WORLD_SIZE" in os.environ:
                distributed.join()
            return given.command(given)
    except KeyboardInterrupt:
        _say("interrupted; the same command resumes from the last saved state")
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("ROBUSTOOD_DEBUG"):
            raise
        print(f"robustood: {_explained(error)}", file=sys.stderr)
        return FAILED
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class _Terminable:
    """Context in which SIGTERM, such as from the scheduler of a cluster, stops a run as Ctrl-C does."""

    def __enter__(self) -> None:
        try:
            self.before = signal.signal(signal.SIGTERM, self.stop)
        except ValueError:  # not the main thread, which alone can handle signals
            self.before = None

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    @staticmethod
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt


def _explained(error: Exception) -> str:
    """One line about an error, with advice if it comes from the operating system."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and ";" not in error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return (
            f"{error.strerror}{where}; nothing written before is lost: fix the cause (or choose another folder for "
            "robustood train by --folder), then repeat the command"
        )
    return text


def _say(line: str) -> None:
    """Print a line at once, in the first process only."""
    if distributed.rank() != 0:
        return
    try:
        tqdm.write(line)  # above the progress bar, if there is one
        sys.stdout.flush()
    except BrokenPipeError:  # the reader is gone, as after "| head": continue without output
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


# --- commands


def _train(given: argparse.Namespace) -> int:
    """Train a recipe."""
    recipe = recipes.read(given.recipe, given.set)
    folder = given.run or Path("runs") / recipe.name
    device = _chosen(given.device)
    run = recipes.train(recipe, folder, given.minutes, device, root=given.data, tell=_say)
    return 0 if run["finished"] else UNFINISHED


def _evaluate(given: argparse.Namespace) -> int:
    """Evaluate a finished run."""
    for change in given.set:
        if not change.strip().startswith("evaluation."):
            raise ValueError(
                f"--set {change}: the training of a finished run is fixed; only evaluation.* may "
                "change here"
            )
    shipped = {run["folder"] for run in results.load()}
    if not given.run.exists() and str(given.run) in shipped:
        name, given.run = str(given.run), Path("runs") / "shipped" / given.run
        if not given.run.exists():
            _say(
                f"the run that ships with the project is copied to {artefacts.restore(name, given.run)}"
            )
    file = given.run / "recipe.json"
    if not file.is_file():
        raise ValueError(
            f"no run in {given.run}: there is no recipe.json; make a run with robustood train, or take one "
            f"that ships with the project: {', '.join(sorted(shipped))}"
        )
    recipe = recipes.read(file, given.set, given.plan)
    if distributed.rank() == 0:  # all processes would measure the same
        device = _chosen(given.device)
        report = recipes.evaluate(recipe, given.run, device, root=given.data, tell=_say)
        if not given.plan:
            _say(results.table(results.load(given.run)))
        ending = f"_{given.plan}" if given.plan else ""
        beside = f", scores in scores{ending}.npz beside it" if report["rows"] else ""
        _say(f"full report: {given.run / f'report{ending}.json'}{beside}")
    return 0


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
    _say(results.table(runs, markdown=given.markdown))
    return 0


def _save(given: argparse.Namespace) -> int:
    """Add finished runs to the results that ship with the project."""
    for run in given.runs:
        _say(str(artefacts.save(run)))
    return 0


def _list_recipes(given: argparse.Namespace) -> int:
    """List the recipes, with a line about each."""
    width = max(map(len, recipes.names()))
    for name in recipes.names():
        _say(f"{name:{width}}  {recipes.read(name).about}")
    return 0


def _fetch(given: argparse.Namespace) -> int:
    """Download sets of images and store them as packs."""
    for name in given.names:
        made = data.fetch(name, root=given.data)
        _say(f"{name}: {', '.join(str(path) for path in made)}")
    return 0


def _check(given: argparse.Namespace) -> int:
    """Read whole sets, verify their checksums, and report their content."""
    there = data.available(given.data)
    for given_name in given.names or there:
        for name in [s for s in there if s.split(":")[0] == given_name] or [given_name]:
            held = data.check(name, root=given.data)
            _say(
                f"{name}: {held['n']} images of {' x '.join(map(str, held['shape']))}, "
                f"{held['classes']} classes, {'JPEG ' + str(held['jpeg']) if held['jpeg'] else 'lossless'}"
                f", sha256 {held['sha256']}"
            )
            for note in held["notes"]:
                _say(f"  {note}")
    return 0


def _pack(given: argparse.Namespace) -> int:
    """Make a pack from a folder of images."""
    name, _, split = given.name.partition(":")
    made = data.folder(given.folder, name, given.size, given.data, split or None)
    called = f"{name}{given.size if given.size != 32 else ''}{':' if split else ''}{split}"
    _say(f"{called}: {len(made)} images of {given.size} x {given.size}")
    for note in made.notes:
        _say(f"  {note}")
    return 0


def _chosen(device: str | None) -> torch.device | None:
    """The requested device; of several processes with GPUs, each takes its own."""
    own = os.environ.get("LOCAL_RANK")
    if device is None:
        return torch.device(f"cuda:{own}") if own and torch.cuda.is_available() else None
    found = torch.device(device)
    if own and found.type == "cuda":  # one GPU per process, whatever index was requested
        found = torch.device(f"cuda:{own}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device}: torch finds no CUDA device; leave the option out to use the CPU"
        )
    return found


# --- arguments


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    about = "Train and measure robust out-of-distribution detection."
    top = argparse.ArgumentParser("robustood", None, about, _HELP, formatter_class=_Raw)
    top.add_argument("--version", action="version", version=f"robustood {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    images = commands.add_parser("data", help="fetch, check and pack images")
    actions = images.add_subparsers(required=True, metavar="ACTION")

    def command(work: _Command, name: str, text: str, among=commands) -> argparse.ArgumentParser:
        added = among.add_parser(
            name, help=text, description=text, epilog=_HELP, formatter_class=_Raw
        )
        added.set_defaults(command=work)
        return added

    trains = command(_train, "train", "train a recipe, or resume a run that was stopped")
    measures = command(_evaluate, "evaluate", "evaluate a finished run, clean and under attack")
    _add_run_options(trains, measures)
    tables = command(_table, "table", "show one row per run: accuracy, AUROC, cost")
    tables.add_argument(
        "runs", nargs="*", type=_place, metavar="RUN_DIR",
        help="folders of runs (default: runs/* and the results that ship with the project)",
    )  # fmt: skip
    tables.add_argument("--markdown", action="store_true", help="print a Markdown table")
    command(_list_recipes, "recipes", "list the recipes")
    saves = command(_save, "save", "save finished runs in data/ of a checkout, to ship with it")
    saves.add_argument("runs", nargs="+", type=_place, metavar="RUN_DIR", help="folders of runs")
    loads = command(_fetch, "fetch", "download sets of images and store them as packs", actions)
    loads.add_argument("names", nargs="+", metavar="NAME", help="such as cifar10 or svhn:train")
    checks = command(_check, "check", "verify packs and report their content", actions)
    checks.add_argument("names", nargs="*", metavar="NAME", help="default: all in the folder")
    packs = command(_pack, "pack", "make a pack from a folder of your own images", actions)
    packs.add_argument(
        "folder", type=_place, metavar="FOLDER", help="folder with one subfolder per class"
    )
    packs.add_argument("--name", required=True, help="its name in recipes, such as mine:test")
    packs.add_argument("--size", type=int, default=32, help="height and width in pixels (32)")
    where = "folder that holds the packs (default: ROBUSTOOD_DATA)"
    for added in (trains, measures, loads, checks, packs):
        added.add_argument("--data", type=_place, metavar="DIR", help=where)
    return top


def _add_run_options(trains: argparse.ArgumentParser, measures: argparse.ArgumentParser) -> None:
    """Add the options of train and evaluate."""
    trains.add_argument("recipe", help="a name from `robustood recipes`, or a .toml file")
    budget = "time budget; exit code 3 if it runs out, and the same command resumes the run"
    trains.add_argument("--minutes", type=_minutes, default=math.inf, help=budget)
    folder = "folder of the run (default: runs/RECIPE); under torchrun, write --folder"
    trains.add_argument("--folder", "--run", dest="run", type=_place, metavar="DIR", help=folder)
    run = "folder of the run, or the name of one that ships with the project"
    measures.add_argument("run", type=_place, metavar="RUN_DIR", help=run)
    plan = f"another evaluation than the recipe's own: {', '.join(recipes.plans())}"
    measures.add_argument("--plan", default="", metavar="PLAN", help=plan)
    change = (
        "change one key of the recipe, such as training.epochs=3; may be repeated; for evaluate, only "
        "evaluation.* keys"
    )
    device = 'such as "cpu" or "cuda:1" (default: CUDA if available)'
    for added in (trains, measures):
        added.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=change)
        added.add_argument("--device", help=device)


def _place(text: str) -> Path:
    """A file or a folder; shells do not expand the ``~`` in ``--data=~/packs``."""
    return Path(text).expanduser()


def _minutes(text: str) -> float:
    """A number of minutes."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value
