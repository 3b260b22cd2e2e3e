"""Defences that are broken in a known way, and honest ones, to try the checks on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from robustood.attacks import pgd
from robustood.detectors import MSP, Detector, Direction, Energy, RejectClass
from robustood.detectors._base import Columns, Values, signed
from robustood.inputs import check_instance, finite_inputs
from robustood.losses import log_odds
from robustood.models import Classifier, declared_outputs
from robustood.perturbations import Linf, PerturbationSet
from robustood.sanity._check import check
from robustood.sanity._findings import Findings
from robustood.sanity._subject import Inputs


@dataclass(frozen=True)
class Defence:
    """A claim of robustness, and what is wrong with it.

    Attributes:
        subject: a classifier or a detector.
        why: what is wrong, or that nothing is.
        expected: the check that must find it; None for an honest defence.
        attack: the attack that its author made, if that is what is wrong.
        prepare: what its author does to the pixels first.
    """

    subject: Callable[[Tensor], Tensor]
    why: str
    expected: str | None = None
    attack: Callable[..., Tensor] | None = None
    prepare: Callable[[Tensor], Tensor] | None = None

    def check(
        self,
        x: Inputs,
        y: Tensor,
        outliers: Inputs,
        within: PerturbationSet | float,
        **settings: Any,
    ) -> Findings:
        """:func:`check` on this defence; a detector is given the outliers, a classifier the labels."""
        x, outliers = finite_inputs(x), finite_inputs(outliers, "outliers")
        if outliers.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"outliers must be shaped like x, (outliers, {', '.join(map(str, x.shape[1:]))}), got "
                f"{tuple(outliers.shape)}"
            )
        prepare = self.prepare or (lambda v: v)
        other = prepare(outliers) if isinstance(self.subject, Detector) else y
        if self.attack is not None:
            settings = {"attack": self.attack, **settings}
        return check(self.subject, prepare(x), other, within, **settings)


def zoo(network: Classifier, robust: nn.Module, exposed: nn.Module) -> dict[str, Defence]:
    """Defences by name: broken ones around a network that has no defence, and honest ones.

    The networks are copied and left as they are.

    Args:
        network: trained without defence.
        robust: trained against attacks.
        exposed: trained on outliers, attacked or not; with reject outputs :class:`~robustood.detectors.RejectClass`
            joins the honest ones.

    >>> from robustood.models import small_cnn
    >>> defences = zoo(small_cnn(), small_cnn(seed=1), small_cnn(seed=2))
    >>> defences["saturated logits"].expected
    'saturation'
    """
    check_instance(network, "network", Classifier, "a trained network, such as small_cnn()")
    for name, given in (("robust", robust), ("exposed", exposed)):
        check_instance(given, name, nn.Module, "a trained network, such as small_cnn()")
    plain = copy.deepcopy(network).eval()
    robust, exposed = (copy.deepcopy(each).eval() for each in (robust, exposed))
    return {**_masked(plain), **_misused(plain), **_honest(plain, robust, exposed)}


def _masked(network: nn.Module) -> dict[str, Defence]:
    """Defences whose gradient, score or output hides from an attack."""
    return {
        "rounded input": Defence(
            nn.Sequential(Rounded(8), network).eval(),
            "Rounding the input to a few grey levels has a gradient of zero.",
            "gradient",
        ),
        "rounded score": Defence(
            RoundedMSP(network),
            "A score rounded to whole numbers has a gradient of zero and many ties.",
            "gradient",
        ),
        "stopped gradient": Defence(
            nn.Sequential(Detached(), network).eval(),
            "The input is detached, so that no gradient reaches it.",
            "gradient",
        ),
        "steep sigmoid": Defence(
            SteepMSP(network),
            "A sigmoid with a slope of 1,000 is 0 or 1 in float32, with a gradient of zero.",
            "gradient",
        ),
        "false gradient": Defence(
            nn.Sequential(FalseGradient(), network).eval(),
            "The backward pass returns noise in place of the gradient.",
            "ascent",
        ),
        "saturated logits": Defence(
            nn.Sequential(network, Scaled(1e3)).eval(),
            "Logits times 1,000 saturate the softmax, and the gradient of the cross-entropy underflows.",
            "saturation",
        ),
        "noisy layer": Defence(
            nn.Sequential(Noisy(0.2), network).eval(),
            "Noise is added at test time, and one draw is evaluated.",
            "randomness",
        ),
        "tied probabilities": Defence(
            SharpMSP(network),
            "Probabilities of a sharpened softmax round to 1 in float32, where scores tie.",
            "ties",
        ),
    }


def _misused(network: Classifier) -> dict[str, Defence]:
    """Networks that are given, attacked or left in the wrong way."""
    bare = copy.deepcopy(network)
    bare.normalise = nn.Identity()
    outputs = network.classes + network.reject
    norms = [nn.BatchNorm1d(outputs, track_running_stats=tracked) for tracked in (True, False)]
    return {
        "batch norm in train mode": Defence(
            nn.Sequential(copy.deepcopy(network), norms[0]).train(),
            "Train mode normalises by the statistics of the batch under attack.",
            "train_mode",
        ),
        "batch statistics": Defence(
            nn.Sequential(network, norms[1]).eval(),
            "Without running statistics, every output depends on the whole batch.",
            "batch",
        ),
        "vacuous start": Defence(
            network,
            "Start and steps, smaller than a grey level, are truncated to 8 bits: the attack never moves.",
            "no_op",
            attack=truncated_attack,
        ),
        "attack on the wrong score": Defence(
            Misattacked(network),
            "The deployed score is the largest output over the mean of all; the attack climbs the smallest one.",
            "objective",
        ),
        "normalisation outside": Defence(
            bare,
            "Standardised images are passed, so that radius and box are not in pixels.",
            "inputs",
            prepare=network.normalise,
        ),
        "probabilities as logits": Defence(
            nn.Sequential(network, nn.Softmax(1)).eval(),
            "The model ends in a softmax, and losses apply another one.",
            "probabilities",
        ),
    }


def _honest(network: nn.Module, robust: nn.Module, exposed: nn.Module) -> dict[str, Defence]:
    """Defences that are as strong or as weak as attacks say."""
    weak, strong = "Weak, and attacks show it.", "As strong as attacks say."
    found = {
        "standard network": Defence(network, weak),
        "standard network with MSP": Defence(MSP(network), weak),
        "adversarial training": Defence(robust, strong),
        "adversarial training with MSP": Defence(MSP(robust), strong),
        "attacked outliers with MSP": Defence(MSP(exposed), strong),
        "attacked outliers with Energy": Defence(Energy(exposed), strong),
    }
    if declared_outputs(exposed)[1]:
        found["attacked outliers with a reject class"] = Defence(RejectClass(exposed), strong)
    return found


# --- layers and scores that are broken


class Rounded(nn.Module):
    """The input in ``levels`` steps; the gradient of rounding is zero."""

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.levels).round() / self.levels


class Detached(nn.Module):
    """The input, cut off from its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class _Noise(torch.autograd.Function):
    """The identity, with noise for a gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        return torch.randn_like(grads[0])


class FalseGradient(nn.Module):
    """The identity, whose backward pass is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return _Noise.apply(x)


