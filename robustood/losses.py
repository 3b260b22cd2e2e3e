r"""Losses: what attacks raise and what training lowers, one value per sample.

All take the outputs z (batch, classes) of a network, before the softmax.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, one_hot

__all__ = [
    "LOSSES",
    "cross_entropy",
    "divergence",
    "dlr",
    "log_odds",
    "margin",
    "to_reject",
    "to_uniform",
]

Values = Float[Tensor, " batch"]
Logits = Float[Tensor, "batch classes"]
Labels = Int[Tensor, " batch"]


def cross_entropy(logits: Logits, y: Labels) -> Values:
    r"""$-\log \mathrm{softmax}(z)_y$. Its gradient underflows once the network is certain."""
    return nn.functional.cross_entropy(logits, y, reduction="none")


def margin(logits: Logits, y: Labels) -> Values:
    r"""$\max_{j \ne y} z_j - z_y$ (Carlini and Wagner 2017).

    Positive where the sample is misclassified, negative where it is classified correctly, zero at a tie.
    """
    own = one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(1) - logits.masked_fill(~own, 0).sum(1)


def dlr(logits: Logits, y: Labels) -> Values:
    r"""Difference of logits ratio: the margin over $z_{\pi_1} - z_{\pi_3}$, with logits in descending order.

    Invariant to shifting and positively rescaling the logits; needs at least 3 classes (Croce
    and Hein 2020, section 4).
    """
    if logits.shape[1] < 3:
        raise ValueError(f'"dlr" needs at least 3 classes, got {logits.shape[1]}; use "margin"')
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def divergence(log_p: Logits, logits: Logits) -> Logits:
    r"""Terms of $\mathrm{KL}(p \,\|\, \mathrm{softmax}(z))$, whose sum over the classes is the divergence."""
    return kl_div(log_softmax(logits, 1), log_p, reduction="none", log_target=True)


def to_uniform(z: Logits) -> Values:
    r"""$\ell_{OE} = \mathrm{LSE}(z) - \bar z$: the cross-entropy from the uniform distribution.

    At least $\log K$, with equality where the softmax is uniform (Hendrycks et al. 2019, section 4.3).
    """
    return z.logsumexp(1) - z.mean(1)


def to_reject(z: Float[Tensor, "batch outputs"]) -> Values:
    r"""$-\log F_{K+1}$: the cross-entropy to the last output, which rejects (Chen et al. 2021, eq. 2)."""
    return z.logsumexp(1) - z[:, -1]


def log_odds(z: Logits) -> Logits:
    r"""$\log \frac{p_t}{1 - p_t} = z_t - \mathrm{LSE}_{j \ne t}(z_j)$ of each class, without cancellation."""
    if z.shape[1] < 2:
        raise ValueError(
            "log-odds compare a class with the others, but the model has only one; use 2 or more classes"
        )
    top = one_hot(z.argmax(1), z.shape[1]).bool()
    # 1 - p_t cancels only for the largest output; p_t of the others is at most 1/2.
    p = z.softmax(1).masked_fill(top, 0)
    rest = z.logsumexp(1, keepdim=True) + torch.log1p(-p)
    rest_of_top = z.masked_fill(top, -torch.inf).logsumexp(1, keepdim=True)
    return z - torch.where(top, rest_of_top, rest)
