"""From scores to a report: rates with intervals, at thresholds calibrated on clean or on attacked inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from robustood import distributed, metrics, rng, tables
from robustood.checkpoints import Checkpoint, Json, as_csv
from robustood.detectors import Detector, Direction
from robustood.detectors._base import check_scores
from robustood.evaluate._attack import attack_score, check_detector
from robustood.evaluate._text import REVERSED, as_text, flat, parsed, plain, written
from robustood.identity import describe, identity
from robustood.inputs import (
    check_callable,
    check_choice,
    check_confidence,
    check_count,
    check_flag,
    check_keywords,
    check_mapping,
    check_number,
    check_path,
    check_seed,
    check_several,
    check_text,
    checked_inputs,
    checked_moved,
    finite_inputs,
    numbers,
    reals,
    suggest,
)
from robustood.metrics import Estimate
from robustood.models import check_finite, frozen, networks
from robustood.perturbations import Ball, PerturbationSet, as_set
from robustood.streams import Stream, stream_seed

Inputs = Float[Tensor, "_ *shape"]  # sets differ in size
Attack = Callable[..., Tensor]
Scores = Float[np.ndarray, " _"]
Job = Callable[[], Tensor]
# The name of a set, its inputs, and the direction of the attack on them, if any.
Wanted = tuple[str, Inputs, Direction | None]
_Record = Json  # settings by name, or numbers, estimates and the name of a set
_COLUMNS = (
    "set", "n_in", "n_out", "auroc", "aupr_in", "aupr_out", "fpr", "fpr_attacked", "rejected",
    "detection_error", "tie_rate",
)  # fmt: skip

Side = Literal["none", "in", "out", "both"]
SIDES: tuple[Side, ...] = ("none", "in", "out", "both")


@torch.no_grad()
def scores(detector: Detector, x: Inputs, batch_size: int = 512) -> Scores:
    """The deployed score of each input (samples,), in float64 on the CPU."""
    check_detector(detector)
    batch_size = check_count(batch_size, "batch_size", low=1)
    x, parts = finite_inputs(x), []
    with frozen(detector):
        for part in x.split(batch_size):
            parts.append(detector.score(part.to(detector.device(part), copy=True)))
            check_scores(parts[-1], part)
    found = torch.cat(parts).double().cpu()
    check_finite((~found.isfinite()).sum(), len(x))
    return found.numpy()


class Row(dict[str, Any]):
    """Numbers by the name of their column; asked for an unknown column, it names the known ones."""

    def __missing__(self, column: object) -> NoReturn:
        raise KeyError(f"no column {column!r} in this row; {suggest(str(column), self)}")


def in_order(row: Row) -> Row:
    """A row with its columns in the usual order, which JSON does not keep."""
    return Row({c: row[c] for c in _COLUMNS if c in row} | row)


@dataclass(frozen=True)
class Report:
    """Detection before or after an attack.

    Attributes:
        settings: what was measured, and how.
        rows: one :class:`Row` per set of outliers: ``set``, ``n_in``, ``n_out``, ``auroc``, ``aupr_in``,
            ``aupr_out``, ``fpr`` (share of outliers accepted at the threshold that accepts ``tpr`` of *clean*
            in-distribution inputs), ``fpr_attacked`` (at the threshold that accepts ``tpr`` of them *as measured*,
            attacked or not), ``rejected`` (share of in-distribution inputs rejected at the clean threshold),
            ``detection_error`` (balanced), ``tie_rate``. Rates are :class:`~robustood.metrics.Estimate`.
        scores: the deployed scores, under ``"in (clean)"``, ``"in"`` and the names of the sets.
    """

    settings: _Record
    rows: list[Row]
    scores: dict[str, Scores] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", [Row(row) for row in self.rows])

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row["set"] == name:
                return row
        raise KeyError(
            f"report has no row {name!r}; choose one of: {', '.join(r['set'] for r in self.rows)}"
        )

    def mean(self, metric: str) -> float:
        """Unweighted mean of a metric over the sets."""
        known = [name for name, value in self.rows[0].items() if not isinstance(value, str)]
        check_choice(metric, "metric", known)
        return float(np.mean([float(row[metric]) for row in self.rows]))

    def to_json(self, path: str | Path | None = None, *, scores: bool = True) -> str:
        """The report as JSON.

        Args:
            path: file that receives it as well.
            scores: keep the scores, in decimals that give the same float64 when read. An image takes about 20 bytes.
        """
        check_flag(scores, "scores")
        return written(as_text(self.to_dict(scores)), path)

    def to_dict(self, scores: bool = True) -> _Record:
        """What :meth:`to_json` writes."""
        kept: _Record = {"settings": self.settings, "rows": [plain(row) for row in self.rows]}
        if scores and self.scores:
            kept["scores"] = {name: each.tolist() for name, each in self.scores.items()}
        return kept

    @classmethod
    def from_dict(cls, kept: _Record) -> Report:
        """The report that :meth:`to_dict` returned.

        Raises:
            ValueError, TypeError, AttributeError, KeyError: for anything else.
        """
        rows = [
            Row({k: Estimate(**v) if isinstance(v, dict) else v for k, v in row.items()})
            for row in kept["rows"]
        ]
        values = {
            name: reals(each, f"scores[{name!r}]", axes=1)
            for name, each in kept.get("scores", {}).items()
        }
        return cls(kept["settings"], rows, values)

    @classmethod
    def from_json(cls, text_or_path: str | Path) -> Report:
        """The report that :meth:`to_json` wrote; without scores if none were kept.

        Args:
            text_or_path: the JSON, which begins with "{", or the path of its file.

        Raises:
            FileNotFoundError: for a path without a file.
            ValueError: for text or a file that is not a report.
        """
        return parsed(text_or_path, ("settings", "rows"), "Report", cls.from_dict)

    def to_csv(self, path: str | Path | None = None) -> str:
        """The rows as CSV; also written to ``path`` if given.

        A rate takes three columns: ``auroc``, ``auroc_low`` and ``auroc_high``, the ends of its interval.
        """
        return written(as_csv([flat(in_order(row)) for row in self.rows]), path)

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

    In-distribution inputs are attacked to lower their score, outliers to raise theirs. Several processes
    (:func:`robustood.distributed.join`) must all make the same call; they share the batches, and all get the report
    that one process would get. An attack that draws random numbers must take them from ``generator``.

    Args:
        detector: fitted if it needs to be.
        x_in: in-distribution test inputs.
        x_out: test outliers by name.
        within: the perturbation set; required if a side is attacked.
        side: ``"none"``, ``"in"``, ``"out"`` or ``"both"``.
        attack: ``attack(detector, x, within, direction=..., generator=..., **how)``, such as
            :func:`attack_score` or ``partial(paper_attack, paper="aloe")``. It is called with the detector in eval
            mode and its parameters frozen. Shape and box of what it returns are checked; :func:`robustood.sanity.check`
            also checks that it stays in a ball.
        tpr: share of in-distribution inputs that the thresholds accept.
        confidence: of the intervals.
        batch_size: inputs scored and attacked at a time; each batch draws its own random initial points.
        seed: of the random initial points.
        run_dir: folder for finished batches; a run that finds its state there resumes from it, if detector,
            inputs, set and attack are the same down to their code (:mod:`robustood.identity`), by any number of
            processes. Reports of all sides may share it.
        name: stands for parts of them that cannot be identified, such as an open file; used with ``run_dir`` only.
        how: passed to the attack, such as ``steps=100, restarts=5``.

    Raises:
        ValueError: for invalid inputs or settings, a missing set, an attack that leaves the box, a score of
            another shape, a ``run_dir`` of another report, or a missing ``name`` if one is needed.
    """
    check_choice(side, "side", SIDES)
    check_mapping(x_out, "x_out", "{name: images}")
    settings = (attack, tpr, confidence, batch_size, seed, run_dir, name)
    return Bench(detector, x_in, dict(x_out), within, *settings, how=how).report(side)


