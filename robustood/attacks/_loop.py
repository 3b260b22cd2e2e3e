"""The attack loop: climb from each initial point, keep the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from robustood import inputs, rng
from robustood.attacks._rules import Ascent, Rule
from robustood.inputs import check_choice, check_count, check_number, checked_inputs
from robustood.models import GradientWatch, input_gradient
from robustood.perturbations import Inputs, PerturbationSet, as_set, per_sample

__all__ = [
    "AttackObjective", "Climb", "ascent", "climb_at", "maximise", "search", "value_and_grad", "watched_ascent",
]  # fmt: skip

AttackObjective = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
Climb = Callable[..., tuple[Tensor, Tensor]]
Gradient = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def maximise(
    objective: AttackObjective | Sequence[AttackObjective],
    x: Inputs,
    within: PerturbationSet | float,
    *,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    rule: Rule | None = None,
    keep: Literal["best", "last"] = "best",
    generator: torch.Generator | None = None,
) -> Inputs:
    """Search ``within`` for the perturbed input with the highest objective, for each sample.

    ``keep="last"`` returns the last iterate of the last restart and costs exactly ``steps``
    forward and input-only backward passes per restart. ``keep="best"`` returns the best of all
    iterates, first and last included, and costs one more forward pass per restart. A finite set is
    searched exhaustively, and the best member is returned.

    Args:
        objective: maps inputs to values (batch,), or to a pair (climb, judge): follow the
            gradient of the first, keep the best by the second. A sequence of objectives is
            climbed one after the other, each from its own initial points, and judged together.
            The model's mode is left alone: call this within :func:`~robustood.models.frozen`.
        x: clean inputs (batch, ...).
        within: the perturbation set; a number means ``Linf(number)``.
        steps: number of steps; 0 only judges the initial points.
        step_size: in the unit of ``within.radius``; by default the rule chooses it.
        restarts: number of initial points: the first random, the second x itself, the others
            random; 0 starts at x only.
        rule: proposes the next point; default :class:`Ascent`.
        generator: source of the random initial points, on the device of x; default: a new one
            with seed 0.

    Returns:
        Perturbed inputs with the shape, dtype and device of x, detached.

    Raises:
        ValueError: for empty input, NaN, values outside the set's box, negative steps, restarts
            or step size.
    """
    within = as_set(within)
    return search(
        objective,
        checked_inputs(x, within.box),
        within,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        rule=rule,
        keep=keep,
        generator=generator,
    )


def search(
    objective: AttackObjective | Sequence[AttackObjective],
    x: Inputs,
    within: PerturbationSet,
    *,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    rule: Rule | None = None,
    keep: Literal["best", "last"] = "best",
    generator: torch.Generator | None = None,
    parts: Sequence[int] | None = None,
    climb: Climb | None = None,
) -> Inputs:
    """:func:`maximise` for inputs that have been checked, without host-device synchronisation.

    Args:
        parts: sizes of the batches that x was concatenated from; each draws its own initial points, as if
            it were attacked alone.
        climb: how to climb from one initial point; default :func:`ascent`, which an engine may compile.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"x must be float32 or float64 under attack, got {x.dtype}, whose rounding takes images out of the set; "
            "pass x.float(), and cast inside the model, such as lambda v: model(v.half()).float()"
        )
    steps, restarts = check_count(steps, "steps"), check_count(restarts, "restarts")
    check_choice(keep, "keep", ("best", "last"))
    if step_size is not None:
        check_number(step_size, "step_size", 0)
    rule, climb = rule or Ascent(), climb or ascent
    inputs.check_instance(rule, "rule", Rule, "a rule such as Ascent() or APGD()")
    inputs.check_generator(generator)
    objectives = objective if isinstance(objective, Sequence) else [objective]
    for each in objectives:
        inputs.check_callable(each, "objective", "objective(x)")
    steps = steps if within.differentiable else 0
    best_of = keep == "best" or within.finite
    generator = generator or rng.generator(x.device, 0)
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone() if x.is_inference() else x.detach()
        best = _Best(x)
        for climbed in objectives:
            whole = [
                within.initial_points(v, restarts, generator) for v in x.split(parts or [len(x)])
            ]
            for z in map(torch.cat, zip(*whole, strict=True)):
                found = climb(climbed, x, z, within, rule, steps, step_size, best_of)
                if best_of:
                    best.update(*found)
                else:
                    best.inputs = found[0]
    return best.inputs.detach()


