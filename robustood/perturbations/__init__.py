r"""What the adversary may change: a perturbation set $S(x) = \{\mathrm{apply}(x, z) : z \in Z\}$.

A set is described by parameters ``z`` (batch first) and answers five questions: where to start,
which image a parameter yields, how to step uphill, whether a parameter is allowed, and which
parameter changes nothing. Attacks use these answers only and know nothing else about the set.

For the norm balls $z = \delta$ is the perturbation itself, in pixels, and the box $[0, 1]$ of
valid images is part of the set (Madry et al. 2018, eq. 2.1 and section 2.2).
"""

from __future__ import annotations

from robustood.perturbations._balls import L2, Ball, Linf, as_set
from robustood.perturbations._base import (
    Inputs,
    PerturbationSet,
    Random,
    norms,
    per_sample,
    sized,
)
from robustood.perturbations._finite import Compose, Corruption, FiniteSubset
from robustood.perturbations._latent import ImageGenerator, Latent
from robustood.perturbations._spatial import Spatial

__all__ = [
    "L2", "Ball", "Compose", "Corruption", "FiniteSubset", "ImageGenerator", "Inputs", "Latent",
    "Linf", "PerturbationSet", "Random", "Spatial", "as_set", "norms", "per_sample", "sized",
]  # fmt: skip
