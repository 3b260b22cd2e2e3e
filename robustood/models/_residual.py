"""Residual networks for 32x32 images, and functions that all networks of published size share.

Every network here is fully convolutional and averages its last map, so other image sizes work too.
In-place activations overwrite only the output of a batch normalisation or of a sum, which autograd does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from robustood.inputs import check_choice, check_count
from robustood.models._base import Classifier, Normalise, seeded

# Mean and standard deviation of red, green and blue, as the papers' networks use them.
STATISTICS = {
    "cifar": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "gtsrb": ((0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629)),
}


def normaliser(normalise: str | nn.Module | None, channels: int) -> nn.Module | None:
    """The normalisation for a name in ``STATISTICS``; a module or None unchanged."""
    check_count(channels, "channels", low=1)
    if normalise is None or isinstance(normalise, nn.Module):
        return normalise
    check_choice(normalise, "normalise", tuple(STATISTICS))
    mean, std = STATISTICS[normalise]
    if channels != len(mean):
        raise ValueError(
            f"normalise {normalise!r} is for {len(mean)} channels, got channels = {channels}; "
            "pass Normalise(mean, std) or None"
        )
    return Normalise(mean, std)


def repeats(depth: int, extra: int) -> int:
    """$n$ in depth $= 6 n +$ extra: three groups of n blocks with two convolutions each."""
    depth = check_count(depth, "depth", low=6 + extra)
    n, rest = divmod(depth - extra, 6)
    if rest:
        raise ValueError(
            f"depth must be 6 n + {extra}, got {depth}; the nearest are {6 * n + extra} and "
            f"{6 * n + 6 + extra}"
        )
    return n


def initialise(model: Classifier, std: float | None = None) -> Classifier:
    r"""Draw every convolution from $N(0, \sigma^2)$ and set the head's bias to zero.

    Args:
        model: changed in place.
        std: $\sigma$; default $\sqrt{2 / (k^2 c)}$ of each $k \times k$ convolution with $c$ outputs
            (He et al. 2015, eq. 14).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if std is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.normal_(module.weight, std=std)
    nn.init.zeros_(model.head.bias)
    return model


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution padded to keep the map's size at stride 1, without bias, for a batch normalisation follows."""
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def activation(channels: int) -> list[nn.Module]:
    """Batch normalisation and ReLU."""
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class _Block(nn.Module):
    """relu(shortcut + conv-BN-relu-conv-BN) (He et al. 2016, Deep Residual Learning, eq. 1 and 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            convolution(inputs, outputs, stride=stride),
            *activation(outputs),
            convolution(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if (inputs, stride) != (outputs, 1):
            fit = convolution(inputs, outputs, 1, stride)
            self.shortcut = nn.Sequential(fit, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.residual(x) + self.shortcut(x), inplace=True)


class _PreBlock(nn.Module):
    """shortcut + conv-BN-relu-conv of BN-relu (He et al. 2016, Identity Mappings, figure 1b).

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.activate = nn.Sequential(*activation(inputs))
        self.residual = nn.Sequential(
            convolution(inputs, outputs, stride=stride),
            *activation(outputs),
            convolution(outputs, outputs),
        )
        same = (inputs, stride) == (outputs, 1)
        self.shortcut = None if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        z = self.activate(x)
        return self.residual(z) + (x if self.shortcut is None else self.shortcut(z))


def _groups(
    block: Callable[[int, int, int], nn.Module], inputs: int, widths: Sequence[int], n: int
) -> list[nn.Sequential]:
    """One group of n blocks per width; every group but the first halves the map."""
    found = []
    for i, width in enumerate(widths):
        first = block(inputs, width, 1 if i == 0 else 2)
        found.append(nn.Sequential(first, *(block(width, width, 1) for _ in range(n - 1))))
        inputs = width
    return found


