"""DenseNet-BC, the network of the papers on robust out-of-distribution detection."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from robustood.inputs import check_choice, check_count
from robustood.models._base import Classifier, seeded
from robustood.models._residual import activation, convolution, initialise, normaliser, repeats


class _DenseLayer(nn.Sequential):
    """Appends ``growth`` maps to its input: BN-relu-conv1x1 to four times as many, then BN-relu-conv3x3."""

    def __init__(self, inputs: int, growth: int):
        super().__init__(
            *activation(inputs),
            convolution(inputs, 4 * growth, 1),
            *activation(4 * growth),
            convolution(4 * growth, growth),
        )

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([input, super().forward(input)], 1)


def densenet_bc(
    depth: int = 100,
    growth: int = 12,
    classes: int = 10,
    reject: int = 0,
    init: Literal["he", "papers"] = "he",
    seed: int = 0,
    normalise: str | nn.Module | None = "cifar",
    channels: int = 3,
) -> Classifier:
    r"""DenseNet-BC with bottlenecks and compression 1/2, without dropout (Huang et al. 2017, section 3).

    Three blocks of n = (depth - 4) / 6 layers. The four stages are the first convolution, the two
    transitions, and the last activated map: 24 x 32 x 32, 108 x 16 x 16, 150 x 8 x 8 and 342 x 8 x 8 for
    depth 100 and growth 12. Lee et al. (2018) and Chen et al. (2020) use these maps for Mahalanobis.

    Args:
        depth: 6 n + 4 layers. With growth 12 and ten classes, depth 100 has 769,162 parameters, depth
            40 has 176,122.
        growth: number of maps that each layer adds.
        classes, reject: numbers of class and of reject outputs.
        init: ``"he"`` as in He et al. (2015); ``"papers"`` as in the published code of Chen et al.
            (2020, 2021), where the name n is reused: every convolution is drawn with
            $\sigma = \sqrt{2 / n}$, 0.354 at depth 100, whatever its size.
        seed: of the initial weights; the global random state is unchanged.
        normalise: a name in ``STATISTICS``, a module such as :class:`Normalise`, or None.
        channels: of the input images.

    Returns:
        Model from (batch, channels, height, width) in [0, 1] to (batch, classes + reject).

    Raises:
        ValueError: for an invalid depth or init, or a number below 1.
    """
    n = repeats(depth, 4)
    growth, channels = check_count(growth, "growth", low=1), check_count(channels, "channels", 1)
    check_choice(init, "init", ("he", "papers"))
    shift = normaliser(normalise, channels)
    with seeded(seed):
        width = 2 * growth
        stages: list[nn.Module] = [convolution(channels, width)]
        for last in (False, False, True):
            layers: list[nn.Module] = [_DenseLayer(width + i * growth, growth) for i in range(n)]
            width += n * growth
            layers += activation(width)
            if not last:
                layers += [convolution(width, width // 2, 1), nn.AvgPool2d(2)]
                width //= 2
            stages.append(nn.Sequential(*layers))
        model = Classifier(stages, width, classes, reject, shift, pool=True)
        return initialise(model, math.sqrt(2 / n) if init == "papers" else None)
