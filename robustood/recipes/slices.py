"""The recipes of the book on a GPU that is there for a quarter of an hour: what fits, in order, so that it can resume.

A slice tests the device (:mod:`robustood.recipes.selftest`), then trains and evaluates one recipe after the other. From
the operations of their steps and the speed that the test measured follows how many epochs all of them can have; if
these are too few, the last recipes wait for another slice.

How the full slice is sized, by a measurement on one H200 (:data:`H200`): in training it did 31e12 operations a second
compiled and 20e12 as it stands, 3 % of its peak, because a network with 16 to 128 channels is bound by memory and by
launches; in evaluation, in float32 without TF32, 8.9e12; and it compiled for 25 s. A step of ``aloe_cifar10_fast`` has
0.54e12 operations, an epoch of all six recipes 0.84e15, an evaluation up to 0.31e15. So five recipes of twelve epochs
fit into twelve minutes, with a minute for the self-test and a tenth kept back; the same command goes on from there.
These rates size the slice on paper alone: a slice plans with those that it measures.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from robustood import artefacts, distributed, results
from robustood.checkpoints import Json, check_same, read_json, write_json, write_whole
from robustood.costs import step_cost
from robustood.data import Batch, Data
from robustood.engine import flops
from robustood.evaluate import PAPERS
from robustood.inputs import check_choice, check_device, check_number, check_path
from robustood.objectives import OutlierTraining
from robustood.recipes import reports
from robustood.recipes.composing import read
from robustood.recipes.images import Card, Root, check_there, to_train
from robustood.recipes.recipe import Evaluation, Recipe, uses_outliers
from robustood.recipes.runs import Tell, chosen_device, device_name, silent, train, versions
from robustood.recipes.selftest import self_test

__all__ = ["BUDGETS", "H200", "NAMES", "Budget", "Cost", "Rates", "cost", "plan", "run_slice"]

NAMES = tuple(
    f"{method}_{images}_fast"
    for images in ("cifar10", "cifar100")
    for method in ("aloe", "oe", "standard", "atom", "acet", "ntom")
)
_USED = 0.9  # share of the time that is planned with
_RESERVE = 5.0  # seconds for the last table and archive
_ROUNDS = 3  # how often a slice comes back to what is not finished, if time is left


@dataclass(frozen=True)
class Budget:
    """What a slice changes in the recipes, and how many epochs it gives them.

    Attributes:
        changes: as in :func:`robustood.recipes.read`.
        most: epochs of each, at most.
        least: epochs of each, below which fewer recipes are planned.
    """

    changes: tuple[str, ...]
    most: int
    least: int


_TABLE = "evaluation.attacks=['none', 'paper', 'adaptive']"  # those that the table shows
BUDGETS = {
    "full": Budget((_TABLE, "evaluation.n_in=400", "evaluation.n_out=100"), most=30, least=12),
    "tiny": Budget(  # a dry run on any machine
        (
            "evaluation.attacks=['none', 'adaptive']",
            "evaluation.detectors=['auto']",
            "evaluation.sets=['textures']",
            "evaluation.n_in=8",
            "evaluation.n_out=4",
            "evaluation.steps=1",
            "evaluation.targets=1",
            "evaluation.pgd_steps=1",
            "model.depth=10",
            "model.width=1",
            "data.validation=8",
            "training.batch_size=16",
            "training.outlier_batch_size=16",
            "training.precision=float32",
            "training.channels_last=false",
            "training.compile=false",
        ),
        most=1,
        least=1,
    ),
}


@dataclass(frozen=True)
class Cost:
    """The operations of a recipe.

    Attributes:
        epoch: of one epoch of training, mining included.
        evaluation: of its evaluation.
    """

    epoch: float
    evaluation: float


@dataclass(frozen=True)
class Rates:
    """The speed of a device: operations per second, and the seconds that each recipe takes besides."""

    training: float
    evaluation: float
    besides: float

    def seconds(self, cost: Cost, epochs: int) -> float:
        """The time of a recipe with this number of epochs."""
        work = epochs * cost.epoch / self.training + cost.evaluation / self.evaluation
        return self.besides + work


# Measured with torch 2.11; reading images takes about 10 s, compiling 25 more.
H200 = Rates(training=31e12, evaluation=8.9e12, besides=10.0)


def cost(recipe: Recipe, images: int, outliers: int) -> Cost:
    """The operations of a recipe, from those of one rehearsed step (:func:`robustood.costs.step_cost`).

    Args:
        recipe: a classifier's.
        images: number of training images.
        outliers: number of auxiliary outliers.
    """
    want, rule, model = recipe.settings.training, recipe.objective(), recipe.model()
    x, u = torch.zeros(want.batch_size, 3, 32, 32), torch.zeros(want.outlier_batch_size, 3, 32, 32)
    batch = Batch(x, torch.zeros(len(x)).long(), u)
    forward = flops(lambda: model.eval()(x[:1]))
    mined = rule.mine if isinstance(rule, OutlierTraining) else None
    scored = min(mined.sample or outliers, outliers) if mined else 0
    steps = images // min(want.batch_size, images)
    epoch = step_cost(model, rule, batch).flops * steps + scored * forward
    return Cost(
        epoch, forward * _passes(recipe.settings.evaluation, recipe.settings.data.outlier_sets())
    )


def _passes(want: Evaluation, sets: Sequence[str]) -> float:
    """About how many forward passes of one image an evaluation costs; a backward pass counts as one more."""
    steps = {
        "paper": PAPERS[want.paper].steps,
        "adaptive": want.steps * max(1, want.restarts) * (want.targets + 1),
    }
    attack = sum(2 * steps.get(name, 0) for name in want.attacks)
    # The score of ODIN has a backward pass of its own, through which an attack differentiates.
    scores = sum(4 if name == "ODIN" else 1 for name in want.detectors)
    attacked = want.n_out * len(sets) + (want.n_in if want.side == "both" else 0)
    return attack * scores * attacked + 2 * want.pgd_steps * want.n_in


def plan(
    costs: Mapping[str, Cost], seconds: float, rates: Rates, most: int = 30, least: int = 12
) -> dict[str, int]:
    """How many epochs each recipe gets: as many for all as fit, for the first ones only if these were too few.

    A recipe that does not fit with the least number of epochs is left out, be it the only one.

    Args:
        costs: of the recipes, in their order.
        seconds: available time.
        rates: of the device.
        most, least: epochs of each recipe.
    """
    for n in range(len(costs), 0, -1):
        some = dict(islice(costs.items(), n))
        fixed = sum(rates.seconds(each, 0) for each in some.values())
        epoch = sum(each.epoch for each in some.values()) / rates.training
        epochs = int((_USED * seconds - fixed) / epoch)
        if epochs >= least:
            return dict.fromkeys(some, min(epochs, most))
    return {}


def run_slice(
    folder: str | Path,
    minutes: float = 12.0,
    device: torch.device | str | None = None,
    budget: Literal["full", "tiny"] = "full",
    *,
    root: Root = None,
    tell: Tell = silent,
) -> Json:
    """Test a device, then train and evaluate the recipes in ``slices.NAMES`` until the time is up.

    The same call resumes: what is finished stays, an interrupted run goes on. After each recipe the folder holds
    ``table.txt`` and the archive (:func:`robustood.artefacts.pack`) of what is there.

    Args:
        folder: receives ``selftest.json``, ``slice.json``, the table, the archive, and a folder for each run.
        minutes: time budget of this call.
        device: default: CUDA if available.
        budget: "full", or "tiny" for a dry run with small networks and few steps.
        root: folder that holds the packs; default as in :func:`robustood.data.load`.
        tell: called with one line of text for each step of the work.

    Returns:
        The content of ``slice.json``: the planned recipes with their epochs and changes, those that ``failed`` with
        the reason, the ``unfinished`` ones, and the minutes of all calls.

    Raises:
        ValueError: for missing images, a folder of another kind of slice, or several processes.
    """
    start = time.monotonic()
    check_path(folder, "folder")
    check_number(minutes, "minutes", 0)
    check_choice(budget, "budget", tuple(BUDGETS))
    check_device(device or "cpu")
    if distributed.world() > 1:
        raise ValueError("a slice is for one GPU; start robustood slice without torchrun")
    for name in NAMES:
        want = read(name, BUDGETS[budget].changes).settings.data
        check_there([want.train, want.test, want.outliers, *want.outlier_sets()], root)
    work = _Slice(
        Path(folder).expanduser(),
        chosen_device(device),
        budget,
        root,
        tell,
        start + 60 * minutes - min(_RESERVE, 6 * minutes),
    )
    work.run()
    work.state["minutes"] += (time.monotonic() - start) / 60
    work.close()
    return work.state


class _OutOfTimeError(Exception):
    """Raised in an evaluation, which keeps what it has measured."""


@dataclass
class _Slice:
    """A slice at work.

    Attributes:
        deadline: when to stop, on the clock of ``time.monotonic``.
        held: the images of recipes that were read, by what determines them.
        state: the content of ``slice.json``.
    """

    folder: Path
    device: torch.device
    budget: Literal["full", "tiny"]
    root: Root
    tell: Tell
    deadline: float
    held: dict[str, tuple[Data, dict[str, Card]]] = field(default_factory=dict)
    state: Json = field(default_factory=dict)

    def run(self) -> None:
        """Test, plan, and work through the plan as long as there is time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "slice.json"
        old = read_json(file, ("budget", "jobs", "minutes")) if file.is_file() else {}
        if old:
            check_same(old, {"budget": self.budget}, f"{self.folder} holds a slice")
        self.state = {"budget": self.budget, "jobs": {}, "minutes": 0.0, **old, "failed": {}}
        tested = self.tested()
        costs: dict[str, Cost] = {}
        for _ in range(_ROUNDS):
            if self.left() > 0 and not self.todo():
                self.extend(tested, costs)
            if not self.todo():  # nothing more fits
                break
            for name in self.todo():
                if (left := self.left()) > 0:
                    self.work(name, left * self.share(name))

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def todo(self) -> list[str]:
        """The planned recipes that are neither finished nor failed."""
        done = lambda name: (self.folder / name / "report.json").is_file()
        return [n for n in self.state["jobs"] if not done(n) and n not in self.state["failed"]]

    def share(self, name: str) -> float:
        """The share of a recipe in the time that is left, as it was planned."""
        todo, jobs = self.todo(), self.state["jobs"]
        later = todo[todo.index(name) :]
        return jobs[name]["seconds"] / sum(jobs[each]["seconds"] for each in later)

    def tested(self) -> Json:
        """The result of the self-test, which is kept for the same device and software."""
        file = self.folder / "selftest.json"
        here = {"device": device_name(self.device), "versions": versions()}
        if (
            file.is_file()
            and (kept := read_json(file, ("checks", "rates"))).items() >= here.items()
        ):
            return kept
        found = self_test(self.device, BUDGETS[self.budget].changes, self.tell)
        write_json(file, found)
        return found

    def extend(self, tested: Json, costs: dict[str, Cost]) -> None:
        """Plan as many of the remaining recipes as the time allows."""
        budget, jobs = BUDGETS[self.budget], self.state["jobs"]
        rest = {name: self.cost(name, costs) for name in NAMES if name not in jobs}
        if not rest:
            return
        rates, changes = self.rates(tested, rest)
        planned = plan(rest, self.left(), rates, budget.most, budget.least)
        if not planned:
            name, needed = next(iter(rest)), rates.seconds(next(iter(rest.values())), budget.least)
            self.tell(
                f"{name} with {budget.least} epochs needs about {needed / _USED / 60:.1f} minutes, and "
                f"{self.left() / 60:.1f} are left; call again with more --minutes"
            )
            return
        for name, epochs in planned.items():
            own = [*budget.changes, *changes, f"training.epochs={epochs}"]
            jobs[name] = {
                "epochs": epochs,
                "changes": own,
                "seconds": rates.seconds(rest[name], epochs),
            }
        self.tell(", ".join(f"{name}: {job['epochs']} epochs" for name, job in jobs.items()))

    def cost(self, name: str, known: dict[str, Cost]) -> Cost:
        """The operations of a recipe; those with CIFAR-100 count as the same with CIFAR-10."""
        same = name.replace("cifar100", "cifar10")
        if same not in known:
            recipe = read(same, BUDGETS[self.budget].changes)
            data, _ = self.images(recipe, self.root)
            known[same] = cost(recipe, len(data.train), len(data.outliers))
        return known[same]

    def rates(self, tested: Json, rest: Mapping[str, Cost]) -> tuple[Rates, list[str]]:
        """The measured speed, compiled or not, whichever leaves more epochs; and what follows for the recipes."""
        failed = {check["name"] for check in tested["checks"] if not check["passed"]}
        measured, budget = tested["rates"], BUDGETS[self.budget]
        changes = ["training.precision=float32"] if "bf16" in failed else []
        eager = Rates(measured["eager"], measured["evaluation"], H200.besides)
        if not measured["compiled"] or "compiled" in failed:
            return eager, [*changes, "training.compile=false"]
        compiled = replace(
            eager, training=measured["compiled"], besides=H200.besides + tested["compile_seconds"]
        )
        epochs = lambda rates: sum(
            plan(rest, self.left(), rates, budget.most, budget.least).values()
        )
        if epochs(compiled) > epochs(eager):
            return compiled, changes
        return eager, [*changes, "training.compile=false"]

    def images(self, recipe: Recipe, root: Root) -> tuple[Data, dict[str, Card]]:
        """The training images of a recipe, read once for all that share them."""
        key = json.dumps([asdict(recipe.settings.data), uses_outliers(recipe.objective())])
        if key not in self.held:
            self.held[key] = to_train(recipe, root)
        data, cards = self.held[key]
        return data, copy.deepcopy(cards)

    def work(self, name: str, seconds: float) -> None:
        """Train a recipe for its share of the time, and evaluate it if it is finished; an error is kept."""
        recipe, place = read(name, self.state["jobs"][name]["changes"]), self.folder / name
        say = partial(self.say, name)
        say(f"{recipe.settings.training.epochs} epochs in at most {seconds:.0f} seconds")
        try:
            run = train(
                recipe,
                place,
                seconds / 60,
                self.device,
                root=self.root,
                tell=say,
                reader=self.images,
            )
            if run["finished"]:
                reports.measure(recipe, place, self.device, self.root, partial(self.in_time, name))
        except _OutOfTimeError:
            say("time is up in the evaluation; the same command resumes from here")
        except (ValueError, ArithmeticError, RuntimeError) as error:
            self.state["failed"][name] = f"{type(error).__name__}: {error}"
            say(f"failed: {error}")
        self.close()

    def say(self, name: str, line: str) -> None:
        """Tell one line about a recipe."""
        self.tell(f"{name}: {line}")

    def in_time(self, name: str, line: str) -> None:
        """Tell one line about a part of an evaluation that begins, if there is time for it."""
        if self.left() <= 0:
            raise _OutOfTimeError
        self.say(name, line)

    def close(self) -> None:
        """Write the plan, the table and the archive of what is there."""
        rest = [name for name in NAMES if name not in self.state["jobs"]]
        self.state["unfinished"] = [*self.todo(), *rest]
        write_json(self.folder / "slice.json", self.state)
        if runs := results.load(self.folder):
            write_whole(self.folder / "table.txt", f"{results.table(runs)}\n".encode())
            self.tell(results.table(runs))
        artefacts.pack(self.folder)
