"""The strongest attack on a classifier: several attacks in turn, each on the samples that still hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from robustood import rng
from robustood.attacks._classifier import Labels, Model, checked_classifier, covering, pgd
from robustood.attacks._rules import APGD
from robustood.attacks._square import Square
from robustood.inputs import check_count, check_generator
from robustood.losses import margin
from robustood.models import frozen, reading
from robustood.perturbations import Ball, Inputs, PerturbationSet, as_set

__all__ = ["worst_case"]

Attack = Callable[..., Tensor]


def worst_case(
    model: Model,
    x: Inputs,
    y: Labels,
    within: PerturbationSet | float,
    *,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
) -> Inputs:
    """The strongest of four attacks on a classifier, without parameters to choose.

    APGD on the cross-entropy and on the DLR loss, APGD towards the nine likeliest wrong classes, 100 steps each, and
    1,000 queries of random search; each is spent on the samples that are still classified correctly. This is the
    order of AutoAttack (Croce and Hein 2020), without its minimum-norm attack. A finite set is searched exhaustively.

    Args:
        model, x, y, within, generator: as in :func:`pgd`.
        batch_size: samples attacked at a time.

    Returns:
        Perturbed inputs, shaped like x, each with the largest margin found.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`pgd`.
    """
    within, batch_size = as_set(within), check_count(batch_size, "batch_size", low=1)
    check_generator(generator)
    x = checked_classifier(model, x, y, within)
    generator = generator or rng.generator(x.device, 0)
    worst, values = x.clone(), _margins(model, x, y, batch_size)
    for attack in _attacks(model, x[:1], within):
        holding = (values <= 0).nonzero()[:, 0]
        for index in holding.split(batch_size) if len(holding) else ():
            moved = attack(model, x[index], y[index], within, generator=generator)
            found = _margins(model, moved, y[index], batch_size)
            better = index[found > values[index]]
            worst[better], values[index] = (
                moved[found > values[index]],
                found.maximum(values[index]),
            )
    return worst


def _attacks(model: Model, one: Inputs, within: PerturbationSet) -> list[Attack]:
    """The attacks that the set and the number of classes allow."""
    if not within.differentiable:
        return [partial(pgd, steps=0)]
    with frozen(model), torch.no_grad(), reading(model) as read:
        classes = read(one).shape[1]
    apgd = partial(pgd, steps=100, rule=APGD())
    found: list[Attack] = [apgd, *[partial(apgd, loss="dlr")] * (classes > 2)]
    found.append(partial(apgd, loss="targets"))
    if isinstance(within, Ball):
        found.append(partial(pgd, loss="margin", steps=1000, rule=Square()))
    return found


def _margins(model: Model, x: Inputs, y: Labels, batch_size: int) -> Tensor:
    """The margin of each sample."""
    with frozen(model), torch.no_grad(), reading(model) as read:
        logits = covering(read, int(y.max()))
        parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
        return torch.cat([margin(logits(part), labels) for part, labels in parts])
