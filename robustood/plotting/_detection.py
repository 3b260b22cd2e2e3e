"""What an attack does to a detector: ROC curves, histograms of scores, and the fall with the radius."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from robustood import metrics
from robustood.inputs import (
    check_choice,
    check_count,
    check_instance,
    check_mapping,
    check_several,
    check_text,
    reals,
)
from robustood.metrics import Estimate, Scores
from robustood.plotting._style import COLOURS, band, check_axis

_LOOKS = {
    "blue": ("-", "o"),
    "red": ("--", "s"),
    "green": ("-.", "D"),
    "orange": (":", "^"),
    "purple": ((0, (5, 1, 1, 1, 1, 1)), "v"),
    "sky": ((0, (8, 3)), "P"),
}  # of lines and their markers, in the order of use
_Look = dict[str, Any]  # keywords of Matplotlib's artists
_AID: _Look = {"color": COLOURS["grey"], "linewidth": 1, "linestyle": ":", "zorder": 1}
_IN: _Look = {
    "edgecolor": COLOURS["blue"],
    "facecolor": (COLOURS["blue"], 0.3),
    "linestyle": "-",
}
_OUT: _Look = {
    "edgecolor": COLOURS["red"],
    "facecolor": (COLOURS["red"], 0.3),
    "linestyle": "--",
    "hatch": "//",
}
_RATES = {
    "auroc": "AUROC",
    "fpr": "outliers accepted (FPR)",
    "fpr_attacked": "outliers accepted (FPR, threshold as attacked)",
    "rejected": "in-distribution inputs rejected",
}


@runtime_checkable
class Scored(Protocol):
    """What holds scores as :class:`robustood.evaluate.Report` does.

    They stand under ``"in (clean)"``, which sets the threshold, ``"in"`` and the names of the sets of outliers.
    """

    @property
    def scores(self) -> Mapping[str, Any]: ...


Measured = Scored | tuple[Scores, Scores]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Sides:
    """The scores behind one curve or pair of histograms, and the threshold of the deployed detector."""

    inside: Float[np.ndarray, " n"]
    outside: Float[np.ndarray, " m"]
    threshold: float
    outliers: str  # the name of their set

    def accepted(self, scores: Float[np.ndarray, " _"]) -> float:
        """The share at or above the threshold."""
        return metrics.acceptance(scores, self.threshold).value

    def __str__(self) -> str:
        inside, outside = self.accepted(self.inside), self.accepted(self.outside)
        kinds = f"{_percent(inside)} of in-distribution inputs and {_percent(outside)} of"
        return f"accepts {kinds} {self.outliers}"


def roc(
    axis: Axes,
    measured: Measured | Mapping[str, Measured],
    outliers: str | None = None,
    *,
    tpr: float = 0.95,
    clean: Scores | None = None,
) -> str:
    """Draw ROC curves, each with the working point of the deployed detector.

    The detector keeps the threshold that accepts a share ``tpr`` of *clean* in-distribution inputs. The working
    point is where that leads: on the dotted line at this TPR, or below it where in-distribution inputs are attacked.

    Args:
        axis: where to draw.
        measured: reports, or pairs (scores_in, scores_out), by name, such as
            ``{"clean": sides["none"], "attacked": sides["both"]}``; or a single one. At most 6.
        outliers: their set in the reports; default: the only one.
        tpr: share of clean in-distribution inputs that are accepted.
        clean: the scores that set the threshold; default: those in a report, scores_in of a pair.

    Returns:
        The text alternative.
    """
    shown = _by_name(axis, measured, outliers, tpr, clean, most=len(_LOOKS))
    axis.plot([0, 1], [0, 1], **_AID)  # a coin
    axis.axhline(tpr, **_AID)
    said = []
    for (name, sides), (colour, (dashes, marker)) in zip(shown.items(), _LOOKS.items()):
        false, true, thresholds = metrics.roc(sides.inside, sides.outside)
        area = f"AUROC {metrics.auroc(sides.inside, sides.outside):.3f}"
        label = f"{name}: {area}" if name else area
        at = np.count_nonzero(thresholds >= sides.threshold) - 1  # every working point is a corner
        (line,) = axis.plot(false, true, color=COLOURS[colour], linestyle=dashes, label=label)
        line.set(marker=marker, markevery=[at], markersize=8, markeredgecolor="white")
        line.set_clip_on(False)  # marks on the border stay whole
        said.append(f"{label}, {sides}")
    axis.set(xlabel=f"{sides.outliers} accepted (FPR)", ylabel="in-distribution accepted (TPR)")
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    _legend(axis, f"marked: threshold at {_percent(tpr)} TPR")
    return f"ROC curves, marked at the threshold of {_percent(tpr)} TPR. {'; '.join(said)}."


def score_histograms(
    axis: Axes,
    measured: Measured | Mapping[str, Measured],
    outliers: str | None = None,
    *,
    bins: int | Sequence[float] | Float[np.ndarray, " _"] = 40,
    tpr: float = 0.95,
    clean: Scores | None = None,
) -> str:
    """Draw the two histograms of a score, with the threshold of the deployed detector.

    Of two measurements, such as clean and attacked, the first is drawn as outlines and the second filled.

    Args:
        bins: number of bins over all scores, or their edges; what lies beyond the edges is counted in the
            first or last bin.
        clean: the scores that set the threshold; default: those in a report, scores_in of the first pair.
        axis, measured, outliers, tpr: as in :func:`roc`, but at most 2 measurements.

    Returns:
        The text alternative.
    """
    shown = _by_name(axis, measured, outliers, tpr, clean, most=2)
    (first, *_), (*_, last) = shown.values(), shown.values()
    last = replace(last, threshold=first.threshold)
    edges = _edges(bins, [s for each in shown.values() for s in (each.inside, each.outside)])
    outline: _Look = {"linewidth": 1.5, "hatch": None, "zorder": 3}
    filled: _Look = {"fill": True, "zorder": 2, "linewidth": 1.5}
    if len(shown) > 1:
        filled |= {"linewidth": 0, "linestyle": "-"}  # matplotlib 3.8 refuses dashes of no width
    said = []
    for place, (name, sides) in enumerate(shown.items(), start=1):
        drawn = filled if place == len(shown) else outline
        both = (("in-distribution", sides.inside, _IN), (sides.outliers, sides.outside, _OUT))
        for kind, scores, look in both:
            counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
            label = f"{kind}, {name}" if name else kind
            axis.stairs(counts, edges, label=label, **look | drawn)
            said.append(f"{label}: median {np.median(scores):.3g}")
    at, label = last.threshold, f"threshold ({_percent(tpr)} TPR)"
    axis.axvline(at, color=COLOURS["black"], linewidth=1.5, zorder=4, label=label)
    axis.set(xlabel="score (higher: more in-distribution)", ylabel="inputs")
    _legend(axis)
    return f"Histograms of scores, cut at {at:.3g}. {'; '.join(said)}. The detector {last}."


def fall(axis: Axes, rows: Rows | Mapping[str, Rows], column: str = "auroc") -> str:
    """Draw how a detector falls as the radius of the attack grows, with intervals.

    Args:
        axis: where to draw.
        rows: those of :func:`robustood.evaluate.epsilon_curve`, or of several detectors by name; also as kept in
            JSON. At most 6 detectors.
        column: a rate with an interval: "auroc", "fpr", "fpr_attacked" or "rejected".

    Returns:
        The text alternative.
    """
    check_axis(axis)
    check_choice(column, "column", list(_RATES))
    said = []
    for (name, each), (colour, (dashes, marker)) in zip(
        _named(rows, "rows", len(_LOOKS)), _LOOKS.items()
    ):
        radii, rates = _points(each, f"rows[{name!r}]" if name else "rows", column)
        look = {"linestyle": dashes, "marker": marker, "clip_on": False}
        band(axis, radii, rates, name or None, colour, **look)
        ends = " and ".join(f"{rates[at]:.2f} at radius {radii[at]:g}" for at in (0, -1))
        said.append(f"{name}: {ends}" if name else ends)
    axis.set(xlabel=r"radius $\varepsilon$ (pixel units)", ylabel=_RATES[column], ylim=(0, 1))
    if column == "auroc":
        axis.axhline(0.5, **_AID)
        across = axis.get_yaxis_transform()
        axis.text(
            1, 0.51, "a coin", ha="right", transform=across, color=COLOURS["grey"], fontsize=8
        )
    if len(said) > 1:
        _legend(axis)
    return f"{_RATES[column]} against the radius of the attack. {'; '.join(said)}."


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _legend(axis: Axes, title: str | None = None) -> None:
    """A legend that can be read on top of lines."""
    axis.legend(title=title, frameon=True, framealpha=0.7, edgecolor="none")


def _named(given: object, name: str, most: int) -> list[tuple[str, Any]]:
    """What several things by name hold; a single one has the name ""."""
    found = list(given.items()) if isinstance(given, Mapping) else [("", given)]
    if not 1 <= len(found) <= most:
        raise ValueError(
            f"{name} must hold 1 to {most} by name, got {len(found)}; draw more onto other axes"
        )
    for each, _ in found:
        check_text(each, f"{name}: each name")
    return found


def _by_name(
    axis: object,
    measured: object,
    outliers: str | None,
    tpr: float,
    clean: Scores | None,
    most: int,
) -> dict[str, _Sides]:
    """The scores to draw; arguments as in :func:`roc`."""
    check_axis(axis)
    if outliers is not None:
        check_text(outliers, "outliers")
    found = {}
    for name, given in _named(measured, "measured", most):
        place = f"measured[{name!r}]" if name else "measured"
        inside, outside, own, kind = _parts(given, place, outliers)
        inside, own = (reals(each, f"{place}: scores_in", 1) for each in (inside, own))
        outside = reals(outside, f"{place}: scores_out", 1)
        fixed = own if clean is None else reals(clean, "clean", 1)
        found[name] = _Sides(inside, outside, metrics.threshold_at_tpr(fixed, tpr), kind)
    return found


def _parts(given: object, place: str, outliers: str | None) -> tuple[object, object, object, str]:
    """Scores of both sides, those that set the threshold, and the name of the outliers."""
    if isinstance(given, Scored) and isinstance(given.scores, Mapping):
        held = given.scores
        sets = [name for name in held if name not in ("in", "in (clean)")]
        if not sets or not {"in", "in (clean)"} <= held.keys():
            raise ValueError(
                f"{place} has no scores of both sides; draw a report as measured, or kept by "
                "to_json with scores=True"
            )
        chosen = sets[0] if outliers is None and len(sets) == 1 else outliers
        check_choice(chosen, "outliers", sets)
        kind = cast(str, chosen)
        return held["in"], held[kind], held["in (clean)"], kind
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ValueError(
            f"{place} must be a report or a pair (scores_in, scores_out), got {given!r:.80}"
        )
    return given[0], given[1], given[0], outliers or "outliers"


def _edges(bins: object, scores: Sequence[Float[np.ndarray, " _"]]) -> Float[np.ndarray, " _"]:
    """The edges of some bins over all scores, or the edges that were given."""
    if isinstance(bins, Integral):
        number, every = check_count(bins, "bins", low=1), np.concatenate(scores)
        try:
            return np.histogram_bin_edges(every, number)
        except ValueError as error:
            raise ValueError(
                f"scores in [{every.min():g}, {every.max():g}] cannot be parted into {number} bins; pass the edges as "
                "bins, or scale the scores"
            ) from error
    edges = reals(bins, "bins", 1)
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(
            f"bins must be a number of bins, or edges that increase, at least 2, got {bins!r:.80}"
        )
    return edges


def _points(rows: Rows, place: str, column: str) -> tuple[list[float], list[Estimate]]:
    """The radii and the rates of some rows."""
    check_several(rows, place, "rows, such as evaluate.epsilon_curve gives")
    radii, rates = [], []
    for row in rows:
        check_mapping(row, f"{place}: each", "evaluate.epsilon_curve gives")
        for key in ("eps", column):
            if key not in row:
                raise ValueError(
                    f"{place}: each must have {key!r}, as the rows of evaluate.epsilon_curve have, "
                    f"got {', '.join(map(str, row))}"
                )
        rate = row[column]
        if isinstance(rate, Mapping) and rate.keys() == {"value", "low", "high", "n"}:
            rate = Estimate(**rate)
        check_instance(rate, f"{place}: {column}", Estimate, "a rate with its interval")
        radii.append(row["eps"])
        rates.append(rate)
    return radii, rates
