r"""Find the worst case: maximise an objective over a perturbation set.

$$\max_{z \in Z}\; J(\mathrm{apply}(x, z))$$

There is one loop, :func:`maximise`. What differs between attacks is data: the objective, the
set, the number of steps and the rule that proposes the next point. FGSM (Goodfellow et al.
2015) is one step of length eps from the clean image; PGD (Madry et al. 2018, section 2.1) is
several from a random start.

An attack needs per-sample values and the gradient with respect to the input, nothing else:
parameters, their ``.grad``, buffers, train/eval mode and the global random state stay as they
are. Losses are summed over the batch, never averaged, so that one sample's step does not depend
on its companions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustood import inputs
from robustood.inputs import check_choice, check_count, check_labels, check_number, taken
from robustood.metrics import Estimate, proportion
from robustood.models import Watch, frozen, reading, slope
from robustood.perturbations import Inputs, PerturbationSet, as_set, per_sample

Values = Float[Tensor, " batch"]
Logits = Float[Tensor, "batch classes"]
Labels = Int[Tensor, " batch"]
Model = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
Propose = Callable[[Tensor, Tensor, Tensor], Tensor]
Search = Callable[..., tuple[Tensor, Tensor]]


@runtime_checkable
class Rule(Protocol):
    """How an attack moves: ``begin`` gives (z, value, grad) -> next z for one restart."""

    def begin(
        self, x: Tensor, within: PerturbationSet, steps: int, step_size: float | None
    ) -> Propose: ...


@dataclass(frozen=True)
class Ascent:
    """Projected steepest ascent with a constant step, by default 2.5 radius / steps: PGD's rule."""

    def begin(
        self, x: Tensor, within: PerturbationSet, steps: int, step_size: float | None
    ) -> Propose:
        size = 2.5 * within.radius / max(steps, 1) if step_size is None else step_size
        return lambda z, value, grad: within.ascend(x, z, grad, size)


@dataclass(frozen=True)
class APGD:
    r"""Ascent with momentum whose step halves by itself, for each sample (Croce and Hein 2020).

    $u = \Pi(z_k + a\,g)$, then $z_{k+1} = \Pi(z_k + \alpha (u - z_k) + (1 - \alpha)(z_k -
    z_{k-1}))$. At checkpoints that grow denser, a sample whose value rose in at most a share
    $\rho$ of the steps, or whose best value and step stayed as they were, halves $a$ and goes
    back to its best point (section 3 and algorithm 1). Starts are those of the set, not on the
    surface of the ball.

    Attributes:
        momentum: $\alpha$.
        rising: $\rho$.

    The first step is ``step_size``, by default twice the radius.
    """

    momentum: float = 0.75
    rising: float = 0.75

    def __post_init__(self) -> None:
        check_number(self.momentum, "momentum", 0, 1)
        check_number(self.rising, "rising", 0, 1)

    def checkpoints(self, steps: int) -> set[int]:
        """The steps at which the size is reconsidered: at shares 0.22, 0.41, 0.57, .. of all."""
        last, share, found = 0.0, 0.22, set()
        while share < 1:
            found.add(math.ceil(round(share * steps, 6)))
            last, share = share, share + max(share - last - 0.03, 0.06)
        return found

    def begin(
        self, x: Tensor, within: PerturbationSet, steps: int, step_size: float | None
    ) -> Propose:
        size = x.new_full((len(x),), 2 * within.radius if step_size is None else step_size)
        halved, rises = torch.ones_like(size, dtype=torch.bool), torch.zeros_like(size)
        before = best = at_checkpoint = torch.full_like(size, -torch.inf)
        places = self.checkpoints(steps)
        taken, since = 0, 0
        previous = best_z = best_grad = torch.empty(0)

        def propose(z: Tensor, value: Tensor, grad: Tensor) -> Tensor:
            nonlocal size, halved, rises, before, best, at_checkpoint, taken, since
            nonlocal previous, best_z, best_grad
            better = value > best
            if taken == 0:
                better, previous, best_z, best_grad = torch.ones_like(better), z, z, grad
            rises = rises + (value > before)
            best, before = torch.where(better, value, best), value
            best_z = torch.where(per_sample(better, z), z, best_z)
            best_grad = torch.where(per_sample(better, grad), grad, best_grad)
            if taken in places:
                stuck = (rises <= self.rising * (taken - since)) | (
                    ~halved & (best <= at_checkpoint)
                )
                size = torch.where(stuck, size / 2, size)
                z = torch.where(per_sample(stuck, z), best_z, z)
                grad = torch.where(per_sample(stuck, grad), best_grad, grad)
                halved, at_checkpoint, since, rises = stuck, best, taken, torch.zeros_like(size)
            ahead = within.ascend(x, z.clone(), grad.clone(), size)
            if taken:
                mixed = z + self.momentum * (ahead - z) + (1 - self.momentum) * (z - previous)
                ahead = within.ascend(x, mixed, torch.zeros_like(mixed), 0.0)
            previous, taken = z, taken + 1
            return ahead

        return propose


