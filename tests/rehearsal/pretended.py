"""A CPU that says it is a GPU: real code, with real values, on tensors whose device is ``cuda:0``.

Values lie on the CPU, so that a whole run works and can be compared with the same run on the CPU. Three parts of
torch do the pretending:

- a ``TorchFunctionMode`` sees each call of torch's Python interface: it answers for ``tensor.device`` and takes
  ``device="cuda"`` out of the arguments;
- a ``TorchDispatchMode`` sees each operation below autograd, in the backward pass too, and notes on which device
  the memory of its result lies;
- ``FakeTensorMode`` judges the operation: it is run once on fake tensors of the same shapes, types and devices, which
  say where the result lies, raise where CUDA would because devices mix, and raise where the result's shape or
  value must be known to the host.

``FakeTensorMode`` alone does not carry a training step. Its tensors have no values, so that each decision of the
host ends the run, and on a machine without CUDA a backward pass of fake CUDA tensors fails: autograd's engine asks
the driver for a context. Here autograd sees CPU tensors, and the judge works below it.

What is not pretended: CUDA's own kernels and their rounding, memory, streams, CUDA graphs, nccl, and torch's code
generator. bf16 is that of the CPU.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from robustood import rng

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
HERE, PACKAGE = Path(__file__), Path(rng.__file__).parent
aten = torch.ops.aten

_WRITES = {"index_put", "index_put_", "_index_put_impl_"}  # with a mask, CUDA must count it first
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


def leaves(value: Any) -> list[Any]:
    """What arguments or results hold, in order; several times as fast as torch's own, which knows more containers."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, (tuple, list)):
        return [each for part in value for each in leaves(part)]
    return [value]


class Generator(rng.SharedGenerator):
    """A generator of the CPU that says it is on the device it was asked for."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls)
        made.at = CUDA if torch.device(device).type == "cuda" else CPU
        _MADE[made._cdata] = made
        return made

    def __init__(self, device: torch.device | str = "cpu") -> None:
        del device

    device: torch.device = property(lambda self: self.at)


_MADE: dict[int, Generator] = {}  # operations get another Python object of the same generator


def home_of(generator: torch.Generator) -> torch.device:
    """The device that a generator claims."""
    known = _MADE.get(generator._cdata)
    return known.at if known else CPU


class Places:
    """Which memory lies on the pretended device."""

    def __init__(self) -> None:
        self.device: dict[int, StorageWeakRef] = {}
        self.sweep = 1024

    def of(self, x: Tensor) -> torch.device:
        return CUDA if x.untyped_storage()._cdata in self.device else CPU

    def put(self, x: Tensor, place: torch.device) -> None:
        storage = x.untyped_storage()
        if place == CPU:
            self.device.pop(storage._cdata, None)
            return
        # A weak reference, so that the address is not given to other memory while it stands here.
        self.device[storage._cdata] = StorageWeakRef(storage)
        if len(self.device) > self.sweep:
            self.device = {key: ref for key, ref in self.device.items() if not ref.expired()}
            self.sweep = 2 * len(self.device) + 1024


class _Move(torch.autograd.Function):
    """A copy on another device; its gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gpu: Operations, target: torch.device) -> Tensor:
        ctx.gpu, ctx.source = gpu, gpu.places.of(x)
        return gpu.moved(x, target)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gpu.moved(grads[0], ctx.source), None, None


