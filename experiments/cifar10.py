"""Further measurements on the kept CIFAR-10 runs: tables of chapter 13 and of three of its appendices.

They need the packs of images (``robustood data fetch``) and the kept runs. The threshold of each network accepts 95 %
of 500 clean test images of CIFAR-10. Attacked outliers are 500 validation images of Tiny-ImageNet, the seen
distribution. Transfer attacks use the images of the plan ``detectors``, 200 of CIFAR-10 and 200 of SVHN; the attacks
that compare budgets in ATOM's test use the same images of SVHN. What is set beside the kept scores uses the images that
these scores belong to: up to 1,000 of CIFAR-10, and up to 500 of each set of outliers, fewer for larger networks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from experiments.harness import Row, experiment, grid
from robustood import artefacts, metrics, results
from robustood.artefacts import Scores
from robustood.attacks import maximise
from robustood.data import compress, load, pixels
from robustood.detectors import MSP, Detector, RejectClass
from robustood.evaluate import attack_score, scores
from robustood.metrics import Estimate, proportion, threshold_at_tpr
from robustood.objectives import Objective, OutlierTraining
from robustood.perturbations import Linf
from robustood.recipes import Recipe, read
from robustood.recipes.reports import fitted, pick
from robustood.recipes.runs import trained

RUNS = [f"{name}_cifar10_cpu" for name in ("standard", "oe", "aloe", "ntom", "atom", "acet")]
RUNS += ["atom_cifar10_cpu_fine", "minedaloe_cifar10_cpu", "adv_cifar10_cpu_8"]
ATTACKED = RUNS[4:8]  # outliers, in training
ALONE = ["oe_cifar10_cpu", *RUNS[3:]]  # in ATOM's test
LOSSLESS = [f"{name}_cifar10_cpu_lossless" for name in ("standard", "oe")]
OTHERS = [f"{name}_cifar10_cpu" for name in ("adv", "aoe")] + ["adv_cifar10_cpu_4", *LOSSLESS]
LARGER = [f"{name}_cifar10_fast" for name in ("standard", "oe", "aloe", "atom")]
DETECTORS = ("MSP", "Energy", "Mahalanobis", "KNN", "ViM", "ReAct", "GradNorm")
NEW = ["svhn:train", "textures", "scenes", "cifar100:test"]
COMMON: Row = {"images a set": 500, "inputs": "cifar10:test", "accepted": 0.95}
COMMON |= {"seen": "tinyimagenet:val", "new": NEW}
PAIR: Row = {"images a set": 200, "inputs": "cifar10:test", "outliers": "svhn:train"}
BETWEEN: Row = PAIR | {"detectors": DETECTORS, "eps": 1 / 255, "steps": 40, "targets": 3}
# Number of steps, size of the first step in grey levels (default: twice the radius), target classes.
BUDGETS = ((10, 16, 3), (10, 2, 3), (40, 16, 3), (100, 16, 1), (100, 16, 3))
SEARCHED: Row = PAIR | {"eps": 8 / 255, "budgets": BUDGETS}
KEPT: Row = {"inputs": "cifar10:test", "new": NEW, "seen": "tinyimagenet:val"}
KEPT |= {"images": 1000, "images a set": 500}
LESS: Row = {"images": 400, "images a set": 100}  # of the larger networks


@lru_cache
def stored(name: str, n: int = COMMON["images a set"]) -> Tensor:
    """Test images as stored in the file, in 8 bits."""
    return pick(load(name), n).x


def pair() -> tuple[Tensor, Tensor]:
    """Images of CIFAR-10, and images of SVHN."""
    n = PAIR["images a set"]
    return pixels(stored(PAIR["inputs"], n)), pixels(stored(PAIR["outliers"], n))


@lru_cache
def restored(run: str) -> tuple[nn.Module, Recipe]:
    """The network of a kept run, and its recipe."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = artefacts.restore(run, scratch)
        recipe = read(folder / "recipe.json")
        model, *_ = trained(recipe, folder, "cpu")
    return model, recipe


@lru_cache
def network(run: str) -> tuple[Detector, Objective, float]:
    """The deployed detector of a kept run, its objective, and the threshold."""
    model, recipe = restored(run)
    detector = RejectClass(model) if model.reject else MSP(model)
    clean = scores(detector, pixels(stored(COMMON["inputs"])))
    return detector, recipe.objective(), threshold_at_tpr(clean, COMMON["accepted"])


@lru_cache
def detectors(run: str) -> dict[str, Detector]:
    """All detectors on the network of a kept run, fitted on training images if they need to be."""
    model, recipe = restored(run)
    return {name: fitted(recipe, name, model, None) for name in DETECTORS}


