"""Robust training on the digits: the tables of chapter 4, ``book/04_training.md``.

A seed determines the initial weights and the order of the data; the split is always that of the book. All accuracies
are on the 500 test digits, with exact 95 % binomial intervals. ``mnist.py`` measures the same on MNIST.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.harness import OPTIMISER, Row, digits, experiment, grid, train
from robustood import data, toy
from robustood.attacks import fgsm, maximise, pgd, robust_accuracy
from robustood.data import Data, Split
from robustood.losses import cross_entropy
from robustood.metrics import Estimate, proportion
from robustood.models import Classifier, frozen, mlp, small_cnn
from robustood.objectives import TRADES, Adversarial, Standard
from robustood.perturbations import L2, Ball, Linf

LINF = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
L2_RADII = (0.0, 0.25, 0.5, 1.0, 1.5)
PAIR_RADII = (0.0, 0.1, 0.2, 0.3)
FAR = (1.0, 2.0, 3.0, 4.0)
PATH = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MODELS = {"linear": "64-10", "mlp": "64-128-128-10", "cnn": "robustood.models.small_cnn"}
RECIPE: Row = OPTIMISER | {
    "train_digits": 1097,
    "test_digits": 500,
    "batch_size": 128,
    "lr": 3e-3,
    "train_steps": dict.fromkeys(MODELS, 800),
    "train_attack": "7 steps of 2.5 eps / 7 from a random start, last iterate",
    "pgd": "cross-entropy, 40 steps of 2.5 eps / 40, 1 random start, best iterate by the margin",
    "box": [0, 1],
    "models": MODELS,
}
OVERFITTING: Row = {"model": "mlp", "eps": 0.3, "epochs": 50, "lr": 3e-3, "batch_size": 64}

Rule = Standard | Adversarial | TRADES

# --- networks and measurements


def network(name: str, seed: int, inputs: int = 64) -> Classifier:
    """An untrained network, one of MODELS."""
    if name == "cnn":
        return small_cnn(seed=seed)
    return mlp(inputs, hidden=() if name == "linear" else (128, 128), seed=seed)


@lru_cache
def trained(
    name: str, rule: Rule, seed: int, steps: int = 800, n: int = 1097, pad: int = 0
) -> tuple[Classifier, float]:
    """A trained network and its CPU seconds; networks with equal arguments are trained only once per process."""
    batch = min(128, n)
    epochs = round(steps / (n // batch))
    model = network(name, seed, (8 + 2 * pad) ** 2)
    return model, train(
        model, rule, padded(digits(n), pad), epochs=epochs, batch_size=batch, seed=seed
    )


def padded(data: Data, border: int) -> Data:
    """The digits with a border of blank pixels."""
    pad = partial(nn.functional.pad, pad=[border] * 4)
    train, val, test = (replace(s, x=pad(s.x)) for s in (data.train, data.val, data.test))
    return replace(data, train=train, val=val, test=test, outliers=pad(data.outliers))


def rule(within: Ball) -> Rule:
    """PGD training, or standard training if the radius is zero."""
    return Adversarial(within) if within.eps else Standard()


def accuracy(
    model: nn.Module,
    within: Ball,
    attack: Callable[..., Tensor] = pgd,
    test: Split | None = None,
    **how: Any,
) -> Estimate:
    """Accuracy under an attack, on the test digits or another split."""
    test = test or digits().test
    return robust_accuracy(model, test.x, test.y, partial(attack, within=within, **how))


def clean(model: nn.Module, test: Split | None = None) -> Estimate:
    """Accuracy on clean images."""
    test = test or digits().test
    return robust_accuracy(model, test.x, test.y)


def mean(values: Tensor) -> Estimate:
    """The mean over samples, with a normal 95 % interval."""
    values = values.double()
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    centre = float(values.mean())
    return Estimate(centre, centre - half, centre + half, len(values))


def linf_curve(
    model: nn.Module, test: Split, radii: Sequence[float], targets: Sequence[float], steps: int
) -> Row:
    """Accuracy under 40 steps of PGD at all radii, and under attacks towards each class at the radii in ``targets``."""
    pgd40 = [accuracy(model, Linf(r), test=test, steps=40 if r else 0) for r in radii]
    each = partial(accuracy, model, test=test, loss="targets", steps=steps)
    found = {"targets": {str(r): each(Linf(r)) for r in targets}} if targets else {}
    return {"pgd": pgd40, **found}


# --- experiments


@experiment(
    grid(model=MODELS, train_eps=LINF),
    RECIPE | {"test_eps": LINF, "targets": "9 classes, 10 steps"},
)
def tradeoff_linf(model: str, train_eps: float, seed: int) -> Row:
    """Accuracy for each training radius at each test radius, l_inf.

    Shown in book/04_training.md, "The trade-off, honestly".
    """
    net, seconds = trained(model, rule(Linf(train_eps)), seed)
    row = linf_curve(net, digits().test, LINF, () if model == "linear" else (0.1, 0.2), steps=10)
    if model == "linear":  # one full step towards each wrong class is exact
        exact = partial(accuracy, net, loss="targets", steps=1, restarts=0)
        row["exact"] = [exact(Linf(r)) for r in LINF]
    return row | {"seconds": seconds}


@experiment(
    grid(model=["cnn"], train_eps=(0.0, 0.5, 1.0, 1.5)),
    RECIPE | {"test_eps": L2_RADII},
)
def tradeoff_l2(model: str, train_eps: float, seed: int) -> Row:
    """Accuracy for each training radius at each test radius, l_2, for the CNN.

    On no page: it shows that the trade-off of `tradeoff_linf` does not depend on its norm.
    """
    net, seconds = trained(model, rule(L2(train_eps)), seed)
    return {"pgd": [accuracy(net, L2(r), steps=40) for r in L2_RADII], "seconds": seconds}


@experiment(
    [
        {"n": n, "train_norm": norm, "train_eps": eps}
        for n in (20, 50, 100, 200, 500, 1097)
        for norm, radii in {"none": (0.0,), "linf": (0.1, 0.2, 0.3), "l2": (0.5,)}.items()
        for eps in radii
    ],
    RECIPE | {"train_steps": 300, "model": "mlp"},
)
def sample_size(n: int, train_norm: str, train_eps: float, seed: int) -> Row:
    """Clean and robust accuracy against the number of training digits, 300 steps each.

    Shown in book/04_training.md, "With few samples".
    """
    within = L2(train_eps) if train_norm == "l2" else Linf(train_eps)
    model, seconds = trained("mlp", rule(within), seed, steps=300, n=n)
    robust = accuracy(model, Linf(0.1), steps=40)
    return {"clean": clean(model), "linf_0.1": robust, "seconds": seconds}


@experiment(
    [
        *grid(model=["mlp"], beta=(None, 1.0, 3.0, 6.0, 12.0)),
        *grid(model=["cnn"], beta=(None, 6.0)),
    ],
    RECIPE | {"eps": 0.15, "targets": "margin to each of 9 classes, 10 steps"},
)
def trades(model: str, beta: float | None, seed: int) -> Row:
    """TRADES with several values of beta, and PGD training, at l_inf 0.15.

    Shown in book/04_training.md, "TRADES: name the price".
    """
    within = Linf(0.15)
    chosen = Adversarial(within) if beta is None else TRADES(within, beta=beta)
    net, seconds = trained(model, chosen, seed)
    robust = accuracy(net, within, steps=40)
    each = accuracy(net, within, steps=10, loss="targets")
    return {"clean": clean(net), "pgd": robust, "targets": each, "seconds": seconds}


@experiment(grid(train_eps=(0.0, 0.1, 0.2)), RECIPE | {"size": [12, 12], "train_steps": 600})
def gradients(train_eps: float, seed: int) -> Row:
    """Share of the loss gradient on pixels that are white in every training image, 12x12.

    Shown in book/04_training.md, "What a robust network looks at".
    """
    data = padded(digits(), 2)
    model, seconds = trained("mlp", rule(Linf(train_eps)), seed, steps=600, pad=2)
    return dead_share(model, data.test, data.train.x) | {"seconds": seconds}


def dead_share(model: nn.Module, test: Split, seen: Tensor) -> Row:
    """The share of the loss gradient on pixels that are 0 in all training images."""
    x = test.x.clone().requires_grad_()
    with frozen(model):
        loss = cross_entropy(model(x), test.y).sum()
        size = torch.autograd.grad(loss, x)[0].flatten(1).abs()
    dead = (seen == 0).all(0).flatten()
    total = size.sum(1)
    moved = total > 0  # a saturated loss can have a gradient of exactly zero
    return {
        "dead_gradient": mean(size[moved][:, dead].sum(1) / total[moved]),
        "dead_pixels": float(dead.double().mean()),
        "median_l1": float(total.median()),
        "clean": clean(model, test),
    }


@experiment(grid(split=range(12), train_digits=[1297]), RECIPE | {"train_digits": 1297}, seeds=(0,))
def splits(split: int, train_digits: int, seed: int) -> Row:
    """How far the cells of the trade-off move from one random split of the digits to another.

    On no page: it shows which differences in `tradeoff_linf` exceed chance. A split determines everything, seeds too.
    """
    own = data.digits(seed=1000 + split)
    rest = Split(torch.cat([own.val.x, own.train.x]), torch.cat([own.val.y, own.train.y]))
    assert len(rest) == train_digits
    own = replace(own, train=rest, outliers=own.outliers[:0])
    cells = [
        ("mlp", 0.0, (0.05, 0.1)),
        ("mlp", 0.3, [0]),
        ("linear", 0.2, [0]),
        ("linear", 0.3, [0]),
    ]
    row: Row = {"seconds": 0}
    for name, eps, radii in cells:
        model = network(name, split)
        seconds = train(model, rule(Linf(eps)), own, epochs=80, batch_size=128, seed=split)
        row["seconds"] += seconds
        for r in radii:
            row[f"{name} {eps:g} at {r:g}"] = accuracy(model, Linf(r), test=own.test, steps=40)
    return row


RULES = {
    "standard": Standard(),
    "linf 0.15": Adversarial(Linf(0.15)),
    "l2 1.0": Adversarial(L2(1.0)),
    "TRADES 0.15": TRADES(Linf(0.15), beta=6.0),
}


@experiment(
    grid(model=["cnn"], training=RULES),
    RECIPE
    | {"test_eps": FAR, "path": PATH, "train_steps": 800, "attack": "targeted l_2, 60 steps"},
)
def large_eps(model: str, training: str, seed: int) -> Row:
    """Targeted l_2 PGD far beyond the training radius: do the images reach the target class?

    Shown in book/04_training.md, "Images that reach the other class".
    """
    net, seconds = trained(model, RULES[training], seed)
    return far(net, digits().test, digits().train, FAR, seed) | {"seconds": seconds}


def goals(test: Split, seed: int) -> Tensor:
    """A random wrong class for each image."""
    shift = torch.randint(1, 10, (len(test),), generator=torch.Generator().manual_seed(seed))
    return (test.y + shift) % 10


def towards(model: nn.Module, x: Tensor, target: Tensor, eps: float, restarts: int = 1) -> Tensor:
    """Images attacked towards a class within an l_2 ball."""
    objective = lambda moved: -cross_entropy(model(moved), target)
    with frozen(model):
        return maximise(objective, x, L2(eps), steps=60, restarts=restarts)


def read_as(model: nn.Module, x: Tensor, target: Tensor) -> Estimate:
    """Share of images that the network assigns to the target class."""
    return proportion(int((model(x).argmax(1) == target).sum()), len(x))


def far(
    model: nn.Module,
    test: Split,
    train: Split,
    radii: Sequence[float],
    seed: int,
    restarts: int = 1,
) -> Row:
    """How often targeted attacks reach their class, according to the network and to the nearest neighbour."""
    target = goals(test, seed)

    def reach(x: Tensor) -> Estimate:
        """Share of images whose nearest training image has the target label."""
        nearest = torch.cdist(x.flatten(1), train.x.flatten(1)).argmin(1)
        return proportion(int((train.y[nearest] == target).sum()), len(x))

    row: Row = {"reached": [], "fooled": []}
    moved = test.x
    for eps in radii:
        moved = towards(model, test.x, target, eps, restarts)
        row["reached"].append(reach(moved))
        row["fooled"].append(read_as(model, moved, target))
    return row | {"path": [reach(test.x.lerp(moved, t)) for t in PATH]}


@experiment(
    [
        *grid(train_eps=[0.0], least_correlation=(0.0, 0.5, 0.7)),
        *grid(train_eps=(0.1, 0.2), least_correlation=[0.0]),
    ],
    RECIPE | {"test_eps": PAIR_RADII, "weak": "|correlation| < 0.3"},
    seeds=(0,),  # training is deterministic: zero start, full batch
)
def fiveseven(train_eps: float, least_correlation: float, seed: int) -> Row:
    """A linear classifier of 5 against 7 on all pixels or only on well correlated ones.

    On no page: book/04_training.md, "Strong and weak pixels: five against seven", measures three of its rows itself.
    """
    return linear_pair(digits().train, digits().test, train_eps, least_correlation)


def linear_pair(train: Split, test: Split, eps: float, least: float) -> Row:
    """Exact accuracy of a linear classifier of 5 against 7, on pixels with at least this correlation with the label."""

    def pair(split: Split) -> tuple[Tensor, Tensor]:
        chosen = (split.y == 5) | (split.y == 7)
        return split.x[chosen].flatten(1), (split.y[chosen] == 5).long() * 2 - 1

    (x, y), (test_x, test_y) = pair(train), pair(test)
    centre = x.mean(0)
    with np.errstate(invalid="ignore"):  # constant pixels have no correlation
        table = np.corrcoef(x.numpy(), y.numpy()[:, None], rowvar=False)[-1, :-1]
    correlation = torch.tensor(np.nan_to_num(table)).abs()
    used = correlation >= least
    w = toy.adversarial_linear((x - centre)[:, used], y, eps, loss="logistic")
    margin = ((test_x - centre)[:, used] @ w) * test_y
    weak = float(w[correlation[used] < 0.3].abs().sum() / w.abs().sum())
    held = [proportion(int((margin > r * w.abs().sum()).sum()), len(margin)) for r in PAIR_RADII]
    return {"exact": held, "pixels": int(used.sum()), "weak_share": weak}


@experiment(
    [
        {"training": "FGSM", "steps": 1, "step_size_in_eps": 1.0},
        {"training": "FGSM, random start", "steps": 1, "step_size_in_eps": 1.25},
        {"training": "PGD-7", "steps": 7, "step_size_in_eps": 2.5 / 7},
    ],
    RECIPE | OVERFITTING,
)
def overfitting(training: str, steps: int, step_size_in_eps: float, seed: int) -> Row:
    """One-step training, evaluated under one-step and PGD attacks after each epoch.

    Shown in book/04_training.md, "One step is not enough".
    """
    within, restarts = Linf(OVERFITTING["eps"]), int(training != "FGSM")
    size = step_size_in_eps * within.eps
    chosen = Adversarial(within, steps=steps, step_size=size, restarts=restarts)
    watched: Row = {"clean": [], "fgsm": [], "pgd": []}

    def watch(model: nn.Module) -> dict[str, float]:
        watched["clean"].append(clean(model))
        watched["fgsm"].append(accuracy(model, within, fgsm))
        watched["pgd"].append(accuracy(model, within, steps=10))
        return {}

    how = {key: OVERFITTING[key] for key in ("epochs", "lr", "batch_size")}
    model = network(OVERFITTING["model"], seed)
    seconds = train(model, chosen, digits(), seed=seed, monitor=watch, **how)
    return watched | {"seconds": seconds}
