r"""How a network is run fast, on several processes, and how far a run is from the floor.

An :class:`Engine` says in which number format and memory layout a network computes and whether it is
compiled; images, perturbations, losses and weights stay float32. The *floor* of a training step is what its
passes must cost: k steps of an attack are k forwards and k backwards to the input, the update one
forward and a backward to input and weights, which is twice as dear, $(2k + 3) F$ an image for a forward
of $F$ floating-point operations. (A choice of the best iterate is one forward more.) The operations of a run's
step are counted as it takes them; tests hold them to the formula. The time of the floor is measured, not
taken from a data sheet: what these operations take at the rate of the bare update of the same network in the
same engine.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as processes
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from robustood.attacks import Objective, ascent, climb_at
from robustood.data import Batch, Data
from robustood.data.batches import check_augment
from robustood.inputs import (
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_images,
    check_instance,
    check_labels,
    check_mapping,
    check_number,
    check_several,
    check_values,
)
from robustood.perturbations import Ball, PerturbationSet

# Dense bf16 operations a second of data-centre GPUs, from their makers' data sheets.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12}


def _check_backend(compile: bool | str) -> None:
    """Refuse what is neither a flag nor the name of a backend."""
    if isinstance(compile, str):
        check_choice(compile, "compile", torch.compiler.list_backends(exclude_tags=()))
    else:
        check_flag(compile, "compile")


@dataclass(frozen=True)
class Engine:
    """How a network is run.

    Attributes:
        precision: of the network's own arithmetic; ``"bf16"`` by autocast, with float32 weights, inputs
            and outputs.
        channels_last: memory layout of the network and of what enters it.
        compile: compile the network, and each attack on a norm ball in eval mode as one graph; a string
            names a backend of ``torch.compile``.
        measured: images a second of forward and backward that led to the choice (:func:`choose`).
    """

    precision: Literal["float32", "bf16"] = "float32"
    channels_last: bool = False
    compile: bool | str = False
    measured: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice(self.precision, "precision", ("float32", "bf16"))
        check_flag(self.channels_last, "channels_last")
        _check_backend(self.compile)
        check_mapping(self.measured, "measured", "{name: images a second}")
        for name, rate in self.measured.items():
            check_number(rate, f"measured[{name!r}]", 0)

    def run(self, model: nn.Module) -> nn.Module:
        """The model as training calls it; itself where nothing is to be done."""
        return model if self == Engine() and world() == 1 else Running(model, self)


MOST_GRAPHS = (
    2  # one ball for inputs, one for outliers; a radius that grows would need one per step
)


def traceable(
    objective: Objective, x: Tensor, z: Tensor, within: PerturbationSet
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`robustood.attacks.value_and_grad` in the form that a compiler can trace."""
    total = lambda z: climb_at(objective, x, z, within)
    grad, (moved, climb, judge) = torch.func.grad(total, has_aux=True)(z)
    return moved.detach(), climb.detach(), judge.detach(), grad


