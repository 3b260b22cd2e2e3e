"""From a recipe to trained weights: the images it names, the run's folder, and what goes on record."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

import robustood
from robustood import data as sets
from robustood import distributed, engine, training
from robustood.attacks import robust_accuracy
from robustood.checkpoints import check_same, load_weights, read_json, save_weights, write_whole
from robustood.data import Augment, Data, Loaded, Split, digest, pixels
from robustood.engine import Engine
from robustood.metrics import Estimate
from robustood.models import declared, split
from robustood.objectives import OutlierTraining
from robustood.recipes.schema import Section, recorded, uses_outliers
from robustood.results import RECORDED

if TYPE_CHECKING:
    from robustood.recipes import Recipe

Root = str | Path | None
Attack = Callable[..., Tensor]
Card = dict[str, Any]
S = TypeVar("S", bound=Split)
PASSED = "passed through JPEG"  # on the card of a set: at which quality, after it was read
TRAINED_BY = ("data", "model", "objective", "training")  # sections that the weights depend on


def silent(line: str) -> None:
    """Say nothing."""


# --- images


def card(name: str, loaded: Loaded) -> Card:
    """What identifies a set of images: name, size, sha256 of its pixels, and its JPEG quality."""
    return {"name": name, "n": len(loaded), "sha256": digest(loaded.x), "jpeg": loaded.jpeg}


def classes(trained: Card) -> list[str]:
    """Names of the classes on the card of a training set; none where it or its pack has none."""
    return trained.get("classes", [])


def check_there(names: list[str], root: Root) -> None:
    """Refuse sets that are not in the folder before others are read."""
    there = sets.available(root)
    for name in names:
        if name not in there:
            sets.load(name, root=root)  # which says what is there, and how to get this one


def for_training(recipe: Recipe, root: Root) -> tuple[Data, dict[str, Card]]:
    """Training and held-out images, and the outliers where the objective looks at them; no test images.

    Raises:
        ValueError: for an unknown or unfitting set, or a pool that is smaller than the recipe demands.
    """
    want, objective = recipe.settings["data"], recipe.objective()
    if "pairs" in want:
        from robustood.recipes import pairs  # which builds on this module

        return pairs.learned_from(recipe, root)
    used = uses_outliers(objective)
    check_there([want["train"], *([want["outliers"]] if used else [])], root)
    cards: dict[str, Card] = {}
    outliers = None
    if used:
        outliers = sets.load(want["outliers"], root=root)
        if want["known"]:
            outliers = sets.without_overlap(outliers, want["known"])
        cards["outliers"] = {**card(want["outliers"], outliers), "without": want["known"]}
        outliers = passed(outliers, everywhere(want), cards["outliers"])
        if isinstance(objective, OutlierTraining) and objective.mine:
            check_pool(recipe, len(outliers))
    inside = sets.load(want["train"], root=root)
    cards["train"] = card(want["train"], inside) | {"classes": list(inside.names)}
    inside = passed(inside, everywhere(want), cards["train"])
    held = want["validation"]
    if held >= len(inside):
        raise ValueError(
            f"recipe {recipe.name}: data.validation = {held} leaves nothing of {want['train']}, which "
            f"has {len(inside)} images; lower it"
        )
    train, val = divided(inside, want)
    quality = 0 if everywhere(want) else twin_quality(want["jpeg"], outliers)
    cards["train"] |= {"held out": held, "jpeg_copies": quality}
    data = Data(
        train=plain(train), val=plain(val), test=plain(inside[:0]),
        outliers=inside.x[:0] if outliers is None else outliers.x,
        compressed=sets.compress(train.x, quality) if quality else None,
    )  # fmt: skip
    return data, cards


def divided(inside: S, want: Section) -> tuple[S, S]:
    """Images to train on and images held out, as a recipe says."""
    held = want["validation"]
    if want["hold_out"] == "by class":
        return sets.hold_out(inside, held)
    return inside[: len(inside) - held], inside[len(inside) - held :]


def plain(loaded: Split) -> Split:
    """Images and labels alone."""
    return Split(loaded.x, loaded.y)


def twin_quality(wanted: int | str, outliers: Loaded | None) -> int:
    """JPEG quality of the training images' twins; 0 for none. Without outliers nothing can leak."""
    if wanted != "auto":
        return int(wanted)
    return 0 if outliers is None else outliers.jpeg or 0


