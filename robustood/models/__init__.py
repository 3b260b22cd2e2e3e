"""Networks with their normalisation inside, so that an attack always works on pixels.

Every model maps inputs in [0, 1] to logits and shows its parts: ``model.stages(x)`` the feature
map after each stage, ``model.features(x)`` the penultimate features, ``model.head`` the last
linear layer, ``model.classes`` and ``model.reject`` how many of its outputs are classes and how
many reject outliers; :func:`declared` finds these two through wrappers.
"""

from __future__ import annotations

from robustood.models.base import (
    Adapted,
    CCUModel,
    Classifier,
    Mixture,
    Normalise,
    adapt,
    batch_statistics,
    ccu_model,
    frozen,
    mlp,
    networks,
    readout,
    seeded,
    small_cnn,
)
from robustood.models.dense import densenet_bc
from robustood.models.reading import (
    Reader,
    Watch,
    check_finite,
    declared,
    read,
    reading,
    slope,
    split,
    through,
)
from robustood.models.residual import STATISTICS, preact_resnet18, resnet, wide_resnet

__all__ = [
    "STATISTICS",
    "Adapted",
    "CCUModel",
    "Classifier",
    "Mixture",
    "Normalise",
    "Reader",
    "Watch",
    "adapt",
    "batch_statistics",
    "ccu_model",
    "check_finite",
    "declared",
    "densenet_bc",
    "frozen",
    "mlp",
    "networks",
    "preact_resnet18",
    "read",
    "reading",
    "readout",
    "resnet",
    "seeded",
    "slope",
    "small_cnn",
    "split",
    "through",
    "wide_resnet",
]  # fmt: skip
