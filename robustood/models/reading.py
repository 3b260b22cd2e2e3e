"""What a network says of its outputs, read in one place, also through wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

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