def everywhere(want: Section) -> int:
    """JPEG quality that every image of a recipe passes through; 0 for none."""
    return want["jpeg"] if want.get("jpeg_everywhere") else 0


def passed(images: S, quality: int | None, said: Card) -> S:
    """Lossless images through JPEG, once, with a note on their card; those that were JPEG stay as they are."""
    if not quality or said["jpeg"] or PASSED in said:
        return images
    said[PASSED] = quality
    return replace(images, x=sets.compress(images.x, quality))


def check_pool(recipe: Recipe, found: int) -> None:
    """Refuse a pool of outliers that is smaller than a recipe of a paper demands."""
    demanded = recipe.settings["data"]["pool_minimum"]
    if found < demanded:
        other = recipe.name.replace("_paper", "_fast")
        fast = f"take the recipe {other}, or " if other != recipe.name else ""
        raise ValueError(
            f"recipe {recipe.name}: the paper mines a pool of {demanded:,} outliers, and "
            f"{recipe.settings['data']['outliers']} has {found:,}; {fast}"
            "go on with the smaller pool by --set data.pool_minimum=0"
        )


def for_testing(
    recipe: Recipe, root: Root, only: Sequence[str] = (), names: Sequence[str] = ()
) -> tuple[Split, dict[str, Tensor], dict[str, Card]]:
    """Test images, and test outliers by name with the seen distribution first; of ``only`` these, if any.

    The test images' labels count the classes in the order of ``names``, where these are known.
    """
    want = recipe.settings["data"]
    outliers = [*([want["seen"]] if want["seen"] else []), *want["ood"]]
    outliers = [name for name in outliers if name in (only or outliers)]
    check_there([want["test"], *outliers], root)
    inside = sets.load(want["test"], root=root)
    inside = sets.counted_as(inside, names, want["train"])
    cards, outside = {"test": card(want["test"], inside)}, {}
    inside = passed(inside, everywhere(want), cards["test"])
    for name in outliers:
        loaded = sets.load(name, root=root)
        if name == want["seen"] and want["known"]:
            loaded = sets.without_overlap(loaded, want["known"])
        cards[name] = card(name, loaded)
        outside[name] = passed(loaded, everywhere(want), cards[name]).x
    return plain(inside), outside, cards


def everything(recipe: Recipe, root: Root) -> Data:
    """All that the recipe names."""
    data, cards = for_training(recipe, root)
    test, outside, _ = for_testing(recipe, root, names=classes(cards["train"]))
    return replace(data, test=test, ood=outside)


# --- the run


