"""The common structure of all networks, small networks for small images, and freezing a network."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustood.callables import OF_EVERY_NETWORK, modules
from robustood.inputs import (
    check_choice,
    check_count,
    check_flag,
    check_instance,
    check_seed,
    check_several,
    check_values,
    reals,
)


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Draw initial weights from a seed; the CPU's global random state is restored, a GPU's not touched."""
    seed = check_seed(seed)
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


@contextmanager
def batch_statistics(model: nn.Module) -> Generator[None]:
    """In train mode, normalise by the batch's own statistics without updating the running ones."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def networks(model: object) -> list[nn.Module]:
    """The networks that a call of the model may reach, including those in functions and lists that a network holds."""
    outer = modules(model)
    held = [
        value
        for network in outer
        for part in network.modules()
        if not type(part).__module__.startswith("torch.")
        for name, value in vars(part).items()
        if name not in OF_EVERY_NETWORK and not isinstance(value, type)
        if callable(value) or isinstance(value, (list, tuple, set, frozenset, dict))
    ]
    return [*outer, *(network for value in held for network in modules(value))]


@contextmanager
def frozen(
    model: object, mode: Literal["eval", "train", "batch", "keep"] = "eval"
) -> Generator[None]:
    """Set the model's mode and freeze its parameters; restore both on leaving, also after an error.

    In eval mode batch statistics do not leak between the samples of an attacked batch and
    running statistics do not move. Frozen parameters let autograd drop what only weight
    gradients would need. Networks inside a function, a bound method or another object are found
    (:func:`robustood.callables.modules`).

    Args:
        model: the network under attack, or a callable that contains it.
        mode: ``"eval"``, ``"train"`` (running statistics move), ``"batch"`` (train mode, running
            statistics stay) or ``"keep"``.
    """
    check_choice(mode, "mode", ("eval", "train", "batch", "keep"))
    found = nn.ModuleList(networks(model))
    modes = [(module, module.training) for module in found.modules()]
    trainable = [p for p in found.parameters() if p.requires_grad]
    try:
        if mode != "keep":
            found.train(mode != "eval")
        for p in trainable:
            p.requires_grad_(False)
        with batch_statistics(found) if mode == "batch" else nullcontext():
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for module, training in modes:
            module.training = training


class Normalise(nn.Module):
    """$(x - \\mu) / \\sigma$ per channel, in one fused expression; one entry alone is for all channels.

    Raises:
        ValueError: for images with another number of channels. A grey one would turn into three channels, but an
            attack would only move all of them together.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        mean, std = reals(mean, "mean").tolist(), reals(std, "std").tolist()
        check_several(mean, "mean", "numbers, one per channel")
        check_several(std, "std", "numbers, one per channel")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(
                f"mean and std must have one entry per channel, std above 0; got {mean}, {std}"
            )
        scale = 1 / torch.tensor(std).view(-1, 1, 1)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", -torch.tensor(mean).view(-1, 1, 1) * scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = len(self.scale)
        if channels > 1 and x.shape[-3:-2] != (channels,):
            last = x.ndim == 4 and x.shape[3] == channels
            fix = (
                "x.permute(0, 3, 1, 2)"
                if last
                else f"grey images as x.expand(-1, {channels}, -1, -1)"
            )
            raise ValueError(
                f"x must have {channels} channels, one per mean, got shape {tuple(x.shape)}; pass {fix}"
            )
        return x * self.scale + self.shift


class Classifier(nn.Module):
    """A normalisation, a chain of stages, and a linear head.

    Args:
        stages: modules applied in turn; the output of the last one gives the features.
        width: number of features.
        classes: number of classes.
        reject: number of additional outputs that stand for "none of the classes".
        normalise: applied first; default the identity.
        pool: average the last map over its pixels instead of flattening it.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        width: int,
        classes: int,
        reject: int = 0,
        normalise: nn.Module | None = None,
        pool: bool = False,
    ):
        super().__init__()
        reject = check_count(reject, "reject")
        classes = check_count(classes, "classes", low=1 if reject else 2)
        self.classes, self.reject, self.pool = classes, reject, pool
        self.normalise = normalise or nn.Identity()
        self.body = nn.ModuleList(stages)
        self.head = nn.Linear(width, classes + reject)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The output of each stage, first to last."""
        x, maps = self.normalise(x), []
        for stage in self.body:
            x = stage(x)
            maps.append(x)
        return maps

    def features(self, x: Tensor) -> Float[Tensor, "batch width"]:
        """Penultimate features."""
        x = self.normalise(x)
        for stage in self.body:
            x = stage(x)
        return x.mean((2, 3)) if self.pool else x.flatten(1)

    def forward(self, x: Tensor) -> Float[Tensor, "batch outputs"]:
        return self.head(self.features(x))


