"""What the checks look at: attacks of several kinds and strengths, each made once and when first needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from robustood import rng
from robustood.attacks import APGD, AttackObjective, Rule, Square, search, value_and_grad
from robustood.inputs import checked_moved
from robustood.models import GradientWatch, input_gradient
from robustood.perturbations import Ball, Linf, PerturbationSet
from robustood.sanity._subject import Inputs, Side, Subject

NOISE = 100  # rounding errors, in units of the number type, that a network may accumulate
SURPLUS = 1.25  # a rise counts as higher than another one if it is a quarter higher
DRAWS = 20  # random members of the set
QUERIES = 60  # steps of the random search
LONGER = 3  # times the steps
RESTARTS = 2  # other initial points: a random one, and the clean input
SIZES = (1.0, 1 / 4, 1 / 16, 1 / 64)  # lengths of a step, as shares of the radius, shortest last


def noise(values: Tensor) -> float:
    """A difference of values that the arithmetic of a network alone may cause; few of them compute in float64."""
    coarse = max(torch.finfo(values.dtype).eps, torch.finfo(torch.float32).eps)
    return NOISE * coarse * float(values.detach().abs().max())


def _climb(objective: AttackObjective, x: Tensor) -> Tensor:
    """The value that an objective climbs, without its gradient."""
    with torch.no_grad():
        values = objective(x)
    return values[0] if isinstance(values, tuple) else values


class SampleWatch(GradientWatch):
    """Per sample: whether its gradient was zero each time, and whether it was ever not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.zero: Tensor | None = None
        self.broken: Tensor | None = None

    def meet(self, grad: Tensor) -> None:
        zero, broken = (grad == 0).flatten(1).all(1), (~grad.isfinite()).flatten(1).any(1)
        self.zero = zero if self.zero is None else self.zero & zero
        self.broken = broken if self.broken is None else self.broken | broken