def four_sides(
    detector: Detector,
    x_in: Inputs,
    x_out: Mapping[str, Inputs],
    within: PerturbationSet | float,
    **settings: Any,
) -> dict[Side, Report]:
    """The reports of all four sides, each input attacked once.

    Args:
        settings: those of :func:`ood_report`, except ``side``.
    """
    check_mapping(x_out, "x_out", "{name: images}")
    own = {f.name: settings.pop(f.name) for f in fields(Bench) if f.name in settings}
    return Bench(detector, x_in, dict(x_out), within, how=settings, **own).reports()


@dataclass
class Bench:
    """Inputs, attack, and the scores measured so far; arguments as in :func:`ood_report`."""

    detector: Detector
    x_in: Inputs
    x_out: dict[str, Inputs]
    within: PerturbationSet | float | None
    attack: Attack = attack_score
    tpr: float = 0.95
    confidence: float = 0.95
    batch_size: int = 512
    seed: int = 0
    run_dir: str | Path | None = None
    name: str | None = None
    how: _Record = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_detector(self.detector)
        check_callable(self.attack, "attack", "attack(detector, x, within, direction=..., ...)")
        for own, instead in (("direction", "side"), ("generator", "seed")):
            if own in self.how:
                raise ValueError(
                    f"{own} follows from {instead}; leave it out and choose {instead}="
                )
        check_keywords(self.attack, self.how, "ood_report()")
        plain = {k: v.item() for k, v in self.how.items() if isinstance(v, np.number)}
        self.how = {**self.how, **plain}
        check_number(self.tpr, "tpr", 1e-9, 1)
        check_confidence(self.confidence)
        self.batch_size = check_count(self.batch_size, "batch_size", low=1)
        self.seed = check_seed(self.seed)
        if self.run_dir is not None:
            check_path(self.run_dir, "run_dir")
        if not self.x_out:
            raise ValueError("x_out is empty; pass at least one set of outliers, {name: images}")
        for name in self.x_out:
            check_text(name, "each name in x_out")
            if name in ("in", "in (clean)"):
                raise ValueError(
                    f"x_out must not name a set {name!r}, as a report calls the in-distribution scores; rename it"
                )
        self.within = None if self.within is None else as_set(self.within)
        box = (0, 1) if self.within is None else self.within.box
        self.x_in = checked_inputs(self.x_in, box, "x_in")
        self.x_out = {k: checked_inputs(v, box, f"x_out[{k!r}]") for k, v in self.x_out.items()}
        given = {name: describe(getattr(self, name)) for name in ("within", "attack", "how")}
        run = {"seed": self.seed, "batch_size": self.batch_size}
        self.settings = {"detector": self.detector._get_name(), **given, **run}
        if distributed.world() > 1:
            held = [network.state_dict() for network in networks(self.detector)]
            distributed.check_alike(identity(None, **run, weights=held, **self.inputs()))
        self.known = _Known(self.run_dir, self.identity)

    def inputs(self) -> dict[str, Inputs]:
        """The sets by the names that messages use."""
        return {"x_in": self.x_in} | {f"x_out[{k!r}]": x for k, x in sorted(self.x_out.items())}

    def identity(self) -> dict[str, str]:
        """Everything that the scores depend on, down to code and tensors."""
        how = {f"how[{key!r}]": value for key, value in sorted(self.how.items())}
        run = {"seed": self.seed, "batch_size": self.batch_size}
        own = {"detector": self.detector, "within": self.within, "attack": self.attack}
        return identity(self.name, **run, **own, **how, **self.inputs())

    def of(self, *wanted: Wanted) -> list[Scores]:
        """Scores of each set; each batch is measured once, in one of the processes."""
        jobs = [self.batches(*each) for each in wanted]
        whole = {name: job for own in jobs for name, job in own.items()}
        found = dict(zip(whole, self.known.each(whole), strict=True))
        return [np.concatenate([found[name].numpy() for name in own]) for own in jobs]

    def batches(self, name: str, x: Inputs, direction: Direction | None) -> dict[str, Job]:
        """How to measure each batch of a set."""
        return {
            f"{name} {direction} {number}": partial(self.batch, part, number, direction)
            for number, part in enumerate(x.split(self.batch_size))
        }

    def batch(self, x: Inputs, number: int, direction: Direction | None) -> Tensor:
        """The scores of one batch."""
        x = x.detach().to(self.detector.device(x), copy=True)
        if direction is not None and self.within is not None:
            noise = rng.generator(x.device, stream_seed(self.seed, number, Stream.BATCHES))
            how = {"direction": direction, "generator": noise, **self.how}
            with frozen(self.detector):
                moved = self.attack(self.detector, x.clone(), self.within, **how)
            x = checked_moved(moved, x, as_set(self.within).box)
        return torch.from_numpy(scores(self.detector, x, self.batch_size))

    def report(self, side: Side) -> Report:
        """Rows for one side."""
        if side != "none" and self.within is None:
            raise ValueError(
                f'within is None, but side="{side}" needs a perturbation set, such as Linf(8/255)'
            )
        low = "lower" if side in ("in", "both") else None
        up = "raise" if side in ("out", "both") else None
        sets: list[Wanted] = [(f"out {name}", x, up) for name, x in self.x_out.items()]
        clean, came, *left = self.of(("in", self.x_in, None), ("in", self.x_in, low), *sets)
        out = dict(zip(self.x_out, left, strict=True))
        rows = [
            Row(set=name, **measure(clean, came, values, self.tpr, self.confidence))
            for name, values in out.items()
        ]
        settings = {**self.settings, "side": side, "tpr": self.tpr, "confidence": self.confidence}
        if side == "none":
            settings |= {"attack": "none", "how": "none"}
            below = [f"{row['auroc']} on {row['set']!r}" for row in rows if row["auroc"].high < 0.5]
            if len(below) == len(rows) and distributed.rank() == 0:
                warnings.warn(REVERSED.format(", ".join(below)), stacklevel=3)
        return Report(settings, rows, {"in (clean)": clean, "in": came, **out})

    def reports(self) -> dict[Side, Report]:
        """Rows for each side. Both sides come before each of them, so that several processes share all attacks."""
        found = {side: self.report(side) for side in ("none", "both", "in", "out")}
        return {side: found[side] for side in SIDES}


