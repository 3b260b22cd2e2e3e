r"""Training rules: what a training step minimises.

An objective maps a model and a batch to one scalar. :func:`robustood.training.fit` knows
nothing else about a method. Every inner maximum is found by
:func:`robustood.attacks.maximise`:

$$\min_\theta\; \mathbb E \max_{z \in Z} \ell(f_\theta(\mathrm{apply}(x, z)), y)$$

(Madry et al. 2018, eq. 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from robustood import attacks, inputs, rng
from robustood.data import Batch, Data
from robustood.inputs import check_choice, check_count, check_number
from robustood.losses import cross_entropy, divergence, to_reject, to_uniform
from robustood.mining import Mining
from robustood.models import batch_statistics, declared_outputs, frozen, read
from robustood.perturbations import Ball, Latent, PerturbationSet, as_set

__all__ = [
    "ACET", "ADV", "ALOE", "AOE", "ATOM", "CCU", "NTOM", "ROWL", "SOFL", "TRADES", "Adversarial",
    "InnerMax", "MinedALOE", "Mode", "Objective", "OutlierExposure", "OutlierTraining", "Set",
    "Standard",
]  # fmt: skip

_Scalar = Float[Tensor, ""]
Mode = Literal["eval", "train", "batch"]


@runtime_checkable
class Objective(Protocol):
    """A training rule: model and batch in, scalar loss out."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Standard:
    r"""Empirical risk: $\frac1B \sum_i \ell(f(x_i), y_i)$ with the cross-entropy $\ell$."""

    def __call__(self, model: nn.Module, batch: Batch) -> _Scalar:
        return F.cross_entropy(read(model, batch.x), batch.y)


@dataclass(frozen=True)
class InnerMax:
    """The inner maximum that the attacked objectives share.

    Attributes:
        within: the perturbation set; a number means ``Linf(number)``.
        steps: attack steps; each costs one forward and one input-only backward.
        step_size: default 2.5 radius / steps.
        restarts: 1 starts at random, 0 at the clean input; with more, the best is kept, which
            costs one more forward each.
        ramp: share of the training over which the radius grows linearly from 0 (balls only).
        mode: of the model during the attack, ``"eval"``, ``"train"`` or ``"batch"``
            (:func:`robustood.models.frozen`).
        keep: with one start, return the ``"last"`` iterate or the ``"best"``, which costs one more forward.

    Raises:
        ValueError: for a negative radius, steps or ramp, or a ramp over a set that is not a ball.
    """

    within: PerturbationSet | float
    steps: int = 7
    step_size: float | None = None
    restarts: int = 1
    ramp: float = 0.0
    mode: Mode = "eval"
    keep: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        check_count(self.steps, "steps", low=1)
        check_number(self.ramp, "ramp", 0, 1)
        check_count(self.restarts, "restarts")
        check_choice(self.mode, "mode", ("eval", "train", "batch"))
        check_choice(self.keep, "keep", ("last", "best"))
        inputs.check_flag(getattr(self, "clean", False), "clean")
        if self.step_size is not None:
            check_number(self.step_size, "step_size", 0)
        within = self.set_at(1)  # a negative radius is refused here, not at the first step
        if self.ramp and not isinstance(within, (Ball, Latent)):
            raise ValueError(f"ramp needs a ball such as Linf, L2 or Latent, got {self.within!r}")

    def set_at(self, progress: float) -> PerturbationSet:
        """The set at a share ``progress`` of the training."""
        within = as_set(self.within)
        if self.ramp and isinstance(within, (Ball, Latent)):
            return within.scaled(min(1.0, progress / self.ramp))
        return within

    def worst(
        self,
        model: nn.Module,
        x: Tensor,
        objective: attacks.AttackObjective,
        batch: Batch,
        parts: Sequence[int] | None = None,
    ) -> Tensor:
        """The worst inputs that the attack finds; ``parts`` as in :func:`robustood.attacks.search`."""
        climb = None if self.ramp else batch.climb  # a set that grows would need a graph per step
        with frozen(model, self.mode):
            return attacks.search(
                objective,
                x,
                self.set_at(batch.progress),
                steps=self.steps,
                step_size=self.step_size,
                restarts=self.restarts,
                keep=self.keep if self.restarts < 2 else "best",
                generator=batch.generator,
                parts=parts,
                climb=climb,
            )


