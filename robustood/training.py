"""One training loop for every method of the book.

What differs between methods is the objective (:mod:`robustood.objectives`). The loop draws batches,
takes steps and keeps the books. A run is a function of its arguments: the data order and all
randomness of an epoch come from the seed and the epoch's number, and the learning rate from the
step's. With a ``run_dir`` it can therefore stop anywhere and go on as if it had not.
"""

from __future__ import annotations

import csv
import inspect
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robustood.checkpoints import check_same, read_state, write_state, write_whole
from robustood.data import Batch, Data, draw
from robustood.data.batches import Change
from robustood.engine import (
    Engine,
    Meter,
    check_data,
    check_parts,
    check_plan,
    followed,
    mean_of_all,
    noted,
    rank,
    release_statistics,
    waited,
    world,
)
from robustood.identity import check_identity, identity
from robustood.inputs import (
    check_choice,
    check_counts,
    check_device,
    check_number,
    check_path,
    check_seed,
)
from robustood.models import Average, Averaged, declared
from robustood.objectives import Objective
from robustood.rng import SharedGenerator

Monitor = Callable[[nn.Module], dict[str, float]]
Tell = Callable[[dict[str, float]], object]


@dataclass
class History:
    """What a run recorded.

    Attributes:
        rows: one dict an epoch: ``epoch``, ``loss`` (mean over its steps), ``lr`` (at its end),
            ``seconds`` (of the run so far), and what the monitor adds.
        finished: False where the run stopped early on its time budget.
        speed: of a run with an engine: images a second, operations a step, and how many times the floor's
            time a step takes (:mod:`robustood.engine`).
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False
    speed: dict[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        """One entry of every row."""
        check_choice(name, "name", list(self.rows[0]) if self.rows else [])
        return [row[name] for row in self.rows]


def learning_rate(
    step: int, total: int, peak: float, warmup: float, milestones: Sequence[float] | None = None
) -> float:
    """Linear warm-up, then a half cosine down to zero (Loshchilov and Hutter 2017), or tenfold drops.

    Args:
        milestones: shares of the run at which the rate falls tenfold, in place of the cosine.
    """
    done = (step + 1) / total
    if done < warmup:
        return peak * done / warmup
    if milestones is not None:
        return peak * 0.1 ** sum(step >= round(share * total) for share in milestones)
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1 - warmup, 1e-12)))


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
    average: float | None = None,
    augment: Change | None = None,
    engine: Engine | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    monitor: Monitor | None = None,
    tell: Tell | None = None,
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
        epochs: passes over the training set; each leaves out the samples of a last batch that is
            not full, other ones each time.
        batch_size: samples a step, at most the size of the training set.
        outlier_batch_size: auxiliary outliers a step, where the data have any.
        lr: peak learning rate, reached after the warm-up and left on a half cosine.
        weight_decay: passed to the optimiser.
        warmup: share of the run with a rising learning rate.
        optimiser: ``optimiser(parameters, lr=..., weight_decay=...)``.
        milestones: shares of the run at which the learning rate falls tenfold, in place of the cosine.
        average: decay of an exponential moving average of the weights, such as 0.999; the
            model of a finished run is the average, and the monitor sees it.
        augment: applied to inputs and outliers of a batch, such as :class:`robustood.data.Augment`.
        engine: how the network is run (:func:`robustood.engine.choose`). Where one is given, a step is
            measured before the first, and the history says how fast the run was.
        seed: of the data order and of every random start.
        device: default the model's.
        monitor: called after each epoch in eval mode; its numbers join the history.
        tell: called with each row of the history after it is kept, such as ``print``.
        run_dir: where ``state.pt`` and ``log.csv`` are kept. A run that finds its state there goes
            on from it, with the same result bit for bit on one machine's CPU, if model, objective, data and all
            else are the same down to their code (:mod:`robustood.identity`).
        name: stands for what cannot be identified in them, such as an open file; needed with a ``run_dir`` alone.
        minutes: stop in time to keep this budget; the state is written first. A monitor is
            not interrupted.

    Returns:
        The history. The same arguments give the same weights bit for bit on one machine's CPU. With
        several processes (:func:`robustood.engine.join`) batch sizes are those of all together, the result is
        that of one process up to rounding, and the first process writes.

    Raises:
        TypeError: for parts of the wrong kind, such as an optimiser that is made already.
        ValueError: for invalid data or settings, a ``run_dir`` of another run, or one without a ``name`` where it
            is needed, before any step.
        FloatingPointError: when the loss is not finite; the message names the step, and the model
            holds the weights of the last good epoch.
    """
    check_parts(model, objective, data, optimiser)
    check_counts(epochs=epochs, batch_size=batch_size, outlier_batch_size=outlier_batch_size)
    check_number(lr, "lr", 0)
    check_number(weight_decay, "weight_decay", 0)
    seed, lr, weight_decay = check_seed(seed), float(lr), float(weight_decay)
    check_device(device or "cpu")
    check_plan(milestones, augment)
    check_path(run_dir or ".", "run_dir")
    check_number(warmup, "warmup", 0, 1)
    check_number(minutes, "minutes", 0, math.inf)
    if average is not None:
        check_number(average, "average", 0, 1)
    check_data(data, declared(model)[0])
    device = torch.device(device or next(model.parameters()).device)
    model, data = model.to(device), data.to(device)
    batch_size = min(batch_size, len(data.train))
    # Half of the outliers may be attacked, in each process the same number.
    shares = {"batch_size": (batch_size, 1), "outlier_batch_size": (outlier_batch_size, 2)}
    for argument, (size, parts) in shares.items():
        if world() > 1 and size % (parts * world()):
            raise ValueError(
                f"{argument} must be a multiple of {parts * world()} with {world()} processes, got {size}"
            )
    made_by = optimiser
    if device.type == "cuda" and "fused" in inspect.signature(optimiser).parameters:
        optimiser = partial(optimiser, fused=True)
    parameters: Any = getattr(model, "parameter_groups", model.parameters)
    run = Run(
        model=model,
        engine=engine or Engine(),
        adapt=optimiser(parameters(), lr=lr, weight_decay=weight_decay),
        mean=None if average is None else Average(model, average),
        steps=len(data.train) // batch_size,
        epochs=epochs,
        folder=None if run_dir is None else Path(run_dir),
        device=device,
        deadline=time.monotonic() + 60 * minutes,
    )
    if run.folder is not None:
        settings = {
            "epochs": epochs, "batch_size": batch_size, "outlier_batch_size": outlier_batch_size, "lr": lr,
            "weight_decay": weight_decay, "warmup": warmup, "average": average, "seed": seed,
            "device": device.type,
        }  # fmt: skip
        held = [key for key, p in model.named_parameters() if not p.requires_grad]
        told = identity(
            name, objective=objective, optimiser=run.adapt, milestones=milestones, augment=augment,
            engine=engine, model=model, held=held, made_by=made_by,
            data=[data.train.x, data.train.y, data.outliers, data.compressed],
        )  # fmt: skip
        run.resume(settings, told)
    rate = partial(
        learning_rate, total=run.steps * epochs, peak=lr, warmup=warmup, milestones=milestones
    )
    cuda = [device] if device.type == "cuda" else []
    quiet = True if rank() else None  # None: a progress bar where somebody looks on
    with run, torch.random.fork_rng(cuda), tqdm(total=run.steps * epochs, disable=quiet) as bar:
        bar.update(run.epoch * run.steps + run.step)
        while run.epoch < epochs:
            generator = run.generator(seed * 1_000_003 + run.epoch)
            prepared = run.prepare(objective, data, seed * 1_000_003 + run.epoch + 250_000)
            of = partial(draw, prepared, batch_size, outlier_batch_size, augment=augment)
            if engine is not None and run.meter is None:
                run.measure(objective, next(of(run.generator(seed))))
            batches = of(generator)
            run.seed_layers(seed * 1_000_003 + run.epoch + 500_000)
            if not run.one_epoch(followed(objective), batches, generator, rate, bar):
                break
            run.record(monitor, prepared.notes, tell)
        return run.close(batch_size)


