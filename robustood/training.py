"""One training loop for every method of the book.

What differs between methods is the objective (:mod:`robustood.objectives`). The loop, :meth:`Run.train`, draws
batches, takes steps and keeps the books. A run is a function of its arguments: the data order and all
randomness of an epoch come from the seed and the epoch's number (:mod:`robustood.streams`), and the learning rate
from the step's. With a ``run_dir`` it can therefore be interrupted anywhere and resumed with identical results.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from robustood import distributed
from robustood.checkpoints import Checkpoint, write_table
from robustood.data import Batch, Data, check_trainable, draw
from robustood.data._batches import Change, check_augment
from robustood.engine import Engine, Meter, running, synchronised_time
from robustood.identity import identity
from robustood.inputs import (
    check_choice,
    check_counts,
    check_device,
    check_instance,
    check_number,
    check_path,
    check_seed,
    check_several,
)
from robustood.models import declared_outputs
from robustood.objectives import Objective
from robustood.streams import Stream, Streams

__all__ = ["History", "Monitor", "Run", "Schedule", "fit"]

Row = dict[str, float]
Monitor = Callable[[nn.Module], Row]
OnEpoch = Callable[[Row], object]


@dataclass
class History:
    """What a run recorded.

    Attributes:
        rows: one dict per epoch: ``epoch``, ``loss`` (mean over its steps), ``lr`` (at its end),
            ``seconds`` (of the run so far), and what the monitor adds.
        finished: False where the run stopped early on its time budget.
        speed: of a run with an engine: images per second, operations per step, and the time of a step relative to
            that of its bare forwards and backwards (:mod:`robustood.engine`).
    """

    rows: list[Row] = field(default_factory=list)
    finished: bool = False
    speed: dict[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        """One entry of every row."""
        check_choice(name, "name", list(self.rows[0]) if self.rows else [])
        return [row[name] for row in self.rows]


@dataclass(frozen=True)
class Schedule:
    """The steps of a run and the learning rate of each: linear warm-up, then down to zero, or stepwise.

    Attributes:
        epochs: of the run.
        steps: of an epoch.
        lr: the peak, from which the rate falls on a half cosine (Loshchilov and Hutter 2017).
        warmup: share of the run in which it rises.
        milestones: shares of the run at which it falls tenfold, in place of the cosine.
    """

    epochs: int
    steps: int
    lr: float
    warmup: float
    milestones: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_number(self.lr, "lr", 0)
        check_number(self.warmup, "warmup", 0, 1)
        if self.milestones is not None:
            check_several(self.milestones, "milestones", "shares of the run")
            for share in self.milestones:
                check_number(share, "milestones: each", 0, 1)

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.epochs * self.steps

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        peak, done = float(self.lr), (step + 1) / self.total
        if done < self.warmup:
            return peak * done / self.warmup
        if self.milestones is not None:
            return peak * 0.1 ** sum(step >= round(m * self.total) for m in self.milestones)
        angle = math.pi * (done - self.warmup) / max(1 - self.warmup, 1e-12)
        return peak * 0.5 * (1 + math.cos(angle))


def fit(
    model: nn.Module,
    objective: Objective,
    data: Data,
    *,
    epochs: int,
    batch_size: int = 64,
    outlier_batch_size: int = 128,
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    warmup: float = 0.15,
    optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    milestones: Sequence[float] | None = None,
    augment: Change | None = None,
    engine: Engine | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    monitor: Monitor | None = None,
    on_epoch: OnEpoch | None = None,
    run_dir: str | Path | None = None,
    name: str | None = None,
    minutes: float = math.inf,
) -> History:
    """Train a model in place and leave it in eval mode.

    Args:
        model: the network; it stays on ``device``. Where it has ``parameter_groups()``, a group's ``scale``
            multiplies the learning rate.
        objective: maps (model, batch) to a scalar, such as ``Adversarial(8/255)``. Where it has
            ``prepare(model, data, epoch, generator)``, that chooses the data of each epoch.
        data: ``data.train`` and ``data.outliers`` are used.
        epochs: passes over the training set; each drops an incomplete last batch; which
            samples are in it varies by epoch.
        batch_size: samples per step, at most the size of the training set.
        outlier_batch_size: auxiliary outliers per step, where the data have any.
        lr: peak learning rate, reached after the warm-up and left on a half cosine.
        weight_decay: passed to the optimiser.
        warmup: share of the run with a rising learning rate.
        optimiser: ``optimiser(parameters, lr=..., weight_decay=...)``.
        milestones: shares of the run at which the learning rate falls tenfold, in place of the cosine.
        augment: applied to inputs and outliers of a batch, such as :class:`robustood.data.Augment`.
        engine: how the network is run (:func:`robustood.engine.choose`). Where one is given, a step is
            measured before the first, and the history says how fast the run was.
        seed: of the data order and of every random start.
        device: default the model's.
        monitor: called after each epoch in eval mode; its numbers join the history.
        on_epoch: called with each row of the history after it is kept, such as ``print``.
        run_dir: where ``state.pt`` and ``log.csv`` are kept. A run that finds its state there goes
            on from it, with the same result bit for bit on one machine's CPU, if model, objective, data and all
            else are the same down to their code (:mod:`robustood.identity`).
        name: stands for a part that cannot be identified, such as an open file; used with a ``run_dir`` only.
        minutes: stop in time to keep this budget; the state is written first. A monitor is
            not interrupted.

    Returns:
        The history. The same arguments give the same weights bit for bit on one machine's CPU. With
        several processes (:func:`robustood.distributed.join`) batch sizes are those of all together, the result is
        that of one process up to rounding, and the first process writes.

    Raises:
        ValueError: for parts of the wrong kind, invalid data or settings, a ``run_dir`` of another run, or one
            without a ``name`` where it is needed, before any step; for a monitor that gives no numbers.
        FloatingPointError: when the loss is not finite; the message names the step, and the model
            holds the weights of the last good epoch.
    """
    _check_parts(model, objective, data, optimiser)
    check_counts(epochs=epochs, batch_size=batch_size, outlier_batch_size=outlier_batch_size)
    check_number(minutes, "minutes", 0, math.inf)
    check_number(weight_decay, "weight_decay", 0)
    check_augment(augment)
    check_device(device or "cpu")
    check_path(run_dir or ".", "run_dir")
    batch_size = min(batch_size, len(data.train))
    distributed.check_divisible(batch_size, "batch_size")
    distributed.check_divisible(outlier_batch_size, "outlier_batch_size", 2)  # half is attacked
    schedule = Schedule(epochs, len(data.train) // batch_size, lr, warmup, milestones)
    device = torch.device(device or next(model.parameters()).device)
    model, data = model.to(device), data.to(device)
    run = Run(
        model=model,
        objective=objective,
        optimiser=_made(optimiser, model, float(lr), float(weight_decay)),
        data=data,
        draw=partial(
            draw, batch_size=batch_size, outlier_batch_size=outlier_batch_size, augment=augment
        ),
        schedule=schedule,
        streams=Streams(check_seed(seed), device),
        deadline=time.monotonic() + 60 * minutes,
        engine=engine,
    )
    if run_dir is not None:
        told = run.identity(name, made_by=optimiser)
        run.resume(Checkpoint(Path(run_dir) / "state.pt", "run", told))
    with (
        running(model, engine or Engine()) as network,
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        tqdm(initial=run.done, total=schedule.total, disable=distributed.rank() > 0 or None) as bar,
    ):
        run.train(network, bar, monitor, on_epoch)
    return run.history(batch_size)


@dataclass(kw_only=True)
class _Progress:
    """How far a run is: what its checkpoint keeps beside weights and optimiser.

    Attributes:
        epoch: that is under way, counted from 0.
        losses: of its steps so far.
        start: the weights that it began with.
        noise: where the random streams are.
        rows: one for each finished epoch.
        paces: seconds per step of each epoch, or of its parts where it was stopped inside.
        seconds: that the run took before this call.
    """

    epoch: int = 0
    losses: list[Tensor] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)
    noise: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(kw_only=True)
class Run(_Progress):
    """A training run: what it works with, and how far it is.

    Attributes:
        draw: the batches of an epoch, from data and a generator.
        deadline: by the clock of ``time.monotonic``.
        meter: what a step costs, once it is measured.
    """

    model: nn.Module
    objective: Objective
    optimiser: Optimizer
    data: Data
    draw: partial[Iterator[Batch]]
    schedule: Schedule
    streams: Streams
    deadline: float
    engine: Engine | None
    began: float = field(default_factory=time.monotonic)
    checkpoint: Checkpoint | None = None
    meter: Meter | None = None

    def train(
        self, network: nn.Module, bar: tqdm, monitor: Monitor | None, on_epoch: OnEpoch | None
    ) -> None:
        """Every epoch that is left, or as many steps as the time allows."""
        while self.epoch < self.schedule.epochs:
            data = self.prepare()
            for batch in self.batches(network, data):
                for group in self.optimiser.param_groups:
                    group["lr"] = self.schedule.rate(self.done) * group.get("scale", 1.0)
                loss = self.objective(network, batch)
                _check_gradient(loss)
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                self.optimiser.step()
                self.losses.append(loss.detach())
                bar.update()
            self.check_finite()
            if self.step < self.schedule.steps:  # the time is up
                self.save()
                return
            self.close_epoch(data.notes, monitor, on_epoch)

    @property
    def step(self) -> int:
        """The number of the epoch's next step."""
        return len(self.losses)

    @property
    def done(self) -> int:
        """Steps that the run has taken."""
        return self.epoch * self.schedule.steps + self.step

    def prepare(self) -> Data:
        """The epoch's data, chosen by the weights that the epoch began with, also after a stop inside it."""
        now = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.start = self.start or now
        choose = getattr(self.objective, "prepare", None)
        if choose is None:
            return self.data
        self.model.load_state_dict(self.start)
        generator = self.streams.of(self.epoch, Stream.CHOICE)
        chosen = choose(self.model, self.data, self.epoch, generator)
        self.model.load_state_dict(now)
        return chosen

    def open_epoch(self, network: nn.Module, data: Data) -> Iterator[Batch]:
        """The remaining batches of an epoch, with every generator in the state that the next one needs."""
        if self.engine and not self.meter:
            batch = next(self.draw(data, generator=self.streams.of(self.epoch, Stream.BATCHES)))
            self.meter = Meter.read(self.model, network, self.objective, batch)
        batches = self.draw(data, generator=self.streams.begin(self.epoch))
        for _ in range(self.step):  # the order is drawn anew, what was done is skipped
            next(batches)
        if self.step:
            self.streams.restore(self.noise)
        self.model.train()
        return batches

    def batches(self, network: nn.Module, data: Data) -> Iterator[Batch]:
        """The remaining batches, while another step fits the time budget."""
        batches, climb = self.open_epoch(network, data), getattr(network, "climb", None)
        first, began, slowest = self.step, synchronised_time(self.streams.device), 0.0
        while self.step < self.schedule.steps:
            start = time.monotonic()
            if self.out_of_time(start, slowest):  # asked before a batch is drawn
                break
            progress = self.done / self.schedule.total
            yield replace(next(batches), progress=progress, climb=climb)
            slowest = max(slowest, time.monotonic() - start)
        if taken := self.step - first:
            self.paces.append((synchronised_time(self.streams.device) - began) / taken)

    def out_of_time(self, now: float, slowest: float) -> bool:
        """Whether the next step would be too late; several processes agree, and ask at every eighth step."""
        if distributed.world() == 1:
            return now + 2 * slowest > self.deadline
        if math.isinf(self.deadline) or self.step % 8:
            return False
        late = float(now + 10 * slowest > self.deadline)
        return bool(distributed.mean(torch.tensor(late, device=self.streams.device)) > 0)

    def check_finite(self) -> None:
        """Stop where a loss or a weight is not finite; checked once per epoch, when alone the loop waits for a GPU."""
        losses = distributed.mean(torch.stack(self.losses)) if self.losses else torch.zeros(0)
        self.losses = list(losses)
        weights = torch.stack([p.detach().isfinite().all() for p in self.model.parameters()])
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if not bad and weights.all():
            return
        self.model.load_state_dict(self.start)
        self.model.eval()
        what = f"the loss is {float(losses[bad[0]])}" if bad else "weights are not finite"
        step = self.epoch * self.schedule.steps + (bad[0] if bad else self.step - 1)
        raise FloatingPointError(
            f"{what} at step {step} (epoch {self.epoch}); the model holds the weights of the last "
            "good epoch. Lower lr or lengthen warmup"
        )

    def close_epoch(self, notes: Row, monitor: Monitor | None, on_epoch: OnEpoch | None) -> None:
        """A row of history, the log and the checkpoint."""
        loss, lr = torch.stack(self.losses).mean(), self.optimiser.param_groups[0]["lr"]
        row = {"epoch": self.epoch, "loss": float(loss), "lr": lr, **notes}
        self.model.eval()
        seen = _numbers(monitor(self.model)) if monitor else {}
        if clash := seen.keys() & {*row, "seconds"}:
            raise ValueError(f"monitor must choose other names than {sorted(clash)}")
        row |= seen | {"seconds": self.elapsed()}
        self.rows.append(row)
        self.epoch, self.losses, self.start = self.epoch + 1, [], {}
        self.save()
        if on_epoch:
            on_epoch(row)

    def elapsed(self) -> float:
        """Seconds of the run so far, in all calls."""
        return self.seconds + time.monotonic() - self.began

    def save(self) -> None:
        """Write checkpoint and log, if the run has a folder."""
        if self.checkpoint is None or distributed.rank():
            return
        self.noise = self.streams.state()
        progress = {f.name: getattr(self, f.name) for f in fields(_Progress)}
        weights = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        self.checkpoint.write({**weights, **progress, "seconds": self.elapsed()})
        if self.rows:
            write_table(self.checkpoint.path.with_name("log.csv"), self.rows)

    def identity(self, name: str | None, made_by: object) -> dict[str, str]:
        """The fingerprint of the run, down to code and tensors (:mod:`robustood.identity`)."""
        train, parameters = self.data.train, self.model.named_parameters()
        return identity(
            name,
            **{key: value for key, value in vars(self.schedule).items() if key != "steps"},
            **self.draw.keywords,
            seed=self.streams.seed,
            device=self.streams.device.type,
            objective=self.objective,
            optimiser=self.optimiser,
            engine=self.engine,
            model=self.model,
            held=[key for key, p in parameters if not p.requires_grad],
            made_by=made_by,
            data=[train.x, train.y, self.data.outliers, self.data.compressed],
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Use this checkpoint, and resume from what it holds."""
        self.checkpoint = checkpoint
        if (state := checkpoint.state) is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        for f in fields(_Progress):
            setattr(self, f.name, state[f.name])
        self.losses = [loss.to(self.streams.device) for loss in self.losses]

    def history(self, images: int) -> History:
        """Leave the model ready for use, and report the speed of steps of so many images."""
        self.model.eval()
        found = History(self.rows, self.epoch == self.schedule.epochs)
        if self.engine and self.meter and self.paces:
            pace = sorted(self.paces)[len(self.paces) // 2]
            found.speed = self.meter.report(self.engine, pace, images, self.streams.device)
        return found


def _check_parts(model: nn.Module, objective: object, data: Data, optimiser: object) -> None:
    """Refuse what cannot be trained, or not be trained by, before any work."""
    check_instance(model, "model", nn.Module, "a torch.nn.Module")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model has no parameter that requires a gradient, so there is nothing to learn; call "
            "model.requires_grad_(True), or pass a network that has parameters"
        )
    if isinstance(objective, type) or not callable(objective):
        name = objective.__name__ if isinstance(objective, type) else "Standard"
        raise ValueError(f"objective must be an instance such as {name}(...), got {objective!r}")
    if isinstance(optimiser, Optimizer) or not callable(optimiser):
        raise ValueError(
            "optimiser must make an optimiser of the parameters, such as torch.optim.SGD or "
            f"partial(torch.optim.SGD, momentum=0.9), got {type(optimiser).__name__}"
        )
    such_as = "a robustood.data.Data, such as Data(train=Split(x, y), ...)"
    check_instance(data, "data", Data, such_as)
    check_trainable(data, declared_outputs(model)[0])


def _made(
    optimiser: Callable[..., Optimizer], model: nn.Module, lr: float, weight_decay: float
) -> Optimizer:
    """The optimiser of the model's parameters, or of the groups that it puts them in; fused on a GPU."""
    on_gpu = next(model.parameters()).is_cuda
    fused = {"fused": True} if on_gpu and "fused" in signature(optimiser).parameters else {}
    groups = getattr(model, "parameter_groups", model.parameters)()
    return optimiser(groups, lr=lr, weight_decay=weight_decay, **fused)


def _check_gradient(loss: Tensor) -> None:
    """Refuse a loss that no optimiser could follow."""
    if not loss.requires_grad:
        raise RuntimeError(
            "the loss has no gradient: is the model's forward under torch.no_grad(), or its output detached?"
        )


def _numbers(found: object) -> Row:
    """What a monitor returned, as numbers by name."""
    try:
        return {str(name): float(value) for name, value in dict(found).items()}  # ty: ignore
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'monitor must return numbers by name, such as {{"accuracy": 0.9}}, got {found!r}'
        ) from error
