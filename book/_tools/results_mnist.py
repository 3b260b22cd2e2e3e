"""Measure again what the results chapter quotes of MNIST: the digits experiments where there are more images.

    python book/_tools/results_mnist.py                     all experiments
    python book/_tools/results_mnist.py fiveseven           one of them
    python book/_tools/results_mnist.py --again             measure anew what is already kept

Needs the MNIST images: ``robustood data fetch mnist``. Each experiment fills ``data/results/mnist_<name>.json``; a
run can be stopped and goes on (``keeping.py``). The measurements are those of ``results_digits.py``. No image is
kept. The four networks that are trained on all images stay in ``data/weights/mnist_*.safetensors`` and are read
from there as long as their card names the same recipe.

Seed 0 measures everything. Further seeds repeat the small training sets, with other images and weights.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import results_digits as digits  # first: it sets the number of threads
import torch
from keeping import FOLDER, Experiment, Task, main, plain
from torch import Tensor, nn

from robustood.checkpoints import load_weights, read_json, save_weights
from robustood.data import Data, Split, load, pixels
from robustood.metrics import proportion
from robustood.models import frozen, small_cnn
from robustood.objectives import Adversarial, Standard
from robustood.perturbations import Linf
from robustood.training import fit

WEIGHTS = FOLDER.parent / "weights"
RADII = (0.0, 0.1, 0.2, 0.3)
SIZES = (20, 50, 100, 200, 500, 2000, 10000)
SMALL = (0.0, 0.1, 0.2)  # training radii there: 300 steps are too few for 0.3
REPEATED = 100  # up to this size all seeds are measured
FAR = (2.0, 4.0, 6.0, 8.0)
RECIPE: dict[str, Any] = {
    "train_images": 60000, "epochs": 4, "batch_size": 64, "optimiser": "Adam", "lr": 6e-3,
    "schedule": "15 % linear warm-up, then half a cosine to zero",
    "train_attack": "5 steps of 2.5 eps / 5 from a random start, last iterate; eps grows from 0 over the first half",
    "model": "PixelUnshuffle(2), then robustood.models.small_cnn(channels=4, size=14): 106,298 parameters",
    "box": [0, 1],
}  # fmt: skip
TEST: dict[str, Any] = {
    "clean_images": 10000, "attacked_images": 1000,
    "pgd": "cross-entropy, 40 steps of 2.5 eps / 40, 1 random start, best iterate by the margin",
}  # fmt: skip


@lru_cache
def images(split: str) -> Split:
    found = load("mnist", split)
    return Split(pixels(found.x), found.y)


def attacked() -> Split:
    """The test images that are attacked, the first ones."""
    return images("test")[: TEST["attacked_images"]]


def network(seed: int = 0) -> nn.Module:
    """The small CNN, which sees each block of 2x2 pixels as one with four channels."""
    return nn.Sequential(nn.PixelUnshuffle(2), small_cnn(channels=4, size=14, seed=seed))


def trained(
    eps: float, seed: int, train: Split, epochs: int = RECIPE["epochs"]
) -> tuple[nn.Module, float]:
    """A network of the recipe and its CPU seconds."""
    data = Data(train, images("test"), images("test"), images("test").x[:0])
    model, rule = network(seed), Adversarial(Linf(eps), steps=5, ramp=0.5) if eps else Standard()
    began = time.process_time()
    how = {"batch_size": RECIPE["batch_size"], "lr": RECIPE["lr"]}
    fit(model, rule, data, epochs=epochs, seed=seed, **how)
    return model, time.process_time() - began


def file_of(eps: float) -> Path:
    """The weights of a network that saw all images."""
    return WEIGHTS / f"mnist_{f'pgd{round(100 * eps)}' if eps else 'standard'}.safetensors"


@lru_cache
def whole(eps: float) -> tuple[nn.Module, float]:
    """The network that saw all images, from its file or trained and put there."""
    path, model = file_of(eps), network()
    card = {"recipe": plain(RECIPE), "data": "mnist", "train_eps": eps, "seed": 0}
    if path.with_suffix(".json").is_file():
        old = read_json(path.with_suffix(".json"))
        if all(old.get(key) == value for key, value in card.items()):
            load_weights(path, model)
            return model.eval(), old["seconds"]
    model, seconds = trained(eps, 0, images("train"))
    save_weights(path, model, **card, clean=plain(clean(model)), seconds=round(seconds, 1))
    return model, seconds


def clean(model: nn.Module):
    """Accuracy on all test images."""
    return digits.accuracy(model, Linf(0.0), test=images("test"), steps=0, restarts=0)


# --- experiments: each yields (settings of a row, function that measures it) for one seed


def tradeoff(seed: int) -> Iterator[Task]:
    """Accuracy for each training radius at each test radius, l_inf."""
    for eps in () if seed else RADII:

        def measure(eps: float = eps) -> dict[str, Any]:
            model, seconds = whole(eps)
            row = digits.linf_curve(model, attacked(), RADII, RADII[1:], steps=20)
            return {"clean": clean(model), **row, "seconds": seconds}

        yield {"train_eps": eps}, measure


def changed(seed: int) -> Iterator[Task]:
    """Clean test images that only one of two networks reads: the standard one, or a robust one."""
    for eps in () if seed else RADII[1:]:

        def measure(eps: float = eps) -> dict[str, Any]:
            test = images("test")
            model, seconds = whole(eps)
            with torch.no_grad():
                reads, before = (m(test.x).argmax(1) == test.y for m in (model, whole(0.0)[0]))
            gained, lost = int((reads & ~before).sum()), int((before & ~reads).sum())
            share = proportion(lost, gained + lost)  # 1/2 if they are equally good: a sign test
            return {"gained": gained, "lost": lost, "lost_share": share, "seconds": seconds}

        yield {"train_eps": eps}, measure


def gradients(seed: int) -> Iterator[Task]:
    """Where the loss gradient lies, and how it is aligned with the image."""
    for eps in () if seed else RADII:

        def measure(eps: float = eps) -> dict[str, Any]:
            model, seconds = whole(eps)
            row = digits.dead_share(model, attacked(), images("train").x)
            return {**row, **alignment(model, attacked()), "seconds": seconds}

        yield {"train_eps": eps}, measure


def alignment(model: nn.Module, test: Split) -> dict[str, Any]:
    """Alignment of Etmann et al. (2019), and the gradient's share away from the strokes."""
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
    """1 where no pixel of the 5x5 around has ink."""
    return (nn.functional.max_pool2d(x, 5, stride=1, padding=2) == 0).float()


