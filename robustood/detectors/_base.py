"""The base class of detectors, and functions that several of them use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustood.inputs import (
    as_floats,
    check_choice,
    check_labels,
    check_model,
    finite_inputs,
    pixels,
)
from robustood.models import (
    Adapted,
    Classifier,
    check_finite,
    frozen,
    input_gradient,
    networks,
    read,
    split,
    through,
)
from robustood.models._adapted import Once, same

Inputs = Float[Tensor, "batch *shape"]
Labels = Int[Tensor, " batch"]
Values = Float[Tensor, " batch"]
Columns = Float[Tensor, "batch objectives"]
Direction = Literal["raise", "lower"]
AttackObjective = Callable[
    [Tensor], tuple[Tensor, Tensor]
]  # (climb, judge), as of robustood.attacks
_Seen = TypeVar("_Seen", Tensor, list[Tensor])
FIT_BATCH = 512  # images per forward pass while fitting
CONFIRMING = 16  # images on which the head of a network from elsewhere is confirmed


class Detector(nn.Module, ABC):
    """Base class of detectors.

    Args:
        model: maps inputs (batch, ...) to outputs (batch, classes + reject).
    """

    model: Any
    fitted_attribute: str | None = None  # the attribute that fit sets, if fit is required
    n_untargeted: int = 1  # number of attack objectives that are not about one class
    has_classes: bool = True  # whether logits(x) gives the outputs of a classifier

    def __init__(self, model: Callable[[Tensor], Any]):
        super().__init__()
        check_model(model)
        self.model = model
        self.confirmed = Once()

    @abstractmethod
    def score(self, x: Inputs) -> Values:
        """The deployed score; differentiable, also through pre-processing and clipping."""

    def paper_score(self, x: Inputs) -> Values:
        """The score as the paper reports it; the deployed score unless a detector defines its own."""
        return self.score(x)

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """Objectives that an attack should maximise to raise (or lower) the score, one per column.

        The first column is the score itself, negated if it is to be lowered. The first ``n_untargeted`` columns
        apply to every input; each of the others pulls towards one class.
        """
        return signed(self.score(x), direction)[:, None]

    def fit(self, x: Inputs, y: Labels | None = None) -> Detector:
        """Learn from in-distribution data, batch by batch; by default there is nothing to learn."""
        return self

    def forward(self, x: Inputs) -> Values:
        return self.score(x)

    def logits(self, x: Inputs) -> Tensor:
        """The class outputs (batch, classes)."""
        return self.class_logits(read(self.model, as_floats(x)))

    def features(self, x: Inputs) -> Float[Tensor, "batch width"]:
        """The network's penultimate features."""
        h = through(self.part("features"), self.model, as_floats(x))
        if not torch.compiler.is_compiling() and (h.ndim != 2 or len(h) != len(x)):
            raise ValueError(
                f"model.features must return (batch, width), got shape {tuple(h.shape)} for {len(x)} inputs; "
                "wrap the network in models.adapt(model), which finds what its head receives"
            )
        return h

    def head(self, x: Inputs) -> Any:
        """The network's last layer, once head(features(x)) has been seen to be what the network returns.

        The networks of this library are so by construction.
        """
        head = self.part("head")
        ours = isinstance(self.model, (Classifier, Adapted))
        if ours or self.confirmed.done or torch.compiler.is_compiling():
            return head
        x = as_floats(x[:CONFIRMING]).detach().to(self.device(x))
        with frozen(self.model), torch.no_grad():
            z, again = self.model(x.clone()), head(self.features(x))
        if not isinstance(z, Tensor) or not same(again, z):
            raise ValueError(
                f"model.head(model.features(x)) is not what {type(self.model).__name__} returns: something lies "
                "before, between or behind the two; wrap it in models.adapt(model), which finds the last layer"
            )
        self.confirmed.done = bool(z.isfinite().all() and z.any())
        return head

    def stages(self, x: Inputs) -> list[Tensor]:
        """The network's feature map after each stage."""
        return through(self.part("stages"), self.model, as_floats(x))

    def part(self, name: str) -> Any:
        """An attribute of the network that not every network has."""
        if (found := getattr(self.model, name, None)) is None:
            raise TypeError(
                f"{type(self).__name__} needs model.{name}, which {type(self.model).__name__} lacks; wrap it in "
                "models.adapt(model)"
            )
        return found

    def class_logits(self, z: Float[Tensor, "batch outputs"]) -> Tensor:
        """Outputs without the reject outputs."""
        return split(self.model, z)[0]

    def check_is_fitted(self) -> None:
        """Refuse to score before fit."""
        if self.fitted_attribute and getattr(self, self.fitted_attribute) is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} is not fitted; call fit(x, y) on training images first")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *how: Any) -> None:  # ty: ignore
        """Make room for what ``fit`` had learned, so that a new object takes the state of a fitted one."""
        for name, own in self._buffers.items():
            kept = state_dict.get(prefix + name)
            if kept is not None and (own is None or own.shape != kept.shape):
                self._buffers[name] = torch.empty_like(kept, device=self.device(torch.zeros(1)))
        super()._load_from_state_dict(state_dict, prefix, *how)

    def device(self, x: Inputs) -> torch.device:
        """The network's device; that of x if the network has no parameters."""
        found = (p.device for network in networks(self.model) for p in network.parameters())
        return next(found, x.device)

    def stream(
        self, look: Callable[[Tensor], _Seen], x: Inputs, y: Labels | None = None
    ) -> Iterator[tuple[_Seen, Tensor]]:
        """``look(batch)`` and the labels of each batch, on the network's device.

        The network is frozen only during each forward pass, so a fit that fails leaves no trace. NaN and
        infinity are refused after the last batch.
        """
        device, bad = self.device(x), 0
        y = torch.zeros(len(x), dtype=torch.int64) if y is None else y
        for part, labels in zip(x.split(FIT_BATCH), y.split(FIT_BATCH), strict=True):
            with frozen(self.model), torch.no_grad():
                seen = look(pixels(part.to(device)))
            for h in seen if isinstance(seen, list) else [seen]:
                bad = bad + (~h.isfinite()).flatten(1).any(1).sum()
            yield seen, labels.to(device)
        check_finite(bad, len(x))


