r"""How to run a network fast, and how close a training run comes to its minimum time.

An :class:`Engine` sets the number format and memory layout in which a network computes and whether it is
compiled; images, perturbations, losses and weights stay float32.

The *floor* of a training step is its minimum time: the time of its forward and backward passes alone. A forward
pass costs $F$ floating-point operations per image, and so does a backward pass to the input only; a backward pass to
input and weights costs $2F$. An attack of k steps takes k forward and k backward passes to the input, the update one
forward pass and one backward pass to input and weights, together $(2k + 3) F$ per image. (Choosing the best iterate
takes one more forward pass.) The operations of a step are counted while it runs; tests compare the count with the
formula. The floor divides this count by a measured rate, not one from a data sheet: the operations per second
of a bare update, one forward and one backward pass of the same network in the same engine.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import platform
import re
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from robustood import distributed
from robustood.attacks import AttackObjective, ascent, climb_at
from robustood.checkpoints import Json
from robustood.data import Batch
from robustood.inputs import (
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_instance,
    check_mapping,
    check_number,
    check_several,
)
from robustood.perturbations import Ball, PerturbationSet

__all__ = [
    "Engine",
    "Meter",
    "Running",
    "arithmetic",
    "choose",
    "flops",
    "keep_memory",
    "made_optimiser",
    "median_seconds",
    "running",
    "synchronised_time",
]

Call = Callable[..., Any]
Precision = Literal["float32", "bf16"]
_PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")
# Peak dense bf16 operations per second of data-centre GPUs, from the manufacturers' data sheets.
_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12}

# Of mallopt in glibc's malloc.h: from this size on memory is mapped apart, and so much is kept at the end of the heap.
_KEPT = {-3: 2**30, -1: 2**31 - 1}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def _check_backend(compile: bool | str) -> None:
    """Refuse a value that is neither a bool nor the name of a backend."""
    if isinstance(compile, str):
        check_choice(compile, "compile", torch.compiler.list_backends(exclude_tags=()))
    else:
        check_flag(compile, "compile")


@dataclass(frozen=True)
class Engine:
    """How a network is run.

    Attributes:
        precision: number format inside the network; ``"bf16"`` uses autocast and keeps weights, inputs and
            outputs in float32.
        channels_last: use this memory layout for the network and its inputs.
        compile: compile the network, and each attack on a norm ball in eval mode as one graph; a string
            names a backend of ``torch.compile``.
        tf32: on a GPU, round the factors of float32 products in training to TF32, which has 10 bits.
        benchmark: on a GPU, let cuDNN try its algorithms at the first step of each shape and keep the fastest.
        measured: images per second of forward and backward passes, on which the choice was based (:func:`choose`).
    """

    precision: Precision = "float32"
    channels_last: bool = False
    compile: bool | str = False
    tf32: bool = False
    benchmark: bool = False
    measured: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice(self.precision, "precision", _PRECISIONS)
        for name in ("channels_last", "tf32", "benchmark"):
            check_flag(getattr(self, name), name)
        _check_backend(self.compile)
        check_mapping(self.measured, "measured", "{name: images per second}")
        for name, rate in self.measured.items():
            check_number(rate, f"measured[{name!r}]", 0)

    def run(self, model: nn.Module) -> nn.Module:
        """The model wrapped for training; the model itself if there is nothing to wrap."""
        return model if self == Engine() and distributed.world() == 1 else Running(model, self)


class Running(nn.Module):
    """A network run by an engine. All attributes but ``forward`` are those of the network.

    On a GPU each compiled attack is recorded as a CUDA graph, which is replayed at fixed addresses:

    - Its inputs (images, initial points, and what the objective holds, such as labels) are copied to those
      addresses before each replay. Weights are read where they lie, so they must be changed in place, as an
      optimiser and ``load_state_dict`` do.
    - Its outputs are overwritten by the next replay, such as that of the next restart, so they are cloned.
    - It draws no random numbers: initial points are drawn before, and a network in eval mode draws none.

    The update is compiled without a CUDA graph, since its outputs must outlive the forward pass for the backward pass.

    Attributes:
        failed: why the compiler failed; from then on everything is run uncompiled. Empty if it did not.
    """

    def __init__(self, model: nn.Module, engine: Engine):
        super().__init__()
        self.module, self.engine, self.failed = model, engine, ""
        if engine.channels_last:
            model.to(memory_format=torch.channels_last)
        network = distributed.wrapped(model)
        # In a dictionary, so that nn.Module does not register a second network.
        self.calls: dict[str, Call] = {"update": network}
        self.climb = self.compiled_ascent if engine.compile else None
        if engine.compile:
            named = isinstance(engine.compile, str)
            how = {"backend": engine.compile} if named else {}
            graphs = {} if named else {"mode": "reduce-overhead"}
            self.calls["update"] = self.guarded(network, network, **how)
            self.calls["ascent"] = self.guarded(ascent, _one_graph, fullgraph=True, **how, **graphs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    @property
    def unwrapped(self) -> nn.Module:
        """The network itself, for what must see its layers (:func:`robustood.smoothing.interval_bounds`)."""
        return self.module

    def guarded(self, call: Call, traceable: Call, **how: Any) -> Call:
        """A call through the compiler, in its traceable form; once that has failed, the call itself.

        An error that the call itself raises passes.
        """
        from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

        compiled = torch.compile(traceable, dynamic=False, **how)

        def attempt(*given: object) -> object:
            if self.failed:
                return call(*given)
            try:
                return compiled(*given)
            except TorchDynamoException as error:
                found = call(*given)
                reason = " ".join(str(error).strip().split("\n\n")[0].split())  # the rest is advice
                self.failed = f"{type(error).__name__}: {reason[:200]}"
                warnings.warn(
                    f"torch.compile failed, so this run goes on uncompiled ({self.failed}); pass compile=False "
                    "to omit the attempt, or install what it lacks, such as a C++ compiler",
                    stacklevel=2,
                )
                return found

        return attempt

    def compiled_ascent(
        self, objective: AttackObjective, x: Tensor, z: Tensor, within: PerturbationSet, *how: Any
    ) -> tuple[Tensor, Tensor]:
        """:func:`robustood.attacks.ascent`, compiled for norm balls if the network is in eval mode."""
        if not isinstance(within, Ball) or self.module.training:
            return ascent(objective, x, z, within, *how)
        found, values = self.calls["ascent"](objective, x, z, within, *how)
        return found.clone(), values.clone()  # the next replay overwrites them

    def forward(self, x: Tensor) -> Tensor:
        attacked = not any(p.requires_grad for p in self.module.parameters())
        network = self.module if attacked else self.calls["update"]
        if self.engine.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        low = self.engine.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            return network(x).float()


def _one_graph(
    objective: AttackObjective, x: Tensor, z: Tensor, within: PerturbationSet, *how: Any
) -> tuple[Tensor, Tensor]:
    """:func:`robustood.attacks.ascent` in a form that the compiler can trace as one graph."""
    return ascent(objective, x, z, within, *how, gradient=_traceable)


def _traceable(
    objective: AttackObjective, x: Tensor, z: Tensor, within: PerturbationSet
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`robustood.attacks.value_and_grad` in a form that the compiler can trace."""
    total = lambda z: climb_at(objective, x, z, within)
    grad, (moved, climb, judge) = torch.func.grad(total, has_aux=True)(z)
    return moved.detach(), climb.detach(), judge.detach(), grad


