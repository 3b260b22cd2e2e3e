"""The standard evaluation of a detector: a fixed sequence of attacks, and the worst case of each input."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from robustood import distributed, metrics, rng, sanity
from robustood.detectors import Detector, Direction
from robustood.evaluate._protocol import VERSION, Stage, climbable, stages
from robustood.evaluate._report import Bench, Inputs, Job, Row, Scores, Wanted, scores
from robustood.evaluate._verdict import StandardReport
from robustood.identity import identity
from robustood.inputs import check_callable, check_mapping
from robustood.models import counting, networks
from robustood.perturbations import PerturbationSet, as_set
from robustood.streams import Stream, stream_seed


def standard(
    detector: Detector,
    x_in: Inputs,
    x_out: Mapping[str, Inputs],
    within: PerturbationSet | float,
    *,
    batch_size: int = 512,
    seed: int = 0,
    tpr: float = 0.95,
    confidence: float = 0.95,
    run_dir: str | Path | None = None,
    name: str | None = None,
    say: Callable[[str], None] | None = None,
) -> StandardReport:
    """Measure what is left of a detector after all attacks of a fixed protocol, ``"standard-1"``.

    Each input, of both sides, is attacked as in the papers, then by APGD on their surrogates, on the deployed score,
    on each of the detector's own objectives (towards the ten likeliest classes), from another random start, and
    by random search; the worst score counts. An attack is spent only on inputs that still hold: an outlier above
    all clean in-distribution scores changes no AUROC and no FPR any more. A score without a gradient is attacked by
    values alone, a finite set is searched exhaustively. :func:`robustood.sanity.check` runs first.

    Nothing about the attacks can be chosen, so that two reports of one version can be compared. Any attack gives a
    lower bound on the damage.

    Args:
        detector: fitted if it needs to be; :func:`robustood.detectors.wrap` makes one from any score.
        x_in: in-distribution test inputs.
        x_out: test outliers by name.
        within: the perturbation set, such as ``Linf(8/255)``, or ``8/255`` for short.
        batch_size: inputs attacked at a time.
        seed: of all random draws.
        tpr, confidence, run_dir, name: as in :func:`ood_report`.
        say: receives a line of progress before each attack, with the time left, such as ``print``; only in the first
            of several processes, which share the batches as in :func:`ood_report`.

    Returns:
        The reports of all four sides, what each attack added and cost, and the findings of the checks.

    Raises:
        ValueError: for invalid inputs or settings, or a ``run_dir`` of another evaluation.
    """
    check_mapping(x_out, "x_out", "{name: images}")
    if say is not None:
        check_callable(say, "say", "say(line)")
    bench = _Bench(
        detector, x_in, dict(x_out), as_set(within), batch_size=batch_size, seed=seed, tpr=tpr,
        confidence=confidence, run_dir=run_dir, name=name, say=say,
    )  # fmt: skip
    (findings,) = distributed.each([bench.findings])
    reports = bench.reports()
    return StandardReport(VERSION, reports, bench.trace(), findings, bench.sha256)


@dataclass
class _Attacked:
    """A set of inputs under attack.

    Attributes:
        bar: the signed score beyond which an input can do no more harm.
        worst: the signed scores, clean and after each attack.
        batches: the places of the inputs that still hold, batch by batch.
    """

    name: str
    x: Inputs
    direction: Direction
    bar: float = 0.0
    worst: list[Scores] = field(default_factory=list)
    batches: Sequence[Tensor] = ()

    @property
    def sign(self) -> int:
        """That of harm in the score."""
        return 1 if self.direction == "raise" else -1


@dataclass
class _Bench(Bench):
    """The worst score of each input after each attack; an attack sees only inputs that still hold.

    An outlier above all clean in-distribution scores can do no more harm, and neither can an in-distribution
    input below all clean outliers: AUROC and FPR depend on the order of the two sides alone. (So does the share of
    in-distribution inputs that are rejected, unless the clean threshold accepts all outliers anyway.)
    """

    say: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set = cast(PerturbationSet, self.within)
        for name, x in self.x_out.items():
            if x.shape[1:] != self.x_in.shape[1:] or x.dtype != self.x_in.dtype:
                raise ValueError(
                    f"x_out[{name!r}] must hold inputs like x_in, of shape {tuple(self.x_in.shape[1:])} in "
                    f"{self.x_in.dtype}, got {tuple(x.shape[1:])} in {x.dtype}; pass both in one type and order, "
                    "such as x.float(), or x.permute(0, 3, 1, 2) if the channels of one stand last"
                )
        # Before any attack: a network that cannot be identified is refused.
        self.sha256 = self.hashes()
        can = climbable(self.detector, self.x_in, self.set)
        self.stages = stages(self.detector, self.x_in, self.set, can)
        self.settings |= {"attack": VERSION, "how": "all", "gradient": "yes" if can else "none"}
        # Inputs, forward passes and backward passes of each attack.
        self.cost = np.zeros((len(self.stages), 3), dtype=int)
        self.worst: dict[str, list[Scores]] = {}  # of each set, clean and after each attack
        inputs = len(self.x_in) + sum(map(len, self.x_out.values()))
        self.clock = _Clock(sum(stage.passes for stage in self.stages) * inputs)

    def identity(self) -> dict[str, str]:
        """As that of any report, with the version of the protocol."""
        return super().identity() | {"protocol": VERSION}

    def of(self, *wanted: Wanted) -> list[Scores]:
        """Clean scores, or the worst after all attacks."""
        if all(direction is None for *_, direction in wanted):
            return super().of(*wanted)
        self.worst = self.worst or self.after_each()
        return [
            self.worst[name][-1] if direction else self.of((name, x, None))[0]
            for name, x, direction in wanted
        ]

    def after_each(self) -> dict[str, list[Scores]]:
        """The worst score of each input of each set so far: clean, then after each attack."""
        outside = [_Attacked(f"out {name}", x, "raise") for name, x in self.x_out.items()]
        sets = [_Attacked("in", self.x_in, "lower"), *outside]
        clean = self.of(*((one.name, one.x, None) for one in sets))
        for one, values in zip(sets, clean, strict=True):
            one.bar, one.worst = self.bar(one.direction), [one.sign * values]
        for place in range(len(self.stages)):
            self.attack_once(place, sets)
        return {one.name: [one.sign * worst for worst in one.worst] for one in sets}

    def bar(self, direction: Direction) -> float:
        """The signed score beyond which an input can do no more harm."""
        if direction == "raise":
            return float(self.of(("in", self.x_in, None))[0].max())
        clean = self.of(*((f"out {name}", x, None) for name, x in self.x_out.items()))
        return -float(np.concatenate(clean).min())

    def attack_once(self, place: int, sets: list[_Attacked]) -> None:
        """Make one attack of the protocol on the inputs of all sets that still hold."""
        stage = self.stages[place]
        jobs: dict[str, Job] = {}
        for one in sets:
            holding = torch.from_numpy(np.flatnonzero(one.worst[-1] <= one.bar))
            one.batches = holding.split(self.batch_size) if len(holding) else ()
            self.clock.skip(stage.passes * (len(one.x) - len(holding)))
            for number, index in enumerate(one.batches):
                job = partial(self.stage_batch, stage, one, index, place, number)
                jobs[f"{one.name} {stage.name} {number}"] = job
        found = self.known.each(jobs)
        for one in sets:
            if self.say is not None and distributed.rank() == 0:
                held, rest = sum(map(len, one.batches)), self.clock.left()
                self.say(f"{one.name}: {stage.name} on {held} of {len(one.x)} inputs{rest}")
            worst = one.worst[-1].copy()
            for index in one.batches:
                values = next(found).numpy()
                self.cost[place] += len(index), *values[-2:].astype(int)
                at = index.numpy()  # as a tensor, a single index would be read as a number
                worst[at] = np.maximum(worst[at], one.sign * values[:-2])
                self.clock.done(stage.passes * len(index))
            one.worst.append(worst)

    def stage_batch(
        self, stage: Stage, one: _Attacked, index: Tensor, place: int, number: int
    ) -> Tensor:
        """The scores of a batch after one attack, and then the number of forward and of backward passes."""
        x = one.x[index].to(self.detector.device(one.x), copy=True)
        seed = stream_seed(self.seed, 1000 * (place + 1) + number, Stream.BATCHES)
        noise = rng.generator(x.device, seed)
        how = {"direction": one.direction, "batch_size": self.batch_size, "generator": noise}
        with counting() as passes, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the gradient is exactly zero")  # a finding says so
            x = stage.attack(self.detector, x, self.set, **how)
            found = scores(self.detector, x, self.batch_size)
        return torch.from_numpy(np.concatenate([found, [passes.forwards, passes.backwards]]))

    def trace(self) -> list[Row]:
        """AUROC with both sides attacked, the mean over the sets, after each attack; and what it cost."""
        names = ["clean", *(stage.name for stage in self.stages)]
        n_all = len(self.x_in) + sum(map(len, self.x_out.values()))
        cost = np.concatenate([[[n_all, n_all, 0]], self.cost])
        rows = []
        for place, name in enumerate(names):
            inside = self.worst["in"][place]
            areas = [metrics.auroc(inside, self.worst[f"out {k}"][place]) for k in self.x_out]
            spent = dict(
                zip(("inputs", "forwards", "backwards"), cost[place].tolist(), strict=True)
            )
            rows.append(Row(attack=name, auroc=float(np.mean(areas)), **spent))
        return rows

    def findings(self) -> sanity.Findings:
        """Those of the checks, with outliers of all sets in turn."""
        mixed = torch.cat([x[:64] for x in self.x_out.values()])
        return sanity.check(self.detector, self.x_in, mixed, self.set, seed=self.seed)

    def hashes(self) -> dict[str, str]:
        """sha256 of the weights and of each set of inputs, by which two reports can be compared."""
        held = [v for network in networks(self.detector) for v in network.state_dict().values()]
        sets = {f"out {name}": [x] for name, x in sorted(self.x_out.items())}
        return {k: _sha256(v) for k, v in {"weights": held, "in": [self.x_in], **sets}.items()}


def _sha256(held: Sequence[object]) -> str:
    """Of the values of some tensors, and of whatever else a network keeps with its weights."""
    found = hashlib.sha256()
    for each in held:
        if isinstance(each, Tensor) and not each.is_quantized:
            flat = each.detach().cpu().contiguous().view(-1)
            found.update(flat.view(torch.uint8).numpy())  # as bytes: NumPy has no bfloat16
        else:
            found.update(repr(sorted(identity(None, weights=each).items())).encode())
    return found.hexdigest()


class _Clock:
    """The time left, from the time that the passes took so far."""

    def __init__(self, planned: int):
        self.planned, self.spent, self.start = planned, 0, time.monotonic()

    def skip(self, passes: int) -> None:
        """Passes that are not needed."""
        self.planned -= passes

    def done(self, passes: int) -> None:
        """Passes that were made."""
        self.spent += passes

    def left(self) -> str:
        """The end of a line of progress; at most what is said, since inputs that fall are not attacked again."""
        if not self.spent:
            return ""
        seconds = (time.monotonic() - self.start) * (self.planned - self.spent) / self.spent
        return (
            f", at most {seconds / 60:.1f} min left"
            if seconds > 90
            else f", at most {seconds:.0f} s left"
        )
