"""What a training step costs in memory and operations, known before the first one.

The step is rehearsed on *fake* tensors, which have a shape, a format and a lifetime but no values: nothing is
computed, and no device is needed. The operations are counted as in :mod:`robustood.engine`; the memory is that of all
tensors which are alive at once, those that autograd saves for the backward pass included.

The estimate leaves out what libraries take as workspace and what is lost between blocks, so a tenth of the free
memory is left to them.
"""

from __future__ import annotations

import copy
import math
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from robustood import distributed
from robustood.data import Batch
from robustood.inputs import check_callable, check_choice, check_instance

__all__ = ["StepCost", "check_memory", "free_memory", "step_cost"]

Objective = Callable[[nn.Module, Batch], Tensor]
MakeOptimiser = Callable[[Iterable[Tensor]], Optimizer]
_USABLE = 0.9  # share of the free memory that a step may plan with


@dataclass(frozen=True)
class StepCost:
    """The cost of one training step: memory in bytes, and operations.

    Attributes:
        weights: parameters and buffers of the network.
        gradients: those of its weights.
        optimiser: the state that the optimiser keeps.
        activations: the most that is alive at once besides the other three.
        flops: operations of attack, forward and backward pass.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    flops: int

    @property
    def memory(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.gradients + self.optimiser + self.activations


def step_cost(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    optimiser: MakeOptimiser | None = None,
    precision: str = "float32",
) -> StepCost:
    """The cost of one step of an objective; nothing is computed and nothing is changed.

    Args:
        model: the network, on any device.
        objective: maps (model, batch) to a scalar.
        batch: of the right shapes; its values are not looked at.
        optimiser: called with a list of parameters; default: none, so that no state is counted.
        precision: "float32", or "bf16" for autocast.

    Raises:
        ValueError: for parts of the wrong kind.
        RuntimeError: if the step depends on values, such as one with ``.item()``.

    >>> layer = nn.Linear(10, 2, bias=False)
    >>> loss = lambda model, batch: model(batch.x).sum()
    >>> step_cost(layer, loss, Batch(torch.zeros(5, 10), torch.zeros(5))).flops
    400
    """
    check_instance(model, "model", nn.Module, "a network, such as small_cnn()")
    check_instance(objective, "objective", Callable, "a training rule, such as ALOE(0.1)")
    check_instance(batch, "batch", Batch, "a Batch(x, y)")
    if optimiser is not None:
        check_callable(optimiser, "optimiser", "optimiser(parameters)")
    check_choice(precision, "precision", ("float32", "bf16"))
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = _bytes(trained)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, part = _faked(model), _part(batch, len(batch.x))
        known = [part.x, part.y, part.outliers, *network.parameters(), *network.buffers()]
        with (
            FlopCounterMode(display=False) as counter,
            _Alive([t for t in known if t is not None]) as alive,
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            loss = objective(network.train(), part)
            forward = alive.most  # while it runs, the gradients of the step before are still there
            loss.backward()
    return StepCost(
        weights=_bytes([*model.parameters(), *model.buffers()]),
        gradients=gradients,
        optimiser=round(_state_per_weight(optimiser) * gradients) if optimiser else 0,
        activations=max(forward, alive.most - gradients),
        flops=counter.get_total_flops(),
    )


def free_memory(device: torch.device) -> float:
    """Bytes that a device has left for tensors; infinity on a CPU, where the operating system sees to it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return math.inf


def check_memory(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    free: float,
    optimiser: MakeOptimiser | None = None,
    precision: str = "float32",
) -> None:
    """Refuse a step that does not fit into the free memory of a device.

    A step that cannot be rehearsed, because it depends on values, is not judged.

    Args:
        model, objective, batch, optimiser, precision: as in :func:`step_cost`; network and batch are on the device.
        free: bytes that are free there (:func:`free_memory`).

    Raises:
        ValueError: if the step needs more; the message says what needs it, and the largest batch that fits.
    """
    cost = partial(step_cost, model, objective, optimiser=optimiser, precision=precision)

    def fits(n: int) -> bool:
        found = cost(_part(batch, n))
        return found.memory - found.weights <= _USABLE * free

    with suppress(RuntimeError):
        n = len(batch.x)
        if fits(n):
            return
        needed = cost(batch)
        parts = {**vars(needed)}
        del parts["flops"]
        raise ValueError(
            f"batch_size = {n * distributed.world()} needs {_readable(needed.memory)} in a step "
            f"({', '.join(f'{name} {_readable(size)}' for name, size in parts.items())}), but the device has only "
            f"{_readable(free)} free, of which a tenth is kept; {_advice(batch, fits)}"
        )


def _advice(batch: Batch, fits: Callable[[int], bool]) -> str:
    """What to do about a batch that is too large."""
    sizes = range(2, len(batch.x))
    most = bisect_left(sizes, True, key=lambda n: not fits(n)) + 1
    if most < 2:
        return "no batch fits: take a smaller network, or a device with more memory"
    said = f"use batch_size={most * distributed.world()}"
    if batch.outliers is not None:
        some = _part(batch, most).outliers
        said += f" and outlier_batch_size={len(some) * distributed.world()}"  # ty: ignore
    return f"{said}, the largest that fits"


def _part(batch: Batch, n: int) -> Batch:
    """A fake batch of n inputs, and outliers in the same proportion as in a batch."""

    def fake(tensor: Tensor, size: int) -> Tensor:
        return torch.empty(size, *tensor.shape[1:], dtype=tensor.dtype)

    u = batch.outliers
    outliers = None if u is None else fake(u, len(u) * n // len(batch.x))
    return Batch(fake(batch.x, n), fake(batch.y, n), outliers, torch.Generator())


def _faked(model: nn.Module) -> nn.Module:
    """A copy of a network whose parameters and buffers are fake tensors on the CPU."""
    memo: dict[int, object] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty(b.shape, dtype=b.dtype)
    return copy.deepcopy(model, memo)


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, for as long as something holds them.

    Attributes:
        most: the largest number of bytes alive at once.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.held: dict[int, weakref.ref] = {}
        for tensor in known:  # counted elsewhere
            self.meet(tensor, 0)

    def meet(self, tensor: Tensor, size: int) -> None:
        """Count the storage of a tensor, unless it is known, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return

        def freed(_: weakref.ref) -> None:
            self.now -= size
            del self.held[key]

        self.held[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.meet(tensor, tensor.untyped_storage().nbytes())
        return made


def _bytes(tensors: Iterable[Tensor]) -> int:
    """The size of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _state_per_weight(optimiser: MakeOptimiser) -> float:
    """Bytes of state that an optimiser keeps for each byte of weights, from one step on four of them."""
    probe = nn.Parameter(torch.zeros(2, 2))
    made = optimiser([probe])
    probe.grad = torch.zeros_like(probe)
    made.step()
    kept = [
        v for v in made.state[probe].values() if isinstance(v, Tensor) and v.shape == probe.shape
    ]
    return _bytes(kept) / _bytes([probe])


def _readable(size: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
