"""From scores to a report: rates with intervals, at thresholds that say where they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from robustood import metrics, tables
from robustood.checkpoints import Checkpoint, as_json, from_json, write_whole
from robustood.detectors import Detector, Direction
from robustood.evaluate.attack import attack_score, check_detector
from robustood.identity import describe, identity
from robustood.inputs import (
    check_callable,
    check_choice,
    check_count,
    check_keywords,
    check_mapping,
    check_number,
    check_path,
    check_seed,
    check_several,
    finite,
    numbers,
    reals,
    taken,
)
from robustood.metrics import Estimate
from robustood.models import check_finite, frozen
from robustood.perturbations import Ball, PerturbationSet, as_set

Inputs = Float[Tensor, "_ *shape"]  # each set has a size of its own
Attack = Callable[..., Tensor]
Scores = Float[np.ndarray, " _"]
Side = Literal["none", "in", "out", "both"]
SIDES: tuple[Side, ...] = ("none", "in", "out", "both")


@torch.no_grad()
def scores(detector: Detector, x: Inputs, batch_size: int = 512) -> Scores:
    """The deployed score of each input (samples,), in float64 on the CPU."""
    check_detector(detector)
    batch_size = check_count(batch_size, "batch_size", low=1)
    x = finite(x)
    with frozen(detector):
        parts = [
            detector.score(part.to(detector.device(part), copy=True))
            for part in x.split(batch_size)
        ]
    found = torch.cat(parts).double().cpu()
    check_finite((~found.isfinite()).sum(), len(x))
    return found.numpy()


@dataclass(frozen=True)
class Report:
    """Detection before or after an attack.

    Attributes:
        settings: what was measured, and how.
        rows: one dict a set of outliers: ``set``, ``n_in``, ``n_out``, ``auroc``, ``aupr_in``,
            ``aupr_out``, ``fpr`` (share of outliers accepted at the threshold that accepts ``tpr`` of *clean*
            in-distribution inputs), ``fpr_attacked`` (at the one that accepts ``tpr`` of them *as they came*, attacked
            or not), ``rejected`` (share of in-distribution inputs turned away at the clean threshold),
            ``detection_error`` (balanced), ``tie_rate``. Rates are :class:`~robustood.metrics.Estimate`.
        scores: the deployed scores behind it, by the names ``"in (clean)"``, ``"in"`` and the sets'.
    """

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    scores: dict[str, Scores] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, name: str) -> dict[str, Any]:
        for row in self.rows:
            if row["set"] == name:
                return row
        raise KeyError(f"no row {name!r}; there are: {', '.join(r['set'] for r in self.rows)}")

    def mean(self, metric: str) -> float:
        """Unweighted mean of a metric over the sets."""
        known = [name for name, value in self.rows[0].items() if not isinstance(value, str)]
        check_choice(metric, "metric", known)
        return float(np.mean([float(row[metric]) for row in self.rows]))

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, without the scores; written to ``path`` where one is given."""
        rows = [plain(row) for row in self.rows]
        text = as_json({"settings": self.settings, "rows": rows}, "report")
        if path is not None:
            check_path(path, "path")
            write_whole(Path(path), text.encode())
        return text

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that :meth:`to_json` wrote.

        Raises:
            ValueError: for another text.
        """
        try:
            kept = from_json(text, ("settings", "rows"))
            rows = [
                {k: Estimate(**v) if isinstance(v, dict) else v for k, v in row.items()}
                for row in kept["rows"]
            ]
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"text is no report ({error}); pass what Report.to_json wrote"
            ) from error
        return cls(kept["settings"], rows)

    def cells(self) -> list[list[str]]:
        """Header and rows of the table, as text."""
        head = ["outliers", "AUROC", "FPR (clean threshold)", "FPR (threshold as attacked)"]
        shown = ("auroc", "fpr", "fpr_attacked", "rejected", "tie_rate")
        body = [[row["set"], *(f"{row[key]:.3f}" for key in shown)] for row in self.rows]
        return [[*head, "ID rejected", "ties"], *body]

    def __str__(self) -> str:
        return tables.text(self.cells())

    def _repr_html_(self) -> str:
        return tables.html(self.cells())


def ood_report(
    detector: Detector,
    x_in: Inputs,
    x_out: Mapping[str, Inputs],
    within: PerturbationSet | float | None = None,
    *,
    side: Side = "none",
    attack: Attack = attack_score,
    tpr: float = 0.95,
    confidence: float = 0.95,
    batch_size: int = 512,
    seed: int = 0,
    run_dir: str | Path | None = None,
    name: str | None = None,
    **how: Any,
) -> Report:
    """Measure a detector on clean inputs, or with one or both sides attacked.

    In-distribution inputs are attacked to lower their score, outliers to raise theirs.

    Args:
        detector: fitted where it needs to be.
        x_in: in-distribution test inputs.
        x_out: test outliers by name.
        within: the perturbation set; needed where a side is attacked.
        side: ``"none"``, ``"in"``, ``"out"`` or ``"both"``.
        attack: ``attack(detector, x, within, direction=..., generator=..., **how)``, such as
            :func:`attack_score` or ``partial(paper_attack, paper="aloe")``.
        tpr: share of in-distribution inputs that the thresholds accept.
        confidence: of the intervals.
        batch_size: inputs scored and attacked at one time; each batch has random starts of its own.
        seed: of the random starts.
        run_dir: where finished batches are kept; a run that finds its state there goes on from it, if detector,
            inputs, set and attack are the same down to their code (:mod:`robustood.identity`). Reports of all
            sides may share it.
        name: stands for what cannot be identified in them, such as an open file; needed with a ``run_dir`` alone.
        how: passed to the attack, such as ``steps=100, restarts=5``.

    Raises:
        ValueError: for invalid inputs or settings, a missing set, a ``run_dir`` of another report, or one without a
            ``name`` where it is needed.
    """
    check_choice(side, "side", SIDES)
    check_mapping(x_out, "x_out", "{name: images}")
    bench = Bench(
        detector, x_in, dict(x_out), within, attack, tpr, confidence, batch_size, seed, how, run_dir,
        name,
    )  # fmt: skip
    return bench.report(side)


def four_sides(
    detector: Detector,
    x_in: Inputs,
    x_out: Mapping[str, Inputs],
    within: PerturbationSet | float,
    **settings: Any,
) -> dict[Side, Report]:
    """The reports of all four sides, each input attacked once.

    Args:
        settings: of :func:`ood_report`, apart from the side.
    """
    check_mapping(x_out, "x_out", "{name: images}")
    defaults = {"attack": attack_score, "tpr": 0.95, "confidence": 0.95, "batch_size": 512, "seed": 0,
                "run_dir": None, "name": None}  # fmt: skip
    own = {name: settings.pop(name, value) for name, value in defaults.items()}
    bench = Bench(detector, x_in, dict(x_out), within, how=settings, **own)
    return {side: bench.report(side) for side in SIDES}


@dataclass
class Bench:
    """The inputs, the attack and the scores measured so far; arguments as in :func:`ood_report`."""

    detector: Detector
    x_in: Inputs
    x_out: dict[str, Inputs]
    within: PerturbationSet | float | None
    attack: Attack
    tpr: float
    confidence: float
    batch_size: int
    seed: int
    how: dict[str, Any]
    run_dir: str | Path | None
    name: str | None = None

    def __post_init__(self) -> None:
        check_detector(self.detector)
        check_callable(self.attack, "attack", "attack(detector, x, within, direction=..., ...)")
        check_keywords(self.attack, self.how, "ood_report()")
        plain = {k: v.item() for k, v in self.how.items() if isinstance(v, np.number)}
        self.how = {**self.how, **plain}
        check_number(self.tpr, "tpr", 1e-9, 1)
        self.batch_size = check_count(self.batch_size, "batch_size", low=1)
        self.seed = check_seed(self.seed)
        if self.run_dir is not None:
            check_path(self.run_dir, "run_dir")
        if not self.x_out:
            raise ValueError("x_out is empty; pass at least one set of outliers, {name: images}")
        self.within = None if self.within is None else as_set(self.within)
        box = (0, 1) if self.within is None else self.within.box
        self.x_in = taken(self.x_in, box, "x_in")
        self.x_out = {k: taken(v, box, f"x_out[{k!r}]") for k, v in self.x_out.items()}
        self.settings = {
            "detector": type(self.detector).__name__, "within": describe(self.within),
            "attack": describe(self.attack), "how": describe(self.how), "seed": self.seed,
            "batch_size": self.batch_size,
        }  # fmt: skip
        self.known = Known(self.run_dir, self.identity)

    def identity(self) -> dict[str, str]:
        """What the scores depend on, down to code and tensors."""
        how = {f"how[{key!r}]": value for key, value in sorted(self.how.items())}
        sets = {f"x_out[{key!r}]": x for key, x in sorted(self.x_out.items())}
        return identity(
            self.name, seed=self.seed, batch_size=self.batch_size, detector=self.detector, within=self.within,
            attack=self.attack, **how, x_in=self.x_in, **sets,
        )  # fmt: skip

    def of(self, name: str, x: Inputs, direction: Direction | None) -> Scores:
        """Scores of a set, clean or after an attack; each batch is measured once."""
        parts = []
        for number, part in enumerate(x.split(self.batch_size)):
            compute = partial(self.batch, part, number, direction)
            parts.append(self.known.get(f"{name} {direction} {number}", compute).numpy())
        return np.concatenate(parts)

    def batch(self, x: Inputs, number: int, direction: Direction | None) -> Tensor:
        """The scores of one batch."""
        x = x.to(self.detector.device(x), copy=True)
        if direction is not None:
            noise = torch.Generator(x.device).manual_seed(self.seed * 1_000_003 + number)
            how = {"direction": direction, "generator": noise, **self.how}
            x = self.attack(self.detector, x, self.within, **how)
        return torch.from_numpy(scores(self.detector, x, self.batch_size))

    def report(self, side: Side) -> Report:
        """Rows for one side."""
        if side != "none" and self.within is None:
            raise ValueError(f'within is missing: side="{side}" needs a perturbation set')
        clean = self.of("in", self.x_in, None)
        came = self.of("in", self.x_in, "lower") if side in ("in", "both") else clean
        up = "raise" if side in ("out", "both") else None
        out = {name: self.of(f"out {name}", x, up) for name, x in self.x_out.items()}
        rows = [
            {"set": name, **measure(clean, came, values, self.tpr, self.confidence)}
            for name, values in out.items()
        ]
        settings = {**self.settings, "side": side, "tpr": self.tpr, "confidence": self.confidence}
        if side == "none":
            settings |= {"attack": "none", "how": "none"}
        return Report(settings, rows, {"in (clean)": clean, "in": came, **out})


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a report without classes of its own, as JSON has it."""
    return {k: asdict(v) if isinstance(v, Estimate) else v for k, v in row.items()}


