"""Learned perturbation sets: the tables of chapter 10, ``book/10_generative.md``, which chapter 11 also uses.

A seed determines the initial weights, the order of the data and all random pairs; the split of the digits is always
that of the book. Errors are given per 1000 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments import harness
from experiments.harness import Row, experiment, grid, train
from robustood import generative
from robustood.attacks import pgd, robust_accuracy
from robustood.data import Data, Split, light_grid, paired, pixels, relit, render, scenes
from robustood.metrics import proportion
from robustood.models import small_cnn
from robustood.objectives import Adversarial, Standard
from robustood.perturbations import Latent, Random, Spatial
from robustood.smoothing import Noise, certified_accuracy, certify, sigma_for

ADAM = partial(torch.optim.Adam, fused=True)
TURN = Spatial(30, 1)
LEARN: dict[str, Row] = {
    "digits": {"epochs": 125, "lr": 5e-3, "warmup": 0.2},
    "relighting": {"epochs": 100, "lr": 2e-3, "warmup": 0.1},
}
TEST = 200
SHARES = (0.0, 0.25, 0.5, 0.75, 0.99)  # of the radius for which the noise was chosen
STEPS = {"digits": 1200, "relighting": 600}
ROWS = [
    {"what": "set"},
    *grid(
        what=["classifier"],
        training=("plain", "augmented", "CVAE-augmented", "latent-adversarial"),
    ),
    *grid(what=["certified"], target=("median", "maximum"), n=[1000], alpha=[0.001]),
]
COMMON: Row = {
    "batch_size": 128,
    "optimiser": "Adam",
    "schedule": "linear warm-up, then half a cosine to zero",
    "cvae": "summed squared error; beta 0 for 5 % of the run, linear to its value at 40 %",
    "classifier": "robustood.models.small_cnn, lr 3e-3, warm-up 15 %",
    "latent_adversarial": "7 steps of max / 5 in the ball of the largest validation norm; the larger of the clean "
    "and the attacked loss",
    "latent_pgd": "50 steps of radius / 20, best iterate; the clean image counts too",
    "test": TEST,
}


# --- experiments


@experiment(
    ROWS,
    COMMON
    | {
        "scale": "digits",
        "pairs": "digits padded to 12x12, rotation 30 degrees, shift 1 pixel, fresh each epoch",
        "model": "warp_cvae((1, 12, 12)), 8 latents, beta 0.02",
        "cvae_steps": 1000,
        "cvae_rate": "5e-3, warm-up 20 %",
        "classifier_steps": STEPS["digits"],
        "true worst": "grid of 13 x 5 x 5 rotations and shifts",
    },
)
def digits(what: str, seed: int, **how: Any) -> Row:
    """Rotated and shifted digits: a learned set, and classifiers under the worst true transformation.

    Shown in book/10_generative.md, "How good is the set?" and "Augmentation, or training against the worst case?",
    and in book/11_smoothing.md, "The same proof in a learned set".
    """
    return MEASURES[what]("digits", seed, **how)


@experiment(
    ROWS,
    COMMON
    | {
        "scale": "rendered scenes",
        "pairs": "1500 scenes 16x16, reference light with 12 random lights",
        "model": "basis_cvae((3, 16, 16)), 8 latents, beta 0.05",
        "cvae_steps": 1100,
        "cvae_rate": "2e-3, warm-up 10 %",
        "classifier_steps": STEPS["relighting"],
        "true worst": "grid of 3 elevations x 12 azimuths x 3 colours; azimuths 15, 45, 75 are held out",
    },
)
def relighting(what: str, seed: int, **how: Any) -> Row:
    """Rendered scenes: a learned set of lights, and classifiers under the worst true light.

    Shown in book/10_generative.md, "Light", and in book/11_smoothing.md, "The same proof in a learned set".
    """
    return MEASURES[what]("relighting", seed, **how)


# --- networks


@dataclass(frozen=True)
class Learned:
    """A trained autoencoder with its radii, its CPU seconds, the training pairs, and test pairs with their labels."""

    model: generative.ConditionalVAE
    radius: generative.Radii
    seconds: float
    train: Any  # pairs of digits and pairs of scenes have different attributes
    x: Tensor
    y: Tensor
    labels: Tensor


@lru_cache
def learned(name: str, seed: int) -> Learned:
    """Train an autoencoder on its pairs."""
    if name == "digits":
        data = paired(harness.digits(), Random(TURN), border=2, seed=seed)
        model, beta = generative.warp_cvae((1, 12, 12), seed=seed), 0.02
    else:
        data = relit(seed=seed)
        model, beta = generative.basis_cvae((3, 16, 16), seed=seed), 0.05
    how = {"batch_size": 128, "optimiser": ADAM, "seed": seed, **LEARN[name]}
    seconds = train(model, generative.Variational(beta), data, **how)
    size = generative.radii(model, pixels(data.val.x), pixels(data.val.y))
    test: Any = data.test
    x, y = pixels(test.x[:TEST]), pixels(test.y[:TEST])
    return Learned(model, size, seconds, data.train, x, y, test.labels[:TEST])


def classifier(
    name: str, seed: int, split: Split, rule: Adversarial | Standard, **how: Any
) -> tuple[nn.Module, float]:
    """A classifier trained on the labelled images, and its CPU seconds."""
    classes = int(learned(name, seed).train.labels.max()) + 1
    _, channels, size, _ = split.x.shape
    model = small_cnn(classes, channels=channels, size=size, seed=seed)
    data = Data(split, split[:0], split[:0], split.x[:0])
    epochs = max(1, round(STEPS[name] / (len(split) // 128)))
    return model, train(model, rule, data, epochs=epochs, batch_size=128, seed=seed, **how)


@dataclass(frozen=True)
class AugmentPixels:
    """An augmentation that works on floats, applied to images stored in 8 bits."""

    change: Callable[..., Tensor]

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.change(pixels(x), generator)


# --- measurements


def quality(name: str, seed: int) -> Row:
    """Radii, the six metrics, and a check of the theorem."""
    task = learned(name, seed)
    x, y = task.x, task.y
    means = generative.set_metrics(task.model, x, y, task.radius.maximum, seed=seed)
    theorem = generative.guarantee(task.model, x, y, seed=seed)
    with torch.no_grad():
        centre = task.model.generate(x, x.new_zeros(len(x), task.model.latent))
    return {
        "radii": asdict(task.radius),
        "doing_nothing_per_1000_pixels": 1000 * float((x - y).square().mean()),
        "centre_per_1000_pixels": 1000 * float((centre - x).square().mean()),
        "metrics": thousandfold(means.means()),
        "ordered": means.ordered(),
        "theorem": {
            "violations": theorem.violations(),
            "mean_bound": float(theorem.bound.mean()),
            "largest_reach": float(theorem.reach.max()),
        },
        "seconds": task.seconds,
    }


def thousandfold(means: dict[str, float]) -> dict[str, float]:
    """Errors per 1000 pixels instead of per pixel; the divergence is not changed."""
    return {
        name.replace("per_pixel", "per_1000_pixels"): 1000 * mean if "per_pixel" in name else mean
        for name, mean in means.items()
    }


def robustness(name: str, seed: int, training: str) -> Row:
    """Accuracies of a classifier under learned and under true perturbations."""
    task = learned(name, seed)
    x, labels, size = task.x, task.labels, task.radius
    split, rule = task.train.labelled, Standard()
    how: Row = {}
    if training == "augmented" and name == "digits":
        how["augment"] = Random(TURN)
    elif training == "augmented":  # all views of all scenes
        views, kinds = task.train.views, task.train.labels
        split = Split(views.flatten(0, 1), kinds.repeat_interleave(views.shape[1]))
    elif training == "CVAE-augmented":
        how["augment"] = AugmentPixels(generative.Resampled(task.model))
    elif training == "latent-adversarial":
        ball, step = Latent(task.model, size.maximum), size.maximum / 5
        rule = Adversarial(ball, steps=7, step_size=step, clean=True)
    model, seconds = classifier(name, seed, split, rule, **how)

    def latent(radius: float, restarts: int = 1) -> Any:
        within = Latent(task.model, radius)
        how: Row = {"steps": 50, "step_size": radius / 20, "restarts": restarts}
        return robust_accuracy(model, x, labels, partial(pgd, within=within, **how))

    found = {
        "clean": robust_accuracy(model, x, labels),
        "random": robust_accuracy(model, task.y, labels),
        "latent median": latent(size.median),
        "latent upper": latent(size.upper),
        "latent max": latent(size.maximum),
        "latent max, 5 restarts": latent(size.maximum, 5),
    }
    truth = worst_turn if name == "digits" else worst_light
    return found | truth(model, x, labels, seed) | {"seconds": seconds}


def worst_turn(model: nn.Module, x: Tensor, labels: Tensor, seed: int) -> Row:
    """Accuracy under the worst of 13 x 5 x 5 true rotations and shifts."""
    grid = TURN.grid([13, 5, 5, 1])
    return {"true worst": robust_accuracy(model, x, labels, partial(pgd, within=grid))}


def worst_light(model: nn.Module, x: Tensor, labels: Tensor, seed: int) -> Row:
    """Accuracy under the worst of a grid of true lights: all, seen and held-out directions."""
    made = scenes(TEST, 3 * seed + 2)
    assert torch.equal(made.kind, labels), "the scenes of the test split"
    found = {}
    for what, azimuths in {"seen": range(105, 360, 30), "held out": range(15, 90, 30)}.items():
        views = render(made, light_grid(azimuths=tuple(map(float, azimuths))))
        with torch.no_grad():
            answers = torch.cat([model(part.flatten(0, 1)) for part in views.split(50)]).argmax(1)
        found[f"true worst, {what}"] = answers.view(views.shape[:2]) == labels[:, None]
    found["true worst"] = torch.cat([*found.values()], 1)
    return {key: proportion(int(right.all(1).sum()), TEST) for key, right in found.items()}


def proved(name: str, seed: int, target: str, n: int, alpha: float) -> Row:
    """Certified accuracy in the latent ball, with just enough noise to certify the target radius."""
    task = learned(name, seed)
    reach, median = getattr(task.radius, target), task.radius.median
    within, sigma = Latent(task.model, reach), sigma_for(reach, n, alpha)
    augment = AugmentPixels(Noise(within, sigma))
    model, seconds = classifier(name, seed, task.train.labelled, Standard(), augment=augment)
    noise = torch.Generator().manual_seed(seed)
    found = certify(model, task.x, within, sigma=sigma, n=n, alpha=alpha, generator=noise)
    shares = certified_accuracy(found, task.labels, [share * reach for share in SHARES])
    row: Row = {"sigma": sigma, "shares": SHARES, "certified": shares}
    if target != "median":  # noise for the median cannot certify more than that, up to rounding
        row["at the median"] = certified_accuracy(found, task.labels, [median])[0]
    return {**row, "median": median, "seconds": seconds}


MEASURES: dict[str, Callable[..., Row]] = {
    "set": quality,
    "classifier": robustness,
    "certified": proved,
}
