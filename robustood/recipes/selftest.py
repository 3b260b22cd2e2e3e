"""Does this machine train as the library says? One training step from all sides, before time is spent on runs.

The images are random, so that no pack is needed. Gradients are compared by their relative distance: the length of the
difference over the length of the second. An attack steps by signs, which rounding turns where a gradient is nearly
zero, so that even two correct float32 steps differ by more than rounding.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robustood import rng
from robustood.checkpoints import Json
from robustood.data import Batch
from robustood.engine import Engine, Meter, flops, median_seconds, running, synchronised_time
from robustood.losses import to_uniform
from robustood.models import frozen
from robustood.objectives import Objective
from robustood.recipes.composing import parts, read
from robustood.recipes.recipe import Recipe
from robustood.recipes.runs import (
    Tell,
    chosen_device,
    chosen_engine,
    commit,
    device_name,
    silent,
    versions,
)

__all__ = ["TOLERANCES", "published_step", "self_test"]

_SHAPE = (3, 32, 32)
# The largest relative distances of two losses and of two gradients. On a CPU in float32 both are 0. In bf16 the
# gradient of a fresh network was 0.13 (10 layers) to 0.26 (16 layers) apart on 48 images, and its loss below 0.01; on
# an H200 0.21 on 384 images, and 0.016 compiled. The published attack starts at the clean image, in train mode, where
# many gradients nearly vanish: another layout alone turns so many signs that two float32 steps are 0.1 to 0.2 apart.
# In float64 they are below 1e-6 apart.
TOLERANCES = {"compiled": (1e-3, 0.05), "bf16": (0.02, 0.5), "published": (1e-5, 1e-3)}
Step = Callable[[], tuple[float, Tensor]]  # loss and gradient of one step


def self_test(
    device: torch.device | str | None = None, changes: Sequence[str] = (), tell: Tell = silent
) -> Json:
    """Test one step of training on a device, and measure its speed.

    - One step of every method: loss and gradient must be finite.
    - A compiled step against the same step as it stands, both in float32.
    - A step in bf16 against the same in float32.
    - A step of ALOE as in the paper against a re-statement of the published loop, both in float64.
    - The speed of a step of ALOE: against the published loop, against its minimum time (:mod:`robustood.engine`).

    Args:
        device: default: CUDA if available.
        changes: of ``aloe_cifar10_fast`` and its sisters, as in :func:`robustood.recipes.read`.
        tell: called with one line of text for each check.

    Returns:
        ``checks``, each with its value, tolerance and whether it passed; ``speed``, the report of a run's speed;
        ``published_over_ours``, a ratio of times; ``rates``, operations per second in training (as it stands and
        compiled) and in evaluation; ``compile_seconds``; device, versions and the engine.
    """
    start, device = time.monotonic(), chosen_device(device)
    recipe = read("aloe_cifar10_fast", changes)
    model, batch = recipe.model().to(device), _batch(recipe, device)
    how = chosen_engine(recipe, model, _SHAPE, device)
    checks = [_finite(read(f"{name}_cifar10_fast", changes), device) for name in parts("methods")]
    checks += _comparisons(recipe, model, batch, how)
    for check in checks:
        tell(
            f"self-test, {check['name']}: {'passed' if check['passed'] else 'FAILED'} ({check['said']})"
        )
    speed = _speed(recipe, model, batch, how)
    tell(
        f"self-test: a step takes {speed['speed']['over_floor']:.2f} times its minimum, the published loop "
        f"{speed['published_over_ours']:.2f} times as long as ours"
    )
    return {
        "device": device_name(device),
        "commit": commit(),
        "versions": versions(),
        "engine": asdict(how),
        "checks": checks,
        **speed,
        "minutes": (time.monotonic() - start) / 60,
    }


def _batch(recipe: Recipe, device: torch.device) -> Batch:
    """Random images of the sizes of a recipe."""
    want, noise = recipe.settings.training, rng.generator(device, 0)
    x = torch.rand(want.batch_size, *_SHAPE, generator=noise, device=device)
    u = torch.rand(want.outlier_batch_size, *_SHAPE, generator=noise, device=device)
    return Batch(
        x, torch.arange(len(x), device=device) % recipe.settings.model["classes"], u, noise
    )


def _gradient(model: nn.Module) -> Tensor:
    """The gradients of all weights as one vector, and none left behind."""
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def _ours(
    model: nn.Module, objective: Objective, batch: Batch, how: Engine, steps: int = 1
) -> tuple[float, Tensor]:
    """Loss and gradient of the last of some steps in an engine, each on other images, from a copy of the network.

    Between two steps the weights change in place, in the same way in every engine.
    """
    net, noise = copy.deepcopy(model).train(), rng.generator(batch.x.device, 1)
    with running(net, how) as network:
        for step in range(steps):
            net.zero_grad()
            own = replace(batch, x=batch.x.roll(step, 0), y=batch.y.roll(step, 0), generator=noise)
            loss = objective(network, replace(own, climb=getattr(network, "climb", None)))
            loss.backward()
            if step < steps - 1:
                with torch.no_grad():
                    for p in net.parameters():
                        p += 0.1 * p.roll(1, 0)
    return float(loss.detach()), _gradient(net)


def _finite(recipe: Recipe, device: torch.device) -> Json:
    """One step of a recipe: are loss and gradient finite?"""
    loss, gradient = _ours(
        recipe.model().to(device), recipe.objective(), _batch(recipe, device), Engine()
    )
    length = float(gradient.norm())
    passed = math.isfinite(loss) and math.isfinite(length) and length > 0
    name = recipe.settings.objective.name
    return {
        "name": f"a step of {name}",
        "passed": passed,
        "said": f"loss {loss:.3f}, gradient {length:.3f}",
    }


def _comparisons(recipe: Recipe, model: nn.Module, batch: Batch, how: Engine) -> list[Json]:
    """The step as it stands in float32 against three others."""
    # On a CPU the traced graph is run as it stands.
    backend = True if batch.x.device.type == "cuda" else "eager"
    plain, paper = Engine(channels_last=how.channels_last), read("aloe_cifar10_paper").objective()
    step = partial(_ours, model, recipe.objective(), batch)
    # A graph on a GPU is recorded at its second call, so that the third one replays it.
    third = partial(step, steps=3)
    where = torch.device("cpu") if batch.x.device.type == "mps" else batch.x.device  # no float64
    exact, precise = copy.deepcopy(model).to(where, torch.float64), _precise(batch, where)

    def published() -> tuple[float, Tensor]:
        net = copy.deepcopy(exact)
        return float(published_step(net, precise)), _gradient(net)

    return [
        _compared(
            "compiled", partial(third, replace(plain, compile=backend)), partial(third, plain)
        ),
        _compared("bf16", partial(step, replace(plain, precision="bf16")), partial(step, plain)),
        _compared("published", partial(_ours, exact, paper, precise, plain), published),
    ]


def _precise(batch: Batch, device: torch.device) -> Batch:
    """A batch in float64."""
    moved = {key: getattr(batch, key).to(device, torch.float64) for key in ("x", "outliers")}
    return replace(batch, y=batch.y.to(device), **moved)


def _compared(name: str, one: Step, other: Step) -> Json:
    """The relative distances of two steps in loss and gradient, against their tolerances."""
    most = TOLERANCES[name]
    try:
        (loss, gradient), (wanted, exact) = one(), other()
    except RuntimeError as error:  # a compiler that is not there, a format that the chip lacks
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return {"name": name, "passed": False, "value": None, "tolerance": most, "said": said}
    gaps = abs(loss / wanted - 1), float((gradient - exact).norm() / exact.norm())
    return {
        "name": name,
        "passed": gaps[0] <= most[0] and gaps[1] <= most[1],
        "value": gaps if all(map(math.isfinite, gaps)) else None,
        "tolerance": most,
        "said": f"losses apart by {gaps[0]:.2g}, at most {most[0]}; gradients by {gaps[1]:.2g}, at most {most[1]}",
    }


def _speed(recipe: Recipe, model: nn.Module, batch: Batch, how: Engine) -> Json:
    """Seconds of a step of ALOE, as it stands and compiled, and what follows from them."""
    device, rule = batch.x.device, recipe.objective()
    _, eager, meter = _timed(model, rule, batch, replace(how, compile=False))
    compiling, ours = 0.0, eager
    if how.compile:
        compiling, ours, meter = _timed(model, rule, batch, how)
    theirs = median_seconds(partial(published_step, copy.deepcopy(model), batch), device)
    return {
        "speed": meter.report(how, ours, len(batch.x), device),
        "published_over_ours": theirs / ours,
        "compile_seconds": compiling,
        "rates": {
            "eager": meter.flops / eager,
            "compiled": meter.flops / ours if how.compile else None,
            "evaluation": _evaluation_rate(model, batch.x),
        },
    }


def _timed(
    model: nn.Module, objective: Objective, batch: Batch, how: Engine
) -> tuple[float, float, Meter]:
    """Seconds of the first step in an engine and of a later one, and the cost of a step."""
    net, device = copy.deepcopy(model).train(), batch.x.device
    with running(net, how) as network:
        part = replace(batch, climb=getattr(network, "climb", None))
        step = lambda: objective(network, part).backward()
        start = synchronised_time(device)
        step()
        first = synchronised_time(device) - start
        return first, median_seconds(step, device), Meter.read(net, network, objective, batch)


def _evaluation_rate(model: nn.Module, x: Tensor) -> float:
    """Operations per second of a forward and a backward pass to the input, in float32."""
    with frozen(model):

        def attack() -> None:
            z = x.clone().requires_grad_()
            torch.autograd.grad(model(z).sum(), z)

        # A backward pass to the input costs as much as a forward pass.
        return 2 * flops(lambda: model(x)) / median_seconds(attack, x.device)


def published_step(model: nn.Module, batch: Batch, eps: float = 1 / 255, steps: int = 2) -> Tensor:
    """One step of the published loop of ALOE, re-stated; it leaves its gradients in the network.

    As the code of Chen et al. (2020) has it: a forward pass of both clean batches for the log, gradients of the
    weights in each attack step, batch statistics in the attack, inputs and outliers attacked one after the other.
    """
    if batch.outliers is None:
        raise ValueError(
            "batch.outliers must not be None: the loop attacks outliers too; pass some"
        )
    model.train()
    clean = model(torch.cat([batch.x, batch.outliers]))
    float(cross_entropy(clean[: len(batch.x)], batch.y).detach())  # for the log alone
    x = _ascend(model, batch.x, lambda z: cross_entropy(z, batch.y), eps, steps)
    u = _ascend(model, batch.outliers, lambda z: to_uniform(z).mean(), eps, steps)
    z = model(torch.cat([x, u]))
    loss = cross_entropy(z[: len(x)], batch.y) + 0.5 * to_uniform(z[len(x) :]).mean()
    model.zero_grad()
    loss.backward()
    return loss.detach()


def _ascend(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], eps: float, steps: int
) -> Tensor:
    """The published attack: whole 8-bit steps from the clean image."""
    moved = x.clone()
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        loss(model(moved)).backward()
        assert moved.grad is not None
        with torch.no_grad():
            moved = (x + (moved + eps * moved.grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return moved.detach()
