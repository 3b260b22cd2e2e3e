"""Measure again what the results chapter says of noise and of training attacks on CIFAR-10.

    python book/_tools/results_cifar10.py             both tables
    python book/_tools/results_cifar10.py noise       one of them
    python book/_tools/results_cifar10.py --again     measure anew what is already kept

Needs the packs of CIFAR-10 and Tiny-ImageNet, and the kept runs. Each table fills
``data/results/cifar10_<name>.json``; a run can be stopped and goes on (``keeping.py``).

The threshold of each network accepts 95 % of 500 clean test images of CIFAR-10; outliers are 500 validation images
of Tiny-ImageNet, the seen distribution.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from keeping import Experiment, Task, main
from torch import Tensor

from robustood import results
from robustood.attacks import maximise
from robustood.data import load, pixels
from robustood.detectors import MSP, Detector, RejectClass
from robustood.evaluate import scores
from robustood.metrics import Estimate, proportion, threshold_at_tpr
from robustood.objectives import OutlierTraining
from robustood.perturbations import Linf
from robustood.recipes import read
from robustood.recipes.running import trained
from robustood.recipes.testing import pick
from robustood.training import Objective

RUNS = ("standard", "oe", "aloe", "atom")
ATTACKED = ("atom",)  # their training attack is measured
COMMON: dict[str, Any] = {"images a side": 500, "accepted": 0.95, "outliers": "tinyimagenet:val"}


@lru_cache
def images(name: str) -> Tensor:
    """Test images in [0, 1]."""
    return pixels(pick(load(name), COMMON["images a side"]).x)


@lru_cache
def network(short: str) -> tuple[Detector, Objective, float]:
    """The deployed detector of a kept run, its objective, and the threshold."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = results.restore(f"{short}_cifar10_cpu", scratch)
        recipe = read(folder / "recipe.json")
        model, *_ = trained(recipe, folder, "cpu")
    detector = RejectClass(model) if model.reject else MSP(model)
    line = threshold_at_tpr(scores(detector, images("cifar10:test")), COMMON["accepted"])
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


def noise(seed: int) -> Iterator[Task]:
    """Every pixel moved up or down by eps at random: what each network still accepts. No attack, no gradient."""
    if seed:
        return
    for short in RUNS:
        for grey in (0, 1, 2, 4, 8):

            def task(short: str = short, grey: int = grey) -> dict[str, Any]:
                draw = torch.Generator().manual_seed(seed)
                found = {}
                for side, name in (("inputs", "cifar10:test"), ("outliers", COMMON["outliers"])):
                    x = images(name)
                    signs = 2.0 * torch.randint(0, 2, x.shape, generator=draw) - 1
                    found[side] = accepted(short, (x + grey / 255 * signs).clamp(0, 1))
                return found

            yield {"run": f"{short}_cifar10_cpu", "grey levels": grey}, timed(task)


def training_attack(seed: int) -> Iterator[Task]:
    """Outliers attacked as in training, and with other steps and radii, by the loss of the training."""
    if seed:
        return
    ways: dict[str, Any] = {  # radius, steps and their size, in grey levels
        "none": None, "as in training": "own", "40 steps of 1": (8, 40, 1), "radius 1": (1, 10, 0.25),
    }  # fmt: skip
    for short in ATTACKED:
        for way, how in ways.items():

            def task(short: str = short, how: Any = how) -> dict[str, Any]:
                detector, objective, _ = network(short)
                assert isinstance(objective, OutlierTraining)
                loss = lambda x: objective.outlier_loss(detector.model(x))  # noqa: E731
                u, draw = images(COMMON["outliers"]), torch.Generator().manual_seed(seed)
                if how == "own":
                    own = objective.inner(objective.outside)
                    assert own is not None, f"{short} attacks no outliers in training"
                    u = own.worst(detector.model, u, loss, draw)
                elif how:
                    radius, steps, size = how
                    u = maximise(
                        loss, u, Linf(radius / 255), steps=steps, step_size=size / 255, keep="best",
                        generator=draw,
                    )  # fmt: skip
                with torch.no_grad():
                    mean = loss(u).mean().item()
                return {"loss": mean, "accepted": accepted(short, u)}

            yield {"run": f"{short}_cifar10_cpu", "attack": way}, timed(task)


EXPERIMENTS: dict[str, Experiment] = {
    "noise": (noise, COMMON),
    "training_attack": (training_attack, COMMON),
}

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", "cifar10", EXPERIMENTS, lambda: images("cifar10:test")))
