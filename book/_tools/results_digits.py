"""Measure again what the digits chapters quote: tables over seeds that are too slow for a page.

    python book/_tools/results_digits.py                     all experiments, seeds 0 to 2
    python book/_tools/results_digits.py trades --seeds 0    one experiment, one seed
    python book/_tools/results_digits.py --again             measure anew what is already kept

Each experiment fills ``data/results/digits_<name>.json``; a run can be stopped and goes on (``keeping.py``). A
seed sets the initial weights and the order of the data. The split is always the book's.

All accuracies are shares of the 500 test digits with exact 95 % binomial intervals. The experiments
with outliers are in ``results_outliers.py``, the same measurements on MNIST in ``results_mnist.py``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import results_outliers
import torch
from keeping import Experiment, Task, main
from torch import Tensor, nn

from robustood import toy
from robustood.attacks import fgsm, maximise, pgd, robust_accuracy
from robustood.data import Data, Split
from robustood.data import digits as load_digits
from robustood.losses import cross_entropy
from robustood.metrics import Estimate, proportion
from robustood.models import Classifier, frozen, mlp, small_cnn
from robustood.objectives import TRADES, Adversarial, Standard
from robustood.perturbations import L2, Ball, Linf
from robustood.training import fit

LINF = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
L2_RADII = (0.0, 0.25, 0.5, 1.0, 1.5)
SIZES = (20, 50, 100, 200, 500, 1097)
FAR = (1.0, 2.0, 3.0, 4.0)
PATH = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
STEPS = {"linear": 800, "mlp": 800, "cnn": 800}
RECIPE = {
    "train_digits": 1097, "test_digits": 500, "batch_size": 128, "optimiser": "Adam", "lr": 3e-3,
    "schedule": "15 % linear warm-up, then half a cosine to zero", "train_steps": STEPS,
    "train_attack": "7 steps of 2.5 eps / 7 from a random start, last iterate",
    "pgd": "cross-entropy, 40 steps of 2.5 eps / 40, 1 random start, best iterate by the margin",
    "box": [0, 1],
    "models": {"linear": "64-10", "mlp": "64-128-128-10", "cnn": "robustood.models.small_cnn"},
}  # fmt: skip

Rule = Standard | Adversarial | TRADES

# --- networks and measurements

digits = lru_cache(load_digits)


def network(name: str, seed: int, inputs: int = 64) -> Classifier:
    if name == "cnn":
        return small_cnn(seed=seed)
    return mlp(inputs, hidden=() if name == "linear" else (128, 128), seed=seed)


@lru_cache
def trained(
    name: str, rule: Rule, seed: int, steps: int = 0, n: int = 1097, pad: int = 0
) -> tuple[Classifier, float]:
    """A trained network and its CPU seconds; equal recipes are trained once a run."""
    data = padded(digits(n), pad)
    batch = min(128, n)
    epochs = round((steps or STEPS[name]) / (n // batch))
    model = network(name, seed, (8 + 2 * pad) ** 2)
    began = time.process_time()
    fit(model, rule, data, epochs=epochs, batch_size=batch, seed=seed)
    return model, time.process_time() - began


def padded(data: Data, border: int) -> Data:
    """The digits with a border of white pixels."""
    if not border:
        return data

    def pad(split: Split) -> Split:
        return replace(split, x=nn.functional.pad(split.x, [border] * 4))

    outliers = nn.functional.pad(data.outliers, [border] * 4)
    return replace(
        data, train=pad(data.train), val=pad(data.val), test=pad(data.test), outliers=outliers
    )


def rule(within: Ball) -> Rule:
    return Adversarial(within) if within.eps else Standard()


def accuracy(
    model: nn.Module,
    within: Ball,
    attack: Callable[..., Tensor] = pgd,
    test: Split | None = None,
    **how: Any,
) -> Estimate:
    """Under an attack, on the test digits or another split."""
    test = test or digits().test
    return robust_accuracy(model, test.x, test.y, partial(attack, within=within, **how))


def mean(values: Tensor) -> Estimate:
    """A mean with its normal 95 % interval over samples."""
    values = values.double()
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    centre = float(values.mean())
    return Estimate(centre, centre - half, centre + half, len(values))


# --- experiments: each yields (settings of a row, function that measures it) for one seed


def tradeoff_linf(seed: int) -> Iterator[Task]:
    """Accuracy for each training radius at each test radius, l_inf."""
    for name in ("linear", "mlp", "cnn"):
        for eps in LINF:

            def measure(name: str = name, eps: float = eps) -> dict[str, Any]:
                model, seconds = trained(name, rule(Linf(eps)), seed)
                test, targets = digits().test, () if name == "linear" else (0.1, 0.2)
                row = linf_curve(model, test, LINF, targets, steps=10) | {"seconds": seconds}
                if name == "linear":  # exact: one step of full length towards each wrong class
                    exact = partial(accuracy, model, loss="targets", steps=1, restarts=0)
                    row = row | {"exact": [exact(Linf(r)) for r in LINF]}
                return row

            yield {"model": name, "train_eps": eps}, measure


def linf_curve(
    model: nn.Module, test: Split, radii: Sequence[float], targets: Sequence[float], steps: int
) -> dict[str, Any]:
    """Accuracy under 40 steps of PGD at all radii, and towards each class at some."""
    pgd40 = [accuracy(model, Linf(r), test=test, steps=40 if r else 0) for r in radii]
    each = partial(accuracy, model, test=test, loss="targets", steps=steps)
    found = {"targets": {str(r): each(Linf(r)) for r in targets}} if targets else {}
    return {"pgd": pgd40, **found}


def tradeoff_l2(seed: int) -> Iterator[Task]:
    """The same for the CNN and l_2."""
    for eps in (0.0, 0.5, 1.0, 1.5):

        def measure(eps: float = eps) -> dict[str, Any]:
            model, seconds = trained("cnn", rule(L2(eps)) if eps else Standard(), seed)
            return {"pgd": [accuracy(model, L2(r), steps=40) for r in L2_RADII], "seconds": seconds}

        yield {"model": "cnn", "train_eps": eps}, measure


def sample_size(seed: int) -> Iterator[Task]:
    """Clean and robust accuracy against the number of training digits, 300 steps each."""
    sets = {"none": None, "linf": (0.1, 0.2, 0.3), "l2": (0.5,)}
    for n in SIZES:
        for norm, radii in sets.items():
            for eps in radii or (0.0,):
                within = L2(eps) if norm == "l2" else Linf(eps)

                def measure(within: Ball = within, n: int = n) -> dict[str, Any]:
                    model, seconds = trained("mlp", rule(within), seed, steps=300, n=n)
                    robust = accuracy(model, Linf(0.1), steps=40)
                    clean = accuracy(model, Linf(0.0), steps=0, restarts=0)
                    return {"clean": clean, "linf_0.1": robust, "seconds": seconds}

                yield {"n": n, "train_norm": norm, "train_eps": eps}, measure


def trades(seed: int) -> Iterator[Task]:
    """TRADES for a range of beta beside PGD training, at l_inf 0.15."""
    for name, betas in [("mlp", (1.0, 3.0, 6.0, 12.0)), ("cnn", (6.0,))]:
        for beta in (None, *betas):
            chosen = Adversarial(Linf(0.15)) if beta is None else TRADES(Linf(0.15), beta=beta)

            def measure(name: str = name, chosen: Rule = chosen) -> dict[str, Any]:
                model, seconds = trained(name, chosen, seed)
                clean = accuracy(model, Linf(0.0), steps=0, restarts=0)
                robust = accuracy(model, Linf(0.15), steps=40)
                each = accuracy(model, Linf(0.15), steps=10, loss="targets")
                return {"clean": clean, "pgd": robust, "targets": each, "seconds": seconds}

            yield {"model": name, "beta": beta}, measure


def gradients(seed: int) -> Iterator[Task]:
    """Share of the loss gradient on pixels that are white in every training image, 12x12."""
    for eps in (0.0, 0.1, 0.2):

        def measure(eps: float = eps) -> dict[str, Any]:
            data = padded(digits(), 2)
            model, seconds = trained("mlp", rule(Linf(eps)), seed, steps=600, pad=2)
            return dead_share(model, data.test, data.train.x) | {"seconds": seconds}

        yield {"train_eps": eps}, measure


def dead_share(model: nn.Module, test: Split, seen: Tensor) -> dict[str, Any]:
    """Where the loss gradient lies, against the pixels that are 0 in all training images."""
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
        "clean": proportion(int((model(x).argmax(1) == test.y).sum()), len(x)),
    }


def splits(seed: int) -> Iterator[Task]:
    """How far the cells of the trade-off move from one random split of the digits to another."""
    if seed:  # a split sets everything
        return
    for number in range(12):
        yield {"split": number, "train_digits": 1297}, partial(one_split, number)


def one_split(number: int) -> dict[str, Any]:
    own = load_digits(seed=1000 + number)
    rest = Split(torch.cat([own.val.x, own.train.x]), torch.cat([own.val.y, own.train.y]))
    data = replace(own, train=rest, outliers=own.outliers[:0])
    cells = {"mlp 0": ("mlp", 0.0, (0.05, 0.1)), "mlp 0.3": ("mlp", 0.3, (0.0,)),
             "linear 0.2": ("linear", 0.2, (0.0,)), "linear 0.3": ("linear", 0.3, (0.0,))}  # fmt: skip
    row: dict[str, Any] = {}
    began = time.process_time()
    for key, (name, eps, tested) in cells.items():
        model = network(name, number)
        fit(model, rule(Linf(eps)), data, epochs=80, batch_size=128, seed=number)
        for r in tested:
            attack = partial(pgd, within=Linf(r), steps=40)
            row[f"{key} at {r:g}"] = robust_accuracy(model, data.test.x, data.test.y, attack)
    return row | {"seconds": time.process_time() - began}


def large_eps(seed: int) -> Iterator[Task]:
    """Targeted l_2 PGD far beyond the training radius: do the images reach the target class?"""
    rules = {
        "standard": Standard(),
        "linf 0.15": Adversarial(Linf(0.15)),
        "l2 1.0": Adversarial(L2(1.0)),
        "TRADES 0.15": TRADES(Linf(0.15), beta=6.0),
    }
    for name, chosen in rules.items():

        def measure(chosen: Rule = chosen) -> dict[str, Any]:
            model, seconds = trained("cnn", chosen, seed, steps=800)
            return far(model, digits().test, digits().train, FAR, seed) | {"seconds": seconds}

        yield {"model": "cnn", "training": name}, measure


def goals(test: Split, seed: int) -> Tensor:
    """A random wrong class for each image."""
    shift = torch.randint(1, 10, (len(test),), generator=torch.Generator().manual_seed(seed))
    return (test.y + shift) % 10


def towards(model: nn.Module, x: Tensor, target: Tensor, eps: float, restarts: int = 1) -> Tensor:
    """Images moved towards a class, as far as l_2 allows."""
    with frozen(model):
        objective = lambda moved: -cross_entropy(model(moved), target)
        return maximise(objective, x, L2(eps), steps=60, restarts=restarts)


def read_as(model: nn.Module, x: Tensor, target: Tensor) -> Estimate:
    """Share of images that the network reads as the target class."""
    return proportion(int((model(x).argmax(1) == target).sum()), len(x))


def far(
    model: nn.Module,
    test: Split,
    train: Split,
    radii: Sequence[float],
    seed: int,
    restarts: int = 1,
) -> dict[str, Any]:
    """Whether targeted attacks reach their class: by the network, and by the nearest neighbour."""
    target = goals(test, seed)

    def reach(x: Tensor) -> Estimate:
        """Share of images whose nearest training digit has the target label."""
        nearest = torch.cdist(x.flatten(1), train.x.flatten(1)).argmin(1)
        return proportion(int((train.y[nearest] == target).sum()), len(x))

    row: dict[str, Any] = {"reached": [], "fooled": []}
    moved = test.x
    for eps in radii:
        moved = towards(model, test.x, target, eps, restarts)
        row["reached"].append(reach(moved))
        row["fooled"].append(read_as(model, moved, target))
    return row | {"path": [reach(test.x.lerp(moved, t)) for t in PATH]}


def fiveseven(seed: int) -> Iterator[Task]:
    """A linear classifier of 5 against 7 on all or only on well correlated pixels, closed form."""
    if seed:  # training is deterministic: zero start, full batch
        return
    data, radii = digits(), (0.0, 0.1, 0.2, 0.3)
    for eps, least in [(0.0, 0.0), (0.0, 0.5), (0.0, 0.7), (0.1, 0.0), (0.2, 0.0)]:
        setting = {"train_eps": eps, "least_correlation": least}
        yield setting, partial(linear_pair, data.train, data.test, eps, least, radii)


def linear_pair(
    train: Split, test: Split, eps: float, least: float, radii: Sequence[float]
) -> dict[str, Any]:
    """Exact accuracy of a linear 5-against-7, trained on pixels whose correlation with the label is enough."""

    def pair(split: Split) -> tuple[Tensor, Tensor]:
        chosen = (split.y == 5) | (split.y == 7)
        return split.x[chosen].flatten(1), (split.y[chosen] == 5).long() * 2 - 1

    (x, y), (test_x, test_y) = pair(train), pair(test)
    centre = x.mean(0)
    with np.errstate(invalid="ignore"):  # constant pixels have no correlation
        table = np.corrcoef(x.numpy(), y.numpy()[:, None], rowvar=False)[-1, :-1]
    correlation = torch.tensor(np.nan_to_num(table)).abs()
    used = correlation >= least
    began = time.process_time()
    w = toy.adversarial_linear((x - centre)[:, used], y, eps, loss="logistic")
    seconds = time.process_time() - began
    margin = ((test_x - centre)[:, used] @ w) * test_y
    weak = float(w[correlation[used] < 0.3].abs().sum() / w.abs().sum())
    return {
        "exact": [proportion(int((margin > r * w.abs().sum()).sum()), len(margin)) for r in radii],
        "pixels": int(used.sum()),
        "weak_share": weak,
        "seconds": seconds,
    }


def overfitting(seed: int) -> Iterator[Task]:
    """One-step training watched by one-step and by PGD attacks, epoch by epoch."""
    settings = OVERFITTING
    for name, steps, stride, restarts in [
        ("FGSM", 1, 1.0, 0),
        ("FGSM, random start", 1, 1.25, 1),
        ("PGD-7", 7, 2.5 / 7, 1),
    ]:

        def measure(steps: int = steps, stride: float = stride, restarts: int = restarts):
            within = Linf(settings["eps"])
            chosen = Adversarial(
                within, steps=steps, step_size=stride * within.eps, restarts=restarts
            )
            watched: dict[str, list[Estimate]] = {"clean": [], "fgsm": [], "pgd": []}

            def watch(model: nn.Module) -> dict[str, float]:
                watched["clean"].append(accuracy(model, Linf(0.0), steps=0, restarts=0))
                watched["fgsm"].append(accuracy(model, within, fgsm))
                watched["pgd"].append(accuracy(model, within, steps=10))
                return {}

            model = network(settings["model"], seed)
            began = time.process_time()
            fit(
                model, chosen, digits(), epochs=settings["epochs"], lr=settings["lr"],
                batch_size=settings["batch_size"], seed=seed, monitor=watch,
            )  # fmt: skip
            return watched | {"seconds": time.process_time() - began}

        yield {"training": name, "steps": steps, "step_size_in_eps": round(stride, 4)}, measure


OVERFITTING: dict[str, Any] = {
    "model": "mlp",
    "eps": 0.3,
    "epochs": 50,
    "lr": 3e-3,
    "batch_size": 64,
}

CLASSIFIERS: dict[str, Experiment] = {
    "fiveseven": (fiveseven, {"test_eps": [0.0, 0.1, 0.2, 0.3], "weak": "|correlation| < 0.3"}),
    "gradients": (gradients, {"size": [12, 12], "train_steps": 600}),
    "overfitting": (overfitting, OVERFITTING),
    "splits": (splits, {"train_digits": 1297}),
    "sample_size": (sample_size, {"train_steps": 300, "model": "mlp"}),
    "trades": (trades, {"eps": 0.15, "targets": "margin to each of 9 classes, 10 steps"}),
    "tradeoff_linf": (tradeoff_linf, {"test_eps": LINF, "targets": "9 classes, 10 steps"}),
    "large_eps": (
        large_eps,
        {"test_eps": FAR, "path": PATH, "train_steps": 800, "attack": "targeted l_2, 60 steps"},
    ),
    "tradeoff_l2": (tradeoff_l2, {"test_eps": L2_RADII}),
}
EXPERIMENTS = {name: (rows, RECIPE | more) for name, (rows, more) in CLASSIFIERS.items()}
EXPERIMENTS |= results_outliers.EXPERIMENTS

if __name__ == "__main__":
    sys.exit(main(__doc__, "digits", EXPERIMENTS))