class Running(nn.Module):
    """A network inside an engine. Anything that is no forward is the network's own."""

    def __init__(self, model: nn.Module, engine: Engine):
        super().__init__()
        self.module, self.engine = model, engine
        if engine.channels_last:
            model.to(memory_format=torch.channels_last)
        self.calls: dict[str, Any] = {"update": model}
        self.climb = self.compiled_ascent if engine.compile else None
        self.graphs: set[Ball] = set()
        if world() > 1:
            synchronise_statistics(model)
            # The wrapper would send the buffers at each forward; they are equal already.
            known = inspect.signature(DistributedDataParallel).parameters
            sent = (
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            )
            quiet: dict[str, Any] = {sent: False}
            self.calls["update"] = DistributedDataParallel(model, **quiet)
        if engine.compile:
            how: dict[str, Any] = {"backend": engine.compile} if engine.compile is not True else {}
            graphs = {} if how else {"mode": "reduce-overhead"}
            self.calls["update"] = torch.compile(self.calls["update"], dynamic=False, **how)
            self.calls["ascent"] = torch.compile(
                ascent, dynamic=False, fullgraph=True, **how, **graphs
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def compiled_ascent(
        self, objective: Objective, x: Tensor, z: Tensor, within: PerturbationSet, *how: Any
    ) -> tuple[Tensor, Tensor]:
        """:func:`robustood.attacks.ascent`, compiled where a graph or two serve all steps of a run.

        They do where neither the set nor the statistics of the network change.
        """
        if isinstance(within, Ball) and len(self.graphs) < MOST_GRAPHS:
            self.graphs.add(within)
        if within not in self.graphs or self.module.training:
            return ascent(objective, x, z, within, *how)
        found, values = self.calls["ascent"](objective, x, z, within, *how, gradient=traceable)
        return found.clone(), values.clone()  # a replayed graph writes over what it returned before

    def forward(self, x: Tensor) -> Tensor:
        attacked = not any(p.requires_grad for p in self.module.parameters())
        network = self.module if attacked else self.calls["update"]
        if self.engine.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        low = self.engine.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            return network(x).float()


# --- what a run is asked for


def check_parts(model: object, objective: object, data: object, optimiser: object) -> None:
    """Refuse what cannot be trained, or not be trained by, before any work.

    Raises:
        TypeError: for parts of the wrong kind; the message says what to pass.
        ValueError: for a network without a parameter that learns.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model has no parameter that requires a gradient, so there is nothing to learn; call "
            "model.requires_grad_(True), or pass a network that has parameters"
        )
    if isinstance(objective, type) or not callable(objective):
        name = objective.__name__ if isinstance(objective, type) else "Standard"
        raise TypeError(f"objective must be an instance such as {name}(...), got {objective!r}")
    if not isinstance(data, Data):
        raise TypeError(
            f"data must be a robustood.data.Data, got {type(data).__name__}; make one of tensors by "
            "Data(train=Split(x, y), val=Split(x, y), test=Split(x, y), outliers=u)"
        )
    if isinstance(optimiser, torch.optim.Optimizer) or not callable(optimiser):
        raise TypeError(
            "optimiser must make an optimiser of the parameters, such as torch.optim.SGD or "
            f"partial(torch.optim.SGD, momentum=0.9), got {type(optimiser).__name__}"
        )


def check_plan(milestones: Sequence[float] | None, augment: object) -> None:
    """Refuse milestones that are no shares of the run, and what augments no images."""
    check_augment(augment)
    if milestones is not None:
        check_several(milestones, "milestones", "shares of the run")
        for share in milestones:
            check_number(share, "milestones: each", 0, 1)


def check_data(data: Data, classes: int | None) -> None:
    """Refuse inputs, outliers and targets that no step could use."""
    for place, images in (("train.x", data.train.x), ("outliers", data.outliers)):
        if len(images) == 0 and place == "outliers":
            continue
        if images.dtype != torch.uint8:
            (check_images if images.ndim == 4 else check_anything)(images, name=f"data.{place}")
        if images.shape[1:] != data.train.x.shape[1:]:
            raise ValueError(
                f"data.{place} must be shaped like data.train.x, {tuple(data.train.x.shape[1:])} a "
                f"sample, got {tuple(images.shape[1:])}"
            )
    check_targets(data.train.y, data.train.x, classes)


def check_anything(x: Tensor, name: str) -> None:
    """Vectors have no box."""
    check_values(x, None, name)


def check_targets(y: Tensor, x: Tensor, classes: int | None) -> None:
    """Targets are labels, numbers, or images of 8 bits or in [0, 1]."""
    if y.ndim == 4 and y.dtype != torch.uint8:
        check_images(y, "data.train.y")
    elif y.is_floating_point():
        check_anything(y, "data.train.y")
    elif y.ndim != 4:
        check_labels(y, x, classes, "data.train.y")


def followed(
    objective: Callable[[nn.Module, Batch], Tensor],
) -> Callable[[nn.Module, Batch], Tensor]:
    """The objective, which says so where its loss has no gradient that an optimiser could follow."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = objective(model, batch)
        if not value.requires_grad:
            raise RuntimeError(
                "the loss has no gradient: is the model's forward under torch.no_grad(), or its output detached?"
            )
        return value

    return loss


def noted(found: object) -> dict[str, float]:
    """What a monitor returned, as numbers by name."""
    try:
        return {str(name): float(value) for name, value in dict(found).items()}  # ty: ignore
    except (TypeError, ValueError) as error:
        raise TypeError(
            f'monitor must return numbers by name, such as {{"accuracy": 0.9}}, got {found!r}'
        ) from error


# --- several processes


def join() -> int:
    """Join the processes that ``torchrun`` started, if it did; returns the rank."""
    if "WORLD_SIZE" in os.environ and not processes.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        processes.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return rank()


def rank() -> int:
    """Number of this process; 0 without others."""
    return processes.get_rank() if processes.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return processes.get_world_size() if processes.is_initialized() else 1


def mean_of_all(values: Tensor) -> Tensor:
    """The mean over the processes."""
    if world() > 1:
        processes.all_reduce(values)
        values = values / world()
    return values


class SumOfAll(torch.autograd.Function):
    """The sum over the processes, through which gradients flow back to all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        processes.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return SumOfAll.forward(ctx, grads[0])


def synchronise_statistics(model: nn.Module) -> None:
    """Let batch normalisation see the batch of all processes, on any device.

    torch's own synchronised layer needs a GPU; this one is the formula.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and "forward" not in vars(layer):
            layer.forward = lambda x, layer=layer: shared_norm(layer, x)  # ty: ignore


def release_statistics(model: nn.Module) -> None:
    """Undo :func:`synchronise_statistics`."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            vars(layer).pop("forward", None)


def shared_norm(layer: Any, x: Tensor) -> Tensor:
    """Batch normalisation with mean and variance over the batches of all processes."""
    if not layer.training:
        return type(layer).forward(layer, x)
    axes = [0, *range(2, x.ndim)]
    wide = x.float()
    count = x.numel() / x.shape[1] * world()
    mean = SumOfAll.apply(wide.sum(axes)) / count
    shape = [1, -1] + [1] * (x.ndim - 2)
    centred = wide - mean.view(shape)
    variance = SumOfAll.apply(centred.square().sum(axes)) / count
    if layer.track_running_stats:
        with torch.no_grad():
            layer.num_batches_tracked += 1
            momentum = layer.momentum or 1 / float(layer.num_batches_tracked)  # None: a plain mean
            layer.running_mean.lerp_(mean, momentum)
            layer.running_var.lerp_(variance * count / (count - 1), momentum)
    scale = layer.weight * (variance + layer.eps).rsqrt()
    return (centred * scale.view(shape) + layer.bias.view(shape)).to(x.dtype)


# --- what a step costs


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of a call, two a multiply-add.

    >>> flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
    60
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def waited(device: torch.device) -> float:
    """The time, after the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(call: Callable[[], object], device: torch.device, least: float = 0.5) -> float:
    """Median time of a call, after one to warm up; of as many as take ``least`` seconds together.

    Several processes make the same number of calls, because a call may wait for the others.
    """
    call()
    took: list[float] = []
    while float(mean_of_all(torch.tensor(sum(took), device=device))) < least:
        start = waited(device)
        call()
        took.append(waited(device) - start)
    return sorted(took)[len(took) // 2]


def bare_update(model: nn.Module, x: Tensor) -> None:
    """One forward and one backward with weights; the gradients are thrown away."""
    logits = model(x)
    cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64, device=x.device)).backward()
    for p in model.parameters():
        p.grad = None


