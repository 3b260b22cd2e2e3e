"""Measure again what the results chapter says of faint changes, training attacks, detectors and budgets on CIFAR-10.

    python book/_tools/results_cifar10.py             all four tables
    python book/_tools/results_cifar10.py faint       one of them
    python book/_tools/results_cifar10.py --again     measure anew what is already kept

Needs the packs of images, and the kept runs. Each table fills
``data/results/cifar10_<name>.json``; a run can be stopped and goes on (``keeping.py``).

The threshold of each network accepts 95 % of 500 clean test images of CIFAR-10. Attacked outliers are 500 validation
images of Tiny-ImageNet, the seen distribution. Attacks made for one detector and judged by another
change 200 images of CIFAR-10 and 200 of SVHN, those of the plan ``detectors``; the budgets of ATOM's test
attack the same images of SVHN.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from keeping import Experiment, Task, main
from torch import Tensor, nn

from robustood import artefacts, metrics
from robustood.attacks import maximise
from robustood.data import compress, load, pixels
from robustood.detectors import MSP, Detector, RejectClass
from robustood.evaluate import attack_score, scores
from robustood.metrics import Estimate, proportion, threshold_at_tpr
from robustood.objectives import OutlierTraining
from robustood.perturbations import Linf
from robustood.recipes import Recipe, read
from robustood.recipes.reports import fitted, pick
from robustood.recipes.runs import trained
from robustood.training import Objective

RUNS = ("standard", "oe", "aloe", "ntom", "atom", "acet", "atom_fine", "minedaloe", "adv_8")
ATTACKED = ("ntom", "atom", "acet", "atom_fine", "minedaloe")  # in training, but for the first
COMMON: dict[str, Any] = {
    "images a set": 500, "accepted": 0.95, "inputs": "cifar10:test", "seen": "tinyimagenet:val",
    "new": ["svhn:train", "textures", "scenes", "cifar100:test"],
}  # fmt: skip
DETECTORS = ("MSP", "Energy", "Mahalanobis", "KNN", "ViM", "ReAct", "GradNorm")
BETWEEN: dict[str, Any] = {
    "detectors": DETECTORS, "images a set": 200, "inputs": "cifar10:test", "outliers": "svhn:train",
    "eps": 1 / 255, "steps": 40, "targets": 3,
}  # fmt: skip
SEARCHED: dict[str, Any] = {
    "images a set": 200, "inputs": "cifar10:test", "outliers": "svhn:train", "eps": 8 / 255,
    # steps, the first of them in grey levels (the rule's own is twice the radius), target classes
    "budgets": [(10, 16, 3), (10, 2, 3), (40, 16, 3), (100, 16, 1), (100, 16, 3)],
}  # fmt: skip


def run_of(short: str) -> str:
    """The kept run of a method, or of a variant of it."""
    method, *variant = short.split("_")
    return "_".join([method, "cifar10_cpu", *variant])


@lru_cache
def stored(name: str, n: int = COMMON["images a set"]) -> Tensor:
    """Test images as they lie in the file, 8-bit."""
    return pick(load(name), n).x


def images(name: str, n: int = COMMON["images a set"]) -> Tensor:
    """The same in [0, 1]."""
    return pixels(stored(name, n))


@lru_cache
def restored(short: str) -> tuple[nn.Module, Recipe]:
    """The network of a kept run, and the recipe that made it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = artefacts.restore(run_of(short), scratch)
        recipe = read(folder / "recipe.json")
        model, *_ = trained(recipe, folder, "cpu")
    return model, recipe


@lru_cache
def network(short: str) -> tuple[Detector, Objective, float]:
    """The deployed detector of a kept run, its objective, and the threshold."""
    model, recipe = restored(short)
    detector = RejectClass(model) if model.reject else MSP(model)
    line = threshold_at_tpr(scores(detector, images(COMMON["inputs"])), COMMON["accepted"])
    return detector, recipe.objective(), line


def accepted(short: str, x: Tensor) -> Estimate:
    """Share of images at or above the threshold."""
    detector, _, line = network(short)
    return proportion(int((scores(detector, x) >= line).sum()), len(x))


