r"""What survives an attack on the score: adaptive attacks, the papers' own, and the report.

An attack on a detector searches the perturbation set for the input with the highest score (outliers
that are to be accepted) or the lowest (in-distribution inputs that are to be rejected):

$$\max_{z \in Z} S(\mathrm{apply}(x, z)) \quad\text{or}\quad \min_{z \in Z} S(\mathrm{apply}(x, z)).$$

*Adaptive* means: maximise the objectives that the detector itself provides
(:meth:`robustood.detectors.Detector.attack_objectives`), keep the best by the deployed score, and restart. The
papers' attacks maximise surrogates instead; :func:`paper_attack` reproduces them for comparison. :func:`standard` runs
all of them, and more, in a fixed order that has a version. Any attack gives a lower bound on the damage.
"""

from __future__ import annotations

from robustood.evaluate._attack import (
    PAPERS,
    Protocol,
    attack_in_turn,
    attack_score,
    deployed_objective,
    mahalanobis_surrogate,
    paper_attack,
    score_objectives,
    surrogate,
    surrogate_objectives,
)
from robustood.evaluate._report import (
    Report,
    Row,
    epsilon_curve,
    four_sides,
    measure,
    ood_report,
    scores,
)
from robustood.evaluate._standard import standard
from robustood.evaluate._verdict import StandardReport

__all__ = [
    "PAPERS", "Protocol", "Report", "Row", "StandardReport", "attack_in_turn", "attack_score", "deployed_objective",
    "epsilon_curve", "four_sides", "mahalanobis_surrogate", "measure", "ood_report", "paper_attack", "score_objectives",
    "scores", "standard", "surrogate", "surrogate_objectives",
]  # fmt: skip
