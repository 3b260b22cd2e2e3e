"""Attacks on a score: with the detector's own objectives, and with the papers' surrogates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from robustood import rng
from robustood.attacks import APGD, Ascent, AttackObjective, Rule, search
from robustood.detectors import Detector, Direction, Mahalanobis, RejectClass, score_objectives
from robustood.detectors._base import signed
from robustood.inputs import (
    check_callable,
    check_choice,
    check_count,
    check_generator,
    check_instance,
    check_keywords,
    check_several,
    checked_inputs,
)
from robustood.losses import to_uniform
from robustood.models import GradientWatch, frozen, read, split
from robustood.perturbations import PerturbationSet, as_set, per_sample

Inputs = Float[Tensor, "batch *shape"]
Objectives = Callable[[Detector, Tensor, Direction], list[AttackObjective]]


def attack_score(
    detector: Detector,
    x: Inputs,
    within: PerturbationSet | float,
    *,
    direction: Direction,
    steps: int = 40,
    restarts: int = 1,
    targets: int | None = None,
    rule: Rule | None = None,
    step_size: float | None = None,
    objectives: Objectives | None = None,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
) -> Inputs:
    """Attack the deployed score adaptively: climb every one of ``attack_objectives``, keep the best by the score.

    Pre-processing, clipping and neighbours are those of the attacked point at each step, because they
    are part of ``attack_objectives``. Each objective costs steps + 1 forward passes of the detector per restart.

    Args:
        detector: fitted if it needs to be; its mode and that of its network are restored.
        x: clean inputs (batch, ...).
        within: the perturbation set, such as ``Linf(8/255)`` or a number; a finite set is searched exhaustively.
        direction: ``"raise"`` for outliers that are to be accepted, ``"lower"`` for in-distribution
            inputs that are to be rejected.
        steps, restarts, step_size: as in :func:`robustood.attacks.maximise`; the best of several restarts
            is returned.
        targets: number of classes to pull towards, the likeliest on the clean input; default all of up
            to ten, ten of more.
        rule: default :class:`robustood.attacks.APGD`. A rule by values, such as :class:`robustood.attacks.Square`,
            climbs the score alone.
        objectives: ``objectives(detector, x, direction)`` gives those to climb in place of
            :func:`score_objectives`, such as :func:`surrogate_objectives`.
        batch_size: inputs attacked at a time.
        generator: source of the random initial points; default: a new one with seed 0.

    Returns:
        Perturbed inputs, shaped like x.

    Raises:
        ValueError: for inputs outside the set's box, or bad settings.
        RuntimeError: for a detector that is not fitted.

    Warns:
        UserWarning: if the gradient is exactly zero at every step for every input.
    """
    check_detector(detector)
    within = as_set(within)
    x = checked_inputs(x, within.box).detach()
    check_choice(direction, "direction", ("raise", "lower"))
    check_generator(generator)
    batch_size = check_count(batch_size, "batch_size", low=1)
    if targets is not None:
        check_count(targets, "targets")
    if objectives is not None:
        check_callable(objectives, "objectives", "objectives(detector, x, direction)")
    generator = generator or rng.generator(x.device, 0)
    rule = rule or APGD()
    worst = partial(
        search,
        within=within,
        steps=steps,
        restarts=restarts,
        step_size=step_size,
        rule=rule,
        generator=generator,
    )
    climbs = objectives or partial(score_objectives, targets=targets)
    if not (within.differentiable and isinstance(rule, Rule) and rule.uses_gradient):
        climbs = deployed_objective
    watch, found = GradientWatch(), []
    judge = watch.over(lambda v: signed(detector.score(v), direction))
    with torch.inference_mode(False), frozen(detector):
        for part in x.split(batch_size):
            moved = worst([watch.over(each) for each in climbs(detector, part, direction)], part)
            if within.differentiable:  # a failed search leaves the clean input
                with torch.no_grad():
                    gained = judge(moved) - judge(part) >= 0
                moved = torch.where(per_sample(gained, part), moved, part)
            found.append(moved)
    watch.close(len(x), hidden=within.radius > 0 and within.differentiable)
    return torch.cat(found)


def check_detector(detector: Detector) -> None:
    """Refuse anything but a detector."""
    check_instance(detector, "detector", Detector, "a detector, such as MSP(model)")


def deployed_objective(
    detector: Detector, x: Inputs, direction: Direction
) -> list[AttackObjective]:
    """The deployed score itself, whatever objectives the detector proposes."""
    return [lambda v: signed(detector.score(v), direction)]


def surrogate_objectives(
    detector: Detector, x: Inputs, direction: Direction
) -> list[AttackObjective]:
    """The surrogates of both papers, judged by the deployed score: attacks that transfer from another objective."""

    def objective(climbed: Callable[[Tensor], Tensor]) -> AttackObjective:
        return lambda v: (climbed(v), signed(detector.score(v), direction))

    return [objective(surrogate(detector, direction, paper)) for paper in ("aloe", "atom")]


def attack_in_turn(
    detector: Detector,
    x: Inputs,
    within: Sequence[PerturbationSet | float],
    *,
    direction: Direction,
    **how: Any,
) -> Inputs:
    """The compositional attack: each set is searched around the worst input found in the previous one.

    With a :class:`~robustood.perturbations.Corruption` and an ``Linf`` ball it is the fourth test condition of
    ATOM (Chen et al. 2021, section 4). It is greedy, so not always stronger than each set alone, and a lower bound
    on the worst case over :class:`~robustood.perturbations.Compose`.

    Args:
        within: the sets, in order.
        direction, how: as in :func:`attack_score`.
    """
    check_several(within, "within", "perturbation sets, in the order of the search")
    check_keywords(attack_score, how, "attack_in_turn()")
    for each in within:
        x = attack_score(detector, x, each, direction=direction, **how)
    return x


# --- the papers' own attacks


@dataclass(frozen=True)
class Protocol:
    """Budget of a paper's attack: number of steps, step size as a share of the radius, and initial points."""

    steps: int
    share: float
    restarts: int
    keep: Literal["best", "last"]