def measure(
    clean: Scores,
    scores_in: Scores,
    scores_out: Scores,
    tpr: float = 0.95,
    confidence: float = 0.95,
) -> Row:
    """One row of a :class:`Report`, from clean scores, which set a threshold, and the scores as measured."""
    scores_in, scores_out = numbers(scores_in, "scores_in"), numbers(scores_out, "scores_out")
    fixed = metrics.threshold_at_tpr(numbers(clean, "clean"), tpr)
    moved = metrics.threshold_at_tpr(scores_in, tpr)
    kept = metrics.acceptance(scores_in, fixed, confidence)
    return Row(
        n_in=scores_in.size,
        n_out=scores_out.size,
        auroc=metrics.confidence_interval(
            metrics.auroc, scores_in, scores_out, confidence=confidence
        ),
        aupr_in=metrics.aupr(scores_in, scores_out, positive="in"),
        aupr_out=metrics.aupr(scores_in, scores_out, positive="out"),
        fpr=metrics.acceptance(scores_out, fixed, confidence),
        fpr_attacked=metrics.acceptance(scores_out, moved, confidence),
        rejected=Estimate(1 - kept.value, 1 - kept.high, 1 - kept.low, kept.n),
        detection_error=metrics.detection_error(scores_in, scores_out),
        tie_rate=metrics.tie_rate(scores_in, scores_out),
    )


