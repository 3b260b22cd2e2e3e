"""What a network declares about its outputs, also through wrappers, and one place that reads its outputs.

Shapes and types are checked at every call. Values are checked once, at the end of a public function (:func:`reading`,
:class:`GradientWatch`): the check waits for the device, which a loop must not do.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor, nn

from robustood.callables import modules

Model = Callable[[Tensor], Tensor]
T = TypeVar("T")
Values = TypeVar(
    "Values", bound=Tensor | tuple[Tensor, Tensor]
)  # of an objective of robustood.attacks


def declared_outputs(model: object) -> tuple[int | None, int]:
    """How many outputs are classes (None: not declared, so all that do not reject) and how many reject.

    A wrapper such as ``nn.Sequential(normalise, net)``, ``DataParallel(net)`` or ``lambda x: net(x)`` has what the
    network inside it declares; the wrapper's own declaration takes precedence. A network that declares nothing,
    such as torchvision's, has class outputs only.

    Raises:
        ValueError: if the networks inside disagree.
    """
    return _declared(model, "classes"), _declared(model, "reject") or 0


def _declared(model: object, name: str) -> int | None:
    found = set(_declarations(model, name))
    if len(found) > 1:
        raise ValueError(
            f"the networks inside the model disagree about {name} ({sorted(found)}); set model.classes and "
            f"model.reject on the {type(model).__name__} itself"
        )
    return found.pop() if found else None


def _declarations(model: object, name: str) -> Iterator[int]:
    """The model's own declaration, or else those of its parts."""
    own = getattr(model, name, None)
    if isinstance(own, Integral) and not isinstance(own, bool):
        yield int(own)
        return
    for part in model.children() if isinstance(model, nn.Module) else modules(model):
        yield from _declarations(part, name)


