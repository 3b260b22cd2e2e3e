"""What a network says of its outputs, also through wrappers, and what it returns, read in one place.

Shapes and types are checked at every call. Values are looked at once, when a door is left (:class:`Reader`,
:class:`Watch`): a look waits for the device, and a loop must not.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from robustood.callables import modules

Model = Callable[[Tensor], Tensor]


def declared(model: Any) -> tuple[int | None, int]:
    """How many outputs are classes (None: nobody says, so all that do not reject) and how many reject.

    A wrapper such as ``nn.Sequential(normalise, net)``, ``DataParallel(net)`` or ``lambda x: net(x)`` has what the
    network inside it has. What the model itself says comes first. A network that says nothing, such as
    torchvision's, has classes alone.

    Raises:
        ValueError: if the networks inside disagree.
    """
    return one(model, "classes"), one(model, "reject") or 0


def one(model: Any, name: str) -> int | None:
    """A number that the model says, or else the outermost of its parts that say one."""
    found = set(said(model, name))
    if len(found) > 1:
        raise ValueError(
            f"the networks inside the model disagree about {name} ({sorted(found)}); set model.classes and "
            f"model.reject on the {type(model).__name__} itself"
        )
    return found.pop() if found else None


def said(model: Any, name: str) -> Iterator[int]:
    """What the model says, or else what its parts say."""
    own = getattr(model, name, None)
    if isinstance(own, Integral) and not isinstance(own, bool):
        yield int(own)
    elif isinstance(model, nn.Module):
        for part in model.children():
            yield from said(part, name)
    else:
        for part in modules(model):
            yield from said(part, name)


def split(model: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs (batch, outputs) that are classes, and those that reject.

    Raises:
        ValueError: if there are other outputs than the model, or a network inside it, says.
    """
    classes, reject = declared(model)
    width = z.shape[1]
    classes = width - reject if classes is None else classes
    if classes + reject != width or classes < 1:
        raise ValueError(
            f"model returns {width} outputs, but it, or a network inside it, says classes = {classes} and "
            f"reject = {reject}; set both on the {type(model).__name__}, or wrap it by "
            "models.adapt(model, head=..., reject=1), with the number of outputs that reject"
        )
    return z[:, :classes], z[:, classes:]


# --- what it returns


def read(model: Model, x: Tensor) -> Tensor:
    """The outputs for x: a float tensor (batch, outputs), of two outputs or more.

    The model gets a copy, which it may overwrite.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: for another shape or integers, and where x has not the weights' own type or device.
    """
    if torch.compiler.is_compiling():
        return model(x)
    z = through(model, model, x)
    if not isinstance(z, Tensor):
        raise TypeError(
            f"model must return a tensor (batch, outputs), got {type(z).__name__}; take one out of it by "
            f"models.adapt(model, head=..., output={entry(z)})"
        )
    if z.ndim != 2 or len(z) != len(x) or not z.is_floating_point():
        raise ValueError(
            f"model must return floats of shape ({len(x)}, outputs) for {len(x)} inputs, got {z.dtype} of shape "
            f"{tuple(z.shape)}; pool or flatten what it returns, and leave out argmax"
        )
    if z.shape[1] < 2:
        raise ValueError(
            "model returns one output, which a softmax makes certain whatever it is; of a single logit z make two, "
            "torch.cat([torch.zeros_like(z), z], 1)"
        )
    return z


def through(call: Callable[[Tensor], Any], model: Any, x: Tensor) -> Any:
    """What a model, or a part of it, makes of a copy of x.

    Raises:
        ValueError: where x has another type, device or shape than the weights take.
    """
    try:
        return call(x.clone())
    except RuntimeError as error:
        if torch.compiler.is_compiling():
            raise
        raise unlike(model, x) or unfit(x, error) from error


