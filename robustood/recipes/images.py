"""The images that a recipe names: for training, validation and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from robustood import data as sets
from robustood.checkpoints import Json
from robustood.data import LEARNED, Data, Loaded, Pairs, Split, corrupted, digest, perturbed
from robustood.objectives import OutlierTraining
from robustood.perturbations import Random, Spatial
from robustood.recipes.recipe import Images, Recipe, uses_outliers

__all__ = [
    "Card", "Root", "card", "check_there", "classes", "data", "divided", "everywhere", "paired_images", "pairs",
    "passed", "plain", "to_test", "to_train",
]  # fmt: skip

Root = str | Path | None
Card = Json  # the record of a set of images
S = TypeVar("S", bound=Split)
_PASSED = "passed through JPEG"  # key on the card of a set: the quality
_RTS = Spatial(rotation=45, translation=7, scale=0.3)  # of Wong and Kolter (2021), section 6


def data(recipe: Recipe, root: Root = None) -> Data:
    """All images of a recipe, in 8 bits; the seen distribution comes first in ``ood``.

    Args:
        recipe: the recipe.
        root: folder that holds the packs; default as in :func:`robustood.data.load`.

    Raises:
        ValueError: for an unknown or unsuitable set, or a pool that is smaller than the recipe requires.
    """
    found, cards = to_train(recipe, root)
    test, outside, _ = to_test(recipe, root, trained=cards["train"])
    return replace(found, test=test, ood=outside)


def to_train(recipe: Recipe, root: Root) -> tuple[Data, dict[str, Card]]:
    """Training and held-out images, and the outliers if the objective uses them; no test images.

    Raises:
        ValueError: for an unknown or unsuitable set, or a pool that is smaller than the recipe requires.
    """
    want, objective = recipe.settings.data, recipe.objective()
    if want.pairs:
        return _pairs_to_train(recipe, root)
    used = uses_outliers(objective)
    check_there([want.train, *([want.outliers] if used else [])], root)
    cards: dict[str, Card] = {}
    outliers = None
    if used:
        outliers = sets.load(want.outliers, root=root)
        if want.known:
            outliers = sets.without_overlap(outliers, want.known)
        cards["outliers"] = {**card(want.outliers, outliers), "without": want.known}
        outliers = passed(outliers, everywhere(want), cards["outliers"])
        if isinstance(objective, OutlierTraining) and objective.mine:
            _check_pool(recipe, len(outliers))
    inside = sets.load(want.train, root=root)
    cards["train"] = card(want.train, inside) | {"classes": list(inside.names)}
    inside = passed(inside, everywhere(want), cards["train"])
    held = want.validation
    if held >= len(inside):
        raise ValueError(
            f"recipe {recipe.name}: data.validation = {held} leaves nothing of {want.train}, which "
            f"has {len(inside)} images; lower it"
        )
    train, val = divided(inside, want)
    quality = 0 if everywhere(want) else _copies_quality(want.jpeg, outliers)
    cards["train"] |= {"held out": held, "jpeg_copies": quality}
    found = Data(
        train=plain(train),
        val=plain(val),
        test=plain(inside[:0]),
        outliers=inside.x[:0] if outliers is None else outliers.x,
        compressed=sets.compress(train.x, quality) if quality else None,
    )
    return found, cards


def to_test(
    recipe: Recipe, root: Root, only: Sequence[str] = (), trained: Card | None = None
) -> tuple[Split, dict[str, Tensor], dict[str, Card]]:
    """Test images, and test outliers by name with the seen distribution first; only the sets in ``only``, if any.

    Args:
        recipe: the recipe.
        root: folder that holds the packs; default as in :func:`robustood.data.load`.
        only: names of sets of outliers.
        trained: the card of the training images. Labels count its classes in its order. If its images were JPEG,
            all test images are, with the same quality: were only those of the in-distribution, the test would
            ask which images were compressed.
    """
    want, trained = recipe.settings.data, trained or {}
    quality = everywhere(want) or trained.get("jpeg")
    outliers = [name for name in want.outlier_sets() if not only or name in only]
    check_there([want.test, *outliers], root)
    inside = sets.load(want.test, root=root)
    inside = sets.counted_as(inside, classes(trained), want.train)
    cards, outside = {"test": card(want.test, inside)}, {}
    inside = passed(inside, quality, cards["test"])
    for name in outliers:
        loaded = sets.load(name, root=root)
        if name == want.seen and want.known:
            loaded = sets.without_overlap(loaded, want.known)
        cards[name] = card(name, loaded)
        outside[name] = passed(loaded, quality, cards[name]).x
    return plain(inside), outside, cards


def card(name: str, loaded: Loaded) -> Card:
    """The record that identifies a set of images: name, size, sha256 of the pixels, JPEG quality."""
    return {"name": name, "n": len(loaded), "sha256": digest(loaded.x), "jpeg": loaded.jpeg}


def classes(trained: Card) -> list[str]:
    """The class names on the card of a training set; empty if its pack has none."""
    return trained.get("classes", [])


def check_there(names: Sequence[str], root: Root) -> None:
    """Refuse missing sets before any other set is read."""
    there = sets.available(root)
    for name in names:
        if name not in there:
            sets.load(name, root=root)  # its error says how to get this one


def _check_pool(recipe: Recipe, found: int) -> None:
    """Refuse a pool of outliers that is smaller than the recipe requires."""
    want = recipe.settings.data
    if found < want.pool_minimum:
        other = recipe.name.replace("_paper", "_fast")
        fast = f"take the recipe {other}, or " if other != recipe.name else ""
        raise ValueError(
            f"recipe {recipe.name}: the paper mines a pool of {want.pool_minimum:,} outliers, and "
            f"{want.outliers} has {found:,}; {fast}use the smaller pool with "
            "--set data.pool_minimum=0"
        )


def divided(inside: S, want: Images) -> tuple[S, S]:
    """Split images into those for training and those held out, as a recipe says."""
    if want.hold_out == "by class":
        return sets.hold_out(inside, want.validation)
    kept = len(inside) - want.validation
    return inside[:kept], inside[kept:]


def plain(loaded: Split) -> Split:
    """The images and labels only."""
    return Split(loaded.x, loaded.y)


def _copies_quality(wanted: int | str, outliers: Loaded | None) -> int:
    """JPEG quality of the copies of training images; 0 for no copies. Without outliers nothing can leak."""
    if wanted != "auto":
        return int(wanted)
    return 0 if outliers is None else outliers.jpeg or 0


def everywhere(want: Images) -> int:
    """JPEG quality with which every image of a recipe is compressed; 0 for no compression."""
    return int(want.jpeg) if want.jpeg_everywhere else 0


def passed(images: S, quality: int | None, said: Card) -> S:
    """Compress lossless images once, with a note on their card; images that were JPEG are not changed."""
    if not quality or said["jpeg"] or _PASSED in said:
        return images
    said[_PASSED] = quality
    return replace(images, x=sets.compress(images.x, quality))


# --- pairs, from which a perturbation set is learned


def _pairs_to_train(recipe: Recipe, root: Root) -> tuple[Data, dict[str, Card]]:
    """Training and validation pairs."""
    inside, held, cards = paired_images(recipe, root)
    kind, seed = recipe.settings.data.pairs, recipe.settings.training.seed
    train, val = pairs(kind, inside, seed), pairs(kind, held, seed + 1)
    return Data(train, val, val[:0], train.x[:0]), cards


def paired_images(recipe: Recipe, root: Root) -> tuple[Split, Split, dict[str, Card]]:
    """The labelled images from which training and validation pairs are made."""
    want = recipe.settings.data
    inside, held = sets.load(want.train, root=root), want.validation
    count = len(inside) - held if want.images is None else want.images
    if not 0 < held <= len(inside) - count:
        raise ValueError(
            f"recipe {recipe.name}: {want.train} has {len(inside)} images; data.images = {count} and "
            f"data.validation = {held} must fit, with at least one of each"
        )
    rest, last = divided(inside, want)
    if count < len(rest):
        rest = rest[:count] if want.hold_out == "last" else sets.hold_out(rest, count)[1]
    cards = {"train": card(want.train, inside) | {"used": count, "held out": held}}
    return plain(rest), plain(last), cards


def pairs(kind: str | None, split: Split, seed: int, names: tuple[str, ...] = LEARNED) -> Pairs:
    """The pairs that ``data.pairs`` stands for.

    ``"rts"``: rotated, shifted and resized images, padded by 7 pixels and drawn again in each epoch.
    ``"corruptions"``: corrupted copies at severity 5; each epoch chooses among one copy of each kind.
    """
    if kind == "rts":
        return perturbed(split, Random(_RTS), torch.Generator().manual_seed(seed), border=7)
    return corrupted(split, names, seed=seed)