def accepted(run: str, x: Tensor) -> Estimate:
    """Share of images at or above the threshold."""
    detector, _, line = network(run)
    return proportion(int((scores(detector, x) >= line).sum()), len(x))


# --- experiments

CHANGES = {f"moved by {grey}": grey for grey in (0, 1, 2, 4, 8)} | {"JPEG 75": None}


@experiment(grid(run=RUNS, change=CHANGES), COMMON, seeds=(0,))
def faint(run: str, change: str, seed: int) -> Row:
    """Faint changes that are not attacks, and the share that each network then accepts. No gradient is used.

    Shown in book/atom_variants.md, "A second leak: the attack marks the outliers".
    """
    draw = torch.Generator().manual_seed(seed)

    def changed(x: Tensor) -> Tensor:
        """Images as floats, after JPEG compression or with each pixel moved up or down at random."""
        grey = CHANGES[change]
        if grey is None:
            return pixels(compress(x, 75))
        signs = 2.0 * torch.randint(0, 2, x.shape, generator=draw) - 1
        return (pixels(x) + grey / 255 * signs).clamp(0, 1)

    new = torch.cat([stored(name) for name in COMMON["new"]])
    sides = {"inputs": stored(COMMON["inputs"]), "seen": stored(COMMON["seen"]), "new": new}
    return {side: accepted(run, changed(x)) for side, x in sides.items()}


WAYS: dict[str, tuple[int, int, float] | None] = {  # radius, steps and their size, in grey levels
    "none": None,
    "5 steps of 4": (8, 5, 4),
    "5 steps of 2": (8, 5, 2),
    "5 steps of 1": (8, 5, 1),
    "40 steps of 4": (8, 40, 4),
    "40 steps of 1": (8, 40, 1),
    "radius 1": (1, 10, 0.25),
}


@experiment(grid(run=["ntom_cifar10_cpu", *ATTACKED], attack=WAYS), COMMON, seeds=(0,))
def training_attack(run: str, attack: str, seed: int) -> Row:
    """Outliers attacked by the training loss, as in ATOM's training, with other steps, and with a smaller radius.

    Shown in book/atom_variants.md, "A second leak: the attack marks the outliers".
    """
    detector, objective, _ = network(run)
    assert isinstance(objective, OutlierTraining)
    loss = lambda x: objective.outlier_loss(detector.model(x))
    u, draw = pixels(stored(COMMON["seen"])), torch.Generator().manual_seed(seed)
    if how := WAYS[attack]:
        radius, steps, size = how
        ball = Linf(radius / 255)
        u = maximise(loss, u, ball, steps=steps, step_size=size / 255, keep="best", generator=draw)
    with torch.no_grad():
        mean = loss(u).mean().item()
    return {"loss": mean, "accepted": accepted(run, u)}


@experiment(
    grid(run=RUNS[1:3], **{"made for": ("none", *DETECTORS)}),
    BETWEEN,
    seeds=(0,),
)
def transfer(run: str, made_for: str, seed: int) -> Row:
    """AUROC of each detector when both sides are attacked for one of the detectors.

    Shown in book/other_detectors.md, "Was the attack on them strong enough?".
    """
    x, u = pair()
    if made_for != "none":
        how = {key: BETWEEN[key] for key in ("steps", "targets")}
        attacked, ball = detectors(run)[made_for], Linf(BETWEEN["eps"])
        x = attack_score(attacked, x, ball, direction="lower", **how)
        u = attack_score(attacked, u, ball, direction="raise", **how)
    return {
        name: metrics.confidence_interval(metrics.auroc, scores(judge, x), scores(judge, u))
        for name, judge in detectors(run).items()
    }


@experiment(
    [
        {"run": run, "steps": steps, "first step": first, "targets": targets}
        for run in ATTACKED
        for steps, first, targets in BUDGETS
    ],
    SEARCHED,
    seeds=(0,),
)
def budgets(run: str, steps: int, first_step: int, targets: int, seed: int) -> Row:
    """AUROC in ATOM's test, outliers attacked adaptively with other steps and numbers of target classes.

    Shown in book/atom_variants.md, "Steps and classes".
    """
    detector, *_ = network(run)
    x, u = pair()
    how: Row = {"steps": steps, "step_size": first_step / 255, "targets": targets}
    u = attack_score(detector, u, Linf(SEARCHED["eps"]), direction="raise", **how)
    return {
        "auroc": metrics.confidence_interval(
            metrics.auroc, scores(detector, x), scores(detector, u)
        )
    }


# --- beside the kept scores