def small_cnn(
    classes: int = 10,
    reject: int = 0,
    channels: int = 1,
    size: int = 8,
    seed: int = 0,
    width: int = 1,
    batch_norm: bool = False,
) -> Classifier:
    """Two convolutions and a hidden layer: 16 filters, 32 at half the resolution, 64 features.

    38,282 parameters for 8x8 grey images and ten classes; trains on the digits in seconds on
    one core. Without batch normalisation, so that training and evaluation compute the same function.

    Args:
        classes, reject: numbers of class and of reject outputs.
        channels, size: of the square input images.
        seed: of the initial weights; the global random state is unchanged.
        width: multiplies filters and features; 2 helps robust training.
        batch_norm: normalise after each convolution.

    Returns:
        Model from (batch, channels, size, size) in [0, 1] to (batch, classes + reject).
    """
    channels, size = check_count(channels, "channels", low=1), check_count(size, "size", low=2)
    width = check_count(width, "width", low=1)
    check_flag(batch_norm, "batch_norm")

    def convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), *norm, nn.ReLU()
        )

    with seeded(seed):
        half = (size + 1) // 2
        first, second = convolution(channels, 16 * width, 1), convolution(16 * width, 32 * width, 2)
        hidden = nn.Linear(32 * width * half * half, 64 * width)
        stages = [first, second, nn.Sequential(nn.Flatten(), hidden, nn.ReLU())]
        normalise = Normalise([0.5] * channels, [0.5] * channels)
        return Classifier(stages, 64 * width, classes, reject, normalise)


def mlp(
    inputs: int,
    hidden: Sequence[int] = (128, 128),
    classes: int = 10,
    reject: int = 0,
    seed: int = 0,
) -> Classifier:
    """Fully connected ReLU network on flattened inputs; ``hidden=()`` is the linear softmax classifier.

    Args:
        inputs: size of one input, such as 64 for an 8x8 image.
        hidden: widths of the hidden layers.
        classes, reject: numbers of class and of reject outputs.
        seed: of the initial weights; the global random state is unchanged.

    Returns:
        Model from (batch, ...) to (batch, classes + reject).
    """
    check_several(hidden, "hidden", "widths, () for none", 0)
    for width in hidden:
        check_count(width, "hidden: each width", low=1)
    inputs = check_count(inputs, "inputs", low=1)
    with seeded(seed):
        widths = [inputs, *hidden]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        return Classifier([nn.Flatten(), *layers], widths[-1], classes, reject)


def readout(
    weight: Tensor | Sequence[Sequence[float]], bias: Tensor | None = None, reject: int = 0
) -> Classifier:
    """A linear head whose features are its inputs: for toy models, tests and stored features.

    Args:
        weight: (outputs, width); the last ``reject`` outputs stand for "none of the classes".
        bias: (outputs,); default zero.

    >>> readout([[1.0, 0.0], [0.0, 2.0]])(torch.tensor([[3.0, 1.0]])).tolist()
    [[3.0, 2.0]]
    """
    reject = check_count(reject, "reject")
    if not isinstance(weight, Tensor):
        check_several(weight, "weight", "rows, one per output")
        weight = torch.tensor(reals(weight, "weight").tolist())
    check_values(weight, None, "weight")
    if weight.ndim != 2:
        raise ValueError(f"weight must be (outputs, width), got shape {tuple(weight.shape)}")
    outputs, width = weight.shape
    if bias is not None:
        check_values(bias, None, "bias")
        if bias.shape != (outputs,):
            raise ValueError(
                f"bias must have shape ({outputs},), one per output, got {tuple(bias.shape)}"
            )
    with seeded(0):
        model = Classifier([nn.Flatten()], width, outputs - reject, reject).to(weight.dtype)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(torch.zeros(outputs) if bias is None else bias)
    return model.eval()