class Evidence:
    """Attacks on one side.

    Args:
        side: what is attacked.
        within: the perturbation set.
        steps: of an attack.
        seed: of the random initial points.
        attack: the user's own, if it is to be judged.
    """

    def __init__(
        self,
        side: Side,
        within: PerturbationSet,
        steps: int,
        seed: int,
        attack: Callable[..., Tensor] | None,
    ):
        self.side, self.within, self.steps, self.seed = side, within, steps, seed
        self.x, self.attack = side.x, attack

    @cached_property
    def clean(self) -> Tensor:
        return self.harm(self.x)

    @cached_property
    def tolerance(self) -> float:
        """A rise that may be rounding."""
        with torch.no_grad():
            return noise(self.side.harm(self.x))

    def harm(self, x: Inputs) -> Tensor:
        """What the attacker wants to be high, in float64."""
        with torch.no_grad():
            return self.side.harm(x).double()

    def rise(self, x: Inputs) -> Tensor:
        """By how much inputs are worse than the clean ones; a failed attack leaves the clean input."""
        return (self.harm(x) - self.clean).nan_to_num(0.0).clamp_min(0)

    def found(
        self,
        objectives: Sequence[AttackObjective],
        within: PerturbationSet | None = None,
        steps: int | None = None,
        restarts: int = 1,
        seed: int | None = None,
        rule: Rule | None = None,
    ) -> Inputs:
        """The worst inputs that an attack finds, from one random initial point or more."""
        generator = rng.generator(self.x.device, self.seed if seed is None else seed)
        return search(
            list(objectives),
            self.x,
            within or self.within,
            steps=self.steps if steps is None else steps,
            restarts=restarts,
            rule=rule or APGD(),
            generator=generator,
        )

    # --- gradients

    def gradient(self, objective: AttackObjective) -> Tensor | None:
        """The gradient of an objective at the clean inputs; None if there is none."""
        probe = self.x.detach().clone().requires_grad_()
        with torch.enable_grad():
            try:  # also .numpy() of a tensor with a gradient is a RuntimeError
                values = objective(probe)
                climb = values[0] if isinstance(values, tuple) else values
                return input_gradient(climb.sum(), probe)
            except RuntimeError:
                return None

    @cached_property
    def climbable(self) -> bool:
        """Whether all objectives of the white-box attack have a gradient."""
        return self.within.differentiable and all(
            self.gradient(each) is not None for each in self.side.own
        )

    @cached_property
    def white(self) -> tuple[Inputs, SampleWatch]:
        """The worst inputs of the white-box attack, and its gradients at clean inputs and on the way."""
        watch = SampleWatch()
        moved = self.found([watch.over(each) for each in self.side.own])
        return moved, watch

    @cached_property
    def white_rise(self) -> Tensor:
        return self.rise(self.white[0])

    @cached_property
    def won(self) -> Tensor:
        """Who is already where the attacker wants it, so that a stronger attack has nothing to show."""
        return self.clean + self.white_rise > self.side.goal

    @cached_property
    def stalled(self) -> tuple[Tensor, Tensor]:
        """Whose gradient promises a difference, and whose objective is no higher along it than against it.

        Both steps are taken at several lengths, and the majority counts: in a box, steps in random directions may raise
        the objective, but as often against the gradient as along it. Where the lengths are divided, the shortest
        decides, which the gradient describes best: an honest score may be rough.
        """
        x, within = self.x, self.within
        climbed = lambda z: _climb(self.side.own[0], within.apply(x, z))
        start = within.identity(x)
        _, value, _, grad = value_and_grad(self.side.own[0], x, start.clone(), within)
        promised, votes = torch.zeros_like(value).bool(), []
        for share in SIZES:
            along, against = (
                within.ascend(x, start.clone(), sign * grad, share * within.radius)
                for sign in (1, -1)
            )
            slope = ((along - against) * grad).flatten(1).sum(1)
            promised = promised | (slope > noise(value))
            votes.append((climbed(along) - climbed(against)).sign())
        return promised, promised & (torch.stack(votes).sum(0) + votes[-1] / 2 <= 0)

    # --- without gradients, and with others

    @cached_property
    def black_rise(self) -> Tensor:
        """By random members of the set, and in a ball by random search."""
        risen = self.rise(self.found([self.side.harm], steps=0, restarts=DRAWS))
        if not isinstance(self.within, Ball):
            return risen
        rule = Square(generator=rng.generator(self.x.device, self.seed))
        return risen.maximum(self.rise(self.found([self.side.harm], steps=QUERIES, rule=rule)))

    @cached_property
    def transferred_rise(self) -> Tensor:
        """By the maxima of other objectives."""
        usable = [each for each in self.side.others if self.gradient(each) is not None]
        return self.rise(self.found(usable)) if usable else torch.zeros_like(self.clean)

    # --- stronger attacks

    @cached_property
    def longer_rise(self) -> Tensor:
        return self.rise(self.found(self.side.own[:1], steps=LONGER * self.steps))

    @cached_property
    def restarted_rise(self) -> Tensor:
        """From other initial points."""
        return self.rise(self.found(self.side.own[:1], restarts=RESTARTS, seed=self.seed + 1))

    @cached_property
    def wider_rise(self) -> Tensor:
        """With twice the radius."""
        wider = self.within
        assert isinstance(wider, Ball)
        return self.rise(self.found(self.side.own[:1], wider.scaled(2)))

    def killed(self, span: float) -> Tensor:
        """The harm within a ball that reaches the middle of the range from every input, at half its span."""
        assert isinstance(self.within, Ball)
        reach = (
            span / 2 if isinstance(self.within, Linf) else span / 2 * math.sqrt(self.x[0].numel())
        )
        ball = self.within.scaled(max(reach / self.within.radius, 1))
        return self.clean + self.rise(self.found(self.side.own[:1], ball))

    # --- 8 bits, and the user's own attack

    @cached_property
    def rounded_rise(self) -> Tensor:
        """After rounding the white-box result to 8 bits, towards the clean pixel, so that it stays in the ball."""
        moved, whole = 255 * self.white[0], 1e-3  # what is a grey level up to rounding stays one
        down, up = (moved + whole).floor(), (moved - whole).ceil()
        return self.rise((torch.where(self.white[0] > self.x, down, up) / 255).clamp(0, 1))

    @cached_property
    def given(self) -> Inputs:
        """What the user's attack returns."""
        assert self.attack is not None
        moved = checked_moved(self.side.run(self.attack, self.within), self.x, self.within.box)
        if isinstance(self.within, Ball):
            reach, ball = float(self.within.norm(moved.detach() - self.x).max()), self.within
            if reach > ball.eps * 1.0005 + 4 * torch.finfo(self.x.dtype).eps:  # rounding passes
                raise ValueError(
                    f"attack must return inputs within {ball}, got one at distance {reach:.6g}; project them, "
                    "x + within.project(x, moved - x), or pass the set that it searches"
                )
        return moved

    def outdone(self) -> Tensor:
        """Who is left by the user's attack with a clearly lower value, not yet won, than by the white-box attack."""
        given = self.rise(self.given)
        lost = self.clean + given <= self.side.goal
        return lost & (self.white_rise > SURPLUS * given + self.tolerance)


class Case:
    """Everything about one call: the subject as given and the evidence of each side."""

    def __init__(
        self,
        subject: Subject,
        within: PerturbationSet,
        steps: int,
        seed: int,
        attack: Callable[..., Tensor] | None = None,
    ):
        self.subject, self.within, self.attack = subject, within, attack
        self.sides = [Evidence(side, within, steps, seed, attack) for side in subject.sides]

    @property
    def x(self) -> Inputs:
        """The inputs of all sides."""
        return torch.cat([side.x for side in self.sides])

    @cached_property
    def climbable(self) -> bool:
        return all(side.climbable for side in self.sides)

    def gather(self, look: Callable[[Evidence], Tensor]) -> Tensor:
        """What each side has to say, in one tensor."""
        return torch.cat([look(side) for side in self.sides])

    def measure(self, harm: Callable[[Evidence], Tensor]) -> float:
        """Accuracy or AUROC."""
        return self.subject.measure([harm(side) for side in self.sides])

    def beaten(self, rise: Callable[[Evidence], Tensor]) -> Tensor:
        """Whose rise is clearly higher than that of the white-box attack, among those that it has not won."""
        higher = lambda side: rise(side) > SURPLUS * side.white_rise + side.tolerance
        return self.gather(lambda side: higher(side) & ~side.won)
