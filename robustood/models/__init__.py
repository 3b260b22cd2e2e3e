"""Networks with their normalisation inside, so that attacks always work on pixels.

Every model maps inputs in [0, 1] to logits and exposes its parts: ``model.stages(x)``, the feature
map after each stage; ``model.features(x)``, the penultimate features; ``model.head``, the last
linear layer; ``model.classes`` and ``model.reject``, the numbers of outputs that are classes and
that reject outliers, which :func:`declared_outputs` finds through wrappers.
"""

from __future__ import annotations

from robustood.models._adapted import Adapted, adapt
from robustood.models._base import (
    CCUModel,
    Classifier,
    Mixture,
    Normalise,
    batch_statistics,
    ccu_model,
    frozen,
    mlp,
    networks,
    readout,
    seeded,
    small_cnn,
)
from robustood.models._dense import densenet_bc
from robustood.models._reading import (
    GradientWatch,
    Passes,
    check_finite,
    counting,
    declared_outputs,
    input_gradient,
    read,
    reading,
    split,
    through,
)
from robustood.models._residual import STATISTICS, preact_resnet18, resnet, wide_resnet

__all__ = [
    "STATISTICS", "Adapted", "CCUModel", "Classifier", "GradientWatch", "Mixture", "Normalise",
    "Passes", "adapt", "batch_statistics", "ccu_model", "check_finite", "counting", "declared_outputs",
    "densenet_bc", "frozen", "input_gradient", "mlp", "networks", "preact_resnet18", "read", "reading",
    "readout", "resnet", "seeded", "small_cnn", "split", "through", "wide_resnet",
]  # fmt: skip
