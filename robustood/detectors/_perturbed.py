"""A score at its lowest near the input: the defender attacks its own detector before it answers."""

from __future__ import annotations

import torch

from robustood.detectors._base import Columns, Detector, Direction, Inputs, Labels, Values
from robustood.inputs import as_floats, check_count, check_instance, check_number
from robustood.models import input_gradient


class PRO(Detector):
    r"""The lowest score on a descent from the input: perturbation-rectified detection (Chen et al. 2025).

    $g^*(x) = \min_{k \le K} g(x_k)$ with $x_0 = x$ and
    $x_{k+1} = x_k - \eta\,\mathrm{sgn} \nabla g(x_k)$, $\mathrm{sgn}(0) = 0$ (eq. 5 and 6, algorithm 1). It stands
    for the minimum over the ball of radius $K\eta$ (eq. 4), which is said to lower the scores of outliers more
    than those of in-distribution inputs.

    The descent takes the deployed score, of which the paper's score is a strictly increasing function: the signs and
    the order of the points are the same, but it does not stop where a probability rounds to 1. The paper's
    PRO-MSP is ``PRO(MSP(model))``, PRO-ENT ``PRO(Entropy(model))``, PRO-MSP-T ``PRO(ODIN(model, T, step=0))``.
    The paper's steps are in units of normalised inputs and are chosen on validation outliers, between 1e-5 and
    0.03; here they are pixels, and as in the released code nothing is clipped.

    *Gradient.* The displacement $x_k - x$ of the lowest point is a sum of signs, which is constant around x unless a
    gradient component is zero or two points tie. So $\nabla g^*(x) = \nabla g(x_k)$ holds exactly, without
    differentiating through the descent, and the objectives of an attack are those of g at the lowest point.

    *Attack.* Were the inner minimum exact, lowering $g^*$ within $\varepsilon$ would be lowering g
    within $\varepsilon + K\eta$: what the detector gains on outliers, it pays on in-distribution inputs. An attack on
    g alone does not see this and reports too much (table ``digits_perturbed``).

    Args:
        base: the detector whose score g is lowered; needs a gradient.
        steps: K, of the descent.
        step: $\eta$ in pixels.

    >>> from robustood.detectors import MaxLogit
    >>> from robustood.models import readout
    >>> pro = PRO(MaxLogit(readout([[2.0, -1.0], [0.0, 0.0]])), steps=2, step=0.1)
    >>> print(f"{pro.score(torch.tensor([[1.0, 0.5]])).item():.2f}")  # 1.5 - 2 * 0.1 * (2 + 1)
    0.90
    """

    def __init__(self, base: Detector, steps: int = 3, step: float = 0.001):
        check_instance(base, "base", Detector, "a detector, such as MSP(model)")
        super().__init__(base.model)
        self.base, self.n_untargeted = base, base.n_untargeted
        self.has_classes = base.has_classes
        self.steps = check_count(steps, "steps")
        check_number(step, "step", 0)
        self.step = step

    def fit(self, x: Inputs, y: Labels | None = None) -> PRO:
        """Fit the base detector."""
        self.base.fit(x, y)
        return self

    def rectified(self, x: Inputs) -> Inputs:
        """The visited point with the lowest base score; for autograd, x plus a constant."""
        x = as_floats(x)
        with torch.inference_mode(False), torch.enable_grad():
            point = x.detach().clone().requires_grad_()
            value = self.base.score(point)
            found, lowest = point.detach(), value.detach()
            for _ in range(self.steps):
                grad = input_gradient(value.sum(), point)
                point = (point.detach() - self.step * grad.sign()).requires_grad_()
                value = self.base.score(point)
                lower = value.detach() < lowest
                found = torch.where(lower.view(-1, *[1] * (x.ndim - 1)), point.detach(), found)
                lowest = torch.where(lower, value.detach(), lowest)
        return found + (x - x.detach())  # exactly the point, with the gradient of x

    def score(self, x: Inputs) -> Values:
        return self.base.score(self.rectified(x))

    def paper_score(self, x: Inputs) -> Values:
        return self.base.paper_score(self.rectified(x))

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """Those of the base detector at the point of its lowest score."""
        return self.base.attack_objectives(self.rectified(x), direction)
