"""The boxes of :mod:`robustood.challenge`, trained, calibrated and saved. Whoever wants to attack them stops here.

    python -m experiments.challenge             train those that are missing
    python -m experiments.challenge A B         train these again

Each is a small network on the digits, and its score the log-odds of the likeliest digit.

``A``
    is masked. A network trained without outliers or attacks, with its score in whole steps: differences of scores
    between near images are zero, so an attack that estimates a gradient from them stands still.
``B``
    is miscalibrated. Trained by ALOE, but with the threshold set on digits that it was trained on, which score
    higher than new ones.
``C``
    is honest. Trained by ALOE, with the threshold set on digits that it has not seen.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from experiments.harness import OPTIMISER, Row, digits, train
from robustood import artefacts, metrics
from robustood.challenge import TPR, WITHIN, log_odds, names
from robustood.checkpoints import save_weights
from robustood.models import small_cnn
from robustood.objectives import ALOE, Objective, Standard

FIT: Row = {"batch_size": 64, "outlier_batch_size": 128, "epochs": 60, "lr": 3e-3}


@dataclass(frozen=True)
class Plan:
    """How a box is made.

    Attributes:
        objective: its training rule.
        calibrated_on: the digits from which its threshold comes, ``"val"`` or ``"train"``.
        width: of the network.
        step: its score comes in whole steps of this size; 0 for none.
        seed: of the initial weights and of the training.
    """

    objective: Objective
    calibrated_on: str
    width: int
    step: float
    seed: int


PLANS = {
    "A": Plan(Standard(), "val", 1, 2.0, 0),
    "B": Plan(ALOE(WITHIN), "train", 2, 0.0, 1),
    "C": Plan(ALOE(WITHIN), "val", 2, 0.0, 0),
}


def make(name: str) -> None:
    """Train a box and save its weights with their card."""
    plan = PLANS[name]
    model = small_cnn(seed=plan.seed, width=plan.width)
    seconds = train(model, plan.objective, digits(), seed=plan.seed, **FIT)
    with torch.no_grad():
        known = log_odds(model, getattr(digits(), plan.calibrated_on).x, plan.step)
    save_weights(
        artefacts.FOLDERS[0] / "weights" / f"challenge_{name.lower()}.safetensors",
        model,
        made_by="experiments/challenge.py: make",
        recipe={**OPTIMISER, **FIT, "objective": type(plan.objective).__name__, "data": "digits"},
        seed=plan.seed,
        width=plan.width,
        step=plan.step,
        threshold=metrics.threshold_at_tpr(known, TPR),
        calibrated_on=plan.calibrated_on,
        seconds=round(seconds, 1),
    )


def main() -> None:
    """Make the boxes that are named, or those that are missing."""
    torch.set_num_threads(1)
    there = artefacts.names("weights")
    missing = [name for name in names() if f"challenge_{name.lower()}" not in there]
    for name in sys.argv[1:] or missing:
        make(name)
        print(f"box {name} is saved", flush=True)


if __name__ == "__main__":
    main()