def choose(
    model: nn.Module,
    shape: tuple[int, ...],
    device: torch.device | str | None = None,
    precision: Literal["auto", "float32", "bf16"] = "auto",
    channels_last: bool | Literal["auto"] = "auto",
    compile: bool | Literal["auto"] = "auto",
    batch_size: int = 64,
) -> Engine:
    """The engine that pays on this machine, by a measurement of some seconds on a CPU.

    bf16 makes some chips six times as fast and others ten times as slow; it is chosen where it gains at
    least a fifth. A GPU gets bf16, channels_last and compilation, if it knows bf16.

    Args:
        model: left as it is.
        shape: of one input, such as (3, 32, 32).
        device: default the model's.
        precision, channels_last, compile: "auto", or a choice that is not to be measured.
        batch_size: of the measurement.
    """
    check_choice(precision, "precision", ("auto", "float32", "bf16"))
    check_instance(model, "model", nn.Module, "a network, such as small_cnn()")
    check_several(shape, "shape", "whole numbers, those of one input such as (3, 32, 32)")
    shape = tuple(check_count(side, "shape: each", low=1) for side in shape)
    if not (isinstance(channels_last, str) and channels_last == "auto"):
        check_flag(channels_last, "channels_last")
    if not (isinstance(compile, str) and compile == "auto"):
        _check_backend(compile)
    batch_size = check_count(batch_size, "batch_size", low=1)
    if device is not None:
        check_device(device)
    device = torch.device(device or next(model.parameters()).device)
    if device.type == "cuda":
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        return Engine(
            best if precision == "auto" else precision,
            True if channels_last == "auto" else channels_last,
            True if compile == "auto" else compile,
        )
    compiled = False if compile == "auto" else compile
    formats = ["float32", "bf16"] if precision == "auto" else [precision]
    layouts = [False, True] if channels_last == "auto" else [channels_last]
    if len(formats) * len(layouts) == 1:
        return Engine(formats[0], layouts[0], compiled)
    x = torch.rand(batch_size, *shape, generator=torch.Generator().manual_seed(0))
    rates = {}
    for kind, last in itertools.product(formats, layouts):
        trial = Running(copy.deepcopy(model).train(), Engine(kind, last))
        rates[kind, last] = batch_size / seconds(lambda: bare_update(trial, x), device)  # noqa: B023
    worth = {key: rate / (1.2 if key[0] == "bf16" else 1.0) for key, rate in rates.items()}
    kind, last = max(worth, key=worth.__getitem__)
    said = {f"{k}{', channels_last' * v}": round(rate, 1) for (k, v), rate in rates.items()}
    return Engine(kind, last, compiled, said)


