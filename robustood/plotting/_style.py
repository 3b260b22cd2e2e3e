"""The style of all figures, grids of images, and lines with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from robustood.inputs import (
    check_choice,
    check_count,
    check_instance,
    check_number,
    check_several,
    check_text,
    checked_inputs,
    reals,
)
from robustood.metrics import Estimate

COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
    "grey": "#777777",
}

STYLE: dict[str, object] = {
    "axes.prop_cycle": plt.cycler(
        color=[COLOURS[c] for c in ("blue", "red", "green", "orange", "purple", "sky")]
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "image.cmap": "gray_r",
}


def use_style() -> None:
    """Set the book's Matplotlib style for the session."""
    plt.rcParams.update(STYLE)  # ty: ignore[no-matching-overload]


def image_grid(
    images: Float[Tensor, "n channels height width"],
    titles: Sequence[str] | None = None,
    columns: int = 8,
    scale: float = 1.0,
) -> Figure:
    """Show images in rows, each with an optional title.

    Args:
        images: grey (1 channel) or RGB (3 channels), in [0, 1] or in 8 bits.
        titles: one per image.
        columns: images per row.
        scale: width of one image in inches.

    Returns:
        The figure, which is not shown yet.
    """
    check_count(columns, "columns", low=1)
    check_number(scale, "scale", 0.01, 100, "the width of one image in inches")
    check_instance(images, "images", Tensor, "a tensor (n, channels, height, width)")
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be (n, 1 or 3, height, width), got shape {tuple(images.shape)}; "
            "add an axis with images[:, None] for grey images"
        )
    images = checked_inputs(images.detach(), name="images")
    if titles is not None:
        check_several(titles, "titles", "strings, one per image", 0)
        for title in titles:
            check_text(title, "each of titles")
        if len(titles) != len(images):
            raise ValueError(
                f"titles must hold one per image, got {len(titles)} for {len(images)} images"
            )
    rows = -(-len(images) // columns)
    head = 0.28 if titles is not None else 0.04
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * scale, rows * (scale + head)), squeeze=False
    )
    for place, axis in enumerate(axes.flat):
        axis.axis("off")
        if place < len(images):
            picture = images[place].cpu().permute(1, 2, 0).squeeze(-1).numpy()
            axis.imshow(picture, vmin=0, vmax=1, interpolation="nearest")
            if titles is not None:
                axis.set_title(titles[place], fontsize=9)
    return figure


def band(
    axis: Axes,
    x: Sequence[float],
    estimates: Sequence[Estimate],
    label: str | float | None = None,
    colour: str = "blue",
    **line: Any,
) -> None:
    """Draw a line through estimates, with their intervals shaded.

    Args:
        axis: where to draw.
        x: positions, one per estimate.
        estimates: values with intervals.
        label: legend entry.
        colour: a name from ``COLOURS``.
        line: passed to ``Axes.plot``; a marker is drawn by default.
    """
    check_axis(axis)
    check_several(x, "x", "positions")
    check_several(estimates, "estimates", "Estimate, one per position")
    places = reals(x, "x")
    for each in estimates:
        check_instance(each, "each of estimates", Estimate, "an Estimate with value, low and high")
    if label is not None and not isinstance(label, Real):
        check_text(label, "label")
    if not len(x) == len(estimates) > 0:
        raise ValueError(
            f"x and estimates must have the same length, got {len(x)} and {len(estimates)}"
        )
    check_choice(colour, "colour", tuple(COLOURS))
    low, value, high = np.array([[e.low, e.value, e.high] for e in estimates]).T
    line.setdefault("marker", "o")
    axis.plot(places, value, color=COLOURS[colour], label=label, **line)
    axis.fill_between(places, low, high, color=COLOURS[colour], alpha=0.15, linewidth=0)


def check_axis(axis: object) -> None:
    """Refuse what nothing can be drawn onto."""
    check_instance(axis, "axis", Axes, "Matplotlib's Axes, such as plt.figure().gca()")
