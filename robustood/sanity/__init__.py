r"""Is the defence real? Symptoms of an attack that fails for reasons other than robustness.

An attack gives an upper bound on robustness. It says little if the attack was blind: if gradients vanish, if outputs
saturate or are random, if the attack climbs another function than the one that is deployed. :func:`check` looks for
these symptoms (Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 3) in a classifier or a detector, in about
a second for a small network. Each :class:`Finding` has a number and says what to do. A defence without findings is not
proven robust; one with findings has not been evaluated yet.

:func:`zoo` builds defences that are broken in a known way, and honest ones, to try the checks on.
"""

from __future__ import annotations

from robustood.sanity._check import check
from robustood.sanity._findings import Finding, Findings
from robustood.sanity._zoo import Defence, zoo

__all__ = ["Defence", "Finding", "Findings", "check", "zoo"]
