"""Checks on the arguments of public functions, with one form of message.

Images are float tensors ``(batch, channel, height, width)`` in [0, 1] *pixel units*;
normalisation is a layer inside the model, so ``eps`` always means pixels (write ``8/255``).
Labels are integers. Every check raises ``ValueError`` with the argument's name, its value and
the fix, before any work is done. The checks read values, which on a GPU waits for the device:
they belong at the start of public functions, never inside a loop.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from difflib import get_close_matches
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "MOST", "TOLERANCE", "as_floats", "check_callable", "check_choice", "check_confidence",
    "check_count", "check_counts", "check_device", "check_flag", "check_generator", "check_images",
    "check_instance", "check_keywords", "check_labels", "check_mapping", "check_model",
    "check_number", "check_path", "check_seed", "check_several", "check_shape", "check_text",
    "check_values", "checked_inputs", "checked_moved", "finite_inputs", "numbers", "pixels", "reals", "suggest",
]  # fmt: skip

TOLERANCE = 1e-6
MOST = sys.float_info.max  # infinity is valid only where a limit is infinite


def check_values(x: Tensor, box: tuple[float, float] | None = (0, 1), name: str = "x") -> None:
    """Refuse an empty batch, integers, NaN, infinity, and values outside ``box`` (None: no box)."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}; {_conversion(x)}")
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
        grey = low >= box[0] and high >= 2 * box[1]  # standardised images are also negative
        remedy = (
            ": divide grey levels by the largest possible one, such as 255"
            if grey
            else " and put the mean/std normalisation inside the model"
        )
        raise ValueError(
            f"{name} lies in [{low:.7g}, {high:.7g}], outside [{box[0]:g}, {box[1]:g}]; pass pixels "
            f"in that range{remedy} (for vectors without a box, box=None)"
        )


def _conversion(x: object) -> str:
    """How to make a tensor of what is none; NumPy computes in float64, and networks have float32 weights."""
    wide = getattr(x, "dtype", None) == np.float64
    return "use torch.as_tensor" + ", with dtype=torch.float32" * wide


def pixels(images: Tensor) -> Tensor:
    """8-bit images as floats in [0, 1]; anything else unchanged."""
    check_instance(images, "images", Tensor, "a tensor of images, in 8 bits or in [0, 1]")
    return images.float() / 255 if images.dtype == torch.uint8 else images


def checked_inputs(x: Tensor, box: tuple[float, float] | None = (0, 1), name: str = "x") -> Tensor:
    """Inputs of a public function: 8-bit pixels as floats in [0, 1], anything else checked and unchanged.

    With a box other than that of pixels, 8-bit inputs are refused like all integers.
    """
    if isinstance(x, Tensor) and box == (0, 1):
        x = pixels(x)
    check_values(x, box, name)
    return x


def checked_moved(moved: Tensor, x: Tensor, box: tuple[float, float] | None) -> Tensor:
    """What a user's attack returned for x: checked inputs, one per sample."""
    moved = checked_inputs(moved, box, "what attack returns")
    if moved.shape != x.shape:
        raise ValueError(
            f"attack must return inputs shaped like x, {tuple(x.shape)}, got {tuple(moved.shape)}"
        )
    return moved


def as_floats(x: Tensor, name: str = "x") -> Tensor:
    """Inputs inside a loop: 8-bit pixels as floats, other integers refused; no value is read."""
    if isinstance(x, Tensor):
        x = pixels(x)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        seen = x.dtype if isinstance(x, Tensor) else f"{type(x).__name__}; {_conversion(x)}"
        raise ValueError(f"{name} must be a tensor of floats or of 8-bit pixels, got {seen}")
    return x


def finite_inputs(x: Tensor, name: str = "x") -> Tensor:
    """Inputs of a public function without a box: 8-bit images as floats in [0, 1], anything else checked for NaN."""
    if isinstance(x, Tensor) and x.ndim == 4:
        x = pixels(x)
    check_values(x, None, name)
    return x


def check_images(x: Tensor, name: str = "x") -> None:
    """Refuse anything but floats (batch, channel, height, width) in [0, 1]."""
    if isinstance(x, Tensor) and x.ndim != 4:
        raise ValueError(
            f"{name} must have 4 axes (batch, channel, height, width), got shape {tuple(x.shape)}; "
            "add an axis with x[None] for one image, x[:, None] for grey images"
        )
    check_values(x, name=name)


def check_labels(y: Tensor, x: Tensor, classes: int | None = None, name: str = "y") -> None:
    """Refuse anything but one integer in 0 .. classes - 1 per sample."""
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
    value: object, name: str, low: float = -MOST, high: float = MOST, fix: str = ""
) -> None:
    """Refuse a number that is NaN or outside [low, high]; infinity passes only as a limit."""
    plain = isinstance(value, (int, float, np.number)) and isinstance(value, Real)
    if isinstance(value, bool) or not plain or not low <= float(value) <= high:
        exact = isinstance(value, Real) and not plain  # torch takes no Fraction
        hint = f"; write float({value})" if exact else f"; {fix}" if fix else ""
        raise ValueError(f"{name} must be {_range(low, high)}, got {value!r:.80}{hint}")


def _range(low: float, high: float) -> str:
    if high < MOST:
        return f"a number in [{low:g}, {high:g}]"
    kind = "a number" if high == math.inf else "a finite number"
    return kind if low <= -MOST else f"{kind} of at least {low:g}"