PAPERS = {
    # 10 steps of eps = 1/255. The random start is truncated to the 8-bit grid, which makes it zero.
    "aloe": Protocol(steps=10, share=1.0, restarts=0, keep="last"),
    # 40 steps of 1/255 at eps = 8/255, from one random start, the best by the surrogate.
    "atom": Protocol(steps=40, share=1 / 8, restarts=1, keep="best"),
}


def paper_attack(
    detector: Detector,
    x: Inputs,
    within: PerturbationSet | float,
    *,
    direction: Direction,
    paper: Literal["aloe", "atom"],
    batch_size: int = 512,
    generator: torch.Generator | None = None,
) -> Inputs:
    """Attack as the code of ALOE (Chen et al. 2020) or ATOM (Chen et al. 2021) does.

    Step sizes scale with the radius from those of the papers at 1/255 and 8/255; the rounding to 8 bits is
    omitted. ATOM attacks outliers only; the surrogate for the other side is its negative.

    Args:
        detector, x, within, direction, batch_size, generator: as in :func:`attack_score`.
        paper: whose surrogate, steps, initial points and choice of iterate to use.
    """
    check_detector(detector)
    check_choice(paper, "paper", tuple(PAPERS))
    check_choice(direction, "direction", ("raise", "lower"))
    batch_size = check_count(batch_size, "batch_size", low=1)
    check_generator(generator)
    within = as_set(within)
    x = checked_inputs(x, within.box).detach()
    plan, watch = PAPERS[paper], GradientWatch()
    climbed = watch.over(surrogate(detector, direction, paper))
    generator = generator or rng.generator(x.device, 0)
    found = []
    with torch.inference_mode(False), frozen(detector):
        for part in x.split(batch_size):
            moved = search(
                climbed,
                part,
                within,
                steps=plan.steps,
                step_size=plan.share * within.radius,
                restarts=plan.restarts,
                rule=Ascent(),
                keep=plan.keep,
                generator=generator,
            )
            if plan.keep == "best":  # the clean input competes, and wins ties
                with torch.no_grad():
                    gained = climbed(moved) > climbed(part)
                moved = torch.where(per_sample(gained, part), moved, part)
            found.append(moved)
    flat = isinstance(detector, Mahalanobis)  # whose surrogate has no gradient by design
    watch.close(len(x), hidden=within.radius > 0 and not flat)
    return torch.cat(found)


def surrogate(
    detector: Detector, direction: Direction, paper: Literal["aloe", "atom"]
) -> Callable[[Tensor], Tensor]:
    r"""What the papers' code maximises in place of the score.

    For a reject class, $-\log F_{K+1}$ (to lower the score, its negative). For Mahalanobis with a logistic
    regression, the cross-entropy of $(1 - \pi, \pi)$ *taken as logits*, $\pi = \sigma(t)$, without the input step. For
    all other detectors, a function of the softmax: ALOE lowers the entropy of outliers, ATOM raises
    $\ell_{OE} = \mathrm{LSE}(z) - \bar z$ of them, and both lower $\ell_{OE}$ of in-distribution inputs.
    """
    check_detector(detector)
    check_choice(direction, "direction", ("raise", "lower"))
    check_choice(paper, "paper", tuple(PAPERS))
    up = direction == "raise"
    if isinstance(detector, RejectClass):

        def reject(x: Tensor) -> Tensor:
            log_f = split(detector.model, read(detector.model, x).log_softmax(1))[1].logsumexp(1)
            return -log_f if up else log_f

        return reject
    if isinstance(detector, Mahalanobis) and detector.weight is not None:
        return lambda x: mahalanobis_surrogate(detector.plain(x), up)
    if up and paper == "aloe":
        log_p = lambda x: detector.logits(x).log_softmax(1)
        return lambda x: ((p := log_p(x)).exp() * p).sum(1)
    sign = 1 if up else -1
    return lambda x: sign * to_uniform(detector.logits(x))


def mahalanobis_surrogate(t: Float[Tensor, " batch"], up: bool) -> Float[Tensor, " batch"]:
    r"""Cross-entropy of $(1 - \pi, \pi)$ taken as logits, with $\pi = 1 / (1 + e^{-t})$ as in the released code.

    In float32 its gradient in t is 0 for t below about -52 and NaN below about -89: an attack on a confident
    in-distribution input has no effect.
    """
    pi = 1 / (1 + torch.exp(-t))
    label = torch.full_like(t, float(up)).long()
    return cross_entropy(torch.stack([1 - pi, pi], 1), label, reduction="none")