def maximise(
    objective: Objective | Sequence[Objective],
    x: Inputs,
    within: PerturbationSet | float,
    *,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    rule: Rule | None = None,
    keep: Literal["best", "last"] = "best",
    generator: torch.Generator | None = None,
    checked: bool = False,
    parts: Sequence[int] | None = None,
    search: Search | None = None,
) -> Inputs:
    """Search ``within`` for the perturbed input with the highest objective, for each sample.

    ``keep="last"`` returns the last iterate of the last restart and costs exactly ``steps``
    forwards and input-only backwards a restart. ``keep="best"`` returns the best of all
    iterates, start and end included, and costs one forward more a restart. A finite set is
    searched through its members, and the best is kept.

    Args:
        objective: maps inputs to values (batch,), or to a pair (climb, judge): follow the
            gradient of the first, keep the best by the second. A sequence of objectives is
            climbed one after the other, from starts of its own each, and judged together.
            The model inside keeps its mode: call this within
            :func:`~robustood.models.frozen`.
        x: clean inputs (batch, ...).
        within: the perturbation set; a number means ``Linf(number)``.
        steps: number of steps; 0 judges the starts alone.
        step_size: in the unit of ``within.radius``; default the rule's own.
        restarts: number of starts: the first at random, the second x itself, the others at
            random; 0 starts from x alone.
        rule: proposes the next point; default :class:`Ascent`.
        generator: source of the random starts, on the device of x; default: a fresh one with
            seed 0.
        checked: the caller vouches for the values of x (a training loop, which must not wait
            for the device).
        parts: sizes of the batches that x was put together from; each gets random starts of its own,
            as if it came alone.
        search: climbs from one start; default :func:`ascent`, which a training loop may compile.

    Returns:
        Perturbed inputs, same shape, dtype and device as x, detached.

    Raises:
        ValueError: for empty input, NaN, values outside the set's box, negative steps, restarts
            or step size.
    """
    steps, restarts = check_count(steps, "steps"), check_count(restarts, "restarts")
    check_choice(keep, "keep", ("best", "last"))
    if step_size is not None:
        check_number(step_size, "step_size", 0)
    within = as_set(within)
    inputs.check_flag(checked, "checked")
    objectives = objective if isinstance(objective, Sequence) else [objective]
    for each in objectives:
        inputs.check_callable(each, "objective", "objective(x)")
    inputs.check_instance(rule or Ascent(), "rule", Rule, "a rule such as Ascent() or APGD()")
    inputs.check_generator(generator)
    if not checked:
        x = taken(x, getattr(within, "box", (0, 1)))
    if parts is not None:
        inputs.check_several(parts, "parts", "whole numbers that sum to the size of the batch")
        parts = [check_count(part, "parts: each", 1) for part in parts]
        check_number(sum(parts), "parts: their sum", len(x), len(x), "it is the size of the batch")
    steps = steps if within.differentiable else 0
    if getattr(within, "finite", not within.differentiable):
        keep = "best"
    rule, search = rule or Ascent(), search or ascent
    generator = generator or torch.Generator(x.device).manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone() if x.is_inference() else x.detach()
        best = Best(x)
        for climbed in objectives:
            whole = [
                within.initial_points(v, restarts, generator) for v in x.split(parts or [len(x)])
            ]
            for z in map(torch.cat, zip(*whole, strict=True)):
                found = search(climbed, x, z, within, rule, steps, step_size, keep == "best")
                if keep == "best":
                    best.update(*found)
                else:
                    best.inputs = found[0]
    return best.inputs.detach()


