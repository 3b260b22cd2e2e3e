"""Scores computed from the network's outputs only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from robustood.detectors._base import (
    Columns,
    Detector,
    Direction,
    Inputs,
    Values,
    downhill,
    signed,
)
from robustood.inputs import as_floats, check_number
from robustood.losses import log_odds, to_uniform
from robustood.models import declared_outputs, read, split


class MSP(Detector):
    r"""Maximum softmax probability, $\max_k p_k$ (Hendrycks and Gimpel 2017).

    In float32 it rounds to 1 once the largest output leads by about 17. The deployed score is
    its log-odds, $\max_k\, z_k - \mathrm{LSE}_{j \ne k}(z_j)$.

    >>> z = torch.tensor([[3.0, 1.0, 0.0]])
    >>> msp = MSP(nn.Identity())
    >>> print(f"{msp.paper_score(z).item():.6f} {msp.score(z).item():.6f}")
    0.843795 1.686738
    """

    def score(self, x: Inputs) -> Values:
        return log_odds(self.logits(x)).amax(1)

    def paper_score(self, x: Inputs) -> Values:
        return self.logits(x).softmax(1).amax(1)

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score; to raise it, also the log-odds of each class, to lower it, closeness to uniform."""
        odds = log_odds(z := self.logits(x))
        score = odds.amax(1, keepdim=True)
        if direction == "raise":
            return torch.cat([score, odds], 1)
        return signed(torch.cat([score, to_uniform(z)[:, None]], 1), direction)


class MaxLogit(Detector):
    r"""Largest output, $\max_k z_k$ (Hendrycks et al. 2022).

    >>> MaxLogit(nn.Identity()).paper_score(torch.tensor([[3.0, 1.0, 0.0]])).item()
    3.0
    """

    def score(self, x: Inputs) -> Values:
        return self.logits(x).amax(1)

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score; to raise it, also each output, to lower it, their smooth maximum."""
        z = self.logits(x)
        top = z.amax(1, keepdim=True)
        if direction == "raise":
            return torch.cat([top, z], 1)
        return signed(torch.cat([top, z.logsumexp(1, keepdim=True)], 1), direction)


class Energy(Detector):
    r"""$T\,\mathrm{LSE}(z / T)$, the negative energy (Liu et al. 2020).

    >>> z = torch.tensor([[3.0, 1.0, 0.0]])
    >>> for T in (1.0, 2.0):
    ...     print(f"{Energy(nn.Identity(), T).paper_score(z).item():.6f}")
    3.169846
    3.928738
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0):
        super().__init__(model)
        check_number(temperature, "temperature", 1e-6)
        self.temperature = temperature

    def of(self, z: Tensor) -> Values:
        return self.temperature * (z / self.temperature).logsumexp(1)

    def score(self, x: Inputs) -> Values:
        return self.of(self.logits(x))

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score; to raise it, also each output, to lower it, the largest."""
        z = self.logits(x)
        if direction == "raise":
            return torch.cat([self.of(z)[:, None], z], 1)
        return signed(torch.stack([self.of(z), z.amax(1)], 1), direction)


class Entropy(Detector):
    r"""Negative entropy of the softmax, $\sum_k p_k \log p_k \in [-\log K, 0]$.

    The deployed score is $-\log H$: where one class leads, $H$ is computed as a sum of small positive
    terms, so it does not round to zero.

    >>> print(f"{Entropy(nn.Identity()).paper_score(torch.tensor([[3.0, 1.0, 0.0]])).item():.6f}")
    -0.524267
    """

    def score(self, x: Inputs) -> Values:
        return self.of(self.logits(x))

    @staticmethod
    def of(z: Tensor) -> Values:
        # H = LSE(u) - sum p u with u = z - max z: no term is negative, nothing cancels.
        first = z.argmax(1, keepdim=True)
        u, top = z - z.gather(1, first), one_hot(first[:, 0], z.shape[1]).bool()
        others = u.masked_fill(top, -torch.inf).logsumexp(1)
        # Masked by 0: its gradient stays finite.
        spread = (u.softmax(1) * -u.masked_fill(top, 0)).sum(1)
        entropy = torch.log1p(others.exp()) + spread
        near = entropy.clamp_min(torch.finfo(z.dtype).tiny).log()
        # Below e^-40, H equals sum e^u (1 - u) to double precision; computed in log space.
        far = (u + torch.log1p(-u)).masked_fill(top, -torch.inf).logsumexp(1)
        return -torch.where(others < -40, far, near)

    def paper_score(self, x: Inputs) -> Values:
        z = self.logits(x)
        return (z.softmax(1) * z.log_softmax(1)).sum(1)

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score; to raise it, also each class's log-odds, to lower it, closeness to uniform and the largest.

        The gradient of the score alone vanishes at a uniform and at a one-hot softmax.
        """
        z = self.logits(x)
        if direction == "raise":
            return torch.cat([self.of(z)[:, None], log_odds(z)], 1)
        return signed(torch.stack([self.of(z), to_uniform(z), log_odds(z).amax(1)], 1), direction)