def train(
    recipe: Recipe,
    folder: str | Path,
    minutes: float,
    device: torch.device | str | None,
    root: Root,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Train by a recipe, or go on where the run in a folder stopped.

    The folder gets ``recipe.json`` (all settings), ``run.json`` (what happened), ``state.pt`` and ``log.csv``
    (:func:`robustood.training.fit`), and at the end ``weights.safetensors`` with its card. With several
    processes the first one writes.

    Args:
        recipe: what to do.
        folder: of this run alone.
        minutes: stop in time to keep this budget, reading the images included; the same call goes on.
        device: default CUDA where there is one.
        root: folder of the packs.
        tell: called with one line after each epoch, and with remarks.

    Returns:
        What ``run.json`` holds; ``finished`` is False where the time ran out.

    Raises:
        ValueError: for images that do not fit the recipe, or a folder that holds a run of another one.
        OSError: if the folder cannot be written; states that were written before stay.
    """
    folder, start = Path(folder), time.monotonic()
    if (old := distributed.from_first(earlier(recipe, folder))) and old["finished"]:
        tell(f"this run is finished: {folder / 'weights.safetensors'}")
        return old
    model, objective = recipe.model(), recipe.objective()
    data, cards = for_training(recipe, root)
    before, now = classes((old["data"] if old else cards)["train"]), classes(cards["train"])
    if before and now:
        check_same({"classes": before}, {"classes": now}, f"{folder} holds a run")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = Engine(**old["engine"]) if old else choose(recipe, model, data, device)
    session = {"commit": commit(), "versions": versions(), "device": device_name(device)}
    sessions = old.get("sessions", []) if old else []
    run = {
        "recipe": recipe.name, "about": recipe.about, "settings": recipe.settings,
        "seed": recipe.settings["training"]["seed"], "data": cards, **session,
        "sessions": sessions + [session] * (session not in sessions), "engine": asdict(chosen),
        "finished": False, "minutes": 0.0, "speed": {}, "history": [],
    }  # fmt: skip
    keep(folder, recipe, old or run)
    left = max(0.0, minutes - (time.monotonic() - start) / 60)
    if minutes and not left:
        tell(
            f"reading the images took the {minutes:g} minutes; give more, or no step is ever taken"
        )
    classifies = "pairs" not in recipe.settings["data"]
    history = training.fit(
        model, objective, data, **to_fit(recipe), engine=chosen if classifies else None, device=device,
        run_dir=folder, minutes=left, monitor=partial(held_out, data.val) if classifies else None,
        on_epoch=partial(epoch_line, tell, recipe.settings["training"]["epochs"]),
    )  # fmt: skip
    rows = history.rows
    run |= {
        "finished": history.finished, "history": rows,
        "speed": history.speed or (old or run)["speed"],
        "minutes": rows[-1]["seconds"] / 60 if rows else 0.0,
    }  # fmt: skip
    if distributed.rank() == 0:
        if history.finished:
            kept = ("recipe", "settings", "seed", "data", "commit", "device", "minutes", "speed")
            save_weights(folder / "weights.safetensors", model, **{k: run[k] for k in kept})
        keep(folder, recipe, run)
    epochs = recipe.settings["training"]["epochs"]
    tell(
        f"finished after {run['minutes']:.1f} minutes: {folder / 'weights.safetensors'}"
        if history.finished
        else f"time is up after {len(rows)} of {epochs} epochs; the same command goes on from here"
    )
    return run


def earlier(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """What the folder's run has on record, None if there is none yet.

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
            f"no weights in {folder}: the run is not finished; give its robustood train command "
            "again, it goes on"
        )
    model = recipe.model()
    written = load_weights(file, model, ("recipe", "settings", "seed", "data"))
    if "train" not in written["data"]:
        raise ValueError(
            f"{file.with_suffix('.json')} says nothing of the training images (data.train); take the card "
            "that robustood train wrote"
        )
    check_recipe(recipe, written["recipe"], written["settings"], f"{folder} holds weights")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.to(device).eval(), written, device


def origin(recipe: Recipe, written: Card, device: torch.device) -> dict[str, Any]:
    """What a report says of the weights, of the settings and of where it was made."""
    return {
        "recipe": recipe.name, "seed": written["seed"], "weights": written["sha256"],
        "settings": recipe.settings["evaluation"], "commit": commit(), "versions": versions(),
        "device": device_name(device),
    }  # fmt: skip


