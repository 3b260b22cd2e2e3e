"""Recipes: complete experiments as short text files, from the names of the images to the evaluation.

A recipe is a TOML file with the sections ``[data]``, ``[model]``, ``[objective]``, ``[training]`` and
``[evaluation]``. It may extend others, which are merged key by key in the order named; later ones take precedence.
Every key is checked before any data are read (``recipe.py`` lists them). The recipes of the papers and their
smaller versions combine a method, a set of images and a scale, whose files lie beside this one
(``composing.py``).

>>> recipe = read("aloe_cifar10_fast", ["training.epochs=3"])
>>> recipe.settings.training.epochs
3
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from robustood import distributed
from robustood.checkpoints import Json
from robustood.recipes import learned_sets, reports
from robustood.recipes.composing import commands, names, plans, read
from robustood.recipes.images import Root, data
from robustood.recipes.reading import Bounds
from robustood.recipes.recipe import Evaluation, Images, Method, Recipe, Settings, Training
from robustood.recipes.runs import Tell, silent, train
from robustood.recipes.selftest import self_test
from robustood.recipes.slices import run_slice

__all__ = [
    "Bounds", "Evaluation", "Images", "Method", "Recipe", "Settings", "Training", "commands", "data", "evaluate",
    "names", "plans", "read", "run_slice", "self_test", "train",
]  # fmt: skip


def evaluate(
    recipe: Recipe,
    folder: str | Path,
    device: torch.device | str | None = None,
    *,
    root: Root = None,
    tell: Tell = silent,
) -> Json:
    """Evaluate the weights in the folder of a run: a classifier, or a learned perturbation set.

    Several processes (:func:`robustood.distributed.join`) share the batches of a classifier's evaluation; the first
    writes the files, evaluates a learned set by itself, and calls ``tell``.

    Args:
        recipe: the one that trained the weights; its ``[evaluation]`` and its plan may differ.
        folder: that of the run. Receives ``report.json`` and ``scores.npz``, the scores of all images; under a plan
            ``report_PLAN.json`` and ``scores_PLAN.npz``. A learned set has no scores.
        device: default: CUDA if available.
        root: folder that holds the packs; default as in :func:`robustood.data.load`.
        tell: called with one line of text for each part of the evaluation.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: if the weights belong to another recipe, or the run is not finished.
    """
    given = (recipe, Path(folder), device, root, tell if distributed.rank() == 0 else silent)
    if not recipe.settings.data.pairs:
        return reports.measure(*given)
    (report,) = distributed.each([partial(learned_sets.measure, *given)])
    return report
