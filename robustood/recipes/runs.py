"""Runs: from a recipe to a folder with trained weights and a record of the training."""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robustood
from robustood import distributed, engine, training
from robustood.artefacts import RECORDED
from robustood.attacks import robust_accuracy
from robustood.checkpoints import (
    Json,
    check_same,
    load_weights,
    read_json,
    save_weights,
    write_json,
    write_whole,
)
from robustood.data import Augment, Data, Split, pixels
from robustood.engine import Engine
from robustood.metrics import Estimate, proportion
from robustood.models import split
from robustood.recipes.images import Card, Root, classes, to_train
from robustood.recipes.recipe import Recipe

__all__ = [
    "Reader", "Tell", "accuracy", "check_recipe", "chosen_device", "chosen_engine", "commit", "device_name",
    "origin", "silent", "to_fit", "train", "trained", "versions",
]  # fmt: skip

Attack = Callable[..., Tensor]
Tell = Callable[[str], None]
Reader = Callable[[Recipe, Root], tuple[Data, dict[str, Card]]]
_TRAINED_BY = ("data", "model", "objective", "training")  # sections that the weights depend on


def silent(line: str) -> None:
    """Ignore a message."""


@distributed.together()
def train(
    recipe: Recipe,
    folder: str | Path,
    minutes: float = math.inf,
    device: torch.device | str | None = None,
    *,
    root: Root = None,
    tell: Tell = silent,
    reader: Reader = to_train,
) -> Json:
    """Train a recipe, or resume the run in a folder.

    The folder receives ``recipe.json`` (all settings), ``run.json`` (record of the training), ``state.pt`` and
    ``log.csv`` (:func:`robustood.training.fit`), and at the end ``weights.safetensors`` with its card. With
    several processes, the first one writes the files.

    Args:
        recipe: what to train.
        folder: for this run only.
        minutes: time budget, including the time to read the images; the same call resumes the run.
        device: default: CUDA if available.
        root: folder that holds the packs; default as in :func:`robustood.data.load`.
        tell: called with one line of text after each epoch, and with remarks.
        reader: reads the images of the recipe; default: from the packs.

    Returns:
        The content of ``run.json``; ``finished`` is False if the time ran out.

    Raises:
        ValueError: for images that do not fit the recipe, or a folder that holds a run of another one.
        OSError: if the folder cannot be written; earlier states are kept.
        ConnectionError: if another of several processes is lost; the same call in all of them resumes the run.
    """
    folder, start = Path(folder), time.monotonic()
    if (old := distributed.from_first(_earlier(recipe, folder))) and old["finished"]:
        tell(f"this run is finished: {folder / 'weights.safetensors'}")
        return old
    model = recipe.model()
    data, cards = reader(recipe, root)
    before, now = classes((old["data"] if old else cards)["train"]), classes(cards["train"])
    if before and now:
        check_same({"classes": before}, {"classes": now}, f"{folder} holds a run")
    device = chosen_device(device)
    shape = tuple(data.train.x.shape[1:])
    how = Engine(**old["engine"]) if old else chosen_engine(recipe, model, shape, device)
    run = _begun(recipe, cards, device, how, old)
    _record(folder, recipe, old or run)
    left = max(0.0, minutes - (time.monotonic() - start) / 60)
    if minutes and not left:
        tell(
            f"reading the images took all of the {minutes:g} minutes; give more, or no step is ever taken"
        )
    epochs, learns_pairs = recipe.settings.training.epochs, recipe.settings.data.pairs
    history = training.fit(
        model,
        recipe.objective(),
        data,
        **to_fit(recipe),
        engine=None if learns_pairs else how,
        device=device,
        run_dir=folder,
        minutes=left,
        monitor=None if learns_pairs else partial(_held_out, data.val),
        on_epoch=partial(_epoch_line, tell, epochs),
    )
    rows = history.rows
    run |= {
        "finished": history.finished,
        "history": rows,
        "speed": history.speed or (old or run)["speed"],
        "minutes": rows[-1]["seconds"] / 60 if rows else 0.0,
    }
    if distributed.rank() == 0 and history.finished:
        kept = ("recipe", "settings", "seed", "data", "commit", "device", "minutes", "speed")
        save_weights(folder / "weights.safetensors", model, **{k: run[k] for k in kept})
    _record(folder, recipe, run)
    tell(
        f"finished after {run['minutes']:.1f} minutes: {folder / 'weights.safetensors'}"
        if history.finished
        else f"time is up after {len(rows)} of {epochs} epochs; the same command resumes from here"
    )
    return run


def _begun(
    recipe: Recipe, cards: dict[str, Card], device: torch.device, how: Engine, old: Card | None
) -> Json:
    """The record of a run when a session of it begins, be it the first one or a later one."""
    session = {"commit": commit(), "versions": versions(), "device": device_name(device)}
    sessions = old.get("sessions", []) if old else []
    return {
        "recipe": recipe.name,
        "about": recipe.about,
        "settings": recipe.settings.to_dict(),
        "seed": recipe.settings.training.seed,
        "data": cards,
        **session,
        "sessions": sessions + [session] * (session not in sessions),
        "engine": asdict(how),
        "finished": False,
        "minutes": 0.0,
        "speed": {},
        "history": [],
    }


def _earlier(recipe: Recipe, folder: Path) -> Json | None:
    """The record of the run in a folder, or None if there is none yet.

    Raises:
        ValueError: if it is a run of another recipe.
    """
    file = folder / "run.json"
    if not file.is_file():
        return None
    run = read_json(file, (*RECORDED, "engine"))
    if "train" not in run["data"]:
        raise ValueError(f"{file} is damaged (its data lacks train); choose another folder")
    check_recipe(recipe, run["recipe"], run["settings"], f"{folder} holds a run")
    run["finished"] = run["finished"] and (folder / "weights.safetensors").is_file()
    return run