def measure(
    clean: Scores,
    scores_in: Scores,
    scores_out: Scores,
    tpr: float = 0.95,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """One row of a :class:`Report`: from clean scores, which set a threshold, and those that came."""
    scores_in, scores_out = numbers(scores_in, "scores_in"), numbers(scores_out, "scores_out")
    fixed = metrics.threshold_at_tpr(numbers(clean, "clean"), tpr)
    moved = metrics.threshold_at_tpr(scores_in, tpr)
    kept = metrics.acceptance(scores_in, fixed, confidence)
    return {
        "n_in": scores_in.size,
        "n_out": scores_out.size,
        "auroc": metrics.confidence_interval(
            metrics.auroc, scores_in, scores_out, confidence=confidence
        ),
        "aupr_in": metrics.aupr(scores_in, scores_out, positive="in"),
        "aupr_out": metrics.aupr(scores_in, scores_out, positive="out"),
        "fpr": metrics.acceptance(scores_out, fixed, confidence),
        "fpr_attacked": metrics.acceptance(scores_out, moved, confidence),
        "rejected": Estimate(1 - kept.value, 1 - kept.high, 1 - kept.low, kept.n),
        "detection_error": metrics.detection_error(scores_in, scores_out),
        "tie_rate": metrics.tie_rate(scores_in, scores_out),
    }


class Known:
    """Tensors that were computed before, kept in a folder; computes what is missing."""

    def __init__(self, folder: str | Path | None, told: Callable[[], dict[str, str]]):
        self.checkpoint, self.parts = None, {}
        if folder is not None:
            self.checkpoint = Checkpoint(Path(folder) / "scores.state", "report", told())
            self.parts = (self.checkpoint.state or {"parts": {}})["parts"]

    def get(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if name not in self.parts:
            self.parts[name] = compute()
            if self.checkpoint is not None:
                self.checkpoint.write({"parts": self.parts})
        return self.parts[name]


def epsilon_curve(
    detector: Detector,
    x_in: Inputs,
    x_out: Inputs,
    within: Ball | float,
    radii: Sequence[float],
    *,
    side: Side = "both",
    run_dir: str | Path | None = None,
    **how: Any,
) -> list[dict[str, Any]]:
    """Rows of a :class:`Report` for one set of outliers as the radius grows.

    What was found at a smaller radius is allowed at a larger one, so the best so far is kept: AUROC
    cannot rise along the curve.

    Args:
        within: a norm ball, whose radius is replaced.
        radii: in increasing order; 0 is the clean report.
        run_dir: where finished batches are kept, a folder for each radius.
        how: passed to :func:`ood_report`.

    Returns:
        One dict a radius, with ``eps`` and the entries of a row.
    """
    check_several(radii, "radii", "radii, in increasing order")
    radii = [float(eps) for eps in reals(radii, "radii")]
    if run_dir is not None:
        check_path(run_dir, "run_dir")
    if list(radii) != sorted(radii) or not len(radii) or radii[0] < 0:
        raise ValueError(f"radii must be at least 0 and increasing, got {list(radii)}")
    ball, rows = as_set(within), []
    if not isinstance(ball, Ball) or not ball.eps:
        raise ValueError(
            f"within must be a ball of a radius above 0, such as Linf(0.1), got {within!r}"
        )
    low, high = None, None
    for eps in radii:
        part = ood_report(
            detector, x_in, {"out": x_out}, ball.scaled(eps / ball.eps), side=side if eps else "none",
            run_dir=run_dir and Path(run_dir) / f"eps_{eps:.6f}", **how,
        )  # fmt: skip
        low = part.scores["in"] if low is None else np.minimum(low, part.scores["in"])
        high = part.scores["out"] if high is None else np.maximum(high, part.scores["out"])
        confidence, tpr = part.settings["confidence"], part.settings["tpr"]
        rows.append({"eps": eps, **measure(part.scores["in (clean)"], low, high, tpr, confidence)})
    return rows
