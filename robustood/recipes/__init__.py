"""Recipes: whole experiments as short texts, from the images' names to the table.

A recipe is a TOML file with the sections ``[data]``, ``[model]``, ``[objective]``, ``[training]`` and
``[evaluation]``. It may extend others, which are merged key by key in the order named, the later one
winning. Every key is checked before any data are read (``recipe.py`` lists them). The recipes of
the papers and their smaller versions are products of a method, a set of images and a scale, whose files lie beside
this one; ``composing.py`` says how.

>>> recipe = read("aloe_cifar10_fast", ["training.epochs=3"])
>>> recipe.settings.training.epochs
3
"""

from __future__ import annotations

from pathlib import Path

import torch

from robustood.artefacts import Json
from robustood.recipes import learned_sets, reports
from robustood.recipes.composing import names, plans, read
from robustood.recipes.images import Root, data
from robustood.recipes.reading import Bounds
from robustood.recipes.recipe import Evaluation, Images, Method, Recipe, Settings, Training
from robustood.recipes.runs import Tell, silent, train

__all__ = [
    "Bounds", "Evaluation", "Images", "Method", "Recipe", "Settings", "Training", "data", "evaluate",
    "names", "plans", "read", "train",
]  # fmt: skip


def evaluate(
    recipe: Recipe,
    folder: str | Path,
    device: torch.device | str | None = None,
    *,
    root: Root = None,
    tell: Tell = silent,
) -> Json:
    """Measure the weights in a run's folder: a classifier, or a learned perturbation set.

    Args:
        recipe: the one that trained the weights; its ``[evaluation]`` and its plan may differ.
        folder: of the run; gets ``report.json`` and the scores of each image, of a plan ``report_PLAN.json`` and
            ``scores_PLAN.npz``; a learned set has no scores.
        device: default CUDA where there is one.
        root: folder of the packs; default as in :func:`robustood.data.load`.
        tell: called with a line for each part.

    Returns:
        What ``report.json`` holds.

    Raises:
        ValueError: if the weights belong to another recipe, or the run is not finished.
    """
    measure = learned_sets.measure if recipe.settings.data.pairs else reports.measure
    return measure(recipe, Path(folder), device, root, tell)