def timed(task: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """A task that also says how long it took."""

    def run() -> dict[str, Any]:
        began = time.process_time()
        return {**task(), "seconds": time.process_time() - began}

    return run


def moved(x: Tensor, grey: int, draw: torch.Generator) -> Tensor:
    """Every pixel of 8-bit images moved up or down at random."""
    signs = 2.0 * torch.randint(0, 2, x.shape, generator=draw) - 1
    return (pixels(x) + grey / 255 * signs).clamp(0, 1)


def faint(seed: int) -> Iterator[Task]:
    """Faint changes that no attack made, and what each network then accepts. No gradient is used."""
    if seed:
        return
    changes: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
        f"moved by {grey}": lambda x, draw, grey=grey: moved(x, grey, draw) for grey in (0, 1, 2, 4, 8)
    }  # fmt: skip
    changes["JPEG 75"] = lambda x, draw: pixels(compress(x, 75))
    for short in RUNS:
        for words, change in changes.items():

            def task(short: str = short, change: Any = change) -> dict[str, Any]:
                draw = torch.Generator().manual_seed(seed)
                new = torch.cat([stored(name) for name in COMMON["new"]])
                sides = {side: stored(COMMON[side]) for side in ("inputs", "seen")} | {"new": new}
                return {side: accepted(short, change(x, draw)) for side, x in sides.items()}

            yield {"run": run_of(short), "change": words}, timed(task)


def training_attack(seed: int) -> Iterator[Task]:
    """Outliers attacked by the training loss, as in ATOM's training, with other steps, and with a smaller radius."""
    if seed:
        return
    ways: dict[str, tuple[int, int, float] | None] = {  # radius, steps and their size, in grey levels
        "none": None, "5 steps of 4": (8, 5, 4), "5 steps of 2": (8, 5, 2), "5 steps of 1": (8, 5, 1),
        "40 steps of 4": (8, 40, 4), "40 steps of 1": (8, 40, 1), "radius 1": (1, 10, 0.25),
    }  # fmt: skip
    for short in ATTACKED:
        for words, how in ways.items():

            def task(short: str = short, how: Any = how) -> dict[str, Any]:
                detector, objective, _ = network(short)
                assert isinstance(objective, OutlierTraining)
                loss = lambda x: objective.outlier_loss(detector.model(x))
                u, draw = images(COMMON["seen"]), torch.Generator().manual_seed(seed)
                if how:
                    radius, steps, size = how
                    u = maximise(
                        loss, u, Linf(radius / 255), steps=steps, step_size=size / 255, keep="best",
                        generator=draw,
                    )  # fmt: skip
                with torch.no_grad():
                    mean = loss(u).mean().item()
                return {"loss": mean, "accepted": accepted(short, u)}

            yield {"run": run_of(short), "attack": words}, timed(task)


@lru_cache
def detectors(short: str) -> dict[str, Detector]:
    """All detectors on one kept network, fitted on training images where they need it."""
    model, recipe = restored(short)
    return {name: fitted(recipe, name, model, None) for name in DETECTORS}


def transfer(seed: int) -> Iterator[Task]:
    """AUROC of each detector on images attacked, both sides, for one of them."""
    if seed:
        return
    how: dict[str, Any] = {key: BETWEEN[key] for key in ("steps", "targets")}
    for short in ("oe", "aloe"):
        for made_for in ("none", *DETECTORS):

            def task(short: str = short, made_for: str = made_for) -> dict[str, Any]:
                n = BETWEEN["images a set"]
                pair = [images(BETWEEN[side], n) for side in ("inputs", "outliers")]
                if made_for != "none":
                    attack = partial(
                        attack_score, detectors(short)[made_for], within=Linf(BETWEEN["eps"]), **how
                    )
                    pair = [attack(pair[0], direction="lower"), attack(pair[1], direction="raise")]
                judged = {
                    name: [scores(d, x) for x in pair] for name, d in detectors(short).items()
                }
                return {
                    name: metrics.confidence_interval(metrics.auroc, *both)
                    for name, both in judged.items()
                }

            yield {"run": run_of(short), "made for": made_for}, timed(task)


def budgets(seed: int) -> Iterator[Task]:
    """AUROC in ATOM's test, outliers attacked adaptively with other steps and numbers of target classes."""
    if seed:
        return
    sides, n = ("inputs", "outliers"), SEARCHED["images a set"]
    for short in ("atom", "atom_fine", "acet", "minedaloe"):
        for steps, first, targets in SEARCHED["budgets"]:
            how: dict[str, Any] = {"steps": steps, "step_size": first / 255, "targets": targets}

            def task(short: str = short, how: dict[str, Any] = how) -> dict[str, Any]:
                detector, *_ = network(short)
                x, u = (images(SEARCHED[side], n) for side in sides)
                u = attack_score(detector, u, Linf(SEARCHED["eps"]), direction="raise", **how)
                pair = scores(detector, x), scores(detector, u)
                return {"auroc": metrics.confidence_interval(metrics.auroc, *pair)}

            budget = {"steps": steps, "first step": first, "targets": targets}
            yield {"run": run_of(short), **budget}, timed(task)


EXPERIMENTS: dict[str, Experiment] = {
    "faint": (faint, COMMON),
    "training_attack": (training_attack, COMMON),
    "transfer": (transfer, BETWEEN),
    "budgets": (budgets, SEARCHED),
}

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", "cifar10", EXPERIMENTS, lambda: images(COMMON["inputs"])))
