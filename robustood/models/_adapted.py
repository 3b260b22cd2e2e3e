"""Networks from elsewhere: which layer classifies, what it receives, and whether its output is the network's."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustood.inputs import check_count, check_instance

Output = str | int | Callable[[Any], Tensor] | None  # of what a foreign network returns


@dataclass
class Once:
    """Whether a head has been confirmed; no part of the identity of a network or a detector."""

    done: bool = field(default=False, compare=False)


class PointwiseLinear(nn.Linear):
    """A 1 x 1 convolution as a linear layer on pooled features; it shares the convolution's parameters.

    The mean over the pixels of a 1 x 1 convolution is a linear function of the mean of its input.
    """

    def __init__(self, convolution: nn.Conv2d):
        nn.Module.__init__(self)
        self.in_features, self.out_features = convolution.in_channels, convolution.out_channels
        self.weight = convolution.weight.flatten(1)  # a view, through which gradients flow
        self.bias = convolution.bias


class Adapted(nn.Module):
    """A network from elsewhere with the parts that detectors use; made by :func:`adapt`.

    The first forward pass confirms by values that what the head returns is what the network returns; each call of
    ``features`` confirms the shapes.
    """

    def __init__(
        self,
        inner: nn.Module,
        where: str,
        reject: int,
        normalise: nn.Module | None,
        output: Output = None,
    ):
        super().__init__()
        self.inner, self.where, self.reject, self.output = inner, where, reject, output
        self.normalise = normalise or nn.Identity()
        self.classes = self.head.out_features - reject
        self.confirmed = Once()

    @property
    def head(self) -> nn.Linear:
        """The layer that classifies, as a linear layer on the features."""
        layer = self.inner.get_submodule(self.where)
        return PointwiseLinear(layer) if isinstance(layer, nn.Conv2d) else layer  # ty: ignore

    def features(self, x: Tensor) -> Float[Tensor, "batch width"]:
        """What the head receives; in front of a convolution, its mean over the pixels.

        Raises:
            ValueError: if what the head returns is not what the network returns.
        """
        return self._observed(x)[1]

    def stages(self, x: Tensor) -> list[Tensor]:
        """The features, as the only known stage."""
        return [self.features(x)]

    def forward(self, x: Tensor) -> Float[Tensor, "batch outputs"]:
        # A traced or compiled forward pass has no values to compare.
        if self.confirmed.done or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.outputs(x)
        with _watched(self.inner, candidates(self.inner)) as seen:
            z = self.outputs(x)
        if isinstance(z, Tensor) and z.ndim == 2:  # anything else is refused by what reads it
            self._confirm(z, seen)
        return z

    def outputs(self, x: Tensor) -> Tensor:
        """What the network returns, whatever the head is."""
        return _entry(self.inner(self.normalise(x)), self.output)

    def _observed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and features."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        names = [self.where] if traced or self.confirmed.done else candidates(self.inner)
        with _watched(self.inner, names) as seen:
            z = self.outputs(x)
        if not traced:
            self._confirm(z, seen)
        return z, seen[self.where][0][0]

    def _confirm(self, z: Tensor, seen: Mapping[str, list[tuple[Tensor, Tensor]]]) -> None:
        """Refuse a head whose output is not the network's: by shapes, and until it was found once by values."""
        runs = seen.get(self.where, [])
        fits = len(runs) == 1 and runs[0][1].shape == z.shape
        if fits and not self.confirmed.done and not z.is_meta:
            fits = same(runs[0][1], z)
            self.confirmed.done = fits and bool(z.isfinite().all() and z.any())
        if not fits:
            raise ValueError(self._complaint(z, seen))

    def _complaint(self, z: Tensor, seen: Mapping[str, list[tuple[Tensor, Tensor]]]) -> str:
        """What is wrong with the head, and which layer is right."""
        right = [k for k, runs in seen.items() if len(runs) == 1 and same(runs[0][1], z)]
        runs = len(seen.get(self.where, []))
        ran = "" if runs == 1 else f" (it ran {runs} times in one forward pass)"
        if right:
            fix = f"pass head={right[-1]!r}, whose output it is"
        else:
            known = [k for k in candidates(self.inner) if _outputs(self.inner, k) == z.shape[-1]]
            fix = (
                f"nor is it that of any other layer with as many outputs (of {known}): something follows, such as an "
                "activation, a scale, a softmax or a mean of several heads; leave it out, say with output=... which "
                "tensor holds the outputs, or use a detector of outputs alone, such as MSP, on the network itself"
            )
        return (
            f"head {self.where!r} is not the output layer: what it returns{ran} is not what the network returns, "
            f"of shape {tuple(z.shape)}; {fix}"
        )


