"""A second zoo of defences on the digits: four whose evaluation misleads, four whose does not.

Each broken defence looks robust to gradient attacks, for a reason known from the literature on obfuscated gradients
(Athalye et al. 2018; Carlini and Wagner 2016; Tramèr et al. 2020); each names the function that an adaptive attack
climbs in its place. :func:`verify` measures what is left of a defence, broken or not, under the plain attacks and under
the strongest of several others. The radius is 0.15 for classifiers and 0.1 for detectors, in Linf.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from robustood import models, objectives
from robustood.attacks import APGD, Ascent, AttackObjective, Square, maximise, pgd
from robustood.data import Data
from robustood.detectors import MSP, Detector, Direction, Mahalanobis, RejectClass
from robustood.evaluate import attack_score, scores
from robustood.losses import margin
from robustood.metrics import auroc
from robustood.models import frozen
from robustood.perturbations import Linf
from robustood.training import fit

RADIUS = {"classifier": Linf(0.15), "detector": Linf(0.1)}


@dataclass(frozen=True)
class Entry:
    """A defence.

    Attributes:
        name: of the defence.
        model_or_detector: what is deployed, in eval mode.
        kind: which of the two it is.
        broken: whether a plain gradient attack overstates its robustness.
        why: the reason, in one sentence.
        source: what a transfer attack climbs in its place; the deployed defence judges.
    """

    name: str
    model_or_detector: nn.Module
    kind: Literal["classifier", "detector"]
    broken: bool
    why: str
    source: nn.Module


# --- the broken ones


class Flickering(nn.Module):
    """Logits times a positive factor that varies quickly with the input: the decisions are those of the network.

    The factor is exp(depth * mean of cos(frequency * pixel)).
    """

    def __init__(self, net: nn.Module, depth: float = 10.0, frequency: float = 50.0):
        super().__init__()
        self.net, self.depth, self.frequency = net, depth, frequency

    def forward(self, x: Tensor) -> Tensor:
        wave = (self.frequency * x).cos().flatten(1).mean(1, keepdim=True)
        return (self.depth * wave).exp() * self.net(x)


class Thermometer(nn.Module):
    """A network that sees each pixel as a column of thresholds (Buckman et al. 2018), as steep sigmoids."""

    thresholds: Tensor

    def __init__(self, net: nn.Module, levels: int, steepness: float):
        super().__init__()
        self.net, self.steepness = net, steepness
        self.register_buffer("thresholds", (torch.arange(levels) + 0.5).view(1, -1, 1, 1) / levels)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((self.steepness * (x - self.thresholds)).sigmoid())


class Sharpened(Detector):
    """The logistic score of another detector, sharpened by a temperature and computed in half precision."""

    has_classes = False

    def __init__(self, inner: Mahalanobis, temperature: float = 0.1):
        super().__init__(inner.model)
        self.inner, self.temperature = inner, temperature

    def score(self, x: Tensor) -> Tensor:
        return (self.inner.score(x) / self.temperature).half().sigmoid().float()


class Guarded(Detector):
    """The energy, plus a weighted distance to the classes that is computed outside the graph unless ``attached``."""

    def __init__(self, distance: Mahalanobis, weight: float = 3.0, attached: bool = False):
        super().__init__(distance.model)
        self.distance, self.weight, self.attached = distance, weight, attached

    def score(self, x: Tensor) -> Tensor:
        distance = self.distance.score(x)
        distance = distance if self.attached else distance.detach()
        return self.logits(x).logsumexp(1) + self.weight * distance


# --- all of them


def second_zoo(standard: nn.Module, robust: nn.Module, data: Data, seed: int = 0) -> list[Entry]:
    """The eight defences.

    Args:
        standard, robust: trained classifiers of the digits, without and with adversarial training.
        data: the digits; three small networks more are trained on them, in half a minute.
        seed: of initial weights and training.
    """
    return [*_broken(standard, data, seed), *_honest(standard, robust, data, seed)]


def _broken(standard: nn.Module, data: Data, seed: int) -> list[Entry]:
    train = data.train
    coded = Thermometer(models.small_cnn(channels=4, seed=seed), 4, 1000.0)
    fit(coded, objectives.Standard(), data, epochs=15, seed=seed)
    distance = Mahalanobis(standard).fit(train.x, train.y)
    calibrated = Mahalanobis(standard).fit(train.x, train.y)
    calibrated.combine(data.val.x, data.outliers[::10])
    return [
        Entry(
            "flickering confidence", Flickering(standard).eval(), "classifier", True,
            "A factor that leaves every decision as it is dominates the gradient of the loss, and its many waves trap "
            "the ascent.",
            standard,
        ),
        Entry(
            "thermometer code", coded, "classifier", True,
            "The gradient of the steep code sees only the threshold next to each pixel, and vanishes between two.",
            Thermometer(coded.net, 4, 20.0).eval(),
        ),
        Entry(
            "sharpened half-precision probability", Sharpened(calibrated).eval(), "detector", True,
            "The sigmoid rounds to exactly 0 or 1 for many inputs, whose gradient is then exactly zero.",
            calibrated,
        ),
        Entry(
            "energy guarded by a detached distance", Guarded(distance).eval(), "detector", True,
            "The attack follows the energy alone, because the distance that dominates the score is cut from the graph.",
            Guarded(distance, attached=True).eval(),
        ),
    ]  # fmt: skip


def pooled_cnn(seed: int = 0) -> models.Classifier:
    """Two convolutions with batch normalisation; a maximum, then an average over 2x2 pixels."""

    def convolution(inputs: int, outputs: int, pool: nn.Module) -> nn.Sequential:
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, pool)

    with models.seeded(seed):
        stages = [convolution(1, 16, nn.MaxPool2d(2)), convolution(16, 32, nn.AvgPool2d(2))]
        return models.Classifier(stages, 128, 10, normalise=models.Normalise([0.5], [0.5]))


def _honest(standard: nn.Module, robust: nn.Module, data: Data, seed: int) -> list[Entry]:
    pooled = pooled_cnn(seed)
    fit(pooled, objectives.Standard(), data, epochs=12, seed=seed)
    rejecting = models.small_cnn(reject=1, seed=seed)
    both_sides = objectives.OutlierTraining(
        inside=0.1, outside=0.1, outlier_loss=objectives.to_reject, weight=1.0
    )
    fit(rejecting, both_sides, data, epochs=15, seed=seed)
    return [
        Entry(
            "adversarial training", robust, "classifier", False,
            "The network was trained on the worst cases, and nothing stands between the attack and its gradient.",
            standard,
        ),
        Entry(
            "pooling and batch normalisation", pooled, "classifier", False,
            "It is weak and claims nothing: batch normalisation uses fixed statistics in eval mode, and the kinks of "
            "a maximum do not hide the gradient.",
            standard,
        ),
        Entry(
            "reject class, both sides attacked in training", RejectClass(rejecting).eval(), "detector", False,
            "Digits and outliers were attacked in training, so that the two sides stay far apart.",
            MSP(standard).eval(),
        ),
        Entry(
            "Mahalanobis on pooled features", Mahalanobis(pooled).fit(data.train.x, data.train.y).eval(),
            "detector", False,
            "It falls to plain gradient attacks, because the distance is a smooth function of features whose gradient "
            "is the true one.",
            MSP(standard).eval(),
        ),
    ]  # fmt: skip


# --- what is left of them


@dataclass(frozen=True)
class Verdict:
    """What is left: accuracy of a classifier, AUROC of a detector with both sides attacked.

    Attributes:
        clean, pgd, apgd: without an attack, and under 40 steps of the plain attacks.
        others: under each other attack.
        worst: per sample, the worst case of the others.
    """

    clean: float
    pgd: float
    apgd: float
    others: dict[str, float]
    worst: float

    @property
    def plain(self) -> float:
        """Under the better of the plain attacks."""
        return min(self.pgd, self.apgd)


def verify(entry: Entry, data: Data, samples: int = 200) -> Verdict:
    """Attack a defence plainly, then by random search, by transfer, and with more steps and restarts.

    Args:
        entry: of the zoo.
        data: the test digits, and for a detector as many letters and photo patches, are attacked.
        samples: number of test digits.
    """
    verified = _verify_classifier if entry.kind == "classifier" else _verify_detector
    return verified(entry, data, samples)


def _verify_classifier(entry: Entry, data: Data, samples: int) -> Verdict:
    model, within = entry.model_or_detector, RADIUS["classifier"]
    x, y = data.test.x[:samples], data.test.y[:samples]

    def transfer(v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            deployed = margin(model(v), y)
        return margin(entry.source(v), y), deployed

    def held(moved: Tensor) -> Tensor:
        with frozen(model), torch.no_grad():
            return model(moved).argmax(1) == y

    attack = partial(pgd, model, x, y, within)
    plain = [held(v) for v in (x, attack(steps=40), attack(steps=40, rule=APGD()))]
    with frozen(model), frozen(entry.source):
        moved = maximise(transfer, x, within, steps=100, rule=APGD())
    others = {
        "square": held(attack(steps=1000, rule=Square(), loss="margin")),
        "transfer": held(moved),
        "longer": held(attack(steps=100, restarts=3, rule=APGD())),
        "dlr": held(attack(steps=100, rule=APGD(), loss="dlr")),
    }
    share = lambda right: float(right.float().mean())
    worst = torch.stack([*others.values()]).all(0)
    return Verdict(*map(share, plain), {n: share(h) for n, h in others.items()}, share(worst))


def _verify_detector(entry: Entry, data: Data, samples: int) -> Verdict:
    detector, source = cast(Detector, entry.model_or_detector), cast(Detector, entry.source)
    within = RADIUS["detector"]
    sides: dict[Direction, Tensor] = {
        "lower": data.test.x[:samples],
        "raise": torch.cat([data.ood[name][: samples // 2] for name in ("letters", "patches")]),
    }

    def transfer(judge: Detector, x: Tensor, direction: Direction) -> list[AttackObjective]:
        sign = 1 if direction == "raise" else -1
        return [lambda v: (sign * source.score(v), sign * judge.score(v))]

    def attacked(**how: Any) -> dict[Direction, Tensor]:
        moved = {
            side: attack_score(detector, x, within, direction=side, targets=2, **how)
            for side, x in sides.items()
        }
        return {side: torch.from_numpy(scores(detector, x)) for side, x in moved.items()}

    clean = {side: torch.from_numpy(scores(detector, x)) for side, x in sides.items()}
    plain = [attacked(steps=40, rule=rule) for rule in (Ascent(), APGD())]
    others = {
        "square": attacked(steps=500, rule=Square()),
        "transfer": attacked(steps=100, objectives=transfer),
        "longer": attacked(steps=100, restarts=2),
    }
    area = lambda found: auroc(found["lower"], found["raise"])
    worst = {
        "lower": torch.stack([each["lower"] for each in others.values()]).amin(0),
        "raise": torch.stack([each["raise"] for each in others.values()]).amax(0),
    }
    return Verdict(
        *map(area, [clean, *plain]), {n: area(f) for n, f in others.items()}, area(worst)
    )