@contextmanager
def running(model: nn.Module, engine: Engine) -> Generator[nn.Module]:
    """The model wrapped for training; on exit, also after an error, layout, layers and arithmetic are restored."""
    try:
        with arithmetic(engine.tf32, engine.benchmark):
            yield engine.run(model)
    finally:
        distributed.release_batch_norm(model)
        model.to(memory_format=torch.contiguous_format)


@contextmanager
def arithmetic(tf32: bool = False, benchmark: bool = False) -> Generator[None]:
    """Context that sets how a GPU computes in float32; as it was on exit, also after an error.

    Training may use TF32 and algorithms that cuDNN has tried; evaluation uses neither, so that float32 has its full
    precision there.
    """
    if not torch.cuda.is_available():
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = tf32, tf32, benchmark
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def keep_memory() -> None:
    """Let the C library of Linux keep the memory of large tensors that were freed, for the rest of the process.

    By default it returns such memory to the system, and gets it back page by page in the next pass. A training step
    of the small residual network on a CPU spends about a sixth of its time on that. The values do not change. The
    command ``robustood`` calls this first; a script of your own may. Without effect on other systems, and on a GPU.
    """
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in _KEPT.items():
            ctypes.CDLL(None).mallopt(parameter, value)


def made_optimiser(
    make: Callable[..., Optimizer], model: nn.Module, lr: float, weight_decay: float
) -> Optimizer:
    """The optimiser for the model's parameters or parameter groups; fused on a GPU if possible."""
    on_gpu = next(model.parameters()).is_cuda
    fused = {"fused": True} if on_gpu and "fused" in signature(make).parameters else {}
    groups = getattr(model, "parameter_groups", model.parameters)()
    return make(groups, lr=lr, weight_decay=weight_decay, **fused)


