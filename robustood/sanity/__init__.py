r"""Is the defence real? Symptoms of an attack that fails for reasons other than robustness.

An attack gives an upper bound on robustness. The bound says little if the attack was blind: if gradients vanish,
outputs saturate or are random, or if the attack climbs another function than the deployed one. :func:`check` looks
for such symptoms (Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 3) in a classifier or a detector. For
a small network that takes a second or two. Each :class:`Finding` has a number and says what to do. A check without
findings is no proof of robustness; with findings, what was measured is no evidence of it.

:func:`zoo` builds defences that are broken in a known way, and honest ones, to try the checks on.
"""

from __future__ import annotations

from robustood.sanity._check import check
from robustood.sanity._findings import Finding, Findings
from robustood.sanity._zoo import Defence, zoo

__all__ = ["Defence", "Finding", "Findings", "check", "zoo"]
