"""Attacks on a classifier, and its accuracy under attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from robustood import inputs
from robustood.attacks._loop import AttackObjective, search
from robustood.attacks._rules import Rule
from robustood.inputs import check_choice, check_count, check_labels, checked_inputs, checked_moved
from robustood.losses import LOSSES, margin
from robustood.metrics import Estimate, proportion
from robustood.models import GradientWatch, frozen, reading
from robustood.perturbations import Inputs, PerturbationSet, as_set

__all__ = ["fgsm", "pgd", "robust_accuracy"]

Labels = Int[Tensor, " batch"]
Model = Callable[[Tensor], Tensor]


def fgsm(model: Model, x: Inputs, y: Labels, within: PerturbationSet | float) -> Inputs:
    """Fast gradient sign method: one full step from the clean input (Goodfellow et al. 2015).

    Args and errors as in :func:`pgd`. For ``Linf`` the step is eps times the sign of the
    gradient, for ``L2`` eps times the unit gradient.
    """
    within = as_set(within)
    return pgd(model, x, y, within, steps=1, step_size=within.radius, restarts=0, keep="last")


def pgd(
    model: Model,
    x: Inputs,
    y: Labels,
    within: PerturbationSet | float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    loss: Literal["ce", "margin", "dlr", "targets"] = "ce",
    keep: Literal["best", "last"] = "best",
    rule: Rule | None = None,
    generator: torch.Generator | None = None,
) -> Inputs:
    """Projected gradient descent against a classifier, untargeted (Madry et al. 2018, section 2.1).

    With ``keep="best"`` the iterate with the largest margin is returned, whichever loss was
    maximised: a sample that was misclassified at any iterate is returned misclassified.

    Args:
        model: inputs to logits (batch, classes).
        x: clean inputs; images (batch, channel, height, width) in [0, 1] unless the set has no box.
        y: labels (batch,).
        within: the perturbation set, such as ``Linf(8/255)``, or ``8/255`` for short.
        steps, step_size, restarts, rule, keep, generator: as in :func:`maximise`.
        loss: ``"ce"``, ``"margin"``, ``"dlr"``, or ``"targets"``: the margin towards each wrong
            class in turn (the nine likeliest if there are more), which is exact for a linear
            model and costs one attack per class.

    Returns:
        Perturbed inputs, shaped like x.

    Raises:
        ValueError: for inputs outside the box, NaN, the wrong number of axes, an empty batch, labels
            out of range, an unknown loss, a loss that needs more classes, or a model that returns NaN.
        TypeError: for a model that does not return a tensor.
        RuntimeError: for a model whose output has no gradient.

    Warns:
        UserWarning: if the gradient is exactly zero at every step for every input.
    """
    check_choice(loss, "loss", (*LOSSES, "targets"))
    check_choice(keep, "keep", ("best", "last"))
    within = as_set(within)
    x = checked_classifier(model, x, y, within)
    watch = GradientWatch()
    with torch.inference_mode(False), frozen(model), reading(model) as read:
        y = y.clone() if y.is_inference() else y
        logits = covering(read, int(y.max()))
        if loss == "targets":
            climbed = targeted_objectives(logits, x, y)
        elif keep == "best":
            climbed = [untargeted_objective(logits, y, loss)]
        else:
            climbed = [lambda moved: LOSSES[loss](logits(moved), y)]
        found = search(
            [watch.over(each) for each in climbed],
            x,
            within,
            steps=steps,
            step_size=step_size,
            restarts=restarts,
            rule=rule,
            keep=keep,
            generator=generator,
        )
    watch.close(len(x), hidden=within.radius > 0)
    return found


def checked_classifier(model: Model, x: Inputs, y: Labels, within: PerturbationSet) -> Inputs:
    """The inputs of an attack on a classifier, once it is certain that they fit."""
    inputs.check_model(model)
    x = checked_inputs(x, within.box).detach()
    if within.box == (0, 1):
        inputs.check_images(x)
    check_labels(y, x)
    return x


def covering(model: Model, highest: int) -> Model:
    """The model, with a check that its outputs cover the highest label; adds no forward pass."""

    def forward(x: Tensor) -> Tensor:
        logits = model(x)
        if logits.ndim != 2 or logits.shape[1] <= highest:
            raise ValueError(
                f"y holds label {highest}, but the model's output has shape {tuple(logits.shape)}; it "
                f"must be (batch, classes) with at least {highest + 1} classes"
            )
        return logits

    return forward


def untargeted_objective(model: Model, y: Labels, loss: str) -> AttackObjective:
    """Maximise a loss, judge by the margin; both from one forward pass."""

    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return LOSSES[loss](logits, y), margin(logits, y)

    return objective


def targeted_objectives(model: Model, x: Inputs, y: Labels, most: int = 9) -> list[AttackObjective]:
    """One objective per wrong class, likeliest first: $z_t - z_y$, judged by the margin."""
    with torch.no_grad():
        logits = model(x)
    own = nn.functional.one_hot(y, logits.shape[1]).bool()
    order = logits.masked_fill(own, -torch.inf).argsort(1, descending=True)

    def objective(target: Tensor) -> AttackObjective:
        def towards(x: Tensor) -> tuple[Tensor, Tensor]:
            z = model(x)
            return (z.gather(1, target) - z.gather(1, y[:, None]))[:, 0], margin(z, y)

        return towards

    return [objective(order[:, [j]]) for j in range(min(logits.shape[1] - 1, most))]


def robust_accuracy(
    model: Model,
    x: Inputs,
    y: Labels,
    attack: Callable[[Model, Tensor, Tensor], Tensor] | None = None,
    *,
    batch_size: int = 512,
    confidence: float = 0.95,
) -> Estimate:
    """Share of samples classified correctly before and after an attack, with an exact interval.

    All samples count, not only those that were right before the attack. The accuracy under an attack
    is an upper bound on the true robust accuracy; the interval covers sampling error only.

    Args:
        model: inputs to logits.
        x: inputs (samples, ...).
        y: labels (samples,).
        attack: ``attack(model, x, y)`` returns perturbed inputs, such as ``partial(pgd,
            within=Linf(0.1))``; ``None`` measures clean accuracy. It is called with the model in eval mode and
            its parameters frozen.

    Raises:
        ValueError: for an empty or invalid x, labels that do not fit x or the model's output,
            or bad settings, before any work.
    """
    batch_size = check_count(batch_size, "batch_size", low=1)
    inputs.check_confidence(confidence)
    inputs.check_model(model)
    inputs.check_callable(attack or max, "attack", "attack(model, x, y)")
    x = checked_inputs(x, (0, 1) if isinstance(x, Tensor) and x.ndim == 4 else None)
    check_labels(y, x)
    right = 0
    with reading(model) as read:
        logits = covering(read, int(y.max()))
        for batch, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            seen = [batch]
            if attack is not None:
                with frozen(model):
                    moved = attack(model, batch.clone(), labels)
                seen.append(checked_moved(moved, batch, None))  # its set may have no box
            with frozen(model), torch.no_grad():
                correct = [logits(given).argmax(1) == labels for given in seen]
            right += int(torch.stack(correct).all(0).sum())
    return proportion(right, len(x), confidence)
