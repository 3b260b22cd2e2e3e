"""The attacks of the standard evaluation, in order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from robustood.attacks import Square, value_and_grad
from robustood.detectors import Detector
from robustood.detectors._base import outputs_of
from robustood.evaluate._attack import (
    attack_score,
    deployed_objective,
    paper_attack,
    surrogate_objectives,
)
from robustood.evaluate._report import Attack, Inputs
from robustood.models import frozen
from robustood.perturbations import Ball, PerturbationSet

VERSION = "standard-1"  # a change of anything below that changes a result needs another version
TARGETS = 10  # likeliest classes: of 40, all find no more than ten do (table digits_targets)


@dataclass(frozen=True)
class Stage:
    """One attack of the protocol.

    Attributes:
        name: as reports show it.
        attack: called as :func:`attack_score` is.
        passes: forward and backward passes per image, roughly; for the time left.
        needs: ``"classes"`` if it climbs outputs of a classifier, ``"gradient"`` if it climbs the score.
    """

    name: str
    attack: Attack
    passes: int
    needs: frozenset[str] = frozenset()


_GRADIENT, _BOTH = frozenset({"gradient"}), frozenset({"gradient", "classes"})
_PAPERS = [
    Stage(f"as in {name}", partial(paper_attack, paper=paper), passes, frozenset({"classes"}))
    for name, paper, passes in (("ALOE", "aloe", 10), ("ATOM", "atom", 41))
]
_OWN = partial(attack_score, steps=100, objectives=deployed_objective)
_BY_GRADIENT = [
    *_PAPERS,
    Stage(
        "APGD on surrogates",
        partial(attack_score, steps=50, restarts=0, objectives=surrogate_objectives),
        100,
        _BOTH,
    ),
    Stage("APGD on the score", partial(_OWN, restarts=0), 100, _GRADIENT),
    Stage(
        "APGD on each objective", partial(attack_score, steps=50, targets=TARGETS), 400, _GRADIENT
    ),
    Stage("another random start", _OWN, 100, _GRADIENT),
]
_SQUARE = Stage("Square", partial(attack_score, steps=1000, restarts=0, rule=Square()), 400)
_DRAWS = Stage(
    "random draws", partial(attack_score, steps=0, restarts=200, objectives=deployed_objective), 70
)
_EXHAUSTIVE = Stage("every member", attack_score, 50)


def stages(detector: Detector, x: Inputs, within: PerturbationSet, climbable: bool) -> list[Stage]:
    """The attacks of the protocol that a detector and a set allow, in order; x are some of the inputs."""
    if not within.differentiable:
        return [_EXHAUSTIVE]
    few = x[:2].to(detector.device(x), copy=True)
    classes = climbable and detector.has_classes and outputs_of(detector, few) is not None
    known = {need for need, there in (("gradient", climbable), ("classes", classes)) if there}
    by_values = _SQUARE if isinstance(within, Ball) else _DRAWS
    return [*(stage for stage in _BY_GRADIENT if stage.needs <= known), by_values]


def climbable(detector: Detector, x: Inputs, within: PerturbationSet) -> bool:
    """Whether the score has a gradient at all; it may still be zero."""
    x = x[:2].to(detector.device(x), copy=True)
    try:
        with torch.inference_mode(False), torch.enable_grad(), frozen(detector):
            value_and_grad(detector.score, x, within.identity(x), within)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("no gradient", "call numpy() on Tensor")):
            raise
        return False
    return True