def split(model: object, z: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs (batch, outputs) that are classes, and those that reject.

    Raises:
        ValueError: if their number is not what the model, or a network inside it, declares.
    """
    classes, reject = declared_outputs(model)
    width = z.shape[1]
    classes = width - reject if classes is None else classes
    if classes + reject != width or classes < 1:
        raise ValueError(
            f"model returns {width} outputs, but it, or a network inside it, declares classes = {classes} and "
            f"reject = {reject}; set both on the {type(model).__name__}, or wrap it in "
            "models.adapt(model, reject=1), with the number of outputs that reject"
        )
    return z[:, :classes], z[:, classes:]


# --- its passes


@dataclass
class Passes:
    """How many inputs passed a network, forwards and backwards."""

    forwards: int = 0
    backwards: int = 0

    def meet(self, x: Tensor) -> None:
        """Count a forward pass, and the backward pass if one follows."""
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self.back)

    def back(self, grad: Tensor) -> None:
        self.backwards += len(grad)


_PASSES: ContextVar[Passes | None] = ContextVar("passes", default=None)


@contextmanager
def counting() -> Generator[Passes]:
    """Count the passes of everything that reads a network inside."""
    token = _PASSES.set(passes := Passes())
    try:
        yield passes
    finally:
        _PASSES.reset(token)


# --- its outputs


def read(model: Model, x: Tensor) -> Tensor:
    """The outputs for x: floats (batch, outputs), with at least two outputs.

    The model gets a copy of x, which it may overwrite.

    Raises:
        TypeError: if the model does not return a tensor.
        ValueError: for another shape, integers, or an x whose type, device or shape does not fit the model.
    """
    if torch.compiler.is_compiling():
        return model(x)
    z = through(model, model, x)
    if not isinstance(z, Tensor):
        raise TypeError(
            f"model must return a tensor (batch, outputs), got {type(z).__name__}; extract it with "
            f"models.adapt(model, output={_place(z)})"
        )
    if z.ndim != 2 or len(z) != len(x) or not z.is_floating_point():
        raise ValueError(
            f"model must return floats of shape ({len(x)}, outputs) for {len(x)} inputs, got {z.dtype} of shape "
            f"{tuple(z.shape)}; pool or flatten its outputs, and omit argmax"
        )
    if z.shape[1] < 2:
        raise ValueError(
            "model returns one output, whose softmax is always 1; turn a single logit z into two outputs, "
            "torch.cat([torch.zeros_like(z), z], 1)"
        )
    return z


def through(call: Callable[[Tensor], T], model: object, x: Tensor) -> T:
    """What a model, or a part of it, returns for a copy of x.

    Raises:
        ValueError: if the type, device or shape of x does not fit the weights.
    """
    x = x.clone()
    if not torch.compiler.is_compiling() and (passes := _PASSES.get()) is not None:
        passes.meet(x)
    try:
        return call(x)
    except RuntimeError as error:
        if torch.compiler.is_compiling():
            raise
        raise _explained(error, model, x) from error


def _explained(error: RuntimeError, model: object, x: Tensor) -> Exception:
    """An error that says what is wrong with x after a failed forward pass; else the error itself."""
    parameters = (p for part in modules(model) for p in part.parameters())
    weights = next((p for p in parameters if p.is_floating_point()), None)
    if weights is not None and (weights.dtype, weights.device) != (x.dtype, x.device):
        return ValueError(
            f"x is {x.dtype} on {x.device}, but the model's weights are {weights.dtype} on {weights.device}; pass "
            f'x.to("{weights.device}", {weights.dtype})'
        )
    if type(error) is RuntimeError and re.search(r"shapes|size|channels|Expected \dD", str(error)):
        last = x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3)
        order = "; if the channels stand last, pass x.permute(0, 3, 1, 2)" if last else ""
        return ValueError(
            f"x of shape {tuple(x.shape)} does not fit the model ({error}); pass a batch such as (batch, channel, "
            f"height, width) in the model's own size{order}"
        )
    return error


def _place(z: object) -> str:
    """The ``output`` of :func:`robustood.models.adapt` that finds the tensor in z."""
    if isinstance(z, Mapping):
        return repr(next((key for key, value in z.items() if isinstance(value, Tensor)), "logits"))
    if isinstance(z, (tuple, list)):
        return "0"
    return '"logits"' if hasattr(z, "logits") else "lambda z: ..."


def check_finite(bad: int | Tensor, total: int) -> None:
    """Refuse outputs that are not numbers; waits for the device."""
    if count := int(bad):
        raise ValueError(
            f"model returned NaN or infinity for {count} of {total} inputs, so nothing is measured; look for weights "
            "that are not finite and for a log or a division by 0, and mask outputs with -1e4 instead of -inf"
        )


@contextmanager
def reading(model: Model) -> Generator[Model]:
    """:func:`read` as a function of x alone; NaN and infinity in its results are refused on leaving."""
    bad: list[Tensor] = []
    total: list[int] = []

    def reader(x: Tensor) -> Tensor:
        z = read(model, x)
        bad.append((~z.detach().isfinite()).any(1).sum())
        total.append(len(z))
        return z

    yield reader
    check_finite(sum(bad), sum(total))


# --- its gradient


def input_gradient(value: Tensor, z: Tensor) -> Tensor:
    """The gradient of a value.

    Raises:
        RuntimeError: if there is none.
    """
    found = torch.autograd.grad(value, z, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise RuntimeError(
            "there is no gradient from the model's outputs to its input, which an attack needs: is the forward pass "
            "under torch.no_grad(), or is its result detached or computed outside torch?"
        )
    return found


class GradientWatch:
    """Whether an attack saw only finite values, and a gradient other than zero; checked once, by ``close``.

    A gradient that is exactly zero at every step from every initial point is not small but hidden.
    """

    def __init__(self) -> None:
        self.bad: int | Tensor = 0
        self.total = 0
        self.rose: Tensor | None = None  # whether any gradient was not zero

    def over(self, objective: Callable[[Tensor], Values]) -> Callable[[Tensor], Values]:
        """The objective; its values and gradients are watched as they pass."""

        def watched(x: Tensor) -> Values:
            if x.requires_grad:
                x.register_hook(self.meet)
            values = objective(x)
            climb = values[0] if isinstance(values, tuple) else values
            self.bad = self.bad + (~climb.detach().isfinite()).sum()
            self.total += len(x)
            return values

        return watched

    def meet(self, grad: Tensor) -> None:
        rose = (grad != 0).any()
        self.rose = rose if self.rose is None else self.rose | rose

    def close(self, inputs: int, hidden: bool = True) -> None:
        """Refuse NaN, and warn if the gradient was hidden for all inputs; waits for the device."""
        check_finite(self.bad, self.total)
        if hidden:
            self.warn(inputs)

    def warn(self, inputs: int) -> None:
        """Warn if the gradient was hidden for all inputs; waits for the device."""
        if self.rose is not None and not self.rose:
            warnings.warn(
                f"the gradient is exactly zero for 100 % of {inputs} inputs at every step, so the attack moved "
                "at random, and what withstands it is no evidence of robustness. Rounding, argmax or saturation hides "
                'the gradient: attack without that layer, with a straight-through gradient, or with loss="margin"',
                stacklevel=3,
            )