class Mixture(nn.Module):
    r"""Density of a mixture of isotropic Gaussians in given coordinates; centres, scales and shares are trained.

    Args:
        axes: (inputs, width), coordinates $x^\top A$ of the metric.
        centres: (components, width).
        scales: (components,), standard deviations.
    """

    axes: Tensor

    def __init__(self, axes: Tensor, centres: Tensor, scales: Tensor):
        super().__init__()
        self.register_buffer("axes", axes)
        self.centres = nn.Parameter(centres.clone())
        self.log_scales = nn.Parameter(scales.log())
        self.log_shares = nn.Parameter(torch.zeros_like(scales))

    def forward(self, x: Tensor) -> Float[Tensor, " batch"]:
        """Log-density, up to the constant of the metric."""
        apart = ((x.flatten(1) @ self.axes)[:, None] - self.centres).square().sum(2)
        width = self.centres.shape[1]
        bumps = -apart / (2 * (2 * self.log_scales).exp()) - width * self.log_scales
        return (bumps + self.log_shares.log_softmax(0)).logsumexp(1)


class CCUModel(nn.Module):
    r"""A classifier that returns to the uniform distribution far from the training data.

    $p(y \mid x) = \frac{F_y(x)\, p_{in}(x) + \lambda\, p_{out}(x) / K}{p_{in}(x) + \lambda\, p_{out}(x)}$ (Meinke and
    Hein 2020, eq. 5), in log space; the outputs are $\log p(y \mid x)$. Made by :func:`ccu_model`.
    """

    reject = 0

    def __init__(self, base: Classifier, inside: Mixture, outside: Mixture, weight: float = 1.0):
        super().__init__()
        self.base, self.inside, self.outside = base, inside, outside
        self.weight, self.classes = weight, base.classes

    def forward(self, x: Tensor) -> Float[Tensor, "batch classes"]:
        log_in = self.inside(x)[:, None]
        log_out = self.outside(x)[:, None] + math.log(self.weight)
        both = torch.logaddexp(log_in, log_out)
        flat = log_out - math.log(self.classes)
        return torch.logaddexp(self.base(x).log_softmax(1) + log_in, flat) - both

    def parameter_groups(self) -> list[dict[str, object]]:
        """The network with the run's learning rate, the densities with a hundredth of it."""
        densities = [*self.inside.parameters(), *self.outside.parameters()]
        return [{"params": [*self.base.parameters()]}, {"params": densities, "scale": 0.01}]


def ccu_model(
    base: Classifier, x: Tensor, outliers: Tensor, components: int = 20, seed: int = 0
) -> CCUModel:
    """Guard a classifier by two mixtures, initialised by k-means in the PCA coordinates of x.

    Args:
        base: the network.
        x, outliers: in-distribution and outlier training images.
        components: number per mixture; the paper uses 100.
        seed: of k-means.
    """
    check_instance(base, "base", nn.Module, "a network with classes, such as small_cnn()")
    components, seed = check_count(components, "components", low=1), check_seed(seed)
    for name, images in (("x", x), ("outliers", outliers)):
        check_values(images, name=name)
        if images.ndim < 2 or len(images) < components:
            raise ValueError(
                f"{name} must hold at least as many images as components, {components}, got shape "
                f"{tuple(images.shape)}"
            )
        if images.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"{name} must have images shaped like those of x, {tuple(x.shape[1:])}, got "
                f"{tuple(images.shape[1:])}"
            )
    from sklearn.cluster import KMeans  # takes a second to import

    x, outliers = x.detach().float(), outliers.detach().float()
    flat = x.flatten(1).double()
    _, values, axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    spread = values / math.sqrt(len(x))
    # Directions without variance would have no scale; they get the smallest one allowed.
    whitened = (axes / spread.clamp_min(0.05 * float(spread[0]))[:, None]).T.float()

    def mixture(images: Tensor) -> Mixture:
        points = images.flatten(1) @ whitened
        found = KMeans(components, n_init=1, random_state=seed).fit(points.numpy())
        centres = torch.tensor(found.cluster_centers_, dtype=points.dtype)
        typical = torch.cdist(points, centres).amin(1).square().mean().sqrt()
        scale = typical / math.sqrt(points.shape[1])
        return Mixture(whitened, centres, scale.expand(components).clone())

    return CCUModel(base, mixture(x), mixture(outliers))