def check_recipe(recipe: Recipe, name: str, settings: dict[str, Section], holder: str) -> None:
    """Refuse settings that trained something else than this recipe would."""
    ours, theirs = (
        {
            f"{section}.{key}": value
            for section in TRAINED_BY
            for key, value in given.get(section, {}).items()
        }
        for given in (recipe.settings, recorded(settings))
    )
    if (rule := theirs["data.hold_out"]) != ours["data.hold_out"]:
        raise ValueError(
            f"{holder} with data.hold_out = {rule!r}; add --set 'data.hold_out={rule}' to go on with it, "
            "or choose another folder"
        )
    wanted = {"recipe": recipe.name, **{key: ours.get(key) for key in ours | theirs}}
    check_same({"recipe": name, **theirs}, wanted, holder)


def keep(folder: Path, recipe: Recipe, run: dict[str, Any]) -> None:
    """Write what is on record, by the first process alone."""
    if distributed.rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "recipe.json", recipe.to_json().encode())
    write_whole(folder / "run.json", (json.dumps(run, indent=1) + "\n").encode())


def choose(recipe: Recipe, model: nn.Module, data: Data, device: torch.device) -> Engine:
    """How to compute: as the recipe says, and by a short measurement where it says "auto"."""
    if "pairs" in recipe.settings["data"]:
        return Engine()  # an autoencoder runs as it is
    want = {k: recipe.settings["training"][k] for k in ("precision", "channels_last", "compile")}
    shape = tuple(data.train.x.shape[1:])
    return distributed.from_first(engine.choose(model, shape, device, **want))


def to_fit(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says to :func:`robustood.training.fit`."""
    want, images = recipe.settings["training"], recipe.settings["data"]
    same = ("epochs", "batch_size", "outlier_batch_size", "lr", "weight_decay", "warmup", "seed")
    sgd = partial(torch.optim.SGD, momentum=want["momentum"], nesterov=want["nesterov"])
    augment = Augment(crop=images["crop"], flip=images["flip"])
    return {
        **{key: want[key] for key in same},
        "optimiser": sgd if want["optimiser"] == "sgd" else torch.optim.Adam,
        "milestones": want["milestones"] or None,
        "augment": augment if images["crop"] or images["flip"] else None,
    }


def held_out(val: Split, model: nn.Module) -> dict[str, float]:
    """What is measured after each epoch."""
    return {"val_accuracy": accuracy(model, val).value} if len(val) else {}


def epoch_line(tell: Callable[[str], None], epochs: int, row: dict[str, float]) -> None:
    """One line about an epoch, from the first process."""
    seen = f", held-out accuracy {row['val_accuracy']:.3f}" if "val_accuracy" in row else ""
    if distributed.rank() == 0:
        tell(f"epoch {row['epoch'] + 1:.0f} of {epochs}: loss {row['loss']:.4f}{seen}")


class Classes(nn.Module):
    """A network's class outputs alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.classes, self.reject = model, declared(model)[0], 0

    def forward(self, x: Tensor) -> Tensor:
        return split(self.model, self.model(x))[0]


def accuracy(
    model: nn.Module, split: Split, attack: Attack | None = None, batch_size: int = 1000
) -> Estimate:
    """Share of 8-bit images whose largest class output is right, and stays right under an attack."""
    device = next(model.parameters()).device
    x, y = pixels(split.x).to(device), split.y.to(device)
    return robust_accuracy(Classes(model), x, y, attack, batch_size=batch_size)


# --- where it happened


def commit() -> str | None:
    """The commit of the checkout that this code lies in, with "+changes" if it was changed; else None."""
    top = Path(robustood.__file__).resolve().parents[1]
    git = partial(subprocess.run, cwd=top, capture_output=True, text=True, check=True)
    try:
        where = git(["git", "rev-parse", "--show-toplevel", "HEAD"]).stdout.split("\n")
        if Path(where[0]).resolve() != top:  # installed inside someone else's repository
            return None
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return where[1] + ("+changes" if changed else "")


def versions() -> dict[str, str]:
    """Of what computed."""
    return {
        "python": platform.python_version(), "torch": torch.__version__,
        "robustood": robustood.__version__,
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    """What a reader calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