def check_scores(values: object, x: Inputs) -> None:
    """Refuse anything but one score per sample."""
    if not isinstance(values, Tensor) or values.shape != x.shape[:1]:
        seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the detector must return a tensor of one score per sample, ({len(x)},), got {seen}; average or "
            "select inside its score"
        )


def outputs_of(detector: Detector, x: Inputs) -> Callable[[Tensor], Tensor] | None:
    """The outputs (batch, outputs) of the network behind a score; None for an autoencoder, or without a network."""
    model = getattr(detector, "model", None)
    if not callable(model):
        return None
    try:
        with frozen(model), torch.no_grad():
            read(model, x[:2])
    except (TypeError, ValueError):  # what read raises for other outputs
        return None
    return partial(read, model)


def signed(values: Tensor, direction: Direction) -> Tensor:
    """The values, negated if the attack is to lower the score."""
    check_choice(direction, "direction", ("raise", "lower"))
    return values if direction == "raise" else -values


def score_objectives(
    detector: Detector, x: Inputs, direction: Direction, targets: int | None = None
) -> list[AttackObjective]:
    """The objectives that an adaptive attack climbs in turn, each judged by the deployed score.

    Args:
        targets: number of classes to pull towards, the likeliest first; default all of up to ten, ten of more.
    """
    with torch.no_grad():
        clean = detector.attack_objectives(x, direction)
    n_untargeted = detector.n_untargeted if direction == "raise" else clean.shape[1]
    order = clean[:, n_untargeted:].argsort(1, descending=True)[
        :, : 10 if targets is None else targets
    ]
    order = order + n_untargeted
    always = torch.arange(n_untargeted, device=x.device).expand(len(x), -1)
    columns = torch.cat([always, order], 1)

    def objective(column: Tensor) -> AttackObjective:
        def climb(v: Tensor) -> tuple[Tensor, Tensor]:
            values = detector.attack_objectives(v, direction)
            return values.gather(1, column)[:, 0], values[:, 0]

        return climb

    return [objective(columns[:, [j]]) for j in range(columns.shape[1])]


def downhill(loss: Callable[[Tensor], Tensor], x: Inputs, step: float) -> Inputs:
    """x minus a sign step on a summed loss, with sgn(0) = 1; its gradient is that of the identity."""
    x = as_floats(x)
    if step == 0:
        return x
    with torch.inference_mode(False), torch.enable_grad():
        probe = x.detach().clone().requires_grad_()
        grad = input_gradient(loss(probe), probe)
    return x - step * (2 * (grad >= 0).to(x) - 1)


def check_fit(x: Inputs, y: Labels | None, labelled: bool = True) -> int:
    """Refuse empty data, NaN, and missing labels if they are needed; return the number of classes."""
    finite_inputs(x)
    if y is not None:
        check_labels(y, x)
        return int(y.max()) + 1
    if labelled:
        raise ValueError("y is None, but this detector learns from labels; call fit(x, y)")
    return 0
