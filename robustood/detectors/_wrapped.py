"""Scores from elsewhere: functions, other libraries' detectors, estimators on features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from robustood.detectors._base import Columns, Detector, Direction, Inputs, Values, signed
from robustood.inputs import (
    as_floats,
    check_callable,
    check_choice,
    check_instance,
    check_text,
    numbers,
)
from robustood.losses import log_odds
from robustood.models import through

Score = Callable[[Tensor], object]


class Wrapped(Detector):
    """A score from elsewhere, turned so that higher means in-distribution; made by :func:`wrap`."""

    def __init__(self, call: Score, sign: int, model: nn.Module | None, name: str):
        super().__init__(call if model is None else model)
        self.call, self.sign, self.name = call, sign, name
        self.has_classes = model is not None

    def score(self, x: Inputs) -> Values:
        x = as_floats(x)
        found = through(self._called, self, x)
        if not isinstance(found, Tensor):
            found = torch.as_tensor(numbers(found, "score"), device=x.device)
        if found.shape != (len(x),) or found.is_complex():
            raise ValueError(
                f"score must return one number per input, shape ({len(x)},), got {tuple(found.shape)}; reduce it, "
                "as in lambda x: net(x).logsumexp(1)"
            )
        return self.sign * (found if found.is_floating_point() else found.double())

    def _called(self, x: Tensor) -> object:
        """What the score returns; one that calls ``x.numpy()`` has no gradient, and need not detach x for it."""
        try:
            return self.call(x)
        except RuntimeError as error:
            if "Can't call numpy()" not in str(error):
                raise
            with torch.no_grad():
                return self.call(x.detach())

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score; to raise it, also the log-odds of each class if the network is known."""
        columns = signed(self.score(x), direction)[:, None]
        if direction == "lower" or not self.has_classes:
            return columns
        return torch.cat([columns, log_odds(self.logits(x)).to(columns)], 1)

    def _get_name(self) -> str:
        """As reports and ``repr`` show it."""
        return self.name

    def extra_repr(self) -> str:
        return f"higher={'in' if self.sign > 0 else 'out'!r}"


def wrap(
    score: object,
    *,
    higher: Literal["in", "out"],
    features: Callable[[Tensor], Tensor] | None = None,
    model: nn.Module | None = None,
    name: str | None = None,
) -> Detector:
    """A detector from any score, so that everything in :mod:`robustood.evaluate` can attack it.

    If the score has no gradient (it is computed in NumPy, or detached), only attacks by values work on it.

    Args:
        score: one of: a function of inputs (batch, ...) that returns (batch,) numbers; a network with a method
            ``score``; an object that is called or that has ``predict``, as pytorch-ood's detectors; an estimator
            of scikit-learn with ``decision_function`` or ``score_samples``.
        higher: which inputs have the higher scores, ``"in"`` or ``"out"`` of the training distribution; it is never
            guessed. Detectors of pytorch-ood score outliers higher, estimators of scikit-learn lower.
        features: what an estimator of scikit-learn receives, as a function of the inputs; default: all values.
        model: the network behind the score, if there is one. Attacks then also pull towards each of its classes, and
            the papers' attacks become possible.
        name: in reports; default: that of the function or class.

    Raises:
        ValueError: for a score that cannot be called in any of these ways.

    >>> brightness = wrap(lambda x: x.flatten(1).mean(1), higher="out")
    >>> brightness.score(torch.tensor([[0.25, 0.75]])).tolist()
    [-0.5]
    """
    check_choice(higher, "higher", ("in", "out"))
    if model is not None:
        check_instance(model, "model", nn.Module, "the network behind the score")
    if features is not None:
        check_callable(features, "features", "features(x)")
    if name is not None:
        check_text(name, "name")
    call = _call(score, features)
    own = getattr(score, "__name__", type(score).__name__)
    return Wrapped(call, 1 if higher == "in" else -1, model, name or str(own))


def _call(score: object, features: Callable[[Tensor], Tensor] | None) -> Score:
    """The function of the inputs inside an object."""
    if isinstance(score, type):
        raise ValueError(
            f"score must be an object, got the class {score.__name__}; create it first"
        )
    for method in (
        "decision_function",
        "score_samples",
    ):  # before "score", which is another thing there
        if callable(estimate := getattr(score, method, None)):
            return _Estimate(estimate, features)
    if features is not None:
        raise ValueError(
            "features is for estimators with decision_function or score_samples; call it inside the score instead, "
            "as in wrap(lambda x: score(features(x)), ...)"
        )
    known = [getattr(score, method, None) for method in ("score", "predict")]
    for found in [*known, score] if isinstance(score, nn.Module) else [score, *reversed(known)]:
        if callable(found):
            return found
    raise ValueError(
        f"score must be a function of the inputs, or an object with predict, score, decision_function or "
        f"score_samples, got {type(score).__name__}"
    )


class _Estimate:
    """The score of an estimator of scikit-learn on features, without a gradient."""

    def __init__(self, estimate: Callable[[np.ndarray], object], features: Callable | None):
        self.estimate, self.features = estimate, features

    def __call__(self, x: Tensor) -> object:
        with torch.no_grad():
            h = x if self.features is None else self.features(x)
        return self.estimate(h.detach().flatten(1).cpu().numpy())