class Operations(TorchDispatchMode):
    """Below autograd: computes on the CPU, notes where results lie, judges and counts.

    Attributes:
        waits: how often, and in which line, the host waited for the device or sent it something.
        launches: number of operations on the device.
        unjudged: operations that fake tensors cannot run; their tensors must lie on one device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places, self.waits = Places(), Counter[str]()
        self.launches, self.unjudged = 0, set[str]()
        # Of the call of Python's interface around an operation: the device asked for, and where its tensors lie.
        self.asked: torch.device | None = None
        self.around: torch.device = CPU
        self.verdicts: dict[Any, Any] = {}
        self.makers: dict[Any, bool] = {}  # whether an operation can be asked for a device
        self.judge = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)

    def note(self, what: str) -> None:
        """Count an event, with the line of the library, or else of the test, that asked for it."""
        stack = [f for f in traceback.extract_stack() if Path(f.filename) != HERE]
        ours = [f for f in stack if Path(f.filename).is_relative_to(PACKAGE)]
        tests = [f for f in stack if "tests" in Path(f.filename).parts]
        frame = (ours or tests or stack)[-1]
        self.waits[f"{what}: {Path(frame.filename).name}:{frame.lineno} {frame.line}"] += 1

    def moved(self, x: Tensor, target: torch.device) -> Tensor:
        """A copy of x on a device."""
        if self.places.of(x) != target:
            self.note("to the host" if target == CPU else "to the device")
        with _disable_current_modes():
            copy = x.detach().clone()
        self.places.put(copy, target)
        return copy

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._overloadname == "out" and dist.is_initialized():
            # Memory for gradients that several processes exchange is made below dispatch; this is its first use.
            self.places.put(kwargs["out"], self.places.of(args[0]))
        flat = leaves((args, kwargs))
        tensors = [t for t in flat if isinstance(t, Tensor)]
        places = [self.places.of(t) for t in tensors]
        target = self.target(func, kwargs, tensors)
        if CUDA not in places and (target or CPU) == CPU:
            return self.on_host(func, args, kwargs, tensors)
        self.launches += 1
        waits, where = self.verdict(func, args, kwargs, tensors, places, target)
        if waits:
            self.note(waits)
        if any(p == CPU for p in places) and func is not aten.copy_.default:
            self.note("host tensor in an operation of the device")
        for generator in (a for a in flat if isinstance(a, torch.Generator)):
            if home_of(generator) != CUDA:
                raise RuntimeError(
                    f"Expected a 'cuda' device type for generator but found 'cpu' ({func})"
                )
        held = {t.untyped_storage()._cdata for t in tensors}
        out = func(*args, **kwargs)
        for k, t in enumerate(t for t in leaves(out) if isinstance(t, Tensor)):
            if t.untyped_storage()._cdata not in held:  # not a view, nor written in place
                self.places.put(t, where[k] if k < len(where) else CUDA)
        return out

    def on_host(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """An operation that has nothing to do with the device."""
        out = func(*args, **kwargs)
        held = {t.untyped_storage()._cdata for t in tensors}
        for t in leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in held:
                self.places.put(t, CPU)
        return out

    def target(self, func: Any, kwargs: Any, tensors: list[Tensor]) -> torch.device | None:
        """The device on which an operation was asked to make its result; None: where its tensors lie."""
        if func not in self.makers:
            self.makers[func] = any(a.name == "device" for a in func._schema.arguments)
        if not self.makers[func]:
            return None
        if self.asked is not None:
            return self.asked
        if tensors and kwargs.get("device") is None:
            return None
        return self.around  # a constant that torch itself makes inside of an operation

    def verdict(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        tensors: list[Tensor],
        places: list[torch.device],
        target: torch.device | None,
    ) -> tuple[str, list[torch.device]]:
        """(why the host waits or "", the devices of the results) of an operation of these kinds of tensors."""
        kinds = tuple((p.type, t.ndim, t.dtype) for t, p in zip(tensors, places, strict=True))
        key = func, kinds, target, tuple(kwargs)
        if key not in self.verdicts:
            self.verdicts[key] = self.judged(func, args, kwargs, places, target)
        found = self.verdicts[key]
        if isinstance(found, Exception):
            raise found
        return found

    def judged(
        self, func: Any, args: Any, kwargs: Any, places: list[torch.device], target: Any
    ) -> Any:
        """What fake tensors say of an operation, or the error that they raise."""
        name = func._schema.name.split("::")[1]
        crossing = func is aten.copy_.default and places[0] != places[1]
        waits = ("to the host" if places[0] == CPU else "to the device") if crossing else ""
        indices = [t for t in leaves(args[1:]) if isinstance(t, Tensor)] if args else []
        masked = name in _WRITES and any(t.dtype in (torch.bool, torch.uint8) for t in indices)
        if masked or name == "bincount":
            waits = name
        if target is not None:
            kwargs = {**kwargs, "device": target}
        try:
            with _disable_current_modes(), self.judge:
                out = func(*self.faked(args), **self.faked(kwargs))
            return waits, [t.device for t in leaves(out) if isinstance(t, Tensor)]
        except (DataDependentOutputException, DynamicOutputShapeException):
            return name, []
        except (RuntimeError, TypeError) as error:
            if len({*places, target or CUDA}) > 1:
                return RuntimeError(f"{func} mixes devices: {error}")
            self.unjudged.add(str(func))  # an error of another kind is raised by the values too
            return waits, []

    def faked(self, value: Any) -> Any:
        """The arguments with fake tensors of the same kinds on the same devices; generators are left out."""

        def fake(a: Any) -> Any:
            if isinstance(a, torch.Generator):
                return None
            if not isinstance(a, Tensor):
                return a
            return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=self.places.of(a))

        return tree_map(fake, value)


class Rehearsal(TorchFunctionMode):
    """Within it, ``"cuda"`` is a device: ``with Rehearsal() as gpu: ...; gpu.waits``."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = Operations()
        self.answers: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: self.place,
            Tensor.is_cuda.__get__: lambda x: self.place(x) == CUDA,
            Tensor.is_cpu.__get__: lambda x: self.place(x) == CPU,
            Tensor.get_device: lambda x: 0 if self.place(x) == CUDA else -1,
            Tensor.to: self.to,
            Tensor.cpu: lambda x, *_: self.to(x, "cpu"),
            Tensor.cuda: lambda x, *_: self.to(x, "cuda"),
            Tensor.numpy: partial(self.on_host, Tensor.numpy),
            Tensor.__array__: partial(self.on_host, Tensor.__array__),
            Tensor.tolist: self.tolist,
        }

    @property
    def waits(self) -> Counter[str]:
        """How often the host waited for the device or sent it something, by reason and line."""
        return self.operations.waits

    def place(self, x: Tensor) -> torch.device:
        return self.operations.places.of(x)

    def __enter__(self) -> Rehearsal:
        self.patch = pytest.MonkeyPatch()
        pretend_cuda(self.patch, self.operations)
        self.operations.__enter__()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self.operations.__exit__(exc_type, exc_val, exc_tb)
        self.patch.undo()
        _MADE.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.answers:
            return self.answers[func](*args, **kwargs)
        tensors = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor)]
        around = CUDA if any(self.place(t) == CUDA for t in tensors) else CPU
        asked = None
        if kwargs.get("device") is not None:
            asked = CUDA if torch.device(kwargs["device"]).type == "cuda" else CPU
            kwargs = {**kwargs, "device": CPU}
        if func in _FROM_HOST:
            return self.sent(func, args, kwargs, asked or around)
        return self.call(func, args, kwargs, asked, around)

    def call(
        self, func: Any, args: Any, kwargs: Any, asked: torch.device | None, around: torch.device
    ) -> Any:
        """A call of torch, whose operations know what it was asked."""
        gpu = self.operations
        before = gpu.asked, gpu.around
        gpu.asked, gpu.around = asked, asked or around
        try:
            return func(*args, **kwargs)
        finally:
            gpu.asked, gpu.around = before

    def sent(self, func: Any, args: Any, kwargs: Any, target: torch.device) -> Any:
        """A tensor made from numbers of the host."""
        if args and isinstance(args[0], Tensor) and func is not Tensor.new_tensor:
            kwargs.pop("device", None)
            return self.to(args[0], target, **kwargs)
        made = self.call(func, args, kwargs, CPU, CPU)
        if target == CPU:
            return made
        there = self.operations.moved(made, target)
        return there.requires_grad_(made.requires_grad)

    def to(self, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        """``Tensor.to``, on either device."""
        own = self.place(x)
        if args and isinstance(args[0], Tensor):
            args = (self.place(args[0]), args[0].dtype, *args[1:])
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        target = own if device is None else CUDA if device.type == "cuda" else CPU
        how = {} if layout is None else {"memory_format": layout}
        x = self.call(Tensor.to, (x, dtype or x.dtype), {"copy": copy, **how}, None, own)
        return x if target == own else _Move.apply(x, self.operations, target)

    def on_host(self, method: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A method that only tensors of the host have."""
        if self.place(x) == CUDA:
            raise TypeError("a cuda:0 tensor has no numpy(); copy it to the host by Tensor.cpu()")
        return method(x, *args, **kwargs)

    def tolist(self, x: Tensor) -> Any:
        if self.place(x) == CUDA:
            self.operations.note("tolist")
        return x.tolist()


def pretend_cuda(patch: pytest.MonkeyPatch, operations: Operations) -> None:
    """Answer for ``torch.cuda`` and for the library's one maker of generators."""
    layers = torch.Generator()
    given = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: operations.note("synchronize"),
        "device": contextlib.nullcontext,
        "manual_seed": layers.manual_seed,
        "manual_seed_all": layers.manual_seed,
        "get_rng_state": lambda device="cuda": layers.get_state(),
        "set_rng_state": lambda state, device="cuda": layers.set_state(state),
        "get_device_name": lambda device=None: "a pretended GPU",
        "get_device_capability": lambda device=None: (
            7,
            5,
        ),  # a T4: no bf16, so that weights stay comparable
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (2**34, 2**34),
    }
    for name, answer in given.items():
        patch.setattr(torch.cuda, name, answer)
    patch.setattr(rng, "SharedGenerator", Generator)
    real = torch.autocast
    on_cpu = lambda kind, *a, **how: real("cpu" if kind == "cuda" else kind, *a, **how)
    patch.setattr(torch, "autocast", on_cpu)
