r"""Interval bounds: a box of inputs, propagated through a network layer by layer.

A layer that is increasing in each input maps the ends of the box to the ends of its outputs. An affine layer
maps its centre and radius,

$$W x + b \in W c + b \pm |W|\, r \quad\text{for } |x - c| \le r$$

(Gowal et al. 2018, section 3). Each layer ignores how its inputs depend on one another, so the box grows
from layer to layer. The bounds hold for every network, up to rounding, but are tight only for networks
trained with them, such as the outlier detectors of Bitterwolf et al. (2020) and Meinke et al. (2022).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from robustood.data import Batch
from robustood.inputs import (
    check_images,
    check_instance,
    check_labels,
    check_number,
    checked_inputs,
    finite_inputs,
)
from robustood.models import Adapted, Classifier, Normalise, declared_outputs, read

Inputs = Float[Tensor, "batch *shape"]
Outputs = Float[Tensor, "batch outputs"]
Values = Float[Tensor, " batch"]
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus)
_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_MONOTONE = (*_ACTIVATIONS, *_POOLING, nn.Flatten, nn.Identity, Normalise)
_SKIPPED = (nn.Dropout, nn.Dropout2d)  # the bounds are for eval mode


def interval_bounds(model: nn.Module, lower: Inputs, upper: Inputs) -> tuple[Outputs, Outputs]:
    """Bounds on each output over all inputs between ``lower`` and ``upper``, pixel by pixel.

    Differentiable in the network's parameters. Batch normalisation must be in eval mode.

    Args:
        model: a chain of convolutions, linear layers, monotone activations and pooling.
        lower, upper: ends of the boxes (batch, ...).

    Raises:
        ValueError: for an unsupported layer, which the message names, or a box with lower > upper.
    """
    lower, upper = _check_bounds(model, lower, upper)
    return propagate(_layers(model), lower, upper)


def _check_bounds(model: nn.Module, lower: Inputs, upper: Inputs) -> tuple[Inputs, Inputs]:
    """Refuse anything but a network and a valid box."""
    check_instance(model, "model", nn.Module, "a network, such as small_cnn()")
    lower, upper = finite_inputs(lower, "lower"), finite_inputs(upper, "upper")
    if lower.shape != upper.shape or bool((lower > upper).any()):
        raise ValueError(
            f"lower and upper must have the same shape with lower <= upper, got {tuple(lower.shape)} and "
            f"{tuple(upper.shape)}; write x - eps and x + eps"
        )
    weight = next(model.parameters(), lower)
    for name, ends in (("lower", lower), ("upper", upper)):
        if ends.dtype != weight.dtype:
            raise ValueError(
                f"{name} is {ends.dtype}, the model {weight.dtype}; use {name}.float()"
            )
    return lower, upper


def margin_bounds(
    model: nn.Module, lower: Inputs, upper: Inputs, y: Int[Tensor, " batch"]
) -> tuple[Outputs, Outputs]:
    r"""Bounds on $z_k - z_y$ for every output k, with the difference taken in the weights of the last layer.

    Tighter than the difference of two bounds (Gowal et al. 2018, section 3).

    Args:
        y: (batch,) the output to compare with, such as the reject output.
    """
    lower, upper = _check_bounds(model, lower, upper)
    check_labels(y, lower, getattr(_layers(model)[-1], "out_features", None))
    return margins(model, lower, upper, y)


def margins(
    model: nn.Module, lower: Inputs, upper: Inputs, y: Int[Tensor, " batch"]
) -> tuple[Outputs, Outputs]:
    """:func:`margin_bounds` for inputs that have been checked; it never waits for the device."""
    *body, head = _layers(model)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"model must end in a linear layer, got {head!r}")
    low, high = propagate(body, lower, upper)
    weight = head.weight - head.weight[y][:, None]
    shift = 0 if head.bias is None else head.bias - head.bias[y][:, None]
    mid = torch.einsum("bkw,bw->bk", weight, (high + low) / 2) + shift
    spread = torch.einsum("bkw,bw->bk", weight.abs(), (high - low) / 2)
    return mid - spread, mid + spread


def worst_cross_entropy(
    model: nn.Module, lower: Inputs, upper: Inputs, y: Int[Tensor, " batch"]
) -> Values:
    r"""Upper bound on the cross-entropy to y over the box: $\log \sum_k e^{\max(z_k - z_y)}$."""
    return margin_bounds(model, lower, upper, y)[1].logsumexp(1)


def interval_score(model: nn.Module, x: Inputs, eps: float) -> tuple[Values, Values]:
    r"""Bounds on the score of a reject class, $\mathrm{LSE}_k(z_k - z_{K+1})$, over $\ell_\infty$ balls in [0, 1].

    The score is that of :class:`~robustood.detectors.RejectClass`.

    Raises:
        ValueError: unless the network has one reject output, and as :func:`interval_bounds`.
    """
    x = checked_inputs(x)
    check_images(x)
    check_number(eps, "eps", 0, 1, "a radius in pixels, such as 0.02")
    lower, upper = _check_bounds(model, *_box(x, eps))
    low, high = margins(model, lower, upper, _reject(model, x))
    return low[:, :-1].logsumexp(1), high[:, :-1].logsumexp(1)


@dataclass(frozen=True)
class IntervalOutliers:
    r"""Train a reject class by interval bounds, on both sides:

    $$\mathbb E_{in}\, L(x, y) + \lambda\, \mathbb E_{out}\, L(u, K + 1), \qquad
    L(x, y) = (1 - s)\,\mathrm{CE}(f(x), y) + s\, \overline{\mathrm{CE}}_{\varepsilon}(x, y)$$

    where $\overline{\mathrm{CE}}_{\varepsilon}$ is :func:`worst_cross_entropy` over the ball. The shape is that of
    :class:`~robustood.objectives.OutlierTraining`, with a bound in place of the attack. The outlier term is that of
    Bitterwolf et al. (2020) for a reject class; a network with one class and one reject output is the binary
    head of Meinke et al. (2022). Both radius and s grow from 0 (Gowal et al. 2018, section 3).

    Attributes:
        eps: radius, in pixels.
        weight: $\lambda$ of the mean over a step's outliers.
        share: s at the end.
        ramp: share of the training over which radius and s grow linearly from 0.
    """

    eps: float
    weight: float = 1.0
    share: float = 0.5
    ramp: float = 0.5

    def __post_init__(self) -> None:
        check_number(self.eps, "eps", 0, 1e6, "give a radius of at least 0, such as 0.02")
        check_number(self.weight, "weight", 0)
        check_number(self.share, "share", 0, 1)
        check_number(self.ramp, "ramp", 0, 1)

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        if batch.outliers is None:
            raise ValueError(
                "data.outliers is empty, but this objective learns from outliers; add some"
            )
        grown = min(1.0, batch.progress / self.ramp) if self.ramp else 1.0
        v = torch.cat([batch.x, batch.outliers])
        y = torch.cat([batch.y, _reject(model, batch.outliers)])
        plain = cross_entropy(read(model, v), y, reduction="none")
        worst = margins(model, *_box(v, grown * self.eps), y)[1].logsumexp(1)
        losses = (1 - grown * self.share) * plain + grown * self.share * worst
        inside, outside = losses.split([len(batch.x), len(batch.outliers)])
        return inside.mean() + self.weight * outside.mean()


# --- layer by layer


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a network in the order in which they are applied.

    Types are compared exactly, here and below, since a subclass may compute something else. An engine's wrapper
    computes the same, and says what it wraps.
    """
    model = getattr(model, "unwrapped", model)
    if type(model) is Classifier:
        pool = [nn.AdaptiveAvgPool2d(1)] if model.pool else []
        parts: Iterable[nn.Module] = [model.normalise, *model.body, *pool, nn.Flatten(), model.head]
    elif type(model) is Adapted and model.output is None:
        parts = [model.normalise, model.inner]
    elif type(model) is nn.Sequential:
        parts = model
    else:
        return [model]
    return [layer for part in parts for layer in _layers(part)]