def ascent(
    objective: AttackObjective,
    x: Tensor,
    z: Tensor,
    within: PerturbationSet,
    rule: Rule,
    steps: int,
    step_size: float | None,
    best_of: bool,
    gradient: Gradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Climb from one initial point: evaluate, keep, propose. Returns inputs and the values that judge them.

    A function of tensors without host synchronisation, so that it can be compiled as one graph;
    ``gradient`` then replaces :func:`value_and_grad` by what a compiler can trace.
    """
    gradient = gradient or value_and_grad if rule.uses_gradient else value_alone
    best, propose = _Best(x), rule.begin(x, within, steps, step_size)
    for _ in range(steps):
        moved, climb, judge, grad = gradient(objective, x, z, within)
        if best_of:
            best.update(moved, judge)
        z = propose(z, climb, grad)
    moved = within.apply(x, z)
    if not best_of:
        return moved, moved.new_empty(0)
    with torch.no_grad():
        best.update(moved, _pair(objective(moved.clone()), len(x))[1])
    return best.inputs, cast(Tensor, best.values)


def watched_ascent(objective: AttackObjective, x: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    """:func:`ascent`, with a warning if the gradient is exactly zero for all inputs; waits for the device.

    Training takes it once, for the last step of the first epoch: by then a head that began with zeros has moved.
    """
    watch = GradientWatch()
    found = ascent(watch.over(objective), x, *how)
    watch.warn(len(x))
    return found


def value_and_grad(
    objective: AttackObjective, x: Tensor, z: Tensor, within: PerturbationSet
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The perturbed input, the value to climb, the value to judge by, and the gradient of the climb in z."""
    z = z.detach().requires_grad_()
    value, (moved, climb, judge) = climb_at(objective, x, z, within)
    grad = input_gradient(value, z)
    return moved.detach(), climb.detach(), judge.detach(), grad


def value_alone(
    objective: AttackObjective, x: Tensor, z: Tensor, within: PerturbationSet
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`value_and_grad` for a rule that needs no gradient, which is empty then."""
    with torch.no_grad():
        _, (moved, climb, judge) = climb_at(objective, x, z, within)
    return moved, climb, judge, z.new_empty(0)


def climb_at(
    objective: AttackObjective, x: Tensor, z: Tensor, within: PerturbationSet
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The value to climb, summed over the batch; with it (inputs, value to climb, value to judge by)."""
    moved = within.apply(x, z)
    climb, judge = _pair(objective(moved.clone()), len(x))  # a model may overwrite its input
    return climb.sum(), (moved, climb, judge)


def _pair(values: Tensor | tuple[Tensor, Tensor], samples: int) -> tuple[Tensor, Tensor]:
    """(climb, judge) of what an objective returns; a single tensor serves as both."""
    climb, judge = values if isinstance(values, tuple) else (values, values)
    for given in (climb, judge):
        if given.shape != (samples,):
            raise ValueError(
                f"objective must return one value per sample, shape ({samples},), got "
                f"{tuple(given.shape)}; do not average over the batch"
            )
    return climb, judge


class _Best:
    """The best input so far of each sample. NaN never wins; no host synchronisation."""

    def __init__(self, x: Tensor):
        self.inputs = x
        self.values: Tensor | None = None

    def update(self, inputs: Tensor, values: Tensor) -> None:
        inputs, values = inputs.detach(), values.detach()
        if self.values is None:
            self.inputs, self.values = inputs, values.masked_fill(values.isnan(), -torch.inf)
            return
        better = values > self.values
        self.inputs = torch.where(per_sample(better, inputs), inputs, self.inputs)
        self.values = torch.where(better, values, self.values)
