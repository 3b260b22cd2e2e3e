"""One training loop for every method of the book.

Methods differ in their objective (:mod:`robustood.objectives`). The loop, :meth:`Run.train`, draws batches, takes
steps and records the history. A run is a function of its arguments: the data order and all randomness of an epoch
are derived from the seed and the epoch number (:mod:`robustood.streams`), the learning rate from the step number.
With a ``run_dir``, a run can therefore be interrupted anywhere and resumed with identical results.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from robustood import distributed
from robustood.attacks._loop import watched_ascent
from robustood.checkpoints import Checkpoint, Json, write_table
from robustood.costs import MakeOptimiser, check_memory, free_memory
from robustood.data import Batch, Data, check_trainable, draw
from robustood.data._batches import Change, check_augment
from robustood.engine import Engine, Meter, made_optimiser, running, synchronised_time
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
            ``seconds`` (elapsed in the run so far), and the monitor's numbers.
        finished: False if the run stopped early because its time budget ran out.
        speed: for a run with an engine: images per second, operations per step, and the time of a step relative to
            its minimum time (:mod:`robustood.engine`).
    """

    rows: list[Row] = field(default_factory=list)
    finished: bool = False
    speed: Json = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        """The values of one entry, one per row."""
        check_choice(name, "name", list(self.rows[0]) if self.rows else [])
        return [row[name] for row in self.rows]


