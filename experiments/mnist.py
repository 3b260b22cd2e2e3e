"""The experiments of ``digits_training.py`` on more images: the tables of the page ``book/mnist.md``.

They need the images: ``robustood data fetch mnist``. No image is stored. The four networks trained on all images are
kept in ``data/weights/mnist_*.safetensors`` and loaded from there as long as their card names the same recipe.

Seed 0 measures everything. Further seeds repeat the small training sets with other images and initial weights.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments import digits_training as digits
from experiments.harness import OPTIMISER, ROOT, Row, experiment, grid, plain, train
from robustood.checkpoints import load_weights, read_json, save_weights
from robustood.data import Data, Split, load, pixels
from robustood.metrics import proportion
from robustood.models import frozen, small_cnn
from robustood.objectives import Adversarial, Standard
from robustood.perturbations import Linf

WEIGHTS = ROOT / "data" / "weights"
RADII = (0.0, 0.1, 0.2, 0.3)
SIZES = (20, 50, 100, 200, 500, 2000, 10000)
SMALL = (0.0, 0.1, 0.2)  # training radii for these sizes: 300 steps are too few for 0.3
REPEATED = 100  # all seeds are measured up to this size
FAR = (2.0, 4.0, 6.0, 8.0)
FAR_IMAGES = 500
RECIPE: Row = OPTIMISER | {
    "train_images": 60000,
    "epochs": 4,
    "batch_size": 64,
    "lr": 6e-3,
    "train_attack": "5 steps of 2.5 eps / 5 from a random start, last iterate; eps grows from 0 over the first half",
    "model": "PixelUnshuffle(2), then robustood.models.small_cnn(channels=4, size=14): 106,298 parameters",
    "box": [0, 1],
}
TEST: Row = {"clean_images": 10000, "attacked_images": 1000, "pgd": digits.RECIPE["pgd"]}


@lru_cache
def images(split: str) -> Split:
    """All images of a split, in [0, 1]."""
    found = load("mnist", split)
    return Split(pixels(found.x), found.y)


def attacked() -> Split:
    """The first test images, which are attacked."""
    return images("test")[: TEST["attacked_images"]]


def network(seed: int = 0) -> nn.Module:
    """The small CNN on blocks of 2x2 pixels, each treated as one pixel with four channels."""
    return nn.Sequential(nn.PixelUnshuffle(2), small_cnn(channels=4, size=14, seed=seed))


def trained(
    eps: float, seed: int, split: Split, epochs: int = RECIPE["epochs"]
) -> tuple[nn.Module, float]:
    """A network trained by the recipe, and its CPU seconds."""
    data = Data(split, images("test"), images("test"), images("test").x[:0])
    rule = Adversarial(Linf(eps), steps=5, ramp=0.5) if eps else Standard()
    how = {"batch_size": RECIPE["batch_size"], "lr": RECIPE["lr"]}
    model = network(seed)
    return model, train(model, rule, data, epochs=epochs, seed=seed, **how)


def file_of(eps: float) -> Path:
    """The file with the weights of a network trained on all images."""
    return WEIGHTS / f"mnist_{f'pgd{round(100 * eps)}' if eps else 'standard'}.safetensors"


@lru_cache
def whole(eps: float) -> tuple[nn.Module, float]:
    """The network trained on all images, loaded from its file or trained and saved there."""
    path, model = file_of(eps), network()
    card = {"recipe": plain(RECIPE), "data": "mnist", "train_eps": eps, "seed": 0}
    if path.with_suffix(".json").is_file():
        old = read_json(path.with_suffix(".json"))
        if all(old.get(key) == value for key, value in card.items()):
            load_weights(path, model)
            return model.eval(), old["seconds"]
    model, seconds = trained(eps, 0, images("train"))
    clean = plain(digits.clean(model, images("test")))
    save_weights(path, model, **card, clean=clean, seconds=round(seconds, 1))
    return model, seconds


# --- experiments


@experiment(
    grid(train_eps=RADII),
    RECIPE | TEST | {"test_eps": RADII, "targets": "9 classes, 20 steps of 2.5 eps / 20"},
    seeds=(0,),
)
def tradeoff(train_eps: float, seed: int) -> Row:
    """Accuracy for each training radius at each test radius, l_inf.

    Shown in book/mnist.md, "What robustness costs".
    """
    model, seconds = whole(train_eps)
    row = digits.linf_curve(model, attacked(), RADII, RADII[1:], steps=20)
    return {"clean": digits.clean(model, images("test")), **row, "seconds": seconds}


@experiment(grid(train_eps=RADII[1:]), RECIPE | {"clean_images": TEST["clean_images"]}, seeds=(0,))
def changed(train_eps: float, seed: int) -> Row:
    """Clean test images that only one of two networks classifies correctly: the standard one or a robust one.

    Shown in book/mnist.md, "What robustness costs".
    """
    test = images("test")
    model, seconds = whole(train_eps)
    with torch.no_grad():
        reads, before = (m(test.x).argmax(1) == test.y for m in (model, whole(0.0)[0]))
    gained, lost = int((reads & ~before).sum()), int((before & ~reads).sum())
    share = proportion(lost, gained + lost)  # 1/2 if both are equally good: a sign test
    return {"gained": gained, "lost": lost, "lost_share": share, "seconds": seconds}


@experiment(
    grid(train_eps=RADII),
    RECIPE | {"test_images": TEST["attacked_images"], "away": "5x5"},
    seeds=(0,),
)
def gradients(train_eps: float, seed: int) -> Row:
    """Where the loss gradient lies, and how it is aligned with the image.

    Shown in book/mnist.md, "Gradients".
    """
    model, seconds = whole(train_eps)
    row = digits.dead_share(model, attacked(), images("train").x)
    return {**row, **alignment(model, attacked()), "seconds": seconds}


def alignment(model: nn.Module, test: Split) -> Row:
    """Alignment as in Etmann et al. (2019), and the share of the gradient away from the strokes."""
    x = test.x.clone().requires_grad_()
    with frozen(model):
        first, second = model(x).topk(2, dim=1).values.unbind(1)
        slope = torch.autograd.grad((first - second).sum(), x)[0]
    along = (test.x * slope).flatten(1).sum(1).abs() / slope.flatten(1).norm(dim=1)
    far = away_from_ink(test.x)
    size = slope.abs()
    share = (size * far).flatten(1).sum(1) / size.flatten(1).sum(1)
    return {
        "alignment": digits.mean(along),
        "away_gradient": digits.mean(share),
        "away_pixels": float(far.double().mean()),
    }


def away_from_ink(x: Tensor) -> Tensor:
    """1 for each pixel whose 5x5 neighbourhood has no ink, else 0."""
    return (nn.functional.max_pool2d(x, 5, stride=1, padding=2) == 0).float()


@experiment(
    grid(train_eps=RADII),
    RECIPE
    | {"test_eps": FAR, "path": digits.PATH, "test_images": FAR_IMAGES}
    | {"attack": "targeted l_2, 60 steps of 2.5 eps / 60 from the image itself"}
    | {"fooled_from_random": "the same from a random start, at the largest radius"},
    seeds=(0,),
)
def large_eps(train_eps: float, seed: int) -> Row:
    """Targeted l_2 PGD far beyond the training radius: do the images reach the target class?

    Shown in book/mnist.md, "Far away: does the image reach the class?".
    """
    model, seconds = whole(train_eps)
    test = images("test")[:FAR_IMAGES]
    row = digits.far(model, test, images("train"), FAR, seed, restarts=0)
    target = digits.goals(test, seed)
    moved = digits.towards(model, test.x, target, FAR[-1], restarts=1)
    row["fooled_from_random"] = digits.read_as(model, moved, target)
    return row | {"seconds": seconds}


@experiment(
    lambda seed: grid(n=[n for n in SIZES if not seed or n <= REPEATED], train_eps=SMALL),
    RECIPE
    | {"train_images": SIZES, "clean_images": TEST["clean_images"]}
    | {"epochs": "4, or as many as make 300 steps", "seeds": f"3 up to {REPEATED} images"},
)
def sample_size(n: int, train_eps: float, seed: int) -> Row:
    """Clean accuracy against the number of training images.

    Shown in book/mnist.md, "Few images".
    """
    order = torch.randperm(60000, generator=torch.Generator().manual_seed(seed))
    batches = max(1, n // RECIPE["batch_size"])
    epochs = max(RECIPE["epochs"], -(-300 // batches))
    model, seconds = trained(train_eps, seed, images("train")[order[:n]], epochs)
    clean = digits.clean(model, images("test"))
    return {"clean": clean, "epochs": epochs, "seconds": seconds}


@experiment(
    [
        *grid(train_eps=[0.0], least_correlation=(0.0, 0.3, 0.5, 0.6)),
        *grid(train_eps=RADII[1:], least_correlation=[0.0]),
    ],
    {"box": None, "test_eps": RADII, "weak": "|correlation| < 0.3", "steps": 1500, "lr": 0.01},
    seeds=(0,),  # training is deterministic: zero start, full batch
)
def fiveseven(train_eps: float, least_correlation: float, seed: int) -> Row:
    """A linear classifier of 5 against 7 on all pixels or only on well correlated ones.

    Shown in book/mnist.md, "Five against seven".
    """
    return digits.linear_pair(images("train"), images("test"), train_eps, least_correlation)
