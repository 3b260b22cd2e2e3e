r"""Scores that detect outliers: higher means more like the training distribution.

A detector wraps a classifier and accepts an input if its score is at least a threshold. Each
has two scores. ``score`` is the deployed one: unsaturated, in log space, so that two confident
inputs never tie and a gradient remains. ``paper_score`` is the number that the paper
reports, a strictly increasing function of it. ``attack_objectives`` returns the objectives that an attack
on the score should try.

Notation: outputs $z \in \mathbb R^K$ of the network, $p = \mathrm{softmax}(z)$,
$\mathrm{LSE}(z) = \log \sum_k e^{z_k}$, penultimate features $h$, head $z = W h + b$. Only the class
outputs of a network with reject outputs are used, except by :class:`RejectClass`.

A detector is a ``torch.nn.Module`` that holds its network: :func:`robustood.models.frozen`, ``.to``
and ``state_dict`` apply to both. Scoring does not change the network's mode; put it in eval mode.
"""

from __future__ import annotations

from torch import nn

from robustood.detectors._base import (
    Detector,
    Direction,
    Inputs,
    Labels,
    downhill,
    score_objectives,
)
from robustood.detectors._features import KNN, GradNorm, Mahalanobis, ReAct, ViM
from robustood.detectors._gaussian import Gaussian
from robustood.detectors._outputs import MSP, ODIN, Energy, Entropy, MaxLogit, RejectClass
from robustood.detectors._perturbed import PRO
from robustood.detectors._wrapped import Wrapped, wrap

__all__ = [
    "KNN", "MSP", "ODIN", "PRO", "Detector", "Direction", "Energy", "Entropy", "Gaussian", "GradNorm",
    "Mahalanobis", "MaxLogit", "ReAct", "RejectClass", "ViM", "Wrapped", "downhill", "post_hoc",
    "score_objectives", "wrap",
]  # fmt: skip


def post_hoc(model: nn.Module, x: Inputs, y: Labels) -> dict[str, Detector]:
    """Every detector that needs only a trained classifier and its training data, fitted."""
    plain = [MSP(model), MaxLogit(model), Energy(model), Entropy(model), ODIN(model)]
    learned = [Mahalanobis(model), KNN(model), ViM(model), ReAct(model), GradNorm(model)]
    return {type(d).__name__: d.fit(x, y) for d in [*plain, *learned]}
