r"""Perturbation sets that are learned from pairs of images (Wong and Kolter 2021).

$$S(x) = \{g(x, u) : \|u\|_2 \le \varepsilon\}, \qquad g(x, u) = \mathrm{decode}(x,\ \mu_p(x) + \sigma_p(x) \odot u).$$

A conditional variational autoencoder (:class:`ConditionalVAE`) is trained by :func:`robustood.training.fit` with
:class:`Variational`. The ball of its latent variables is
:class:`robustood.perturbations.Latent`, which attacks, training and certificates use like a norm
ball. :func:`radii` estimates the radius from data, :func:`set_metrics` measures how good the set is,
:func:`guarantee` checks the theorem behind it on samples.
"""

from __future__ import annotations

from robustood.generative._learning import Resampled, Variational, distances
from robustood.generative._networks import (
    Basis,
    Bottleneck,
    ConditionalVAE,
    Diagonal,
    Encoder,
    Painted,
    Plain,
    Warp,
    basis_cvae,
    divergence,
    plain_cvae,
    residual_cvae,
    warp_cvae,
)
from robustood.generative._quality import (
    Entered,
    Guarantee,
    Radii,
    SetMetrics,
    guarantee,
    largest_ratio,
    log_ratio_bound,
    radii,
    set_metrics,
)

__all__ = [
    "Basis", "Bottleneck", "ConditionalVAE", "Diagonal", "Encoder", "Entered", "Guarantee",
    "Painted", "Plain", "Radii", "Resampled", "SetMetrics", "Variational", "Warp", "basis_cvae",
    "distances", "divergence", "guarantee", "largest_ratio", "log_ratio_bound", "plain_cvae",
    "radii", "residual_cvae", "set_metrics", "warp_cvae",
]  # fmt: skip