def kept(run: str, attack: str, sets: Sequence[str]) -> tuple[Scores, Scores]:
    """The kept scores of the deployed detector of a run: those of CIFAR-10, and those of sets of outliers."""
    return results.pooled(artefacts.scores(run), type(network(run)[0]).__name__, attack, sets)


def compressed_inputs(run: str, n: int) -> Row:
    """AUROC when n in-distribution images went through JPEG, and how far it then lies above the clean one."""
    moved, found = scores(network(run)[0], pixels(compress(stored(KEPT["inputs"], n), 75))), {}
    for where, sets in {"new": KEPT["new"], "seen": [KEPT["seen"]]}.items():
        inside, outside = kept(run, "none", sets)
        found[where] = metrics.confidence_interval(metrics.auroc, moved, outside)
        pairs = (moved, outside), (inside, outside)
        found[f"{where}, change"] = metrics.paired_difference(metrics.auroc, *pairs)
    return found


@experiment(grid(run=RUNS + OTHERS), KEPT | {"quality": 75}, seeds=(0,))
def compressed(run: str, seed: int) -> Row:
    """AUROC when the in-distribution images went through JPEG, and how far it then lies above the clean one.

    Shown in book/13_results.md, "First, a leak".
    """
    return compressed_inputs(run, KEPT["images"])


@experiment(grid(run=LARGER), KEPT | LESS | {"quality": 75}, seeds=(0,))
def larger_compressed(run: str, seed: int) -> Row:
    """The same for the larger networks.

    Shown in book/larger_network.md, "Both sides attacked by one grey level".
    """
    return compressed_inputs(run, LESS["images"])


INPUTS: Row = KEPT | {"images": 300, "eps": 1 / 255, "steps": 100, "targets": 3}


def attacked_inputs(run: str, n: int) -> Row:
    """AUROC when n in-distribution images alone are attacked; outliers are the clean new ones."""
    (detector, *_), (_, outside) = network(run), kept(run, "none", INPUTS["new"])
    x = pixels(stored(INPUTS["inputs"], n))
    how = {key: INPUTS[key] for key in ("steps", "targets")}
    moved = attack_score(detector, x, Linf(INPUTS["eps"]), direction="lower", **how)
    return {
        name: metrics.confidence_interval(metrics.auroc, scores(detector, images), outside)
        for name, images in {"clean": x, "attacked": moved}.items()
    }


@experiment(grid(run=ALONE), INPUTS, seeds=(0,))
def inputs_alone(run: str, seed: int) -> Row:
    """AUROC when the in-distribution images alone are attacked, by one grey level; outliers are the clean new ones.

    Shown in book/13_results.md, "Outliers alone attacked: the table of ATOM".
    """
    return attacked_inputs(run, INPUTS["images"])


@experiment(grid(run=LARGER[3:]), INPUTS | LESS | {"images": 100}, seeds=(0,))
def larger_inputs_alone(run: str, seed: int) -> Row:
    """The same for the larger ATOM.

    Shown in book/larger_network.md, "Outliers alone attacked by eight grey levels: ATOM".
    """
    return attacked_inputs(run, 100)


REPEATED: Row = KEPT | {"attacked again, a set": 75, "beaten": 0.05}


@experiment(grid(run=[LOSSLESS[1], *RUNS[1:3], "atom_cifar10_cpu"]), REPEATED, seeds=(1,))
def repeated(run: str, seed: int) -> Row:
    """The kept adaptive attack on outliers, and the same attack from other random starts, image by image.

    Shown in book/atom_variants.md, "Image by image".
    """
    (detector, *_), settings = network(run), artefacts.result(run)["report"]["settings"]
    at = np.linspace(0, KEPT["images a set"] - 1, REPEATED["attacked again, a set"]).astype(int)
    inside, pool = kept(run, "adaptive", KEPT["new"])
    before = np.concatenate([each[at] for each in np.split(pool, len(KEPT["new"]))])
    u = torch.cat([stored(name, KEPT["images a set"])[at] for name in KEPT["new"]])
    how = {key: settings[key] for key in ("steps", "restarts", "targets")}
    draw = torch.Generator().manual_seed(seed)
    ball = Linf(settings["eps"])
    u = attack_score(detector, pixels(u), ball, direction="raise", generator=draw, **how)
    again = scores(detector, u)
    by = {"kept": before, "again": again, "worse of both": np.maximum(before, again)}
    return {
        "beaten": proportion(int((again > before + REPEATED["beaten"]).sum()), len(again)),
        **{name: metrics.confidence_interval(metrics.auroc, inside, s) for name, s in by.items()},
    }