@dataclass
class Meter:
    """Operations and bare rate of a run's step, measured once at its start.

    Attributes:
        flops: of one step, on this process: attack, forward, backward.
        bare: operations a second of the bare update.
    """

    flops: int
    bare: float

    @classmethod
    def read(
        cls, model: nn.Module, running: nn.Module, step: Callable[[nn.Module], Tensor], x: Tensor
    ) -> Meter:
        """Take one step and some bare updates; weights, buffers and gradients are put back.

        Args:
            model: the network.
            running: the same in its engine.
            step: the objective on a batch.
            x: inputs as many as an update sees.
        """
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        model.train()
        step(running).backward()  # what has to be compiled is compiled here
        whole = flops(lambda: step(model).backward())
        update = flops(lambda: bare_update(model, x))
        took = seconds(lambda: bare_update(running, x), x.device, 0.2)
        model.load_state_dict(kept)
        for p in model.parameters():
            p.grad = None
        return cls(whole, update / took)

    def report(self, engine: Engine, per_step: float, images: int, device: torch.device) -> dict:
        """What a run's record says of its speed.

        Args:
            per_step: measured seconds a step.
            images: in-distribution images a step, of all processes.
        """
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        floor = self.flops / self.bare
        found: dict[str, Any] = {
            **asdict(engine), "device": name, "processes": world(), "threads": torch.get_num_threads(),
            "flops_per_step": self.flops, "images_per_second": images / per_step,
            "floor_images_per_second": images / floor, "over_floor": per_step / floor,
        }  # fmt: skip
        peak = next((rate for chip, rate in PEAK.items() if re.search(rf"\b{chip}\b", name)), None)
        if peak and engine.precision == "bf16":
            found["share_of_peak"] = self.flops / per_step / peak
        return found