class _Known:
    """Tensors computed before and stored in a folder; computes what is missing."""

    def __init__(self, folder: str | Path | None, is_text: Callable[[], dict[str, str]]):
        self.checkpoint, self.parts = None, {}
        if folder is not None:
            file = Path(folder) / "scores.state"
            # One process reads, so that all know the same parts.
            (self.checkpoint,) = distributed.each([lambda: Checkpoint(file, "report", is_text())])
            self.parts = (self.checkpoint.state or {"parts": {}})["parts"]

    def each(self, jobs: dict[str, Job]) -> Iterator[Tensor]:
        """The tensors of these names in order; the processes share the jobs of those that are missing."""
        computed = distributed.each([job for name, job in jobs.items() if name not in self.parts])
        for name in jobs:
            if name not in self.parts:
                self.parts[name] = next(computed)
                if self.checkpoint is not None and distributed.rank() == 0:
                    self.checkpoint.write({"parts": self.parts})
            yield self.parts[name]


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
) -> list[Row]:
    """Rows of a :class:`Report` for one set of outliers as the radius grows.

    What was found at a smaller radius is allowed at a larger one, so the worst scores so far are used: AUROC
    cannot increase along the curve.

    Args:
        within: a norm ball, whose radius is replaced.
        radii: in increasing order; 0 is the clean report.
        run_dir: folder for finished batches, with a subfolder per radius.
        how: passed to :func:`ood_report`.

    Returns:
        One :class:`Row` per radius, with ``eps`` and the entries of a row.
    """
    check_several(radii, "radii", "radii, in increasing order")
    radii = [float(eps) for eps in reals(radii, "radii")]
    if run_dir is not None:
        check_path(run_dir, "run_dir")
    if radii != sorted(radii) or radii[0] < 0:
        raise ValueError(f"radii must be at least 0 and increasing, got {radii}")
    ball, rows = as_set(within), []
    if not isinstance(ball, Ball) or not ball.eps:
        raise ValueError(
            f"within must be a ball with a radius above 0, such as Linf(0.1), got {within!r}"
        )
    low, high = None, None
    balls = [ball.scaled(eps / ball.eps) for eps in radii]  # refuses a radius before any work
    for eps, grown in zip(radii, balls, strict=True):
        attacked = side if eps else "none"
        own = run_dir and Path(run_dir) / f"eps_{eps:.6f}"
        part = ood_report(detector, x_in, {"out": x_out}, grown, side=attacked, run_dir=own, **how)
        low = part.scores["in"] if low is None else np.minimum(low, part.scores["in"])
        high = part.scores["out"] if high is None else np.maximum(high, part.scores["out"])
        confidence, tpr = part.settings["confidence"], part.settings["tpr"]
        row = measure(part.scores["in (clean)"], low, high, tpr, confidence)
        rows.append(Row(eps=eps, **row))
    return rows