# --- the cost of a step


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call; a multiply-add counts as two.

    >>> flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
    60
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def synchronised_time(device: torch.device) -> float:
    """The time in seconds, read after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def median_seconds(call: Callable[[], object], device: torch.device, least: float = 0.5) -> float:
    """Median time of a call: one call to warm up, then as many as take ``least`` seconds in total.

    Several processes make the same number of calls, because one call may wait for the others.
    """
    call()
    took: list[float] = []
    while float(distributed.mean(torch.tensor(sum(took), device=device))) < least:
        start = synchronised_time(device)
        call()
        took.append(synchronised_time(device) - start)
    return sorted(took)[len(took) // 2]


def _bare_update(model: nn.Module, x: Tensor) -> None:
    """One forward and one backward pass to the weights; the gradients are discarded."""
    logits = model(x)
    cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64, device=x.device)).backward()
    for p in model.parameters():
        p.grad = None


def choose(
    model: nn.Module,
    shape: tuple[int, ...],
    device: torch.device | str | None = None,
    precision: Precision | Literal["auto"] = "auto",
    channels_last: bool | Literal["auto"] = "auto",
    compile: bool | Literal["auto"] = "auto",
    batch_size: int = 64,
) -> Engine:
    """The fastest engine for this machine; on a CPU it is found by a measurement of a few seconds.

    bf16 makes some CPUs six times as fast and others ten times slower; it is chosen if it is at least 20 % faster.
    On an NVIDIA GPU the compute capability decides: from 8.0 (A100) on, the chip has bf16 and TF32; before, as on a
    T4 (7.5), bf16 would be emulated, and float32 is chosen. Both get channels_last, compilation and cuDNN's
    benchmark. Other devices, such as "mps", get the plain engine.

    Args:
        model: not changed.
        shape: of one input, such as (3, 32, 32).
        device: default: the model's.
        precision, channels_last, compile: "auto", or a fixed choice that is used without a measurement.
        batch_size: number of images per batch in the measurement.
    """
    check_instance(model, "model", nn.Module, "a network, such as small_cnn()")
    check_several(shape, "shape", "whole numbers, those of one input such as (3, 32, 32)")
    shape = tuple(check_count(side, "shape: each", low=1) for side in shape)
    batch_size = check_count(batch_size, "batch_size", low=1)
    if device is not None:
        check_device(device)
    given: Json = {
        "precision": precision,
        "channels_last": channels_last,
        "compile": compile,
    }
    given = {name: v for name, v in given.items() if not (isinstance(v, str) and v == "auto")}
    plain = Engine(**given)  # refuses invalid values
    device = torch.device(device or next(model.parameters()).device)
    if device.type == "cuda":
        recent = torch.cuda.get_device_capability(device)[0] >= 8
        fast = Engine("bf16" if recent else "float32", True, compile=True, benchmark=True)
        fast = replace(fast, **given)
        return replace(fast, tf32=recent and fast.precision == "float32")
    if device.type != "cpu":
        return plain
    formats = [plain.precision] if "precision" in given else _PRECISIONS
    layouts = [plain.channels_last] if "channels_last" in given else [False, True]
    if len(formats) * len(layouts) == 1:
        return plain
    x = torch.rand(batch_size, *shape, generator=torch.Generator().manual_seed(0))
    rates = {}
    for kind, last in itertools.product(formats, layouts):
        trial = Running(copy.deepcopy(model).train(), Engine(kind, last))
        rates[kind, last] = batch_size / median_seconds(partial(_bare_update, trial, x), device)
    worth = {key: rate / (1.2 if key[0] == "bf16" else 1.0) for key, rate in rates.items()}
    kind, last = max(worth, key=worth.__getitem__)
    said = {f"{k}{', channels_last' * v}": round(rate, 1) for (k, v), rate in rates.items()}
    return replace(plain, precision=kind, channels_last=last, measured=said)


@dataclass
class Meter:
    """Operations of a training step and their rate in a bare update, measured once at the start of a run.

    Attributes:
        flops: operations of one step in this process: attack, forward and backward pass.
        bare: operations per second of a bare update.
        running: the network in its engine, which says whether its compilation failed.
    """

    flops: int
    bare: float
    running: nn.Module | None = None

    @classmethod
    def read(
        cls,
        model: nn.Module,
        running: nn.Module,
        objective: Callable[[nn.Module, Batch], Tensor],
        batch: Batch,
    ) -> Meter:
        """Measure one step and some bare updates; weights and buffers are restored, gradients cleared.

        Args:
            model: the network.
            running: the same network in its engine.
            objective: that of the run.
            batch: as many inputs and outliers as in a step.
        """
        x = batch.x if batch.outliers is None else torch.cat([batch.x, batch.outliers])
        climbing = replace(batch, climb=getattr(running, "climb", None))
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        model.train()
        objective(running, climbing).backward()  # compiles what has to be compiled
        whole = flops(lambda: objective(model, batch).backward())
        update = flops(lambda: _bare_update(model, x))
        took = median_seconds(lambda: _bare_update(running, x), x.device, 0.2)
        model.load_state_dict(kept)
        for p in model.parameters():
            p.grad = None
        return cls(whole, update / took, running)

    def report(self, engine: Engine, per_step: float, images: int, device: torch.device) -> dict:
        """The speed of a run, as its record keeps it.

        Args:
            per_step: measured seconds per step.
            images: in-distribution images per step, over all processes.
        """
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        floor = self.flops / self.bare
        found: Json = {
            **asdict(engine),
            "device": name,
            "processes": distributed.world(),
            "threads": torch.get_num_threads(),
            "flops_per_step": self.flops,
            "images_per_second": images / per_step,
            "floor_images_per_second": images / floor,
            "over_floor": per_step / floor,
        }
        peak = next((rate for chip, rate in _PEAK.items() if re.search(rf"\b{chip}\b", name)), None)
        if failed := getattr(self.running, "failed", ""):
            found |= {"compile": False, "compile_failed": failed}
        if peak and engine.precision == "bf16":
            found["share_of_peak"] = self.flops / per_step / peak
        return found
