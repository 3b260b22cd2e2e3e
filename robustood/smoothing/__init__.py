r"""What can be proved: randomised smoothing, and interval bounds.

An attack shows what an adversary *can* do. A certificate shows what no adversary of a given strength can
do. There are two kinds, for classifiers and for the scores of detectors:

- :func:`certify` and :func:`certified_score` add Gaussian noise $\nu$ to the parameters of a perturbation
  set and take the vote, or the mean score, over many draws. That result cannot change faster than the normal law
  allows (Cohen et al. 2019). The certificate holds in the Euclidean norm of the parameters: pixels for
  :class:`~robustood.perturbations.L2`, a latent code for a learned set. As the noise is sampled, it
  holds with probability $1 - \alpha$.
- :func:`interval_bounds` propagates a box of inputs through the layers of a network (Gowal et al. 2018). The
  certificate holds with certainty, in the maximum norm, but is tight only for networks that were trained with it.

A certified rate is a lower bound, an attacked rate an upper bound on the same number. Plot both.
"""

from __future__ import annotations

from robustood.smoothing._gaussian import (
    ABSTAIN,
    CertifiedScore,
    CertifiedVote,
    Noise,
    Smoothed,
    certified_accuracy,
    certified_score,
    certify,
    guaranteed_auroc,
    lower_bound,
    mean_bound,
    predict,
    sigma_for,
    votes,
)
from robustood.smoothing._intervals import (
    IntervalOutliers,
    interval_bounds,
    interval_score,
    margin_bounds,
    propagate,
    worst_cross_entropy,
)

__all__ = [
    "ABSTAIN", "CertifiedScore", "CertifiedVote", "IntervalOutliers", "Noise", "Smoothed",
    "certified_accuracy", "certified_score", "certify", "guaranteed_auroc", "interval_bounds",
    "interval_score", "lower_bound", "margin_bounds", "mean_bound", "predict", "propagate",
    "sigma_for", "votes", "worst_cross_entropy",
]  # fmt: skip