def check_confidence(value: float) -> None:
    """Refuse a confidence level outside [0.5, 1)."""
    check_number(value, "confidence", 0.5, 1 - 1e-9, "write 0.95 for 95 %; 1 is out of reach")


def check_count(
    value: object, name: str, low: int = 0, high: float = math.inf, fix: str = ""
) -> int:
    """Refuse anything but a whole number in [low, high]; return it as the int that torch needs."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= high:
        most = f", at most {high:g}" if high < MOST else ""
        hint = f"; {fix}" if fix else ""
        raise ValueError(
            f"{name} must be a whole number of at least {low}{most}, got {value!r:.80}{hint}"
        )
    return int(value)


def check_seed(value: int, name: str = "seed") -> int:
    """Refuse anything but an integer of at least 0; return it as the int that torch needs."""
    return check_count(value, name, high=2**63 - 1, fix="the same seed gives the same draws")


def check_flag(value: object, name: str) -> None:
    """Refuse anything but True and False: a str such as "no" would count as True."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r:.80}")


def check_choice(value: object, name: str, choices: Sequence[str]) -> None:
    """Refuse a name that does not exist, and say which do."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r:.80}"
        )


def check_text(value: object, name: str) -> None:
    """Refuse anything but a str."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a str, got {type(value).__name__}")


def check_path(value: object, name: str) -> None:
    """Refuse anything but the path of a file or folder."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(
            f"{name} must be the path of a file or folder, a str or Path, got {type(value).__name__}"
        )


def check_callable(value: object, name: str, form: str) -> None:
    """Refuse what cannot be called; ``form`` shows the call."""
    if not callable(value):
        raise ValueError(f"{name} must be a function, called as {form}, got {value!r:.80}")


def check_instance(value: object, name: str, kind: type | tuple[type, ...], such_as: str) -> None:
    """Refuse anything but an instance of ``kind``; a class itself is refused, though it passes a protocol."""
    if isinstance(value, type) or not isinstance(value, kind):
        seen = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise ValueError(f"{name} must be {such_as}, got {seen}")


def check_generator(value: object, name: str = "generator") -> None:
    """Refuse anything but a torch.Generator or None."""
    if value is not None:
        such_as = "a torch.Generator, such as torch.Generator().manual_seed(0)"
        check_instance(value, name, torch.Generator, such_as)


def check_model(model: object, name: str = "model") -> None:
    """Refuse what cannot be called, and a class that was not instantiated."""
    if isinstance(model, type) or not callable(model):
        seen = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ValueError(f"{name} must be a network or a function, called as model(x), got {seen}")


def check_device(value: object, name: str = "device") -> None:
    """Refuse anything but a device or its name."""
    with suppress(RuntimeError):  # what torch raises for an unknown name
        if isinstance(value, (str, torch.device)) and torch.device(value):
            return
    raise ValueError(f'{name} must be a device such as "cpu" or "cuda:0", got {value!r:.80}')


def check_several(values: object, name: str, what: str, least: int = 1) -> None:
    """Refuse anything but a list with one axis; a str is refused, though it is a sequence of characters."""
    listed = isinstance(values, (Sequence, np.ndarray, Tensor)) and not isinstance(values, str)
    if not isinstance(values, Sized) or not listed or getattr(values, "ndim", 1) != 1:
        raise ValueError(f"{name} must be a list of {what}, got {values!r:.80}; use [..] for one")
    if len(values) < least:
        raise ValueError(f"{name} must hold at least {least} of {what}, got {values!r:.80}")


def check_counts(low: int = 1, **values: int) -> None:
    """Refuse any value that is not a whole number of at least ``low``."""
    for name, value in values.items():
        check_count(value, name, low)


def check_shape(shape: object) -> tuple[int, int, int]:
    """Refuse anything but the shape of one image, (channel, height, width); return it as a tuple."""
    check_several(shape, "shape", "three whole numbers (channel, height, width)", 3)
    channels, *sides = shape  # ty: ignore
    if len(sides) != 2:
        raise ValueError(f"shape must be (channel, height, width), got {shape!r:.80}")
    return tuple(check_count(side, "each of shape", 1) for side in (channels, *sides))  # ty: ignore


def numbers(values: object, name: str) -> np.ndarray:
    """Real numbers as float64: a number, a list, an array or a tensor."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values if values.is_complex() else values.double()).numpy()
    try:
        found = np.asarray(values)
        if found.dtype.kind not in "biuf":
            raise TypeError(f"not real numbers: {found.dtype}")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be numbers, got {values!r:.80}; pass a flat list or array"
        ) from error
    return found.astype(np.float64, copy=False)


def reals(values: object, name: str, axes: int | None = None) -> np.ndarray:
    """Finite real numbers as float64, at least one."""
    found = numbers(values, name)
    if axes is not None and found.ndim != axes:
        raise ValueError(f"{name} must have {axes} axes, got shape {found.shape}; use [None]")
    if found.size == 0 or not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite numbers, at least one, got {values!r:.80}")
    return found


def check_mapping(values: object, name: str, form: str) -> None:
    """Refuse anything but a dict; ``form`` shows one."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a dict such as {form}, got {type(values).__name__}")


def check_keywords(function: Callable[..., object], given: Mapping[str, object], own: str) -> None:
    """Refuse keywords that ``own`` would pass on to a function without such a parameter."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}"
            raise TypeError(f"{own} got an unexpected keyword argument {name!r}{meant}")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known name, if any, and all of them."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}there are: {', '.join(known) or 'none'}"