def unfit(x: Tensor, error: RuntimeError) -> Exception:
    """What to say where a forward failed because of the shape of its inputs; else the error itself."""
    if type(error) is RuntimeError and re.search(r"shapes|size|channels|Expected \dD", str(error)):
        return ValueError(
            f"x of shape {tuple(x.shape)} does not fit the model ({error}); pass a batch such as (batch, channel, "
            "height, width) in the model's own size"
        )
    return error


def unlike(model: Any, x: Tensor) -> ValueError | None:
    """What to say where a forward failed because weights and inputs are of two types or devices."""
    parts = [model] if isinstance(model, nn.Module) else modules(model)
    weights = next((p for part in parts for p in part.parameters() if p.is_floating_point()), None)
    if weights is None or (weights.dtype, weights.device) == (x.dtype, x.device):
        return None
    return ValueError(
        f"x is {x.dtype} on {x.device}, but the model's weights are {weights.dtype} on {weights.device}; pass "
        f'x.to("{weights.device}", {weights.dtype})'
    )


def entry(z: Any) -> str:
    """How ``models.adapt`` would be told where the tensor is."""
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
            "that are not finite, for a log or a division by 0, and write -1e4 where -inf masks an output"
        )


class Reader:
    """A model at a door. Whether all that it returned was finite is asked at the end, by ``close``."""

    def __init__(self, model: Model):
        self.model, self.total = model, 0
        self.bad: int | Tensor = 0

    def __call__(self, x: Tensor) -> Tensor:
        z = read(self.model, x)
        self.bad, self.total = self.bad + (~z.detach().isfinite()).any(1).sum(), self.total + len(z)
        return z

    def close(self) -> None:
        check_finite(self.bad, self.total)


@contextmanager
def reading(model: Model) -> Generator[Reader]:
    """The model as a :class:`Reader`; NaN and infinity are refused on leaving."""
    reader = Reader(model)
    yield reader
    reader.close()


# --- whether it can be followed uphill


def slope(value: Tensor, z: Tensor) -> Tensor:
    """The gradient of a value.

    Raises:
        RuntimeError: if there is none.
    """
    found = torch.autograd.grad(value, z, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise RuntimeError(
            "there is no gradient from the model's outputs to its input: is its forward under torch.no_grad(), or "
            "is what it returns detached or computed outside torch? An attack needs that gradient"
        )
    return found


class Watch:
    """Whether an attack met numbers, and a gradient for some input; asked once, by :meth:`close`.

    Zero at every step of every start, exactly, is no small gradient but a hidden one.
    """

    def __init__(self) -> None:
        self.met: Tensor | None = None  # of the batch at hand
        self.batches: list[Tensor] = []
        self.bad: int | Tensor = 0
        self.total = 0

    def over(self, objective: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """The objective; what it returns and its gradients are looked at as they pass."""

        def watched(x: Tensor) -> Any:
            if x.requires_grad:
                x.register_hook(self.meet)
            values = objective(x)
            climb = values[0] if isinstance(values, tuple) else values
            self.bad, self.total = (
                self.bad + (~climb.detach().isfinite()).sum(),
                self.total + len(x),
            )
            return values

        return watched

    def meet(self, grad: Tensor) -> None:
        some = (grad != 0).flatten(1).any(1)
        self.met = some if self.met is None else self.met | some

    def next(self) -> None:
        """Go on to another batch."""
        self.batches += [] if self.met is None else [self.met]
        self.met = None

    def close(self, hidden: bool = True) -> None:
        """Refuse NaN, and warn of a gradient that was hidden from all inputs; waits for the device."""
        check_finite(self.bad, self.total)
        self.next()
        if hidden and self.batches and not (met := torch.cat(self.batches)).any():
            warnings.warn(
                f"the gradient is exactly zero for 100 % of {len(met)} inputs at every step, so the attack moved "
                "by chance alone, and what it leaves is no evidence of robustness. Rounding, argmax or saturation "
                'hides it: attack without that layer, by a straight-through gradient, or with loss="margin"',
                stacklevel=3,
            )
