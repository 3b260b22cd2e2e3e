r"""Training rules: what a step of training makes small.

An objective maps a model and a batch to one scalar. :func:`robustood.training.fit` knows
nothing else about a method, and every inner maximum is found by
:func:`robustood.attacks.maximise`:

$$\min_\theta\; \mathbb E \max_{z \in Z} \ell(f_\theta(\mathrm{apply}(x, z)), y)$$

(Madry et al. 2018, eq. 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from robustood import attacks
from robustood.data import Batch
from robustood.inputs import check_choice, check_count, check_number
from robustood.perturbations import Ball, Linf, PerturbationSet

Scalar = Float[Tensor, ""]


@runtime_checkable
class Objective(Protocol):
    """A training rule: model and batch in, scalar loss out."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Standard:
    r"""Empirical risk: $\frac1B \sum_i \ell(f(x_i), y_i)$ with the cross-entropy $\ell$."""

    def __call__(self, model: nn.Module, batch: Batch) -> Scalar:
        return cross_entropy(model(batch.x), batch.y)


@dataclass(frozen=True)
class Attacked:
    """What the attacked objectives share: the inner maximum.

    Attributes:
        within: the perturbation set; a number means ``Linf(number)``.
        steps: attack steps; each costs one forward and one input-only backward.
        step_size: default 2.5 radius / steps.
        restarts: 1 starts at random, 0 from the clean input; of more, the best is kept, which
            costs a forward more each.
        ramp: share of the training over which the radius grows linearly from 0 (norm balls only).
        mode: of the model during the attack, ``"eval"`` or ``"train"``
            (:func:`robustood.attacks.frozen`).

    Raises:
        ValueError: for a negative radius, steps or ramp, or a ramp over a set that is no norm ball.
    """

    within: PerturbationSet | float
    steps: int = 7
    step_size: float | None = None
    restarts: int = 1
    ramp: float = 0.0
    mode: Literal["eval", "train"] = "eval"

    def __post_init__(self) -> None:
        check_count(self.steps, "steps", low=1)
        check_number(self.ramp, "ramp", 0, 1)
        check_count(self.restarts, "restarts")
        check_choice(self.mode, "mode", ("eval", "train"))
        if self.step_size is not None:
            check_number(self.step_size, "step_size", 0)
        if not isinstance(self.within, (Real, PerturbationSet)):
            raise ValueError(
                "within must be a number or a perturbation set such as Linf(8/255), got "
                f"{self.within!r}"
            )
        within = self.set_at(1)  # a negative radius is refused here, not at the first step
        if self.ramp and not isinstance(within, Ball):
            raise ValueError(f"ramp needs a norm ball such as Linf or L2, got {self.within!r}")

    def set_at(self, progress: float) -> PerturbationSet:
        """The set after a share ``progress`` of the training."""
        given = self.within
        within = given if isinstance(given, PerturbationSet) else Linf(float(given))
        if self.ramp and isinstance(within, Ball):
            return within.scaled(min(1.0, progress / self.ramp))
        return within

    def worst(self, model: nn.Module, batch: Batch, objective: attacks.Objective) -> Tensor:
        """The worst inputs that an attack finds, by the shared loop."""
        within = self.set_at(batch.progress)
        with attacks.frozen(model, self.mode):
            return attacks.maximise(
                objective, batch.x, within, steps=self.steps, step_size=self.step_size,
                restarts=self.restarts, keep="last" if self.restarts < 2 else "best",
                generator=batch.generator, checked=True,
            )  # fmt: skip


@dataclass(frozen=True)
class Adversarial(Attacked):
    r"""$\frac1B \sum_i \max_{S(x_i)} \ell(f(x_i'), y_i)$ (Madry et al. 2018, eq. 2.1).

    With ``steps=1, step_size=within.radius, restarts=0`` it is FGSM training (Goodfellow et al.
    2015 mix it with the clean loss), with ``steps=1, step_size=1.25 * radius`` the random-start single step of
    Wong et al. (2020, algorithm 3); both can overfit to their own attack.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Scalar:
        worst = self.worst(model, batch, lambda x: attacks.cross_entropy(model(x), batch.y))
        return cross_entropy(model(worst), batch.y)


@dataclass(frozen=True)
class TRADES(Attacked):
    r"""Accuracy plus a price on instability (Zhang et al. 2019, eq. 5):

    $$\frac1B \sum_i \ell(f(x_i), y_i) + \beta \max_{S(x_i)} \mathrm{KL}(f(x_i) \,\|\, f(x_i')).$$

    The gradient flows through both arguments of the divergence. The gradient of the divergence
    is zero, up to rounding, at the clean input, so a random start is needed; ours is uniform in the set,
    the authors' code draws Gaussian noise of standard deviation 0.001.

    Attributes:
        beta: price of instability; the authors use 1 to 6.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.beta, "beta", 0)
        check_count(self.restarts, "restarts", low=1)

    def __call__(self, model: nn.Module, batch: Batch) -> Scalar:
        with torch.no_grad(), attacks.frozen(model, self.mode):
            anchor = log_softmax(model(batch.x), 1)
        worst = self.worst(model, batch, lambda x: divergence(anchor, model(x)).sum(1))
        clean = model(batch.x)
        unstable = divergence(log_softmax(clean, 1), model(worst)).sum(1).mean()
        return cross_entropy(clean, batch.y) + self.beta * unstable


def divergence(log_p: Tensor, logits: Tensor) -> Tensor:
    r"""Terms of $\mathrm{KL}(p \,\|\, \mathrm{softmax}(z))$, (batch, classes)."""
    return kl_div(log_softmax(logits, 1), log_p, reduction="none", log_target=True)
