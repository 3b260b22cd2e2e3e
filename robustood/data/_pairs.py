"""Pairs of an image and a perturbed image, from which a perturbation set can be learned.

A :class:`Pairs` is a split whose targets are images; it also holds the classes of its inputs. Partners are
fixed, drawn by a random perturbation (:func:`paired`), or other views of the same object
(:class:`Views`): corrupted copies, photographs under other lights, rendered scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from robustood import rng
from robustood.corruptions import NAMES, STANDARD, corrupt
from robustood.data._base import Data, Split, pixels
from robustood.data._batches import Change
from robustood.data._files import images_in, read_image
from robustood.inputs import (
    check_callable,
    check_choice,
    check_count,
    check_generator,
    check_images,
    check_instance,
    check_path,
    check_seed,
    check_several,
)

# CIFAR-10-C as learned and as held out by Wong and Kolter (2021), at severity 5; noise is omitted.
LEARNED = tuple(name for name in STANDARD if not name.endswith("_noise"))
HELD_OUT = ("gaussian_blur", "spatter", "saturate")
Pairing = Literal["first", "others", "any"]
_PAIRINGS = ("first", "others", "any")


@dataclass(frozen=True)
class Pairs(Split):
    """Inputs x with one perturbed image y each, fixed.

    Attributes:
        labels: classes of the inputs (samples,).
    """

    labels: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        check_instance(self.labels, "labels", Tensor, "a tensor of classes (samples,)")
        if self.labels.is_floating_point() or self.labels.shape != self.x.shape[:1]:
            raise ValueError(
                f"labels must be {len(self.x)} integers, one per sample, got {self.labels.dtype} of shape "
                f"{tuple(self.labels.shape)}"
            )

    def __getitem__(self, index: slice | Tensor) -> Pairs:
        return self._each(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> Pairs:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})

    @property
    def labelled(self) -> Split:
        """The inputs with their classes, for a classifier."""
        return Split(self.x, self.labels)

    def redraw(self, generator: torch.Generator) -> Pairs:
        """The same inputs with new partners, if there are others."""
        return self


@dataclass(frozen=True)
class Drawn(Pairs):
    """Partners made by a random perturbation.

    Attributes:
        change: ``change(x, generator)`` perturbs each image at random, such as
            ``robustood.perturbations.Random(Spatial(30, 1))``.
    """

    change: Change

    def __post_init__(self) -> None:
        super().__post_init__()
        check_callable(self.change, "change", "change(x, generator)")

    def redraw(self, generator: torch.Generator) -> Drawn:
        return replace(self, y=self.change(pixels(self.x), generator))


@dataclass(frozen=True)
class Views(Pairs):
    """Partners from several views of each object.

    Attributes:
        views: (samples, views, channel, height, width), float or 8 bits.
        pairing: ``"first"``: the first view is the input, any other its partner; ``"others"``: an ordered
            pair of two views that are not the first; ``"any"``: an ordered pair of any two.
    """

    views: Tensor
    pairing: Pairing = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_views(self.views, self.pairing)

    @staticmethod
    def of(views: Tensor, labels: Tensor, pairing: Pairing = "first", seed: int = 0) -> Views:
        """Views with a first draw of pairs.

        Raises:
            ValueError: for views without five axes, too few of them to pair, or an unknown pairing.
        """
        _check_views(views, pairing)
        blank = views[:, 0]
        made = Views(blank, blank, labels, views, pairing)
        return made.redraw(rng.generator(views.device, check_seed(seed)))

    def redraw(self, generator: torch.Generator) -> Views:
        count, device = self.views.shape[1], self.views.device

        start = {"first": 0, "others": 1, "any": 0}[self.pairing]
        first = torch.zeros(len(self.views), dtype=torch.int64, device=device)
        if self.pairing != "first":
            first = start + rng.integers(0, count - start, self.views, generator)
        # Among the remaining views, indices from the first on shift by one, so the two always differ.
        second = start + rng.integers(0, count - start - 1, self.views, generator)
        second = second + (second >= first)
        at = torch.arange(len(self.views), device=device)
        return replace(self, x=self.views[at, first], y=self.views[at, second])


def _check_views(views: Tensor, pairing: Pairing) -> None:
    """Refuse anything but views, and too few of them to pair."""
    check_choice(pairing, "pairing", _PAIRINGS)
    check_instance(views, "views", Tensor, "a tensor of images, float or 8 bits")
    needed = 3 if pairing == "others" else 2
    if views.ndim != 5 or views.shape[1] < needed:
        raise ValueError(
            f"views must be (samples, views, channel, height, width) with at least {needed} views "
            f"for pairing {pairing!r}, got shape {tuple(views.shape)}"
        )


def redrawn(data: Data, generator: torch.Generator) -> Data:
    """The data with new partners for its training pairs; other data unchanged."""
    train = data.train
    return replace(data, train=train.redraw(generator)) if isinstance(train, Pairs) else data


def paired(data: Data, change: Change, border: int = 0, seed: int = 0) -> Data:
    """Labelled images as pairs with a random perturbation, drawn anew at each epoch of training.

    The digits of the book are padded by 2 to 12x12 and perturbed by ``Random(Spatial(30, 1))``; MNIST-RTS of
    Wong and Kolter (2021) is MNIST padded by 7 to 42x42 with ``Random(Spatial(45, 7, 0.3))``, whose shifts are
    whole pixels. (The S stands for scale; their text says skew.)

    Args:
        data: with labelled splits; validation and test pairs are drawn once.
        change: ``change(x, generator)`` perturbs images at random.
        border: pixels of zeros added on each side, so that no content leaves the image.
        seed: of the fixed draws.
    """
    check_instance(data, "data", Data, "Data(train, val, test, outliers)")
    source = torch.Generator().manual_seed(check_seed(seed))
    splits = (data.train, data.val, data.test)
    train, val, test = (perturbed(split, change, source, border) for split in splits)
    return Data(train, val, test, train.x[:0])


def perturbed(split: Split, change: Change, generator: torch.Generator, border: int = 0) -> Drawn:
    """One labelled split as pairs with a random perturbation; arguments as in :func:`paired`."""
    check_instance(split, "split", Split, "a Split(x, y)")
    check_callable(change, "change", "change(x, generator)")
    check_generator(generator)
    border = check_count(border, "border")
    x = pad(pixels(split.x), [border] * 4)
    return Drawn(x, x, split.y, change).redraw(generator)


def corrupted(
    split: Split, names: Sequence[str] = LEARNED, severity: int = 5, seed: int = 0
) -> Views:
    """Each image, clean and under each of several corruptions, as 8-bit views.

    Args:
        split: labelled images (samples, channel, height, width), float in [0, 1] or 8 bits.
        names: of the corruptions (:mod:`robustood.corruptions`); default the twelve of the paper.
        severity: 1 to 5.
        seed: of the noise of the corruptions, which differs for every image and corruption.
    """
    check_instance(split, "split", Split, "a Split(x, y)")
    x = pixels(split.x)
    check_images(x, "split.x")
    check_several(names, "names", "corruptions")
    for name in names:
        check_choice(name, "each of names", NAMES)
    lots = np.random.default_rng(check_seed(seed)).integers(2**31, size=(len(names), len(x)))
    made = [
        corrupt(x, name, severity, torch.as_tensor(s)) for name, s in zip(names, lots, strict=True)
    ]
    views = torch.stack([x, *made], 1)
    return Views.of((views * 255).round().to(torch.uint8), split.y, "first", seed)


def folder_of_views(
    path: str | Path, size: int = 32, pairing: Pairing = "any", seed: int = 0
) -> Views:
    """Photographs of objects: one folder per object, with one image per view.

    For the scenes of Multi-Illumination (Murmann et al. 2019), or your own. The views of an object are sorted by
    name, and all objects must have the same number; files are read as by :func:`robustood.data.folder`. Labels
    number the objects in alphabetical order.

    Args:
        path: the folder of folders.
        size: height and width to which images are resized (shorter side, then a centre crop).
        pairing: see :class:`Views`; photographs have no clean view, so ``"any"``.
        seed: of the first draw of pairs.

    Raises:
        ValueError: for a folder without folders of images, an image that cannot be read, or objects
            with different numbers of views; the message names them.
    """
    check_path(path, "path")
    check_choice(pairing, "pairing", _PAIRINGS)
    check_count(size, "size", low=1)
    check_seed(seed)
    tree, things = Path(path).expanduser(), dict[str, list[Path]]()
    for file in images_in(tree)[0]:
        if file.parent == tree:
            raise ValueError(
                f"{file} lies in no subfolder; give each object a folder with its views"
            )
        things.setdefault(file.parent.relative_to(tree).as_posix(), []).append(file)
    counts = {name: len(files) for name, files in things.items()}
    first = next(iter(counts.values()))
    if odd := [f"{name} has {n}" for name, n in counts.items() if n != first]:
        raise ValueError(
            f"all folders in {tree} must contain as many views as the first, {first}; {', '.join(odd[:5])}"
        )
    read = [np.stack([read_image(file, size)[0] for file in files]) for files in things.values()]
    views = torch.as_tensor(np.stack(read)).movedim(-1, 2).contiguous()
    return Views.of(views, torch.arange(len(things)), pairing, seed)
