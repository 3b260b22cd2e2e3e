r"""What can be proved: randomised smoothing, and interval bounds.

An attack shows what an adversary *can* do. A certificate shows what no adversary of a given strength can
do. Two kinds are here, for classifiers and for the scores of detectors:

- :func:`certify` and :func:`certified_score` add Gaussian noise $\nu$ to the parameters of a perturbation
  set and take the vote, or the mean score, over many draws. That answer cannot change faster than the normal law
  allows (Cohen et al. 2019). It holds in the Euclidean norm of the parameters: of pixels for
  :class:`~robustood.perturbations.L2`, of a latent code for a learned set. As the noise is sampled, it
  holds with probability $1 - \alpha$.
- :func:`interval_bounds` follows a box of inputs through the layers of a network (Gowal et al. 2018). It holds
  surely, for the largest change of a pixel, and says much only of networks that were trained by it.

A certified rate is a lower bound, an attacked one an upper bound of the same number. Draw both.
"""

from __future__ import annotations

from robustood.smoothing.gaussian import (
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
from robustood.smoothing.intervals import (
    IntervalOutliers,
    interval_bounds,
    interval_score,
    margin_bounds,
    worst_cross_entropy,
)

__all__ = [
    "ABSTAIN", "CertifiedScore", "CertifiedVote", "IntervalOutliers", "Noise", "Smoothed",
    "certified_accuracy", "certified_score", "certify", "guaranteed_auroc", "interval_bounds",
    "interval_score", "lower_bound", "margin_bounds", "mean_bound", "predict", "sigma_for", "votes",
    "worst_cross_entropy",
]  # fmt: skip