def ascent(
    objective: Objective,
    x: Tensor,
    z: Tensor,
    within: PerturbationSet,
    rule: Rule,
    steps: int,
    step_size: float | None,
    best_of: bool,
) -> tuple[Tensor, Tensor]:
    """Climb from one start: evaluate, keep, propose. Returns inputs and what they are judged by.

    A function of tensors without host synchronisation, so that it can be compiled as one graph.
    """
    best, propose = Best(x), rule.begin(x, within, steps, step_size)
    for _ in range(steps):
        moved, climb, judge, grad = value_and_grad(objective, x, z, within)
        if best_of:
            best.update(moved, judge)
        z = propose(z, climb, grad)
    moved = within.apply(x, z)
    if not best_of:
        return moved, moved.new_empty(0)
    with torch.no_grad():
        best.update(moved, pair(objective(moved.clone()), len(x))[1])
    return best.inputs, cast(Tensor, best.values)


def value_and_grad(
    objective: Objective, x: Tensor, z: Tensor, within: PerturbationSet
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input that z makes, what to climb, what to judge by, and the gradient of the climb in z."""

    def total(z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        moved = within.apply(x, z)
        climb, judge = pair(objective(moved.clone()), len(x))  # a model may overwrite what it gets
        return climb.sum(), (moved, climb, judge)

    if torch.compiler.is_compiling():  # the same gradient in the form that a compiler can trace
        grad, (moved, climb, judge) = torch.func.grad(total, has_aux=True)(z)
    else:
        z = z.detach().requires_grad_()
        value, (moved, climb, judge) = total(z)
        grad = slope(value, z)
    return moved.detach(), climb.detach(), judge.detach(), grad


def pair(values: Tensor | tuple[Tensor, Tensor], samples: int) -> tuple[Tensor, Tensor]:
    """What to climb and what to judge by; one tensor serves as both."""
    climb, judge = values if isinstance(values, tuple) else (values, values)
    for given in (climb, judge):
        if given.shape != (samples,):
            raise ValueError(
                f"objective must return one value a sample, shape ({samples},), got "
                f"{tuple(given.shape)}; do not average over the batch"
            )
    return climb, judge


class Best:
    """The best input so far, per sample. NaN never wins; no host synchronisation."""

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


def cross_entropy(logits: Logits, y: Labels) -> Values:
    r"""$-\log \mathrm{softmax}(z)_y$. Its gradient underflows once the network is sure."""
    return nn.functional.cross_entropy(logits, y, reduction="none")


def margin(logits: Logits, y: Labels) -> Values:
    r"""$\max_{j \ne y} z_j - z_y$ (Carlini and Wagner 2017).

    Positive where the sample is misclassified, negative where it is right, zero at a tie.
    """
    own = nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(1) - logits.masked_fill(~own, 0).sum(1)


def dlr(logits: Logits, y: Labels) -> Values:
    r"""Difference of logits ratio: the margin over $z_{\pi_1} - z_{\pi_3}$, logits sorted downwards.

    Invariant to shifting and positively rescaling the logits; needs at least 3 classes (Croce
    and Hein 2020, section 4).
    """
    if logits.shape[1] < 3:
        raise ValueError(f'"dlr" needs at least 3 classes, got {logits.shape[1]}; use "margin"')
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


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

    With ``keep="best"`` the iterate with the largest margin is returned, whatever loss was
    climbed: a sample that was misclassified at any iterate comes back misclassified.

    Args:
        model: inputs to logits (batch, classes).
        x: clean inputs; images (batch, channel, height, width) in [0, 1] unless the set has no box.
        y: labels (batch,).
        within: the perturbation set, such as ``Linf(8/255)`` or, which is the same, ``8/255``.
        steps, step_size, restarts, rule, keep, generator: as in :func:`maximise`.
        loss: ``"ce"``, ``"margin"``, ``"dlr"``, or ``"targets"``: the margin towards each wrong
            class in turn (the nine likeliest where there are more), which is exact for a linear
            model and costs as many times more.

    Returns:
        Perturbed inputs, shaped like x.

    Raises:
        ValueError: for inputs outside the box, NaN, a wrong rank, an empty batch, labels out of
            range, an unknown loss, a loss that needs more classes, or a model that returns NaN.
        TypeError, RuntimeError: for a model that returns no tensor, or one without a gradient.

    Warns:
        UserWarning: where the gradient is exactly zero at every step for every input.
    """
    check_choice(loss, "loss", (*LOSSES, "targets"))
    check_choice(keep, "keep", ("best", "last"))
    inputs.check_model(model)
    within = as_set(within)
    box = getattr(within, "box", (0, 1))
    x = taken(x, box)
    if box == (0, 1):
        inputs.check_images(x)
    check_labels(y, x)
    watch = Watch()
    with torch.inference_mode(False), frozen(model), reading(model) as read:
        y = y.clone() if y.is_inference() else y
        logits = covering(read, int(y.max()))
        if loss == "targets":
            climbed = targeted_objectives(logits, x, y)
        elif keep == "best":
            climbed = [untargeted_objective(logits, y, loss)]
        else:
            climbed = [lambda moved: LOSSES[loss](logits(moved), y)]
        found = maximise(
            [watch.over(each) for each in climbed], x, within, steps=steps, step_size=step_size,
            restarts=restarts, rule=rule, keep=keep, generator=generator, checked=True,
        )  # fmt: skip
    watch.close(hidden=within.radius > 0)
    return found


def covering(model: Model, highest: int) -> Model:
    """The model, with a check that its outputs cover the highest label; no forward of its own."""

    def forward(x: Tensor) -> Tensor:
        logits = model(x)
        if logits.ndim != 2 or logits.shape[1] <= highest:
            raise ValueError(
                f"y holds label {highest} but the model's output has shape {tuple(logits.shape)}; "
                "it must be (batch, classes) with more classes than that"
            )
        return logits

    return forward


def untargeted_objective(model: Model, y: Labels, loss: str) -> Objective:
    """Climb a loss, judge by the margin; both from one forward."""

    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return LOSSES[loss](logits, y), margin(logits, y)

    return objective


def targeted_objectives(model: Model, x: Inputs, y: Labels, most: int = 9) -> list[Objective]:
    """One objective for each wrong class, likeliest first: $z_t - z_y$, judged by the margin."""
    with torch.no_grad():
        logits = model(x)
    own = nn.functional.one_hot(y, logits.shape[1]).bool()
    order = logits.masked_fill(own, -torch.inf).argsort(1, descending=True)

    def objective(target: Tensor) -> Objective:
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
    """Share of samples that are right and stay right under an attack, with an exact interval.

    All samples count, not only those that were right before the attack. An attack is an upper
    bound on the true robust accuracy, the interval is about sampling alone.

    Args:
        model: inputs to logits.
        x, y: inputs (samples, ...) and labels (samples,).
        attack: ``attack(model, x, y)`` returns perturbed inputs, such as ``partial(pgd,
            within=Linf(0.1))``; ``None`` measures clean accuracy.

    Raises:
        ValueError: for an empty or invalid x, labels that do not fit it or the model's output,
            or bad settings, before any work.
    """
    batch_size = check_count(batch_size, "batch_size", low=1)
    inputs.check_confidence(confidence)
    inputs.check_model(model)
    inputs.check_callable(attack or max, "attack", "attack(model, x, y)")
    x = taken(x, (0, 1) if isinstance(x, Tensor) and x.ndim == 4 else None)
    check_labels(y, x)
    right = 0
    with reading(model) as read:
        logits = covering(read, int(y.max()))
        for batch, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            seen = [batch] if attack is None else [batch, attack(model, batch.clone(), labels)]
            with frozen(model), torch.no_grad():
                correct = [logits(given).argmax(1) == labels for given in seen]
            right += int(torch.stack(correct).all(0).sum())
    return proportion(right, len(x), confidence)
