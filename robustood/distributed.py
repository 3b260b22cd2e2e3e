"""Several processes that share one computation, each with its part.

Training shares every batch: the result equals that of one process up to rounding. An evaluation shares whole batches,
each of which has random numbers of its own: the scores are those of one process, bit for bit where all processes have
the same device and number of threads.

If a process is lost, the others do not wait for it: they raise a :class:`ConnectionError` that says how to resume.

With a single process every function does the trivial thing, so that callers need not check whether there are others.
"""

from __future__ import annotations

import atexit
import inspect
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "check_alike", "check_divisible", "each", "from_first", "join", "leave", "mean", "rank", "release_batch_norm",
    "together", "world", "wrapped",
]  # fmt: skip

T = TypeVar("T")
# The end of a process closes its connections, which the others notice at once. Only a process that stays silent
# without ending, as on a machine without power, takes these times to be noticed.
_SILENCE = timedelta(minutes=10)  # in training, where all processes take the same steps
_PATIENCE = timedelta(days=1)  # between the batches of an evaluation, which may take hours


def join() -> int:
    """Join the processes that ``torchrun`` started, if any; returns the rank.

    The end of the program leaves them, if :func:`leave` did not.
    """
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        store, own, size = next(dist.rendezvous("env://", timeout=_SILENCE))
        store = dist.PrefixStore(_life(), store)
        dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=_SILENCE)
        # A connection still open when the interpreter ends has threads that abort the process.
        atexit.register(leave)
    return rank()


def _life() -> str:
    """A name for what the processes tell one another before they are connected.

    PyTorch's store may outlive a restart by ``torchrun`` (2.15 keeps it; pytorch/pytorch#135712): without a name of its
    own, a new process calls the address of one that is gone. Several machines count their restarts apart, so there
    the way out is ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` before ``torchrun``.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if alone else "all lives"


def leave() -> None:
    """Close the connections to the other processes, if there are any."""
    if dist.is_initialized():
        _patient.cache_clear()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, counted from 0; 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def together() -> Generator[None]:
    """Context, or decorator, of work that needs all processes, in which the loss of one has a clear message.

    Raises:
        ConnectionError: if another process has ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise ConnectionError(
            f"process {rank()} of {world()} stops, because another one has ended or does not answer; nothing saved "
            "is lost: repeat the command to resume (torchrun --max-restarts=3 repeats it by itself)"
        ) from error


@together()
def mean(values: Tensor) -> Tensor:
    """The mean over the processes; ``values`` may be overwritten."""
    if world() > 1:
        dist.all_reduce(values)
        values = values / world()
    return values


@together()
def from_first(value: T) -> T:
    """The first process's value, in every process."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def each(jobs: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Do each job in one of the processes, and yield the results in order, in all of them.

    The processes take jobs in turn, and wait for one another after each round. All must be given the same jobs, and a
    job must not communicate. With one process a job is done when its result is asked for.

    Raises:
        Exception: what a job raises, in the process that did it; in the others a RuntimeError that cites it.
    """
    if world() == 1:
        yield from (job() for job in jobs)
        return
    for start in range(0, len(jobs), world()):
        yield from _one_each(jobs[start : start + world()])


def _one_each(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """The results of at most one job for each process."""
    found, error = None, None
    if rank() < len(jobs):
        try:
            found = jobs[rank()]()
        except Exception as raised:  # the others must not wait for a result
            error = raised
    results: list[Any] = [None] * world()
    own = found, error and f"{type(error).__name__}: {error}"
    with together():
        dist.all_gather_object(results, own, group=_patient(dist.group.WORLD))
    if error is not None:
        raise error
    for number, (_, failure) in enumerate(results):
        if failure is not None:
            raise RuntimeError(f"process {number} of {world()} failed: {failure}")
    return [value for value, _ in results[: len(jobs)]]


@cache
def _patient(processes: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The same processes in a group of its own, where none is lost while it works on a long job."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))


def check_alike(things: dict[str, str]) -> None:
    """Refuse to share work on things that differ between the processes.

    Args:
        things: a fingerprint of each by its name (:func:`robustood.identity.identity`).
    """
    for name, first in from_first(things).items():
        if things.get(name) != first:
            raise ValueError(
                f"{name} must be the same in all processes, but is {first} in process 0 and "
                f"{things.get(name, 'nothing')} in process {rank()}; read it from a file, or draw it with a seed"
            )


def check_divisible(size: int, name: str, parts: int = 1) -> None:
    """Refuse a batch whose ``parts`` do not divide evenly among the processes."""
    if world() > 1 and size % (parts * world()):
        raise ValueError(
            f"{name} must be a multiple of {parts * world()} with {world()} processes, got {size}"
        )


def wrapped(model: nn.Module) -> nn.Module:
    """The model with gradients and batch statistics shared by all processes; the model itself if there is only one."""
    if world() == 1:
        return model
    _synchronise_batch_norm(model)
    # The wrapper would send the buffers at each forward pass, though they are equal already.
    known = inspect.signature(DistributedDataParallel).parameters
    sent = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    how: dict[str, Any] = {sent: False}
    return DistributedDataParallel(model, **how)


# --- batch normalisation over the batches of all processes


def _synchronise_batch_norm(model: nn.Module) -> None:
    """Make batch normalisation use the batches of all processes, on any device.

    torch's own synchronised layer needs a GPU; this one computes the formula directly.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and "forward" not in vars(layer):
            layer.forward = lambda input, layer=layer: _shared_batch_norm(layer, input)


def release_batch_norm(model: nn.Module) -> None:
    """Undo :func:`wrapped`."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            vars(layer).pop("forward", None)


class _AllReduce(torch.autograd.Function):
    """The sum over the processes, with gradients for all of them."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        return _AllReduce.forward(ctx, grads[0])


def _shared_batch_norm(layer: _BatchNorm, x: Tensor) -> Tensor:
    """Batch normalisation with mean and variance over the batches of all processes."""
    if not layer.training:
        return type(layer).forward(layer, x)
    axes = [0, *range(2, x.ndim)]
    wide = x.float()
    count = x.numel() / x.shape[1] * world()
    centre = cast(Tensor, _AllReduce.apply(wide.sum(axes))) / count
    shape = [1, -1] + [1] * (x.ndim - 2)
    centred = wide - centre.view(shape)
    variance = cast(Tensor, _AllReduce.apply(centred.square().sum(axes))) / count
    steps, means, variances = layer.num_batches_tracked, layer.running_mean, layer.running_var
    if steps is not None and means is not None and variances is not None:
        with torch.no_grad():
            steps += 1
            momentum = layer.momentum or 1 / float(steps)  # None: the mean over all steps
            means.lerp_(centre, momentum)
            variances.lerp_(variance * count / (count - 1), momentum)
    scale = layer.weight * (variance + layer.eps).rsqrt()
    return (centred * scale.view(shape) + layer.bias.view(shape)).to(x.dtype)
