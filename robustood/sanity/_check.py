"""All checks in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustood import inputs
from robustood.detectors import Detector
from robustood.inputs import check_count, check_number, check_seed, finite_inputs
from robustood.models import frozen
from robustood.perturbations import PerturbationSet, as_set
from robustood.sanity import _checks
from robustood.sanity._evidence import Case
from robustood.sanity._findings import Finding, Findings
from robustood.sanity._subject import Inputs, Model, Subject, classifier, detector, unchanged

BATCH = 512  # inputs scored at a time, for a threshold


def check(
    model_or_detector: Model | Detector,
    x: Inputs,
    y: Tensor,
    within: PerturbationSet | float,
    *,
    seed: int = 0,
    samples: int = 64,
    steps: int = 20,
    attack: Callable[..., Tensor] | None = None,
    threshold: float | None = None,
    tpr: float = 0.95,
) -> Findings:
    """Look for signs that attacks on a classifier or a detector fail for reasons other than robustness.

    The model is left as it was: mode, parameters, buffers and the random state.

    Args:
        model_or_detector: inputs to logits (batch, classes), or a fitted :class:`~robustood.detectors.Detector`.
        x: clean test inputs (batch, ...).
        y: for a classifier labels (batch,), for a detector outliers (outliers, ...).
        within: the perturbation set of the claim; a number is the radius of ``Linf``.
        seed: of the sample, the initial points and what the model draws.
        samples: number of inputs of each side that are used, drawn at random.
        steps: of an attack; all checks together make about ``40 * steps`` passes over the samples.
        attack: your own, to be judged: ``attack(model, x, y, within)`` for a classifier, as
            :func:`~robustood.attacks.pgd`, and ``attack(detector, x, within, direction=...)`` for a detector.
        threshold: a detector accepts what scores at least this much; all of x is used to judge it.
        tpr: the share of in-distribution inputs that the threshold promises to accept.

    Returns:
        Findings by name. A check that does not apply, as those by gradient do not where there is none, is left out.
        If inputs lie outside the range of pixels, no attack is made.

    Raises:
        ValueError: for empty or NaN inputs, outputs that are not finite, labels or outliers that do not fit, or bad
            settings.

    Source: the symptoms are those of Athalye et al. (2018, section 3.1) and Carlini et al. (2019, section 3).
    """
    within, samples = as_set(within), check_count(samples, "samples", low=1)
    seed, steps = check_seed(seed), check_count(steps, "steps", low=1)
    check_number(tpr, "tpr", 1e-9, 1)
    if attack is not None:
        inputs.check_callable(attack, "attack", "attack(model, x, y, within)")
    x = finite_inputs(x)
    y = _fitting(model_or_detector, x, y, threshold)
    with torch.inference_mode(False), unchanged(model_or_detector, x.device, seed):
        view = _view(model_or_detector, *_drawn(x, y, samples, seed))
        case = Case(view, within, steps, seed, attack)
        found = [each(case) for each in _checks.AS_GIVEN]
        found.append(_checks.train_mode(case, model_or_detector))
    with (
        torch.inference_mode(False),
        unchanged(model_or_detector, x.device, seed),
        frozen(model_or_detector),
    ):
        found += [each(case) for each in _checks.EVALUATED]
        if threshold is not None and isinstance(model_or_detector, Detector):
            found.append(_threshold(model_or_detector, x, threshold, tpr))
        if not any(each and each.check == "inputs" and each.level != "ok" for each in found):
            found += _attacked(case)
    return Findings(tuple(each for each in found if each is not None))


def _attacked(case: Case) -> list[Finding | None]:
    """The checks that need attacks; with a gradient, all of them."""
    found = [each(case) for each in _checks.ATTACKED]
    return found + [each(case) for each in _checks.CLIMBED] if case.climbable else found


def _fitting(subject: object, x: Inputs, y: Tensor, threshold: float | None) -> Tensor:
    """Labels or outliers, checked."""
    if not isinstance(subject, Detector):
        inputs.check_model(subject, "model_or_detector")
        if threshold is not None:
            raise ValueError(
                "threshold must be None for a classifier; pass a detector, such as MSP(model), with outliers for y"
            )
        inputs.check_labels(y, x)
        return y
    if threshold is not None:
        check_number(threshold, "threshold")
    if isinstance(y, Tensor) and y.dtype == torch.int64:
        raise ValueError(
            f"y must be outliers for a detector, such as images of other things, got labels of shape {tuple(y.shape)}"
        )
    y = finite_inputs(y, "y")
    if y.shape[1:] != x.shape[1:] or y.dtype != x.dtype:
        raise ValueError(
            f"y must be outliers shaped like x for a detector, (outliers, {', '.join(map(str, x.shape[1:]))}) of "
            f"{x.dtype}, got {tuple(y.shape)} of {y.dtype}"
        )
    return y


def _drawn(x: Inputs, y: Tensor, samples: int, seed: int) -> tuple[Inputs, Tensor]:
    """A random part of the inputs: files are often sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    pick = lambda n: torch.randperm(n, generator=generator)[:samples].to(x.device)
    chosen = pick(len(x))
    labels = y.dtype == torch.int64
    return x[chosen].detach(), y[chosen if labels else pick(len(y))].detach()


def _view(subject: Model | Detector, x: Inputs, y: Tensor) -> Subject:
    return detector(subject, x, y) if isinstance(subject, Detector) else classifier(subject, x, y)


def _threshold(scored: Detector, x: Inputs, threshold: float, tpr: float) -> Finding:
    with torch.no_grad():
        scores = torch.cat([scored.score(part.clone()).double() for part in x.split(BATCH)])
    return _checks.threshold(scores, threshold, tpr)