@contextmanager
def _watched(
    inner: nn.Module, names: list[str]
) -> Generator[Mapping[str, list[tuple[Tensor, Tensor]]]]:
    """What layers receive and return, pooled to (batch, ..), for each time they run."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def note(name: str) -> Callable[..., None]:
        def look(
            layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], returned: Tensor
        ) -> None:
            pool = _pooled if isinstance(layer, nn.Conv2d) else _flat
            # A copy: an activation may overwrite what a layer has returned.
            received = next(iter((*given, *named.values())))
            seen[name].append((pool(received), pool(returned.detach()).clone()))

        return look

    layers = map(inner.get_submodule, names)
    hooks = [
        layer.register_forward_hook(note(name), with_kwargs=True)
        for name, layer in zip(names, layers, strict=True)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _pooled(maps: Tensor) -> Tensor:
    return maps.flatten(2).mean(2)


def _flat(values: Tensor) -> Tensor:
    return values.flatten(1) if values.ndim > 1 else values


def same(a: Tensor, b: Tensor) -> bool:
    """Whether values agree up to rounding; what is not finite is judged elsewhere."""
    if a.shape != b.shape or a.device != b.device:
        return False
    rounding = max(torch.finfo(each.dtype).eps for each in (a, b)) ** 0.5
    return not bool(((a - b).abs() > rounding * b.abs().max()).any())


def _entry(returned: Any, output: Output) -> Tensor:
    """The output tensor in what a network returns."""
    if output is None:
        return returned
    if not isinstance(output, (str, int)):
        return output(returned)
    try:
        if isinstance(output, str) and not isinstance(returned, Mapping):
            return getattr(returned, output)
        return returned[output]
    except (AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"output={output!r} is not in what the network returns, a {type(returned).__name__}; name the key, the "
            "attribute or the place of its outputs, or leave output out if it returns them alone"
        ) from error


def candidates(module: nn.Module) -> list[str]:
    """The names of all linear layers and 1 x 1 convolutions, in the order of registration."""
    return [name for name, part in module.named_modules() if _classifies(part)]


def _outputs(module: nn.Module, name: str) -> int:
    """The number of outputs of a candidate."""
    layer = module.get_submodule(name)
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features  # ty: ignore


def _classifies(part: nn.Module) -> bool:
    """Whether a layer can be the last one: linear, or linear in each pixel alone."""
    if isinstance(part, nn.Conv2d):
        padded = part.padding not in ((0, 0), "same", "valid")
        return part.kernel_size == part.stride == (1, 1) and part.groups == 1 and not padded
    return isinstance(part, nn.Linear)


def _last(names: list[str]) -> str:
    """The last layer that does not belong to an auxiliary head, such as Inception's AuxLogits."""
    main = [name for name in names if "aux" not in name.lower()]
    return (main or names)[-1]


def adapt(
    module: nn.Module,
    head: str | None = None,
    reject: int = 0,
    normalise: nn.Module | None = None,
    output: Output = None,
) -> Adapted:
    """Give any network, such as one of torchvision or timm, the parts of a :class:`Classifier`.

    Args:
        module: maps what ``normalise`` returns to outputs.
        head: dotted name of the layer that classifies, linear or a 1 x 1 convolution, such as ``"fc"`` or
            ``"classifier.1"``; default: the last one outside of auxiliary heads. The first forward pass refuses a
            layer that does not return what the network returns.
        reject: number of outputs, the last ones, that reject outliers.
        normalise: applied to the pixels first, such as :class:`Normalise`.
        output: where the outputs are, if the network does not return a tensor: an attribute or key such as
            ``"logits"``, an index such as 0, or a function that extracts them.

    Raises:
        ValueError: if the network has no such layer, or ``head`` names something else.

    >>> adapt(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))).where
    '3'
    """
    check_instance(module, "module", nn.Module, "a network, such as torchvision's")
    if normalise is not None:
        check_instance(normalise, "normalise", nn.Module, "a module, such as Normalise(mean, std)")
    check_count(reject, "reject")
    # Without what torch.compile wraps around it: compiled code ignores the hooks that observe layers.
    module = getattr(module, "_orig_mod", module)
    names = candidates(module)
    if not names:
        raise ValueError(
            f"module must have a linear layer or a 1 x 1 convolution that classifies, but {type(module).__name__} has "
            "none; use a detector that needs outputs alone, such as MSP, on the network itself"
        )
    if head is not None and head not in names:
        raise ValueError(
            f"head must name a linear layer or a 1 x 1 convolution, one of {names}, got {head!r}"
        )
    return Adapted(module, _last(names) if head is None else head, reject, normalise, output)
