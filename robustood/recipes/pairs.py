"""Recipes that learn a perturbation set: the pairs that they name, and how the learned set is measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from robustood import data as sets
from robustood import generative
from robustood.checkpoints import write_whole
from robustood.data import HELD_OUT, LEARNED, Data, Pairs, Split, corrupted, perturbed, pixels
from robustood.perturbations import Random, Spatial
from robustood.recipes.running import Card, Root, card, divided, origin, trained
from robustood.recipes.schema import Section

if TYPE_CHECKING:
    from robustood.recipes import Recipe

RTS = Spatial(rotation=45, translation=7, scale=0.3)  # of Wong and Kolter (2021), section 6


def pairs(kind: str, split: Split, seed: int, names: tuple[str, ...] = LEARNED) -> Pairs:
    """The pairs that a recipe means by ``data.pairs``.

    ``"rts"``: turned, shifted and resized images, padded by 7, fresh at each epoch. ``"corruptions"``:
    corrupted copies at severity 5, drawn anew at each epoch from one copy of each kind.
    """
    if kind == "rts":
        return perturbed(split, Random(RTS), torch.Generator().manual_seed(seed), border=7)
    return corrupted(split, names, seed=seed)


def parts(recipe: Recipe, root: Root) -> tuple[Split, Split, dict[str, Card]]:
    """Labelled images to train on and to validate with."""
    want = recipe.settings["data"]
    inside, held = sets.load(want["train"], root=root), want["validation"]
    count = want.get("images", len(inside) - held)
    if not 0 < held <= len(inside) - count:
        raise ValueError(
            f"recipe {recipe.name}: {want['train']} has {len(inside)} images; data.images = {count} and "
            f"data.validation = {held} must fit, with at least one of each"
        )
    rest, last = divided(inside, want)
    if count < len(rest):
        rest = rest[:count] if want["hold_out"] == "last" else sets.hold_out(rest, count)[1]
    cards = {"train": card(want["train"], inside) | {"used": count, "held out": held}}
    return Split(rest.x, rest.y), Split(last.x, last.y), cards


def learned_from(recipe: Recipe, root: Root) -> tuple[Data, dict[str, Card]]:
    """Training and validation pairs."""
    inside, held, cards = parts(recipe, root)
    kind, seed = recipe.settings["data"]["pairs"], recipe.settings["training"]["seed"]
    train, val = pairs(kind, inside, seed), pairs(kind, held, seed + 1)
    return Data(train, val, val[:0], train.x[:0]), cards


def measure(
    recipe: Recipe,
    folder: str | Path,
    device: torch.device | str | None,
    root: Root,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Measure a learned set: radii from validation pairs, the six metrics on test pairs at the largest.

    Writes ``report.json``. A set learned from corruptions is also measured on pairs of held-out corruptions, one
    by one. Arguments and errors as in :func:`robustood.recipes.testing.evaluate`.
    """
    folder, began = Path(folder), time.monotonic()
    model, written, device = trained(recipe, folder, device)
    want, test = recipe.settings["data"], sets.load(recipe.settings["data"]["test"], root=root)
    some = test[: recipe.settings["evaluation"]["n_in"]]
    some = Split(some.x, some.y)
    val = pairs(want["pairs"], parts(recipe, root)[1], recipe.settings["training"]["seed"] + 1)
    tell("radii of the validation pairs")
    found = generative.radii(model, *both(val, device))
    report: dict[str, Any] = {
        **origin(recipe, written, device), "data": {"test": card(want["test"], test)},
        "radii": asdict(found), "rows": [], "means": [], "curve": [],
    }  # fmt: skip
    kinds: dict[str, tuple[str, ...]] = {"learned": LEARNED}
    if want["pairs"] == "corruptions":
        kinds |= {name: (name,) for name in HELD_OUT}
    settings = recipe.settings
    for name, corruptions in kinds.items():
        tell(f"metrics: {name}")
        report.setdefault("sets", {})[name] = measured(
            model, pairs(want["pairs"], some, 2, corruptions), found.maximum, settings, device
        )
    report["minutes"] = (time.monotonic() - began) / 60
    write_whole(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def both(split: Split, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and partners as floats."""
    return pixels(split.x).to(device), pixels(split.y).to(device)


def measured(
    model: generative.ConditionalVAE,
    test: Pairs,
    radius: float,
    settings: dict[str, Section],
    device: torch.device,
) -> dict[str, Any]:
    """The six metrics on pairs, and what doing nothing would cost."""
    x, y = both(test, device)
    distance = settings["objective"].get("distance", "squared error")
    found = generative.set_metrics(
        model, x, y, radius, distance=distance, batch_size=settings["evaluation"]["batch_size"]
    )
    nothing = generative.distances(x.clamp(1e-3, 1 - 1e-3), y, distance).mean() / y[0].numel()
    return {**found.means(), "ordered": found.ordered(), "doing_nothing_per_pixel": float(nothing)}