@dataclass
class Run:
    """The moving parts of a training run, and how they are kept."""

    model: nn.Module
    engine: Engine
    adapt: torch.optim.Optimizer
    mean: Average | None
    steps: int
    epochs: int
    folder: Path | None
    device: torch.device
    deadline: float
    epoch: int = 0
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    history: History = field(default_factory=History)
    noise: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, str] = field(default_factory=dict)
    earlier: float = 0.0
    began: float = field(default_factory=time.monotonic)
    chosen: bool = False
    meter: Meter | None = None
    paces: list[tuple[int, float]] = field(default_factory=list)
    running: nn.Module = field(init=False)

    def __enter__(self) -> None:
        self.running = self.engine.run(self.model)

    def __exit__(self, *_: object) -> None:
        """The model as its owner knows it, also after an error."""
        release_statistics(self.model)
        self.model.to(memory_format=torch.contiguous_format)

    def generator(self, seed: int) -> torch.Generator:
        """A source of randomness on the run's device, shared with the other processes."""
        generator = SharedGenerator(self.device)
        generator.place = (rank(), world())
        return generator.manual_seed(seed)

    def measure(self, objective: Objective, batch: Batch) -> None:
        """What a step costs, and what its bare passes would."""
        x = batch.x if batch.outliers is None else torch.cat([batch.x, batch.outliers])
        self.meter = Meter.read(self.model, self.running, lambda m: objective(m, batch), x)

    def one_epoch(
        self,
        objective: Callable[[nn.Module, Batch], Tensor],
        batches: Iterator[Batch],
        generator: torch.Generator,
        rate: Callable[[int], float],
        bar: tqdm,
    ) -> bool:
        """Take the epoch's remaining steps; False when time is up first, with the state kept."""
        if self.step == 0 or not self.start:
            self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        for _ in range(self.step):  # the order is drawn anew, what was done is skipped
            next(batches)
        if self.noise:
            generator.set_state(self.noise.pop("own"))
            self.set_layers(self.noise)
            self.noise = {}
        self.model.train()
        slowest, before, began = 0.0, self.step, waited(self.device)
        while self.step < self.steps:
            start = time.monotonic()
            if self.out_of_time(start, slowest):  # asked before the next batch is drawn
                self.check_finite()
                self.noise = {"own": generator.get_state(), "cpu": torch.get_rng_state()}
                if self.device.type == "cuda":
                    self.noise["cuda"] = torch.cuda.get_rng_state(self.device)
                self.paces.append((self.step - before, waited(self.device) - began))
                self.keep()
                return False
            batch = next(batches)
            done = self.epoch * self.steps + self.step
            for group in self.adapt.param_groups:
                group["lr"] = rate(done) * group.get("scale", 1.0)
            batch = replace(
                batch, progress=done / (self.epochs * self.steps),
                climb=getattr(self.running, "climb", None),
            )  # fmt: skip
            loss = objective(self.running, batch)
            self.adapt.zero_grad(set_to_none=True)
            loss.backward()
            self.adapt.step()
            if self.mean:
                self.mean.update(self.model)
            self.losses.append(loss.detach())
            self.step += 1
            bar.update()
            slowest = max(slowest, time.monotonic() - start)
        self.check_finite()
        self.paces.append((self.step - before, waited(self.device) - began))
        return True

    def out_of_time(self, now: float, slowest: float) -> bool:
        """Whether the next step would be too late; several processes agree, and ask at every eighth step."""
        if world() == 1:
            return now + 2 * slowest > self.deadline
        if math.isinf(self.deadline) or self.step % 8:
            return False
        late = float(now + 10 * slowest > self.deadline)
        return bool(mean_of_all(torch.tensor(late, device=self.device)) > 0)

    def seed_layers(self, seed: int) -> None:
        """Seed what layers such as dropout draw from: the device's global generator."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    def set_layers(self, states: dict[str, Tensor]) -> None:
        """Put the global generators back to where a state was written."""
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def check_finite(self) -> None:
        """One look an epoch, so that a GPU is not waited for at every step."""
        losses = mean_of_all(torch.stack(self.losses)) if self.losses else torch.zeros(1)
        self.losses = list(losses) if self.losses else []
        weights = torch.stack([p.detach().isfinite().all() for p in self.model.parameters()])
        if losses.isfinite().all() and weights.all():
            return
        self.model.load_state_dict(self.start)
        self.model.eval()
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        step = self.epoch * self.steps + (bad[0] if bad else len(losses) - 1)
        what = f"the loss is {float(losses[bad[0]])}" if bad else "weights are not finite"
        raise FloatingPointError(
            f"{what} at step {step} (epoch {self.epoch}); the model holds the weights of the last "
            "good epoch. Lower lr or lengthen warmup"
        )

    def prepare(self, objective: Objective, data: Data, seed: int) -> Data:
        """The epoch's data, chosen by the weights that the epoch began with, also after a stop inside it."""
        choose = getattr(objective, "prepare", None)
        if choose is None:
            return data
        now = self.model.state_dict()
        if self.step and self.start:
            now = {name: value.clone() for name, value in now.items()}
            self.model.load_state_dict(self.start)
        prepared = choose(self.model, data, self.epoch, self.generator(seed))
        self.model.load_state_dict(now)
        self.chosen = prepared is not data
        return prepared

    def record(self, monitor: Monitor | None, notes: dict[str, float], tell: Tell | None) -> None:
        """Close an epoch: a row of history, the log and the state."""
        row: dict[str, float] = {
            "epoch": self.epoch,
            "loss": float(torch.stack(self.losses).mean()),
            "lr": self.adapt.param_groups[0]["lr"],
            **notes,
        }
        self.model.eval()
        if monitor:
            with Averaged(self.model, self.mean):
                seen = noted(monitor(self.model))
            if clash := seen.keys() & {*row, "seconds"}:
                raise ValueError(f"monitor must choose other names than {sorted(clash)}")
            row |= seen
        row["seconds"] = self.earlier + time.monotonic() - self.began
        self.history.rows.append(row)
        self.epoch, self.step, self.losses, self.start = self.epoch + 1, 0, [], {}
        self.keep()
        if tell:
            tell(row)

    def keep(self) -> None:
        """Write log and state, if the run has a folder."""
        if self.folder is None or rank():
            return
        write_state(
            self.folder / "state.pt",
            {
                "settings": self.settings,
                "identity": self.identity,
                "model": self.model.state_dict(),
                "optimiser": self.adapt.state_dict(),
                "mean": self.mean.tensors if self.mean else {},
                "mean_count": self.mean.count if self.mean else 0,
                "epoch": self.epoch,
                "step": self.step,
                "losses": self.losses,
                "rows": self.history.rows,
                "noise": self.noise,
                "start": self.start if self.chosen and self.step else {},
                "paces": self.paces,
                "seconds": self.earlier + time.monotonic() - self.began,
            },
        )
        if self.history.rows:
            text = io.StringIO()
            names = dict.fromkeys(name for row in self.history.rows for name in row)
            table = csv.DictWriter(text, list(names), lineterminator="\n")
            table.writeheader()
            table.writerows(self.history.rows)
            write_whole(self.folder / "log.csv", text.getvalue().encode())

    def resume(self, settings: dict[str, Any], told: dict[str, str]) -> None:
        """Go on from the folder's state, if it has one that belongs to these settings and this identity."""
        self.settings, self.identity = settings, told
        if self.folder is None:
            return
        state = read_state(self.folder / "state.pt")
        holder = f"run_dir {self.folder.name!r} holds a run"
        if state is not None:
            check_same(state["settings"], settings, holder)
        check_identity(state, told, holder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.adapt.load_state_dict(state["optimiser"])
        if self.mean:
            self.mean.count = state["mean_count"]
            for name, value in state["mean"].items():
                self.mean.tensors[name].copy_(value)
        self.epoch, self.step = state["epoch"], state["step"]
        self.losses = [loss.to(self.device) for loss in state["losses"]]
        self.history.rows, self.noise = state["rows"], state["noise"]
        self.start = {name: value.to(self.device) for name, value in state["start"].items()}
        self.paces = [(steps, took) for steps, took in state["paces"]]
        self.earlier = state["seconds"]

    def close(self, images: int) -> History:
        """Leave the model ready for use, and say how fast a step of so many images was."""
        self.history.finished = self.epoch == self.epochs
        if self.meter and (pace := self.pace()):
            self.history.speed = self.meter.report(self.engine, pace, images, self.device)
        if self.mean and self.history.finished:
            self.mean.exchange(self.model)
        self.model.eval()
        return self.history

    def pace(self) -> float:
        """Median seconds a step over the epochs, or their parts where the run was stopped inside."""
        each = sorted(took / steps for steps, took in self.paces if steps)
        return each[len(each) // 2] if each else 0.0