def propagate(chain: list[nn.Module], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The box after all layers of a chain."""
    for layer in chain:
        if type(layer) in _MONOTONE:
            low, high = layer(low), layer(high)
        elif type(layer) not in _SKIPPED:
            centre, radius = (high + low) / 2, (high - low) / 2
            mid = layer(centre)  # first: a hook, as of weight_norm, may compute the weight now
            spread = _magnitude(layer, radius)
            low, high = mid - spread, mid + spread
    return low, high


def _magnitude(layer: nn.Module, radius: Tensor) -> Tensor:
    """$|W|\\, r$ of an affine layer."""
    if type(layer) is nn.Linear:
        return linear(radius, layer.weight.abs())
    if type(layer) is nn.Conv2d:
        return layer._conv_forward(radius, layer.weight.abs(), None)
    if type(layer) is nn.BatchNorm2d:
        if layer.training or layer.running_var is None:
            raise ValueError(
                "interval bounds need running statistics, but a BatchNorm2d layer is in train mode or has none; "
                "call model.eval() or build the network without batch normalisation"
            )
        scale = (layer.running_var + layer.eps).rsqrt()
        if layer.weight is not None:
            scale = scale * layer.weight.abs()
        return radius * scale[:, None, None]
    raise ValueError(
        f"interval bounds do not support the layer {type(layer).__name__}; they support chains of Linear, "
        f"Conv2d, BatchNorm2d, {', '.join(kind.__name__ for kind in _MONOTONE)}"
    )


def _box(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Ends of the ball, clipped to valid images."""
    return (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)


def _reject(model: nn.Module, x: Tensor) -> Int[Tensor, " batch"]:
    """The index of the one output that rejects, for each input."""
    classes, rejects = declared_outputs(model)
    if classes is None or rejects != 1:
        raise ValueError(
            f"model must have one reject output, got {rejects}; build it with reject=1, or wrap a network from "
            "elsewhere in models.adapt(model, reject=1)"
        )
    return torch.full((len(x),), classes, device=x.device)