@dataclass(frozen=True)
class Schedule:
    """The steps of a run and their learning rates: linear warm-up, then a decay to zero or in steps.

    Attributes:
        epochs: number of epochs in the run.
        steps: number of steps in an epoch.
        lr: peak learning rate, followed by a half-cosine decay (Loshchilov and Hutter 2017).
        warmup: share of the run during which the rate rises linearly.
        milestones: shares of the run at which the rate is divided by ten, instead of the cosine decay.
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
        """Number of steps in the run."""
        return self.epochs * self.steps

    def rate(self, step: int) -> float:
        """The learning rate of a step; steps are counted from 0."""
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
        model: the network; it is moved to ``device`` and stays there. If it has ``parameter_groups()``, a group's
            ``scale`` multiplies the learning rate.
        objective: maps (model, batch) to a scalar, such as ``Adversarial(8/255)``. If it has a method
            ``prepare(model, data, epoch, generator)``, that method chooses the data of each epoch.
        data: ``data.train`` and ``data.outliers`` are used.
        epochs: passes over the training set; each leaves out an incomplete last batch, made of different samples in
            every epoch.
        batch_size: samples per step, at most the size of the training set.
        outlier_batch_size: auxiliary outliers per step, if the data have any.
        lr: peak learning rate, reached after the warm-up and followed by a half-cosine decay.
        weight_decay: passed to the optimiser.
        warmup: share of the run during which the learning rate rises.
        optimiser: called as ``optimiser(parameters, lr=..., weight_decay=...)``.
        milestones: shares of the run at which the learning rate is divided by ten, instead of the cosine decay.
        augment: applied to inputs and outliers of a batch, such as :class:`robustood.data.Augment`.
        engine: how the network is run (:func:`robustood.engine.choose`). If one is given, the cost of a step is
            measured before training, and the history reports how fast the run was.
        seed: determines the data order and every random start.
        device: default: the model's.
        monitor: called after each epoch in eval mode; its numbers are added to the history.
        on_epoch: called with each new row of the history after it is saved, such as ``print``.
        run_dir: folder for ``state.pt`` and ``log.csv``. A run that finds its state there resumes from it, with
            bitwise the same result on one machine's CPU, if model, objective, data and everything else are the same
            down to their code (:mod:`robustood.identity`).
        name: stands for a part that cannot be identified, such as an open file; used with a ``run_dir`` only.
        minutes: time budget; the run saves its state and stops before it is exceeded, but a monitor is finished.

    Returns:
        The history. The same arguments give bitwise the same weights on one machine's CPU. With several processes
        (:func:`robustood.distributed.join`), batch sizes are totals over all processes, the result is that of one
        process up to rounding, and the first process writes the files.

    Raises:
        ValueError: before any step, for parts of the wrong kind, invalid data or settings, a batch that a GPU has no
            memory for, a ``run_dir`` of another run, or a missing ``name``; later, for a monitor that does not
            return numbers.
        FloatingPointError: if the loss is not finite; the message names the step, and the model holds the weights
            from the start of that epoch.
        ConnectionError: if another of several processes is lost; the same call in all of them resumes from run_dir.
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
    sizes = {"batch_size": batch_size, "outlier_batch_size": outlier_batch_size}
    device = torch.device(device or next(model.parameters()).device)
    model, data = model.to(device), data.to(device)
    run = Run(
        model=model,
        objective=objective,
        optimiser=made_optimiser(optimiser, model, float(lr), float(weight_decay)),
        data=data,
        draw=partial(draw, augment=augment, **sizes),
        schedule=schedule,
        streams=Streams(check_seed(seed), device),
        deadline=time.monotonic() + 60 * minutes,
        engine=engine,
    )
    run.check_memory(partial(optimiser, lr=float(lr), weight_decay=float(weight_decay)))
    if run_dir is not None:
        fingerprint = run.identity(name, made_by=optimiser)
        run.resume(Checkpoint(Path(run_dir) / "state.pt", "run", fingerprint))
    with (
        distributed.together(),
        running(model, engine or Engine()) as network,
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        tqdm(initial=run.done, total=schedule.total, disable=distributed.rank() > 0 or None) as bar,
    ):
        run.train(network, bar, monitor, on_epoch)
    return run.history(batch_size)


@dataclass(kw_only=True)
class _Progress:
    """The progress of a run: what its checkpoint keeps besides weights and optimiser state.

    Attributes:
        epoch: the current epoch, counted from 0.
        losses: of the steps taken in this epoch.
        start: the weights at the start of this epoch.
        noise: states of the random generators.
        rows: one row for each finished epoch.
        paces: seconds per step, one entry for each uninterrupted part of an epoch.
        seconds: duration of the run before this call.
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
    """A training run: its parts and its progress.

    Attributes:
        draw: makes the batches of an epoch from data and a generator.
        deadline: when to stop, on the clock of ``time.monotonic``.
        meter: the cost of a step, once it is measured.
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
        """Run the remaining epochs, or as many steps as the time budget allows."""
        while self.epoch < self.schedule.epochs:
            data = self.prepare()
            for batch in self.batches(network, data):
                for group in self.optimiser.param_groups:
                    group["lr"] = self.schedule.rate(self.done) * group.get("scale", 1.0)
                loss = self.objective(network, batch)
                _check_loss(loss)
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                self.optimiser.step()
                self.losses.append(loss.detach())
                bar.update()
            self.check_finite()
            if self.step < self.schedule.steps:  # out of time
                self.save()
                return
            self.close_epoch(data.notes, monitor, on_epoch)

    @property
    def step(self) -> int:
        """Number of the next step within the epoch, counted from 0."""
        return len(self.losses)

    @property
    def done(self) -> int:
        """Number of steps taken so far."""
        return self.epoch * self.schedule.steps + self.step

    def prepare(self) -> Data:
        """The data of the epoch, always chosen with the weights from its start, even if resumed in mid-epoch."""
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

    def check_memory(self, optimiser: MakeOptimiser) -> None:
        """Refuse a batch for which the device lacks memory, before any work is done."""
        if math.isfinite(free := free_memory(self.streams.device)):
            batch = next(self.draw(self.data, generator=self.streams.of(0, Stream.BATCHES)))
            precision = (self.engine or Engine()).precision
            check_memory(self.model, self.objective, batch, free, optimiser, precision)

    def open_epoch(self, network: nn.Module, data: Data) -> Iterator[Batch]:
        """The remaining batches of an epoch, after setting every generator to the state for the next one."""
        if self.engine and not self.meter:
            batch = next(self.draw(data, generator=self.streams.of(self.epoch, Stream.BATCHES)))
            self.meter = Meter.read(self.model, network, self.objective, batch)
        batches = self.draw(data, generator=self.streams.begin(self.epoch))
        for _ in range(self.step):  # the order is drawn again, finished steps are skipped
            next(batches)
        if self.step:
            self.streams.restore(self.noise)
        self.model.train()
        return batches

    def batches(self, network: nn.Module, data: Data) -> Iterator[Batch]:
        """Yield the remaining batches while another step fits into the time budget."""
        rest, climb = self.open_epoch(network, data), getattr(network, "climb", None)
        first, began, slowest = self.step, synchronised_time(self.streams.device), 0.0
        while self.step < self.schedule.steps:
            start = time.monotonic()
            if self.out_of_time(start, slowest):  # checked before a batch is drawn
                break
            look = watched_ascent if self.done == self.schedule.steps - 1 else None
            yield replace(next(rest), progress=self.done / self.schedule.total, climb=climb or look)
            slowest = max(slowest, time.monotonic() - start)
        if taken := self.step - first:
            self.paces.append((synchronised_time(self.streams.device) - began) / taken)

    def out_of_time(self, now: float, slowest: float) -> bool:
        """Whether the next step would miss the deadline; several processes decide together, every eighth step."""
        if distributed.world() == 1:
            return now + 2 * slowest > self.deadline
        if math.isinf(self.deadline) or self.step % 8:
            return False
        late = float(now + 10 * slowest > self.deadline)
        return bool(distributed.mean(torch.tensor(late, device=self.streams.device)) > 0)

    def check_finite(self) -> None:
        """Raise if a loss or a weight is not finite; once per epoch, the only time the loop waits for a GPU."""
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
            f"{what} at step {step} (epoch {self.epoch}); the model holds the weights from the "
            "start of this epoch. Lower lr or lengthen warmup"
        )

    def close_epoch(self, notes: Row, monitor: Monitor | None, on_epoch: OnEpoch | None) -> None:
        """Finish an epoch: add a row to the history, write log and checkpoint."""
        loss, lr = torch.stack(self.losses).mean(), self.optimiser.param_groups[0]["lr"]
        row = {"epoch": self.epoch, "loss": float(loss), "lr": lr, **notes}
        self.model.eval()
        try:
            row |= _numbers(monitor(self.model) if monitor else {}, taken={*row, "seconds"})
        except BaseException:
            self.save()  # a monitor that fails costs no step
            raise
        row["seconds"] = self.elapsed()
        self.rows.append(row)
        self.epoch, self.losses, self.start = self.epoch + 1, [], {}
        self.save()
        if on_epoch:
            on_epoch(row)

    def elapsed(self) -> float:
        """Duration of the run so far in seconds, over all calls."""
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
        data, parameters = self.data, self.model.named_parameters()
        others = {"val": data.val, "test": data.test, "ood": data.ood}
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
            data=[data.train.x, data.train.y, data.outliers, data.compressed],
            chosen_from=others if hasattr(self.objective, "prepare") else None,
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Save to this checkpoint from now on, and resume from the state it holds."""
        self.checkpoint = checkpoint
        if (state := checkpoint.state) is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        for f in fields(_Progress):
            setattr(self, f.name, state[f.name])
        self.losses = [loss.to(self.streams.device) for loss in self.losses]

    def history(self, images: int) -> History:
        """Set the model to eval mode and return the history, with the speed for this many images per step."""
        self.model.eval()
        found = History(self.rows, self.epoch == self.schedule.epochs)
        if self.engine and self.meter and self.paces:
            pace = sorted(self.paces)[len(self.paces) // 2]
            found.speed = self.meter.report(self.engine, pace, images, self.streams.device)
            found.speed["fused"] = bool(self.optimiser.defaults.get("fused"))
        return found


def _check_parts(model: nn.Module, objective: object, data: Data, optimiser: object) -> None:
    """Refuse parts that training cannot use, before any work is done."""
    check_instance(model, "model", nn.Module, "a torch.nn.Module")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model has no parameter that requires a gradient, so there is nothing to learn; call requires_grad_(True)"
        )
    if isinstance(objective, type) or not callable(objective):
        name = objective.__name__ if isinstance(objective, type) else "Standard"
        raise ValueError(f"objective must be an instance such as {name}(...), got {objective!r}")
    if isinstance(optimiser, Optimizer) or not callable(optimiser):
        raise ValueError(
            f"optimiser must be a callable such as partial(SGD, momentum=0.9), got {type(optimiser).__name__}"
        )
    check_instance(data, "data", Data, "a robustood.data.Data, such as Data(train=Split(x, y))")
    check_trainable(data, declared_outputs(model)[0])


def _check_loss(loss: object) -> None:
    """Refuse anything but a scalar with a gradient."""
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(f"objective must return a scalar tensor, got {loss!r:.80}; take the mean")
    if not loss.requires_grad:
        raise RuntimeError("the loss has no gradient: is it under torch.no_grad(), or detached?")


def _numbers(found: object, taken: set[str]) -> Row:
    """The result of a monitor as floats by name; the names of the run's own numbers are taken."""
    try:
        row = {str(name): float(value) for name, value in dict(found).items()}  # ty: ignore
    except (TypeError, ValueError) as error:
        raise ValueError(f"monitor must return a dict of numbers by name, got {found!r}") from error
    if clash := row.keys() & taken:
        raise ValueError(f"monitor must return other names than {sorted(clash)}")
    return row