def trained(
    recipe: Recipe, folder: Path, device: torch.device | str | None
) -> tuple[Any, Card, torch.device]:
    """The network with the weights in a run's folder, in eval mode on its device, and the weights' card.

    Raises:
        ValueError: if the weights belong to another recipe, or the run is not finished.
    """
    file = folder / "weights.safetensors"
    if not file.is_file():
        raise ValueError(
            f"no weights in {folder}: the run is not finished; run its robustood train command "
            "again to resume it"
        )
    model = recipe.model()
    written = load_weights(file, model, ("recipe", "settings", "seed", "data"))
    if "train" not in written["data"]:
        raise ValueError(
            f"{file.with_suffix('.json')} lacks data.train, the record of the training images; use the card "
            "that robustood train wrote"
        )
    check_recipe(recipe, written["recipe"], written["settings"], f"{folder} holds weights")
    device = chosen_device(device)
    return model.to(device).eval(), written, device


def chosen_device(device: torch.device | str | None) -> torch.device:
    """A device; by default CUDA if available."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def origin(recipe: Recipe, written: Card, device: torch.device) -> Json:
    """The origin of a report: weights, settings, software versions and device."""
    return {
        "recipe": recipe.name,
        "seed": written["seed"],
        "weights": written["sha256"],
        "settings": asdict(recipe.settings.evaluation),
        "commit": commit(),
        "versions": versions(),
        "device": device_name(device),
    }


def check_recipe(recipe: Recipe, name: str, settings: Json, holder: str) -> None:
    """Refuse training settings that differ from those of this recipe."""
    ours, theirs = (
        {
            f"{section}.{key}": v
            for section in _TRAINED_BY
            for key, v in given.get(section, {}).items()
        }
        for given in (recipe.settings.to_dict(), settings)
    )
    wanted = {"recipe": recipe.name, **{key: ours.get(key) for key in ours | theirs}}
    check_same({"recipe": name, **theirs}, wanted, holder)


def _record(folder: Path, recipe: Recipe, run: Json) -> None:
    """Write recipe and record, in the first process only."""
    if distributed.rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "recipe.json", recipe.to_json().encode())
    write_json(folder / "run.json", run)


def chosen_engine(
    recipe: Recipe, model: nn.Module, shape: tuple[int, ...], device: torch.device
) -> Engine:
    """The engine of a run: as the recipe says, chosen for the device where it says "auto"."""
    if recipe.settings.data.pairs:
        return Engine()  # autoencoders use the default
    want = recipe.settings.training
    how = ("precision", "channels_last", "compile")
    return distributed.from_first(
        engine.choose(model, shape, device, **{key: getattr(want, key) for key in how})
    )


def to_fit(recipe: Recipe) -> Json:
    """The arguments of :func:`robustood.training.fit` that a recipe determines."""
    want, images = recipe.settings.training, recipe.settings.data
    same = ("epochs", "batch_size", "outlier_batch_size", "lr", "weight_decay", "warmup", "seed")
    sgd = partial(torch.optim.SGD, momentum=want.momentum, nesterov=want.nesterov)
    augment = Augment(crop=images.crop, flip=images.flip)
    return {
        **{key: getattr(want, key) for key in same},
        "optimiser": sgd if want.optimiser == "sgd" else torch.optim.Adam,
        "milestones": want.milestones or None,
        "augment": augment if images.crop or images.flip else None,
    }


def _held_out(val: Split, model: nn.Module) -> dict[str, float]:
    """The measurements after each epoch: accuracy on the held-out images, if any."""
    return {"val_accuracy": accuracy(model, val).value} if len(val) else {}


def _epoch_line(tell: Callable[[str], None], epochs: int, row: dict[str, float]) -> None:
    """Report an epoch in one line, in the first process only."""
    seen = f", held-out accuracy {row['val_accuracy']:.3f}" if "val_accuracy" in row else ""
    if distributed.rank() == 0:
        tell(f"epoch {row['epoch'] + 1:.0f} of {epochs}: loss {row['loss']:.4f}{seen}")


def accuracy(
    model: nn.Module, images: Split, attack: Attack | None = None, batch_size: int = 1000
) -> Estimate:
    """Share of 8-bit images that are classified correctly, without an attack or under one.

    Several processes share the batches.
    """
    device = next(model.parameters()).device

    def classes_alone(x: Tensor) -> Tensor:
        return split(model, model(x))[0]

    def right(start: int) -> int:
        part = images[start : start + batch_size]
        x, y = pixels(part.x).to(device), part.y.to(device)
        found = robust_accuracy(classes_alone, x, y, attack, batch_size=batch_size)
        return round(found.value * found.n)

    jobs = [partial(right, start) for start in range(0, len(images), batch_size)]
    return proportion(sum(distributed.each(jobs)), len(images))


# --- software and hardware of a run


def commit() -> str | None:
    """The commit of this checkout, with "+changes" if files were changed; None outside a checkout."""
    top = Path(robustood.__file__).resolve().parents[1]
    git = partial(subprocess.run, cwd=top, capture_output=True, text=True, check=True)
    try:
        where = git(["git", "rev-parse", "--show-toplevel", "HEAD"]).stdout.split("\n")
        if Path(where[0]).resolve() != top:  # installed inside another repository
            return None
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return where[1] + ("+changes" if changed else "")


def versions() -> dict[str, str]:
    """The versions of Python, torch and this library."""
    own = {"torch": torch.__version__, "robustood": robustood.__version__}
    return {"python": platform.python_version(), **own}


def device_name(device: torch.device) -> str:
    """A readable name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
