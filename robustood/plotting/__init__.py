"""Figures in one style that everyone can read.

Colours are those of Okabe and Ito (2008), which are distinct for every common form of colour
blindness; lines differ in their dashes too. The background is white on light and on dark pages.

:func:`roc`, :func:`score_histograms` and :func:`fall` draw what an attack does to a detector, onto axes that the
caller makes and may change further. Each returns a text alternative, which says what the picture shows.
"""

from __future__ import annotations

from robustood.plotting._detection import Measured, Rows, Scored, fall, roc, score_histograms
from robustood.plotting._style import COLOURS, STYLE, band, image_grid, use_style

__all__ = [
    "COLOURS", "STYLE", "Measured", "Rows", "Scored", "band", "fall", "image_grid", "roc",
    "score_histograms", "use_style",
]  # fmt: skip
