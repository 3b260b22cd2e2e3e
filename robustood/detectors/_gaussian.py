"""Class means, their common scatter, and the Mahalanobis distance."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustood.detectors._base import Labels


def gram(own: Float[Tensor, "batch width"], strip: int = 86) -> Float[Tensor, "width width"]:
    """own.T @ own, each entry computed once: strips of the upper triangle, mirrored."""
    product = own.new_empty(own.shape[1], own.shape[1])
    for at in range(0, own.shape[1], strip):
        product[at : at + strip, at:] = own[:, at : at + strip].T @ own[:, at:]
        end = at + strip
        product[end:, at:end] = product[at:end, end:].T
    return product


def precision(h: Tensor) -> torch.dtype:
    """The dtype of matrix products: float32 if h is and torch does not lower its precision, else float64."""
    kept = torch.get_float32_matmul_precision() == "highest"
    kept = kept and not torch.is_autocast_enabled(h.device.type)
    return torch.float32 if kept and h.dtype == torch.float32 else torch.float64


class Moments:
    """Class means and the scatter about them in float64, updated batch by batch.

    The parallel form of Welford's update (Chan, Golub and LeVeque 1983): no difference of large
    sums, whatever the size of the mean. Single precision is used only within one centred batch, and adds no
    more error than the rounding of the features themselves.
    """

    def __init__(self, classes: int, like: Tensor):
        width = like.shape[1]
        self.count = torch.zeros(classes, dtype=torch.float64, device=like.device)
        self.mean = self.count.new_zeros(classes, width)
        self.scatter = self.count.new_zeros(width, width)

    def update(self, h: Float[Tensor, "batch width"], y: Labels) -> None:
        h = h.to(precision(h))
        count = torch.bincount(y, minlength=len(self.count)).double()
        each, total = count.clamp_min(1)[:, None], self.count + count
        about = self.sums(h, y) / each.to(h)
        own = about.index_select(0, y).neg_().add_(h)  # in place: this is bound by memory
        rest = self.sums(own, y).double() / each  # the rounding error of the mean
        mean = about.double() + rest
        shift, share = mean - self.mean, count / total.clamp_min(1)
        weight = torch.cat([-count, self.count * share])[:, None]
        apart = torch.cat([rest, shift])
        self.scatter += gram(own)
        self.scatter.addmm_((weight * apart).T, apart)
        self.mean += shift * share[:, None]
        self.count = total

    def sums(self, h: Float[Tensor, "batch width"], y: Labels) -> Float[Tensor, "classes width"]:
        """Sum of each class's rows."""
        return torch.zeros_like(self.mean, dtype=h.dtype).index_add_(0, y, h)


class Gaussian(nn.Module):
    """Class means under one covariance, in coordinates in which the distance is Euclidean.

    Args:
        means: (classes, width).
        covariance: (width, width), symmetric; directions without variance are dropped.
    """

    whiten: Tensor
    means: Tensor

    def __init__(self, means: Tensor, covariance: Tensor):
        super().__init__()
        variances, axes = torch.linalg.eigh(covariance.double())
        kept = variances > variances.amax() * len(variances) * torch.finfo(torch.float32).eps
        if not kept.any():
            raise ValueError(
                "the features of x have no variance within the classes; look for a dead feature layer"
            )
        whiten = axes[:, kept] / variances[kept].sqrt()
        self.register_buffer("whiten", whiten.to(means.dtype))
        self.register_buffer("means", (means.double() @ whiten).to(means.dtype))

    @classmethod
    def whitened(cls, whiten: Tensor, means: Tensor) -> Gaussian:
        """One of known parts: the map to its coordinates (width, kept), and the means there (classes, kept)."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.register_buffer("whiten", whiten)
        made.register_buffer("means", means)
        return made

    def forward(self, h: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        r"""$-\tfrac12 (h - \mu_c)^\top \Sigma^{-1} (h - \mu_c)$ for each class."""
        return -0.5 * ((h @ self.whiten)[:, None] - self.means).square().sum(2)