def resnet(
    depth: int = 20,
    width: int = 16,
    classes: int = 10,
    reject: int = 0,
    seed: int = 0,
    normalise: str | nn.Module | None = "cifar",
    channels: int = 3,
) -> Classifier:
    """ResNet for CIFAR (He et al. 2016, Deep Residual Learning, section 4.2).

    Where the shape changes, the shortcut is a 1x1 convolution with batch normalisation (the paper's
    option B, and current practice; its own CIFAR networks pad with zeros, option A). The four stages
    are the first activated convolution (32x32) and the three groups (32x32, 16x16, 8x8).

    Args:
        depth: 6 n + 2 layers; 20 has 272,474 parameters, 8 has 78,042.
        width: channels of the first group, at least 8; the others have two and four times as many.
        classes, reject: numbers of class and of reject outputs.
        seed: of the initial weights; the global random state is unchanged.
        normalise: a name in ``STATISTICS``, a module such as :class:`Normalise`, or None.
        channels: of the input images.

    Returns:
        Model from (batch, channels, height, width) in [0, 1] to (batch, classes + reject).

    Raises:
        ValueError: for an invalid depth, or a width below 8.
    """
    n = repeats(depth, 2)
    # With fewer inputs, torch 2.15's weight gradient of the shortcut (1x1, stride 2, channels_last,
    # float32, on a CPU) writes out of bounds and may crash the process.
    width, channels = check_count(width, "width", low=8), check_count(channels, "channels", 1)
    shift = normaliser(normalise, channels)
    with seeded(seed):
        stem = nn.Sequential(convolution(channels, width), *activation(width))
        stages = [stem, *_groups(_Block, width, (width, 2 * width, 4 * width), n)]
        return initialise(Classifier(stages, 4 * width, classes, reject, shift, pool=True))


def _preactivated(
    stem: int,
    widths: Sequence[int],
    n: int,
    classes: int,
    reject: int,
    seed: int,
    normalise: str | nn.Module | None,
    channels: int,
) -> Classifier:
    """A convolution, groups of n pre-activated blocks, and a final activation."""
    shift = normaliser(normalise, channels)
    channels = int(channels)
    with seeded(seed):
        stages = _groups(_PreBlock, stem, widths, n)
        stages[-1].extend(activation(widths[-1]))
        stages = [convolution(channels, stem), *stages]
        return initialise(Classifier(stages, widths[-1], classes, reject, shift, pool=True))


def wide_resnet(
    depth: int = 16,
    width: int = 2,
    classes: int = 10,
    reject: int = 0,
    seed: int = 0,
    normalise: str | nn.Module | None = "cifar",
    channels: int = 3,
) -> Classifier:
    """WRN-depth-width (Zagoruyko and Komodakis 2016, table 1), without dropout.

    The four stages are the first convolution (16 channels, 32x32) and the three groups (32x32,
    16x16, 8x8), the last with the final activation.

    Args:
        depth: 6 n + 4 layers.
        width: multiplies the groups' 16, 32 and 64 channels. WRN-16-2 has 691,674 parameters,
            WRN-40-4 8,949,210.
        classes, reject: numbers of class and of reject outputs.
        seed: of the initial weights; the global random state is unchanged.
        normalise: a name in ``STATISTICS``, a module such as :class:`Normalise`, or None.
        channels: of the input images.

    Returns:
        Model from (batch, channels, height, width) in [0, 1] to (batch, classes + reject).

    Raises:
        ValueError: for an invalid depth, or a number below 1.
    """
    n = repeats(depth, 4)
    width = check_count(width, "width", low=1)
    widths = (16 * width, 32 * width, 64 * width)
    return _preactivated(16, widths, n, classes, reject, seed, normalise, channels)


def preact_resnet18(
    classes: int = 10,
    reject: int = 0,
    seed: int = 0,
    normalise: str | nn.Module | None = "cifar",
    channels: int = 3,
) -> Classifier:
    """ResNet-18 with pre-activated blocks and a 3x3 first convolution, for 32x32 images.

    Blocks and final activation are those of He et al. (2016, Identity Mappings); groups of 64, 128,
    256 and 512 channels with two blocks each are ResNet-18's. 11,172,170 parameters for ten classes.
    The five stages are the first convolution (32x32) and the groups (32x32 to 4x4), the last with
    the final activation.

    Args:
        classes, reject: numbers of class and of reject outputs.
        seed: of the initial weights; the global random state is unchanged.
        normalise: a name in ``STATISTICS``, a module such as :class:`Normalise`, or None.
        channels: of the input images.

    Returns:
        Model from (batch, channels, height, width) in [0, 1] to (batch, classes + reject).
    """
    return _preactivated(64, (64, 128, 256, 512), 2, classes, reject, seed, normalise, channels)