@dataclass(frozen=True)
class Adversarial(InnerMax):
    r"""$\frac1B \sum_i \max_{S(x_i)} \ell(f(x_i'), y_i)$ (Madry et al. 2018, eq. 2.1).

    With ``steps=1, step_size=within.radius, restarts=0`` it is FGSM training (Goodfellow et al.
    2015 mix it with the clean loss); with ``steps=1, step_size=1.25 * radius``, the random-start single step of
    Wong et al. (2020, algorithm 3). Both can overfit to their own attack.

    Attributes:
        clean: count the clean input as a member of the set and take the larger of the two losses, as Wong and
            Kolter (2021) do with learned sets, which need not contain the input.
    """

    clean: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> _Scalar:
        loss = lambda x: cross_entropy(read(model, x), batch.y)
        worst = self.worst(model, batch.x, loss, batch)
        if self.clean:
            return torch.maximum(loss(batch.x), loss(worst)).mean()
        return F.cross_entropy(read(model, worst), batch.y)


@dataclass(frozen=True)
class TRADES(InnerMax):
    r"""Accuracy with a penalty on instability (Zhang et al. 2019, eq. 5):

    $$\frac1B \sum_i \ell(f(x_i), y_i) + \beta \max_{S(x_i)} \mathrm{KL}(f(x_i) \,\|\, f(x_i')).$$

    The gradient flows through both arguments of the divergence. The gradient of the divergence
    is zero, up to rounding, at the clean input, so a random start is needed. Ours is uniform in the set;
    the authors' code draws Gaussian noise of standard deviation 0.001.

    Attributes:
        beta: weight of the penalty; the authors use 1 to 6.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.beta, "beta", 0)
        check_count(self.restarts, "restarts", low=1)

    def __call__(self, model: nn.Module, batch: Batch) -> _Scalar:
        with torch.no_grad(), frozen(model, self.mode):
            anchor = F.log_softmax(read(model, batch.x), 1)
        apart = lambda x: divergence(anchor, read(model, x)).sum(1)
        worst = self.worst(model, batch.x, apart, batch)
        clean = read(model, batch.x)
        unstable = divergence(F.log_softmax(clean, 1), read(model, worst)).sum(1).mean()
        return F.cross_entropy(clean, batch.y) + self.beta * unstable


@dataclass(frozen=True)
class OutlierTraining:
    r"""Every method of the two papers, and combinations of them:

    $$\mathbb E_{in} \max_{S_{in}(x)} \mathrm{CE}(f(x'), y) + \lambda\, \mathbb E_{out} \big[(1 - \kappa)\,\ell(f(u))
    + \kappa \max_{S_{out}(u)} \ell(f(u'))\big].$$

    The methods are choices of its settings (:func:`OutlierExposure`, :func:`AOE`, :func:`ALOE`,
    :func:`NTOM`, :func:`ATOM`, :func:`ACET`, :func:`MinedALOE`). Both inner maxima are found by the
    shared loop; the update sees all inputs of a step in one batch.

    Attributes:
        inside: set of the inner maximum over in-distribution inputs, an :class:`InnerMax` for full
            control, or None for clean inputs. A number means ``Linf(number)``.
        outside: the same for outliers.
        outlier_loss: $\ell$, :func:`~robustood.losses.to_uniform` or :func:`~robustood.losses.to_reject`.
        weight: $\lambda$ of the mean over a step's outliers; 0 omits them altogether.
        attacked_share: $\kappa$, the share of a step's outliers that is attacked: the last ones.
        mine: selects the outliers of each epoch from the pool (:class:`robustood.mining.Mining`); None for all.
        steps: attack steps of an inner maximum that is given as a set or a number.
        bn: which batch statistics an attack uses. ``"eval"``: the running ones. ``"train"``: those of each
            attacked batch, which also update the running ones, as in the code of ALOE. ``"separate"``: those of
            each batch, in the update too; the running ones come from in-distribution inputs only.

    Raises:
        ValueError: for bad settings, outliers that are missing, or a network without the reject
            output that ``to_reject`` needs.
    """

    inside: InnerMax | PerturbationSet | float | None = None
    outside: InnerMax | PerturbationSet | float | None = None
    outlier_loss: Callable[[Tensor], Tensor] = to_uniform
    weight: float = 0.5
    attacked_share: float = 1.0
    mine: Mining | None = None
    steps: int = 2
    bn: Literal["eval", "train", "separate"] = "eval"

    def __post_init__(self) -> None:
        check_number(self.weight, "weight", 0)
        check_number(self.attacked_share, "attacked_share", 0, 1)
        check_choice(self.bn, "bn", ("eval", "train", "separate"))
        inputs.check_callable(self.outlier_loss, "outlier_loss", "outlier_loss(outputs)")
        inputs.check_instance(self.mine or Mining(), "mine", Mining, "a Mining(q, share)")
        for given in (self.inside, self.outside):
            self.inner(given)  # a bad set is refused here, not at the first step

    def inner(self, given: InnerMax | PerturbationSet | float | None) -> InnerMax | None:
        """The inner maximum that a setting stands for."""
        if given is None or isinstance(given, InnerMax):
            return given
        return InnerMax(given, steps=self.steps, mode=_BN_OF_ATTACK[self.bn])

    def __call__(self, model: nn.Module, batch: Batch) -> _Scalar:
        x, u = self.worst(model, batch)
        if u is None:
            return F.cross_entropy(read(model, x), batch.y)
        if self.bn == "separate":
            z_in = read(model, x)
            with batch_statistics(model):
                z_out = read(model, u)
        else:
            z_in, z_out = read(model, torch.cat([x, u])).split([len(x), len(u)])
        return F.cross_entropy(z_in, batch.y) + self.weight * self.outlier_loss(z_out).mean()

    def worst(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Inputs and outliers as the update sees them: clean outliers first, None if they have no weight.

        Where both sides are attacked alike and batch statistics are frozen, so that the samples of a batch
        do not affect one another, both are attacked in one batch, with half the number of passes.
        """
        x, u = batch.x, self.outliers(model, batch)
        inside, outside = self.inner(self.inside), self.inner(self.outside)
        clean = 0 if u is None else len(u) - round(self.attacked_share * len(u))
        if u is None or clean == len(u):
            outside = None
        rest = x[:0] if u is None else u[clean:]
        on_labels = lambda x: cross_entropy(read(model, x), batch.y)
        on_outliers = lambda u: self.outlier_loss(read(model, u))

        def on_both(v: Tensor) -> Tensor:
            z_in, z_out = read(model, v).split([len(x), len(rest)])
            return torch.cat([cross_entropy(z_in, batch.y), self.outlier_loss(z_out)])

        if inside and inside == outside and inside.mode == "eval":
            both, parts = torch.cat([x, rest]), (len(x), len(rest))
            moved = inside.worst(model, both, on_both, batch, parts)
            x, rest = moved.split(parts)
        else:
            if inside:
                x = inside.worst(model, x, on_labels, batch)
            if outside:
                rest = outside.worst(model, rest, on_outliers, batch)
        return x, None if u is None else torch.cat([u[:clean], rest])

    def outliers(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """The step's outliers, None if they have no weight."""
        if self.weight == 0:
            return None
        if self.outlier_loss is to_reject:
            _reject_outputs(model)
        return _needed(batch.outliers)

    def prepare(self, model: nn.Module, data: Data, epoch: int, generator: torch.Generator) -> Data:
        """The data of one epoch: mined outliers, or all of them."""
        if self.mine is None or self.weight == 0:
            return data
        return self.mine(model, data, generator)


_BN_OF_ATTACK: dict[str, Mode] = {"eval": "eval", "train": "train", "separate": "batch"}
Set = InnerMax | PerturbationSet | float


def _given(within: Set) -> Set:
    """The set itself, after a check."""
    if not isinstance(within, InnerMax):
        as_set(within)
    return within


def OutlierExposure(weight: float = 0.5) -> OutlierTraining:
    """OE: clean inputs, clean outliers pushed to the uniform distribution (Hendrycks et al. 2019)."""
    return OutlierTraining(weight=weight)


def ADV(within: Set, steps: int = 2, **how: Any) -> OutlierTraining:
    """Adversarial training: attacked inputs, no outliers."""
    return OutlierTraining(inside=_given(within), weight=0.0, steps=steps, **how)


def AOE(within: Set, steps: int = 2, **how: Any) -> OutlierTraining:
    """Attacked inputs, clean outliers (Chen et al. 2020, section 4).

    The authors' code also attacks the outliers and discards the result, and makes two forward passes.
    """
    return OutlierTraining(inside=_given(within), steps=steps, **how)


def ALOE(within: Set, steps: int = 2, **how: Any) -> OutlierTraining:
    """Attacked inputs and attacked outliers (Chen et al. 2020, section 4).

    The paper: eps = 1/255, two steps of 1/255, weight 0.5. The authors' code attacks in train mode
    (``bn="train"``) and starts at the clean input, because it truncates its random start to whole 8-bit
    steps. Here the start is random and the step is 2.5 radius / steps.
    """
    return OutlierTraining(inside=_given(within), outside=within, steps=steps, **how)


def ACET(within: Set, steps: int = 5, **how: Any) -> OutlierTraining:
    """Clean inputs, half of the outliers attacked (Hein et al. 2019, as in the code of ATOM).

    The original attacks noise and minimises its largest log-confidence.
    """
    return OutlierTraining(outside=_best_of(within, steps), weight=1.0, attacked_share=0.5, **how)


def NTOM(q: float = 0.125, **how: Any) -> OutlierTraining:
    """Mined clean outliers, trained into a reject class (Chen et al. 2021, section 3)."""
    return OutlierTraining(outlier_loss=to_reject, weight=1.0, mine=Mining(q), **how)


def ATOM(within: Set, q: float = 0.125, steps: int = 5, **how: Any) -> OutlierTraining:
    """Mined outliers, the second half of them attacked, trained into a reject class (Chen et al. 2021, section 3).

    The paper's formula attacks all outliers; its code attacks half, as does this. Inputs
    are never attacked. The paper: eps = 8/255, five steps of 2/255, the best iterate kept.
    """
    return NTOM(q, outside=_best_of(within, steps), attacked_share=0.5, **how)


def MinedALOE(within: Set, q: float = 0.125, steps: int = 5, **how: Any) -> OutlierTraining:
    """ALOE's attacked inputs with ATOM's mined, half-attacked outliers; our combination, in neither paper."""
    outside = _best_of(within, steps)
    return NTOM(q, inside=within, outside=outside, attacked_share=0.5, steps=steps, **how)


def _best_of(within: Set, steps: int) -> InnerMax:
    """An inner maximum that returns the best iterate."""
    return within if isinstance(within, InnerMax) else InnerMax(within, steps=steps, keep="best")


@dataclass(frozen=True)
class SOFL:
    r"""Self-supervised outlier classes (Mohseni et al. 2020), for a network with R reject outputs.

    First plain cross-entropy on the classes; then $\mathrm{CE}(x, y) + \lambda\,\mathrm{CE}(u, \hat r)$, where
    $\hat r$ is the network's own prediction if that is a reject output, else a random reject output.

    Attributes:
        weight: $\lambda$ of the mean over a step's outliers.
        start: share of the training before outliers are used; one half, as in the papers' 100 + 100 epochs.
    """

    weight: float = 5.0
    start: float = 0.5

    def __post_init__(self) -> None:
        check_number(self.weight, "weight", 0)
        check_number(self.start, "start", 0, 1)

    def __call__(self, model: nn.Module, batch: Batch) -> _Scalar:
        if batch.progress < self.start or batch.outliers is None:
            return F.cross_entropy(read(model, batch.x), batch.y)
        classes, rejects = _reject_outputs(model)
        z = read(model, torch.cat([batch.x, batch.outliers]))
        z_in, z_out = z.split([len(batch.x), len(batch.outliers)])
        answer = z_out.argmax(1)
        drawn = rng.integers(classes, classes + rejects, answer, batch.generator)
        pseudo = torch.where(answer >= classes, answer, drawn)
        return F.cross_entropy(z_in, batch.y) + self.weight * F.cross_entropy(z_out, pseudo)


def _needed(outliers: Tensor | None) -> Tensor:
    """The outliers, after a check that there are any."""
    if outliers is None:
        raise ValueError(
            "data.outliers is empty, but this objective learns from outliers; add some"
        )
    return outliers


def _reject_outputs(model: nn.Module) -> tuple[int, int]:
    """Numbers of classes and of reject outputs, after a check that there are some."""
    classes, rejects = declared_outputs(model)
    if classes is None or not rejects:
        raise ValueError(
            "model has no reject output; build it with reject=1, or wrap a network from elsewhere in "
            "models.adapt(model, reject=1)"
        )
    return classes, rejects


@dataclass(frozen=True)
class ROWL:
    r"""Robust open-world learning (Sehwag et al. 2019): one more class, all inputs attacked.

    Outliers are class K + 1. The loss is the mean of two cross-entropies, of clean inputs and of inputs pushed
    towards a random wrong class of the K + 1, each with its true label. The papers' code uses only 5,000 outliers.

    Attributes:
        inner: set of the targeted attack, or an :class:`InnerMax` for full control.
        steps: attack steps where ``inner`` is a set or a number.
    """

    inner: InnerMax | PerturbationSet | float
    steps: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.inner, InnerMax):
            InnerMax(self.inner, self.steps)  # a bad set is refused here, not at the first step

    def __call__(self, model: nn.Module, batch: Batch) -> _Scalar:
        classes, _ = _reject_outputs(model)
        outliers = _needed(batch.outliers)
        x = torch.cat([batch.x, outliers])
        y = torch.cat([batch.y, batch.y.new_full((len(x) - len(batch.y),), classes)])
        parts = (batch.x, outliers)
        drawn = [rng.integers(1, classes + 1, part, batch.generator) for part in parts]
        wrong = (y + torch.cat(drawn)) % (classes + 1)
        inner = self.inner if isinstance(self.inner, InnerMax) else InnerMax(self.inner, self.steps)
        toward = lambda v: -cross_entropy(read(model, v), wrong)
        moved = inner.worst(model, x, toward, batch)
        return F.cross_entropy(read(model, torch.cat([x, moved])), torch.cat([y, y]))


@runtime_checkable
class _Densities(Protocol):
    """What :class:`CCU` needs of a network besides its outputs: two log-densities."""

    inside: Callable[[Tensor], Tensor]
    outside: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CCU:
    r"""Certified certain uncertainty (Meinke and Hein 2020, eq. 8), for :class:`~robustood.models.CCUModel`.

    $\tfrac12(-\log p(y \mid x) - \log p_{in}(x)) + \tfrac{\lambda}{2}(\ell_{OE}(u) - \log p_{out}(u))$ with the
    guarded posterior, each term averaged. The densities are trained too, with their own learning rate. The code
    of ATOM trains this and then scores the bare network.

    Attributes:
        weight: $\lambda$.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.weight, "weight", 0)

    def __call__(self, model: nn.Module, batch: Batch) -> _Scalar:
        if not isinstance(model, _Densities):
            raise ValueError("model must be a CCUModel; build it with models.ccu_model")
        u = _needed(batch.outliers)
        inside = F.cross_entropy(read(model, batch.x), batch.y) - model.inside(batch.x).mean()
        outside = to_uniform(read(model, u)).mean() - model.outside(u).mean()
        return 0.5 * inside + 0.5 * self.weight * outside