class Scaled(nn.Module):
    """Outputs times a factor."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        return self.factor * z


class Noisy(nn.Module):
    """Gaussian noise, drawn anew at each call."""

    def __init__(self, sigma: float):
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn_like(x)


class RoundedMSP(Detector):
    """The log-odds of the likeliest class in whole numbers."""

    def score(self, x: Inputs) -> Values:
        return log_odds(self.logits(x)).amax(1).round()


class SteepMSP(Detector):
    """A step at log-odds of 5 that passes for smooth."""

    def score(self, x: Inputs) -> Values:
        return (1e3 * (log_odds(self.logits(x)).amax(1) - 5)).sigmoid()


class SharpMSP(Detector):
    """The largest probability at a temperature of 1/10."""

    def score(self, x: Inputs) -> Values:
        return (10 * self.logits(x)).softmax(1).amax(1)


class Misattacked(Detector):
    """The largest output over the mean of all; its attack climbs the smallest output."""

    def score(self, x: Inputs) -> Values:
        z = self.logits(x)
        return z.amax(1) - z.mean(1)

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        return signed(self.logits(x).amin(1), direction)[:, None]


class Truncated(Linf):
    """Perturbations of whole grey levels, rounded towards zero."""

    def shrink(self, z: Inputs) -> Inputs:
        return (255 * super().shrink(z)).trunc() / 255


def truncated_attack(
    model: Callable[[Tensor], Tensor], x: Inputs, y: Tensor, within: PerturbationSet
) -> Inputs:
    """Steps of half a grey level, truncated to 8 bits after each: it never leaves the clean input."""
    within = Truncated(within.radius)
    return pgd(model, x, y, within, steps=10, step_size=0.5 / 255, restarts=0)
