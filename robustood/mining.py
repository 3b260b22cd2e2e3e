r"""Which outliers matter: those that the network finds hardest to tell from its classes.

Before each epoch the whole pool is scored and sorted, the most in-distribution-like first. The hardest share
q is skipped, because some of it may *be* in-distribution, and the next n are used (Chen et al. 2021,
section 3 and algorithm 1): ranks $[\lfloor qN \rfloor, \lfloor qN \rfloor + n)$ of N.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustood.data import Data, pixels
from robustood.detectors import MSP, RejectClass
from robustood.inputs import check_choice, check_count, check_instance, check_number, check_values
from robustood.models import check_finite, declared_outputs, frozen

__all__ = ["Mining", "contamination", "margins", "mine", "window"]

_Margins = Float[Tensor, " _"]


@torch.no_grad()
def margins(model: nn.Module, pool: Tensor, batch_size: int = 1024) -> _Margins:
    r"""How in-distribution-like each image looks, in eval mode; higher is harder.

    With reject outputs the log-odds $\mathrm{LSE}(z_{1..K}) - \mathrm{LSE}(z_{K+1..})$, which sorts like
    $1 - F_{K+1}$ but does not saturate. Without them, the largest log-odds of a class.

    Args:
        pool: images (pool, ...), floats in [0, 1] or 8-bit.
    """
    check_instance(model, "model", nn.Module, "a network, such as small_cnn(reject=1)")
    batch_size = check_count(batch_size, "batch_size", low=1)
    check_instance(pool, "pool", Tensor, "a tensor of images")
    detector = RejectClass(model) if declared_outputs(model)[1] else MSP(model)
    if pool.dtype != torch.uint8:
        check_values(pool, None, "pool")
    device = next(model.parameters()).device
    with frozen(model):
        parts = [detector.score(pixels(part.to(device))) for part in pool.split(batch_size)]
    found = torch.cat(parts)
    check_finite((~found.isfinite()).sum(), len(pool))
    return found


def mine(model: nn.Module, pool: Tensor, n: int, q: float) -> Int[Tensor, " n"]:
    """Indices of the n hardest outliers after the hardest share q, hardest first.

    Deterministic: equal margins keep the order of the pool.

    Args:
        pool: images (N, ...), floats in [0, 1] or 8-bit.
        n: number of outliers to select.
        q: share of the pool to skip at the hard end.

    Raises:
        ValueError: if q + n/N is above 1, which would leave too few.
    """
    check_instance(pool, "pool", Tensor, "a tensor of images")
    _check_window(n, q, len(pool))
    return window(margins(model, pool), n, q)


def window(m: _Margins, n: int, q: float) -> Int[Tensor, " n"]:
    """Indices of the n highest margins after the highest share q."""
    _check_margins(m, "m")
    _check_window(n, q, len(m))
    first = int(q * len(m))
    return m.argsort(descending=True, stable=True)[first : first + n]


def _check_margins(m: _Margins, name: str) -> None:
    """Refuse anything but finite margins, one per image."""
    check_values(m, None, name)
    if m.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {tuple(m.shape)}; use .flatten()")


def _check_window(n: int, q: float, pool: int) -> None:
    """Refuse a window that does not fit the pool, before the pool is scored."""
    check_count(n, "n", low=1)
    check_number(q, "q", 0, 1)
    check_count(pool, "number of images in the pool", low=1)
    if int(q * pool) + n > pool:
        raise ValueError(
            f"q + n/N must be at most 1, got {q:g} + {n}/{pool}; take q of at most "
            f"{max(0.0, 1 - n / pool):.3g}, fewer outliers n, or a larger pool"
        )


def contamination(margins_in: _Margins, margins_pool: _Margins) -> float:
    r"""Estimated share of the pool that is in-distribution.

    Half of the in-distribution images lie above their median margin, and hardly any other image does if the
    network is good: $\hat c = 2\, \Pr_{pool}[m \ge \mathrm{median}_{in}(m)]$, at most 1. Outliers
    above the median make it too large, which is the safe direction for q.

    Args:
        margins_in: of held-out in-distribution images.
        margins_pool: of the pool, by the same network.

    Raises:
        ValueError: if either is empty or not finite.
    """
    _check_margins(margins_in, "margins_in")
    _check_margins(margins_pool, "margins_pool")
    return min(1.0, 2 * float((margins_pool >= margins_in.median()).double().mean()))


@dataclass(frozen=True)
class Mining:
    """The mining rule as part of an objective: called before each epoch.

    Attributes:
        q: share skipped at the hard end; ``"auto"`` uses :func:`contamination`, measured on
            ``data.val`` each epoch.
        share: n/N; one quarter in the papers. The mined images are repeated to fill the epoch.
        sample: score only a new random sample of the pool of this size; None for all of it.
    """

    q: float | Literal["auto"] = 0.125
    share: float = 0.25
    sample: int | None = None

    def __post_init__(self) -> None:
        check_number(self.share, "share", 1e-9, 1)
        if isinstance(self.q, str):
            check_choice(self.q, "q", ("auto",))
        else:
            check_number(self.q, "q", 0, 1)
            if self.q + self.share > 1 + 1e-12:
                raise ValueError(
                    f"q + share must be at most 1, got {self.q:g} + {self.share:g}; lower one of them"
                )
        if self.sample is not None:
            check_count(self.sample, "sample", low=1)

    def __call__(self, model: nn.Module, data: Data, generator: torch.Generator) -> Data:
        """The data with the mined outliers, and with notes on the pool for the run's log."""
        pool = data.outliers
        if self.q == "auto" and not len(data.val.x):
            raise ValueError(
                'q="auto" is measured on held-out images, but data.val is empty; hold some out, or give q as a number'
            )
        if self.sample is not None and self.sample < len(pool):
            order = torch.randperm(len(pool), generator=generator, device=generator.device)
            pool = pool[order[: self.sample].to(pool.device)]
        m, n = margins(model, pool), max(1, int(self.share * len(pool)))
        q = self.q
        if isinstance(q, str):
            q = min(contamination(margins(model, data.val.x), m), 1 - n / len(pool))
        kept = window(m, n, q)
        notes = {"pool": len(pool), "mined": n, "q": q, "pool margin": float(m.mean())}
        notes["pool easy"] = float((m < -5).double().mean())
        notes |= {"mined hardest": float(m[kept[0]]), "mined easiest": float(m[kept[-1]])}
        return replace(data, outliers=pool[kept.to(pool.device)], notes={**data.notes, **notes})
