"""Attack this detector: three black boxes on the digits, and a judge.

One of the boxes ``"A"``, ``"B"`` and ``"C"`` is as robust as it seems, one hides its weakness, and one does not keep
what its threshold promises. Which is which is for you to find out, from the scores alone:

1. :func:`clean_images` returns 100 digits and 100 letters. Move each of them within ``WITHIN``, the digits to a low
   score, the letters to a high one.
2. ``box("A").score(x)`` answers as often as you like. It has no gradient.
3. :func:`judge` verifies that each image lies in the set around its own clean image, and measures what is left.

The weights and how they were trained lie in ``data/weights/challenge_*.json``, and in ``experiments/challenge.py``;
they are the solution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustood import artefacts, metrics, tables
from robustood.checkpoints import load_weights, read_json
from robustood.data import digits
from robustood.detectors import MSP
from robustood.inputs import TOLERANCE, check_choice, check_instance, check_number, check_values
from robustood.metrics import Estimate
from robustood.models import small_cnn
from robustood.perturbations import Linf

__all__ = [
    "DIGITS", "TPR", "WITHIN", "Box", "Rates", "Verdict", "box", "clean_images", "judge", "log_odds", "names",
]  # fmt: skip

Images = Float[Tensor, "batch 1 8 8"]
WITHIN = Linf(0.1)  # what an image may be moved by
DIGITS = 100  # the first so many of the images; the others are letters
TPR = 0.95  # the share of digits that the threshold of each box promises to accept
_SHOWN = 10  # violations that a message lists


@dataclass(frozen=True)
class Box:
    """A detector of which only the scores can be seen; made by :func:`box`.

    Attributes:
        name: such as ``"A"``.
        threshold: it accepts an input that scores at least this much, and with it 95 % of all digits, says its maker.
    """

    name: str
    threshold: float
    _score: Callable[[Tensor], Tensor]

    def score(self, x: Images) -> Float[Tensor, " batch"]:
        """One number per image, higher for digits; without a gradient.

        Raises:
            ValueError: for anything but images in [0, 1].
        """
        x = _checked(x, "x")
        with torch.no_grad():
            return self._score(x)


@dataclass(frozen=True)
class Rates:
    """What a box does to the images of :func:`clean_images`, moved or not.

    Attributes:
        auroc: with the interval of DeLong.
        digits, letters: the shares that the threshold accepts.
    """

    auroc: Estimate
    digits: Estimate
    letters: Estimate


@dataclass(frozen=True)
class Verdict:
    """The judgement on moved images.

    Attributes:
        name: that of the box.
        before: on the clean images.
        after: on the moved images.
        moved: the largest distance between an image and its clean one.
    """

    name: str
    before: Rates
    after: Rates
    moved: float

    def cells(self) -> list[list[str]]:
        """Header and rows of the table, as text."""
        rows = {
            "AUROC": "auroc",
            f"digits accepted (promised: {TPR:g})": "digits",
            "letters accepted": "letters",
        }
        body = [
            [label, *(f"{getattr(rates, key):.3f}" for rates in (self.before, self.after))]
            for label, key in rows.items()
        ]
        return [[f"box {self.name}", "clean", "as submitted"], *body]

    def __str__(self) -> str:
        return f"{tables.text(self.cells())}\nall images lie in the set; moved by at most {self.moved:.4f}"

    def _repr_html_(self) -> str:
        return tables.html(self.cells())


def names() -> tuple[str, ...]:
    """The names of the boxes."""
    return ("A", "B", "C")


def box(name: str) -> Box:
    """A box by its name.

    Raises:
        ValueError: for an unknown name, or damaged weights.
    """
    check_choice(name, "name", names())
    return _loaded(name)


@lru_cache
def _loaded(name: str) -> Box:
    file = artefacts.find("weights", f"challenge_{name.lower()}")
    card = read_json(file.with_suffix(".json"), ("width", "step", "threshold"))
    model = small_cnn(width=card["width"])
    load_weights(file, model)
    return Box(name, card["threshold"], partial(log_odds, model.eval(), step=card["step"]))


def log_odds(model: nn.Module, x: Images, step: float = 0) -> Float[Tensor, " batch"]:
    """The log-odds of the likeliest digit, in whole steps if there is a step."""
    check_number(step, "step", 0)
    odds = MSP(model).score(x)
    return (odds / step).round() * step if step else odds


def clean_images() -> Images:
    """The clean images: 100 digits that no box was trained on, then 100 letters."""
    return _clean().clone()


@lru_cache
def _clean() -> Images:
    data = digits()
    return torch.cat([data.test.x[:DIGITS], data.ood["letters"][:DIGITS]])


def judge(box: Box, images: Images) -> Verdict:
    """Verify that moved images lie in the set, and measure the box on them and on the clean ones.

    Args:
        box: from :func:`box`.
        images: (200, 1, 8, 8), each at the place of its clean image in :func:`clean_images`.

    Raises:
        ValueError: for another shape, and for images outside the set; the message has their places, counted from 0,
            and by how much.
    """
    check_instance(box, "box", Box, 'a box, such as challenge.box("A")')
    moved, clean = _checked(images, "images", in_range=False), _clean()
    if len(moved) != len(clean):
        raise ValueError(
            f"images must be all {len(clean)}, {DIGITS} digits and then {len(clean) - DIGITS} letters, got "
            f"{len(moved)}; leave those as they are that you do not attack"
        )
    distances = WITHIN.norm(moved - clean)
    outside = [*_too_far(distances), *_out_of_range(moved)]
    if outside:
        more = f"; and {len(outside) - _SHOWN} more" if len(outside) > _SHOWN else ""
        raise ValueError(
            f"images must lie in the set, but {'; '.join(outside[:_SHOWN])}{more}; project them by "
            "WITHIN.project(clean, images - clean)"
        )
    return Verdict(box.name, _rates(box, clean), _rates(box, moved), float(distances.max()))


def _too_far(distances: Float[Tensor, " batch"]) -> list[str]:
    """A message for each image that was moved too far."""
    places = (distances > WITHIN.eps + TOLERANCE).nonzero()[:, 0].tolist()
    return [
        f"image {i} is moved by {distances[i]:.6g}, at most {WITHIN.eps:g} is allowed"
        for i in places
    ]


def _out_of_range(images: Images) -> list[str]:
    """A message for each image with values that no pixel has."""
    low, high = images.flatten(1).aminmax(dim=1)
    places = ((low < -TOLERANCE) | (high > 1 + TOLERANCE)).nonzero()[:, 0].tolist()
    return [
        f"image {i} has values in [{low[i]:.6g}, {high[i]:.6g}], outside [0, 1]" for i in places
    ]


def _rates(box: Box, x: Images) -> Rates:
    """AUROC, and what the threshold of a box accepts."""
    scores = box.score(x).double()
    inside, outside = scores[:DIGITS].numpy(), scores[DIGITS:].numpy()
    return Rates(
        metrics.confidence_interval(metrics.auroc, inside, outside),
        metrics.acceptance(inside, box.threshold),
        metrics.acceptance(outside, box.threshold),
    )


def _checked(x: Images, name: str, in_range: bool = True) -> Images:
    """Images like the digits, as float32 on the CPU."""
    check_values(x, (0, 1) if in_range else None, name)
    if x.shape[1:] != (1, 8, 8):
        raise ValueError(
            f"{name} must be images of shape (n, 1, 8, 8), got {tuple(x.shape)}; use x.view(-1, 1, 8, 8)"
        )
    return x.detach().float().cpu()
