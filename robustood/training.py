"""One training loop for every method of the book.

What differs between methods is the objective (:mod:`robustood.objectives`). The loop draws
batches, takes steps and keeps the books. A run is a function of its arguments: the data order
and all randomness of an epoch come from the seed and the epoch's number, and the learning rate
from the step's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robustood.data import Batch, Data
from robustood.inputs import check_count, check_labels, check_number, check_values
from robustood.objectives import Objective


@dataclass
class History:
    """What a run recorded.

    Attributes:
        rows: one dict an epoch: ``epoch``, ``loss`` (mean over its steps), ``lr``, ``seconds``,
            and what the monitor adds.
        finished: False where the run stopped early on its time budget.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False

    def column(self, name: str) -> list[float]:
        """One entry of every row."""
        return [row[name] for row in self.rows]


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear warm-up, then a half cosine down to zero (Loshchilov and Hutter 2017)."""
    done = (step + 1) / total
    if done < warmup:
        return peak * done / warmup
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
    seed: int = 0,
    device: torch.device | str | None = None,
    monitor: Callable[[nn.Module], dict[str, float]] | None = None,
) -> History:
    """Train a model in place and leave it in eval mode.

    Args:
        model: the network; it stays on ``device``.
        objective: maps (model, batch) to a scalar, such as ``Adversarial(8/255)``.
        data: ``data.train`` and ``data.outliers`` are used.
        epochs: passes over the training set; a last batch that is not full is left out, in
            fresh order each epoch.
        batch_size: samples a step, at most the size of the training set.
        outlier_batch_size: auxiliary outliers a step, where the data have any.
        lr: peak learning rate.
        weight_decay: passed to the optimiser.
        warmup: share of the run with a rising learning rate.
        optimiser: ``optimiser(parameters, lr=..., weight_decay=...)``.
        seed: of the data order and of every random start.
        device: default the model's.
        monitor: called after each epoch in eval mode; its numbers join the history.

    Returns:
        The history. The same arguments give the same weights bit for bit on one machine's CPU.

    Raises:
        ValueError: for invalid images, labels or settings, before the first step.
        FloatingPointError: when the loss is not finite; the message names the step, the model
            holds the weights of the last good epoch.
    """
    check_count(epochs, "epochs", low=1)
    check_count(batch_size, "batch_size", low=1)
    check_number(lr, "lr", 0)
    check_number(warmup, "warmup", 0, 1)
    check_values(data.train.x, None, "data.train.x")
    if not data.train.y.is_floating_point():
        check_labels(data.train.y, data.train.x, getattr(model, "classes", None), "data.train.y")
    device = torch.device(device or next(model.parameters()).device)
    model, data = model.to(device), data.to(device)
    steps = len(data.train) // min(batch_size, len(data.train))
    total = epochs * steps
    adapt = optimiser(model.parameters(), lr=lr, weight_decay=weight_decay)
    history, started = History(), time.monotonic()
    bar = tqdm(total=total, disable=None, unit="step", leave=False)
    for epoch in range(epochs):
        good = {name: value.clone() for name, value in model.state_dict().items()}
        losses, rate = [], lr
        batches = draw(data, batch_size, outlier_batch_size, generator_for(seed, epoch, device))
        model.train()
        for index, (batch_x, batch_y, outliers, generator) in enumerate(batches):
            step = epoch * steps + index
            rate = learning_rate(step, total, lr, warmup)
            for group in adapt.param_groups:
                group["lr"] = rate
            batch = Batch(batch_x, batch_y, outliers, generator, step / total)
            loss = objective(model, batch)
            adapt.zero_grad(set_to_none=True)
            loss.backward()
            adapt.step()
            losses.append(loss.detach())
            bar.update()
        values = torch.stack(losses).cpu()
        if not values.isfinite().all():
            model.load_state_dict(good)
            step = epoch * steps + int((~values.isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"the loss is {values[step - epoch * steps]:g} at step {step} (epoch {epoch}); the model holds the "
                "weights of the last good epoch. Lower lr, or lengthen warmup"
            )
        row = {"epoch": epoch, "loss": float(values.mean()), "lr": rate}
        model.eval()
        row |= monitor(model) if monitor else {}
        history.rows.append(row | {"seconds": time.monotonic() - started})
    bar.close()
    history.finished = True
    return history


def generator_for(seed: int, epoch: int, device: torch.device) -> torch.Generator:
    """The source of all randomness of one epoch."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)


def draw(
    data: Data, batch_size: int, outlier_batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, torch.Generator]]:
    """One epoch of batches in random order; outliers are drawn alongside, as often as needed."""
    n, device = len(data.train), data.train.x.device
    size = min(batch_size, n)
    order = torch.randperm(n, generator=generator, device=device)
    pool = len(data.outliers)
    if pool:
        wanted = n // size * outlier_batch_size
        rounds = [
            torch.randperm(pool, generator=generator, device=device)
            for _ in range(-(-wanted // pool))
        ]
        others = torch.cat(rounds).split(outlier_batch_size)
    for index in range(n // size):
        chosen = order[index * size : (index + 1) * size]
        outliers = data.outliers[others[index]] if pool else None
        yield data.train.x[chosen], data.train.y[chosen], outliers, generator
