r"""Find the worst case: maximise an objective over a perturbation set.

$$\max_{z \in Z}\; J(\mathrm{apply}(x, z))$$

There is one loop, :func:`maximise`. Attacks differ only in its arguments: the objective, the
set, the number of steps and the rule that proposes the next point. FGSM (Goodfellow et al.
2015) is one step of length eps from the clean image; PGD (Madry et al. 2018, section 2.1) is
several steps from a random start.

An attack needs per-sample values and the gradient with respect to the input, nothing else:
parameters, their ``.grad``, buffers, train/eval mode and the global random state are left
unchanged. Losses are summed over the batch, never averaged, so that a sample's step does not
depend on the rest of the batch.
"""

from __future__ import annotations

from robustood.attacks._classifier import fgsm, pgd, robust_accuracy
from robustood.attacks._loop import (
    AttackObjective,
    ascent,
    climb_at,
    maximise,
    search,
    value_and_grad,
)
from robustood.attacks._portfolio import worst_case
from robustood.attacks._rules import APGD, Ascent, Rule
from robustood.attacks._square import Square

__all__ = [
    "APGD", "Ascent", "AttackObjective", "Rule", "Square", "ascent", "climb_at", "fgsm", "maximise",
    "pgd", "robust_accuracy", "search", "value_and_grad", "worst_case",
]  # fmt: skip
