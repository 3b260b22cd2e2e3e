"""What a public function accepts: one door, one kind of message.

Images are float tensors ``(batch, channel, height, width)`` in [0, 1] *pixel units*;
normalisation is a layer inside the model, so ``eps`` always means pixels (write ``8/255``).
Labels are integers. Every check raises ``ValueError`` with the argument's name, the value seen
and the fix, before any work is done. The checks read values, which on a GPU waits for the
device: they stand at public doors and never inside a loop.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

TOLERANCE = 1e-6


def check_values(x: Tensor, box: tuple[float, float] | None = (0, 1), name: str = "x") -> None:
    """Refuse an empty batch, integers, NaN, infinity, and values outside ``box`` (None: no box)."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{name} must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor"
        )
    if not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating point, got {x.dtype}; divide 8-bit images by 255"
        )
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name} is empty (shape {tuple(x.shape)}); pass at least one sample")
    low, high = (float(v) for v in x.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} contains NaN or infinity; clean the data first")
    if box is not None and (low < box[0] - TOLERANCE or high > box[1] + TOLERANCE):
        raise ValueError(
            f"{name} lies in [{low:.7g}, {high:.7g}], outside [{box[0]:g}, {box[1]:g}]; pass pixels "
            "in that range and put the mean/std normalisation inside the model (for vectors without "
            "a box, box=None)"
        )


def pixels(images: Tensor) -> Tensor:
    """8-bit images as floats in [0, 1]; all else as it is."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def taken(x: Tensor, box: tuple[float, float] | None = (0, 1), name: str = "x") -> Tensor:
    """Inputs as a door takes them: 8-bit pixels as floats in [0, 1], all else checked and as it is.

    In any other box than that of pixels, 8-bit numbers are refused like all integers.
    """
    if isinstance(x, Tensor) and box == (0, 1):
        x = pixels(x)
    check_values(x, box, name)
    return x


def finite(x: Tensor, name: str = "x") -> Tensor:
    """Inputs as a door without a box takes them: 8-bit images as floats in [0, 1], all else checked for NaN."""
    if isinstance(x, Tensor) and x.ndim == 4:
        x = pixels(x)
    check_values(x, None, name)
    return x


def check_images(x: Tensor, name: str = "x") -> None:
    """Refuse what is not a float batch (batch, channel, height, width) in [0, 1]."""
    if isinstance(x, Tensor) and x.ndim != 4:
        raise ValueError(
            f"{name} must have 4 axes (batch, channel, height, width), got shape {tuple(x.shape)}; "
            "add an axis with x[None] for one image, x[:, None] for grey ones"
        )
    check_values(x, name=name)


def check_labels(y: Tensor, x: Tensor, classes: int | None = None, name: str = "y") -> None:
    """Refuse labels that are not integers, not one per sample, or outside 0 .. classes - 1."""
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        seen = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{name} must be an int64 tensor of class labels, got {seen}; use y.long()"
        )
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({len(x)},), one label per sample, got {tuple(y.shape)}"
        )
    low, high = (int(v) for v in y.aminmax())
    if low < 0 or (classes is not None and high >= classes):
        limit = "the number of classes" if classes is None else f"{classes - 1}"
        raise ValueError(f"{name} lies in [{low}, {high}]; labels count from 0 to {limit}")


def check_number(
    value: float, name: str, low: float = -math.inf, high: float = math.inf, fix: str = ""
) -> None:
    """Refuse a number that is NaN or outside [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        hint = f"; {fix}" if fix else ""
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}{hint}")


def check_confidence(value: float) -> None:
    """Refuse a confidence level outside [0.5, 1)."""
    check_number(value, "confidence", 0.5, 1 - 1e-9, "write 0.95 for 95 %; 1 is out of reach")


def check_count(value: int, name: str, low: int = 0) -> None:
    """Refuse what is not a whole number of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def check_choice(value: object, name: str, choices: tuple[str, ...]) -> None:
    """Refuse a name that does not exist, and say which do."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
