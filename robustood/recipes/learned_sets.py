"""Evaluation of a learned perturbation set: radii, and the six metrics on test pairs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from robustood import data as sets
from robustood import generative
from robustood.checkpoints import Json, write_whole
from robustood.data import HELD_OUT, LEARNED, Pairs, Split, pixels
from robustood.recipes.images import Root, card, paired_images, pairs, plain
from robustood.recipes.recipe import Recipe, Settings
from robustood.recipes.runs import origin, trained

__all__ = ["measure"]


def measure(
    recipe: Recipe,
    folder: Path,
    device: torch.device | str | None,
    root: Root,
    tell: Callable[[str], None],
) -> Json:
    """Evaluate a learned set: radii from validation pairs, then the six metrics on test pairs at the largest radius.

    Writes ``report.json``. A set learned from corruptions is also evaluated on each of the held-out corruptions.
    Arguments and errors as in :func:`robustood.recipes.evaluate`.
    """
    began = time.monotonic()
    model, written, device = trained(recipe, folder, device)
    settings = recipe.settings
    want, test = settings.data, sets.load(settings.data.test, root=root)
    some = plain(test[: settings.evaluation.n_in])
    val = pairs(want.pairs, paired_images(recipe, root)[1], settings.training.seed + 1)
    tell("radii from the validation pairs")
    found = generative.radii(model, *_both(val, device))
    report: Json = {
        **origin(recipe, written, device),
        "data": {"test": card(want.test, test)},
        "radii": asdict(found),
        "rows": [],
        "means": [],
        "curve": [],
    }
    kinds: dict[str, tuple[str, ...]] = {"learned": LEARNED}
    if want.pairs == "corruptions":
        kinds |= {name: (name,) for name in HELD_OUT}
    for name, corruptions in kinds.items():
        tell(f"metrics: {name}")
        report.setdefault("sets", {})[name] = _measured(
            model, pairs(want.pairs, some, 2, corruptions), found.maximum, settings, device
        )
    report["minutes"] = (time.monotonic() - began) / 60
    write_whole(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def _both(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and partners as floats."""
    return pixels(split.x).to(device), pixels(split.y).to(device)


def _measured(
    model: generative.ConditionalVAE,
    test: Pairs,
    radius: float,
    settings: Settings,
    device: torch.device,
) -> Json:
    """The six metrics on pairs, and the error of leaving the input unchanged."""
    x, y = _both(test, device)
    distance = settings.objective.distance or "squared error"
    found = generative.set_metrics(
        model, x, y, radius, distance=distance, batch_size=settings.evaluation.batch_size
    )
    nothing = generative.distances(x.clamp(1e-3, 1 - 1e-3), y, distance).mean() / y[0].numel()
    return {**found.means(), "ordered": found.ordered(), "doing_nothing_per_pixel": float(nothing)}
