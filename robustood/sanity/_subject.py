"""A classifier and a detector seen alike: values that an attack raises, on one side or on two."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from robustood.attacks import AttackObjective
from robustood.attacks._classifier import targeted_objectives, untargeted_objective
from robustood.detectors import Detector, Direction, score_objectives
from robustood.detectors._base import check_scores, outputs_of
from robustood.inputs import check_labels
from robustood.losses import cross_entropy, margin, to_uniform
from robustood.metrics import auroc
from robustood.models import check_finite, networks, read
from robustood.perturbations import PerturbationSet

Inputs = Float[Tensor, "_ *shape"]  # sides differ in size
Model = Callable[[Tensor], Tensor]
TARGETS = 1  # classes that an attack on a score pulls towards, the likeliest: enough to see that gradients help


@dataclass(frozen=True)
class Side:
    """Inputs that are attacked in one direction.

    Attributes:
        name: for texts.
        x: the clean inputs.
        harm: what the attacker wants to be high, per sample: the margin, or the score with its sign.
        own: objectives of the white-box attack on this model; the first is the principal one.
        others: objectives that are not its own, whose maxima are tried as a transfer.
        run: calls an attack of the user's on x within a set.
        goal: harm above which the attacker has won: a misclassification, or a score like those of the other side.
        loss: the cross-entropy, for a classifier.
        declared: what a detector declares as the value to raise, the first of its attack objectives.
    """

    name: str
    x: Inputs
    harm: Callable[[Tensor], Tensor]
    own: Sequence[AttackObjective]
    others: Sequence[AttackObjective]
    run: Callable[[Callable[..., Tensor], PerturbationSet], Tensor]
    goal: float
    loss: Callable[[Tensor], Tensor] | None = None
    declared: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        outputs: what must be the same each time: logits, or a column of scores.
        logits: the network's outputs, if there is a network.
        measure: accuracy or AUROC from the harm of each side.
        metric: its name.
        chance: its value if all inputs could be made alike.
        labels: of the inputs of a classifier.
    """

    sides: Sequence[Side]
    outputs: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None
    measure: Callable[[Sequence[Tensor]], float]
    metric: str
    chance: float
    labels: Tensor | None = None


def classifier(model: Model, x: Inputs, y: Tensor) -> Subject:
    """A classifier: one side, whose margins are to be raised above 0."""
    logits = partial(read, model)
    with torch.no_grad():
        clean = logits(x)
    check_finite((~clean.isfinite()).any(1).sum(), len(x))
    check_labels(y, x, clean.shape[1])
    harm = lambda v: margin(logits(v), y)
    loss = lambda v: cross_entropy(logits(v), y)

    own = [harm, untargeted_objective(logits, y, "ce")]
    others = targeted_objectives(logits, x, y, most=2)
    run = lambda attack, within: attack(model, x, y, within)
    side = Side("inputs", x, harm, own, others, run, 0.0, loss)
    accuracy = lambda harms: float((harms[0] < 0).double().mean())
    return Subject(
        [side], logits, logits, accuracy, "accuracy", float(y.bincount().max()) / len(y), y
    )


def detector(scored: Detector, x: Inputs, outliers: Inputs) -> Subject:
    """A detector: in-distribution scores are to be lowered, those of outliers to be raised."""
    score = lambda v: scored.score(v.clone())
    logits = outputs_of(scored, x)
    typical = []
    for part in (x, outliers):
        with torch.no_grad():
            check_scores(clean := score(part), part)
        check_finite((~clean.isfinite()).sum(), len(part))
        typical.append(float(clean.double().median()))

    def side(name: str, v: Inputs, direction: Direction, other_side: float) -> Side:
        sign = 1 if direction == "raise" else -1
        harm = lambda v: sign * score(v)
        other = harm if logits is None else lambda v: sign * to_uniform(logits(v))
        return Side(
            name,
            v,
            harm,
            score_objectives(scored, v, direction, TARGETS),
            [lambda v: (other(v), harm(v))],
            lambda attack, within: attack(scored, v, within, direction=direction),
            sign * other_side,
            declared=lambda v: scored.attack_objectives(v.clone(), direction)[:, 0],
        )

    sides = [
        side("in-distribution inputs", x, "lower", typical[1]),
        side("outliers", outliers, "raise", typical[0]),
    ]
    area = lambda harms: auroc((-harms[0]).cpu().numpy(), harms[1].cpu().numpy())
    return Subject(sides, lambda v: score(v)[:, None], logits, area, "AUROC", 0.5)


@contextmanager
def unchanged(subject: object, device: torch.device, seed: int) -> Generator[None]:
    """Restore parameters, buffers, generators and the global random state on leaving; inside, a seed is set."""
    found = [part for network in networks(subject) for part in network.modules()]
    kept = [
        (part, name, value, value.detach().clone())
        for part in found
        for name, value in (
            *part.named_parameters(recurse=False),
            *part.named_buffers(recurse=False),
        )
    ]
    held = [v for part in found for v in vars(part).values() if isinstance(v, torch.Generator)]
    states = [generator.get_state() for generator in held]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield
    finally:
        with torch.no_grad():
            for part, name, value, before in kept:
                if getattr(part, name) is not value:
                    setattr(part, name, value)
                if not torch.equal(value, before):
                    value.copy_(before)
        for generator, state in zip(held, states, strict=True):
            generator.set_state(state)