def large_eps(seed: int) -> Iterator[Task]:
    """Targeted l_2 PGD far beyond the training radius: do the images reach the target class?"""
    for eps in () if seed else RADII:

        def measure(eps: float = eps) -> dict[str, Any]:
            model, seconds = whole(eps)
            test = images("test")[:FAR_IMAGES]
            row = digits.far(model, test, images("train"), FAR, seed, restarts=0)
            target = digits.goals(test, seed)
            moved = digits.towards(model, test.x, target, FAR[-1], restarts=1)
            row["fooled_from_random"] = digits.read_as(model, moved, target)
            return row | {"seconds": seconds}

        yield {"train_eps": eps}, measure


FAR_IMAGES = 500


def sample_size(seed: int) -> Iterator[Task]:
    """Clean accuracy against the number of training images."""
    order = torch.randperm(60000, generator=torch.Generator().manual_seed(seed))
    for n in SIZES:
        for eps in SMALL if not seed or n <= REPEATED else ():

            def measure(n: int = n, eps: float = eps) -> dict[str, Any]:
                batches = max(1, n // RECIPE["batch_size"])
                epochs = max(RECIPE["epochs"], -(-300 // batches))
                model, seconds = trained(eps, seed, images("train")[order[:n]], epochs)
                return {"clean": clean(model), "epochs": epochs, "seconds": seconds}

            yield {"n": n, "train_eps": eps}, measure


def fiveseven(seed: int) -> Iterator[Task]:
    """A linear classifier of 5 against 7 on all or only on well correlated pixels, closed form."""
    found = [(0.0, 0.0), (0.0, 0.3), (0.0, 0.5), (0.0, 0.6), (0.1, 0.0), (0.2, 0.0), (0.3, 0.0)]
    for eps, least in () if seed else found:  # deterministic: zero start, full batch

        def measure(eps: float = eps, least: float = least) -> dict[str, Any]:
            return digits.linear_pair(images("train"), images("test"), eps, least, RADII)

        yield {"train_eps": eps, "least_correlation": least}, measure


FIVESEVEN = {"box": None, "test_eps": RADII, "weak": "|correlation| < 0.3", "steps": 1500, "lr": 0.01}  # fmt: skip
EXPERIMENTS: dict[str, Experiment] = {
    "tradeoff": (
        tradeoff,
        RECIPE | TEST | {"test_eps": RADII, "targets": "9 classes, 20 steps of 2.5 eps / 20"},
    ),
    "changed": (changed, RECIPE | {"clean_images": TEST["clean_images"]}),
    "fiveseven": (fiveseven, FIVESEVEN),
    "gradients": (gradients, RECIPE | {"test_images": TEST["attacked_images"], "away": "5x5"}),
    "large_eps": (
        large_eps,
        RECIPE
        | {"test_eps": FAR, "path": digits.PATH, "test_images": FAR_IMAGES}
        | {"attack": "targeted l_2, 60 steps of 2.5 eps / 60 from the image itself"}
        | {"fooled_from_random": "the same from a random start, at the largest radius"},
    ),
    "sample_size": (
        sample_size,
        RECIPE
        | {"train_images": SIZES, "clean_images": TEST["clean_images"]}
        | {"epochs": "4, or as many as make 300 steps", "seeds": f"3 up to {REPEATED} images"},
    ),
}

if __name__ == "__main__":
    sys.exit(main(__doc__, "mnist", EXPERIMENTS, needs=partial(images, "train")))