class ODIN(Detector):
    r"""Temperature and an input step (Liang et al. 2018, eq. 2 and 3).

    $\tilde x = x - \eta\,\mathrm{sgn} \nabla_x \mathrm{CE}(z(x)/T, \hat y)$ with $\mathrm{sgn}(0) = 1$,
    then $\max_k \mathrm{softmax}(z(\tilde x)/T)_k$. At T = 1000 all scores lie within a few
    thousandths of 1/K; the deployed score is $T(\text{log-odds} + \log(K-1))$ in float64, close to the lead
    of the largest output over the mean of the others. The step counts as a constant in its gradient
    (backward-pass differentiable approximation, Athalye et al. 2018).

    Args:
        temperature: T, divides the logits.
        step: $\eta$ in pixels, not in standard deviations; the result is not clipped.

    >>> model = nn.Linear(2, 3)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0]])), model.bias.zero_()
    >>> x = torch.tensor([[2.0, 1.0]])
    >>> for T, step in ((1000.0, 0.0), (10.0, 0.0), (10.0, 0.1)):
    ...     print(f"{ODIN(model, T, step).paper_score(x).item():.6f}")
    0.333667
    0.367165
    0.370713
    """

    def __init__(self, model: nn.Module, temperature: float = 1000.0, step: float = 0.0014):
        super().__init__(model)
        check_number(temperature, "temperature", 1e-6)
        check_number(step, "step", 0)
        self.temperature, self.step = temperature, step

    def stepped(self, x: Inputs) -> Inputs:
        """The pre-processed input; for autograd, x plus a constant."""

        def loss(probe: Tensor) -> Tensor:
            z = self.logits(probe) / self.temperature
            return cross_entropy(z, z.argmax(1), reduction="sum")

        return downhill(loss, x, self.step)

    def of(self, z: Tensor) -> Values:
        """The deployed score of class outputs."""
        scaled = z.double() / self.temperature
        return self.temperature * (log_odds(scaled).amax(1) + math.log(z.shape[1] - 1))

    def score(self, x: Inputs) -> Values:
        return self.of(self.logits(self.stepped(x)))

    def paper_score(self, x: Inputs) -> Values:
        return (self.logits(self.stepped(x)) / self.temperature).softmax(1).amax(1)

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score; to raise it, also each class's lead at the stepped input, to lower it, closeness to uniform."""
        z = self.logits(self.stepped(x)).double()
        score = self.of(z)[:, None]
        if direction == "raise":
            return torch.cat([score, z - z.mean(1, keepdim=True)], 1)
        return signed(torch.cat([score, to_uniform(z)[:, None]], 1), direction)


class RejectClass(Detector):
    r"""Outputs for "none of the classes", $-\sum_{j > K} F_j$ (Chen et al. 2021; Mohseni et al. 2020).

    The deployed score is the log-odds $\mathrm{LSE}(z_{1..K}) - \mathrm{LSE}(z_{K+1..})$.

    >>> from robustood.models import readout
    >>> reject = RejectClass(readout(torch.eye(4), reject=1))
    >>> z = torch.tensor([[3.0, 1, 0, 2]])
    >>> print(f"{reject.paper_score(z).item():.6f} {reject.score(z).item():.6f}")
    -0.236883 1.169846

    Raises:
        ValueError: for a network without reject outputs.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        if not declared_outputs(model)[1]:
            raise ValueError(
                "model must have reject outputs (model.reject of at least 1), got a network with "
                "class outputs only; build it with reject=1, or wrap a network from elsewhere in "
                "models.adapt(model, reject=1)"
            )

    def halves(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Class outputs, and the LSE of the reject outputs (batch, 1)."""
        z, reject = split(self.model, read(self.model, as_floats(x)))
        return z, reject.logsumexp(1, keepdim=True)

    def score(self, x: Inputs) -> Values:
        z, reject = self.halves(x)
        return z.logsumexp(1) - reject[:, 0]

    def paper_score(self, x: Inputs) -> Values:
        return -split(self.model, read(self.model, as_floats(x)).softmax(1))[1].sum(1)

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score; to raise it, also each class over rejection, to lower it, the largest class."""
        z, reject = self.halves(x)
        score = z.logsumexp(1, keepdim=True) - reject
        if direction == "raise":
            return torch.cat([score, z - reject], 1)
        return signed(torch.cat([score, z.amax(1, keepdim=True) - reject], 1), direction)
