"""What the standard evaluation of a detector rests on: the number of classes to pull towards, and the checks."""

from __future__ import annotations

from dataclasses import replace

import torch

from experiments.harness import Row, digits, experiment, grid, train
from experiments.second_zoo import RADIUS, second_zoo
from robustood import metrics, sanity
from robustood import objectives as rules
from robustood.attacks import robust_accuracy
from robustood.data import Data, Split
from robustood.detectors import MSP
from robustood.evaluate import attack_score, scores, standard
from robustood.models import small_cnn
from robustood.perturbations import Linf
from robustood.sanity._zoo import RoundedMSP

FIT: Row = {"batch_size": 64, "epochs": 20, "lr": 3e-3}
HASTE: Row = FIT | {"epochs": 12, "lr": 0.1}
EPS = {"standard": 0.05, "ADV": 0.1}


def turned(part: Split) -> Split:
    """Each digit in four orientations, each of which is a class of its own: 40 classes."""
    x = torch.cat([part.x.rot90(k, (2, 3)) for k in range(4)])
    y = torch.cat([4 * part.y + k for k in range(4)])
    return Split(x, y)


def many_classes() -> Data:
    """The digits with 40 classes."""
    found = digits()
    return replace(found, train=turned(found.train), val=turned(found.val), test=turned(found.test))


@experiment(
    grid(training=("standard", "ADV")),
    {
        **FIT,
        "eps": EPS,
        "classes": 40,
        "detector": "MSP",
        "images": "100 letters, raised; 400 turned digits, clean",
        "attack": "APGD, 50 steps, 1 random start; the score and its T likeliest classes, best by the score",
    },
)
def targets(training: str, seed: int) -> Row:
    """AUROC with the outliers attacked towards the T likeliest of 40 classes; 40 are all.

    Shown in book/12_sanity.md, "The standard evaluation".
    """
    data, model = many_classes(), small_cnn(40, seed=seed)
    objective = rules.Standard() if training == "standard" else rules.ADV(EPS[training])
    seconds = train(model, objective, data, seed=seed, **FIT)
    detector, within = MSP(model), Linf(EPS[training])
    inside, letters = data.test.x[::5], digits().ood["letters"][:100]
    clean = scores(detector, inside)

    def left(count: int) -> metrics.Estimate:
        moved = attack_score(detector, letters, within, direction="raise", steps=50, targets=count)
        return metrics.confidence_interval(metrics.auroc, clean, scores(detector, moved))

    areas = {str(count): left(count) for count in (0, 1, 3, 10, 20, 40)}
    accuracy = robust_accuracy(model, inside, data.test.y[::5])
    return {"clean": accuracy, "auroc by T": areas, "seconds": seconds}


def alarms(findings: sanity.Findings) -> Row:
    """The value of each check that reports an alarm, by level and check."""
    levels = {"errors": findings.errors, "warnings": findings.warnings}
    return {level: {each.check: each.value for each in of} for level, of in levels.items()}


class Repaired(RoundedMSP):
    """The same scores; an attack climbs the log-odds before they are rounded."""

    attack_objectives = MSP.attack_objectives


@experiment(
    grid(),
    {
        **FIT,
        "objective": "OE",
        "eps": 0.1,
        "detectors": "log-odds in whole numbers; the same with objectives that are not rounded",
        "images": "60 digits and 60 letters, both attacked",
    },
)
def sequence(seed: int) -> Row:
    """AUROC after each stage of the standard evaluation, for a rounded score and with its objectives repaired.

    Shown in book/12_sanity.md, "A fixed sequence does not adapt".
    """
    model = small_cnn(seed=seed)
    seconds = train(model, rules.OutlierExposure(), digits(), seed=seed, **FIT)
    x, letters = digits().test.x[:60], digits().ood["letters"][:60]
    found: Row = {}
    for name, detector in (("rounded", RoundedMSP(model)), ("repaired", Repaired(model))):
        report = standard(detector, x, {"letters": letters}, Linf(0.1), seed=seed)
        areas = {row["attack"]: row["auroc"] for row in report.attacks}
        checks = {level: list(values) for level, values in alarms(report.findings).items()}
        found[name] = {"auroc": report["both"]["letters"]["auroc"], "auroc after": areas, **checks}
    accuracy = robust_accuracy(model, x, digits().test.y[:60])
    return {"clean": accuracy, **found, "seconds": seconds}


@experiment(
    grid(),
    {
        **HASTE,
        "objective": "ALOE",
        "eps": 0.1,
        "images": "60 digits and 60 letters, both attacked",
    },
)
def plateaus(seed: int) -> Row:
    """AUROC after each stage of the standard evaluation, and its passes, for a network that was trained too fast.

    Shown in book/12_sanity.md, "An honest network, evaluated by luck".
    """
    model = small_cnn(seed=seed)
    seconds = train(model, rules.ALOE(0.1), digits(), seed=seed, **HASTE)
    x, letters = digits().test.x[:60], digits().ood["letters"][:60]
    report = standard(MSP(model), x, {"letters": letters}, Linf(0.1), seed=seed)
    with torch.no_grad():
        off = {
            side: (model.features(images) == 0).all(1).double().mean().item()
            for side, images in (("digits", x), ("letters", letters))
        }
    return {
        "clean": robust_accuracy(model, digits().test.x, digits().test.y),
        "auroc": report["both"]["letters"]["auroc"],
        "attacks": report.attacks,
        "all features off": off,
        **alarms(report.findings),
        "seconds": seconds,
    }


@experiment(
    grid(),
    {
        **FIT,
        "networks": "standard; 12 epochs of adversarial training, 4 steps; 12 epochs of ALOE",
        "eps": 0.1,
        "images": "60 digits, 60 letters",
    },
)
def zoo(seed: int) -> Row:
    """What the checks say of the zoo of defences: the level of each check that applies.

    Shown in book/12_sanity.md, "What must hold for any honest measurement".
    """
    objectives = (rules.Standard(), rules.Adversarial(0.1, steps=4), rules.ALOE(0.1))
    models, seconds = [small_cnn(seed=seed) for _ in objectives], 0.0
    for model, objective, epochs in zip(models, objectives, (20, 12, 12), strict=True):
        seconds += train(model, objective, digits(), seed=seed, **FIT | {"epochs": epochs})
    x, y, letters = digits().test.x[:60], digits().test.y[:60], digits().ood["letters"][:60]
    levels: Row = {}
    for name, defence in sanity.zoo(*models).items():
        found = defence.check(x, y, letters, 0.1, seed=seed)
        levels[name] = {each.check: each.level for each in found}
    accuracy = robust_accuracy(models[2], digits().test.x, digits().test.y)
    return {"accuracy of ALOE": accuracy, "levels": levels, "seconds": seconds}


@experiment(
    grid(),
    {
        "standard": {"epochs": 40, "lr": 3e-3},
        "robust": {"eps": 0.15, "epochs": 20, "lr": 3e-3},
        "radius": {kind: within.eps for kind, within in RADIUS.items()},
        "images": "200 digits, 200 letters, of which a check draws 64 each",
    },
)
def second(seed: int) -> Row:
    """What the checks say of a second zoo of defences, written without knowledge of the checks.

    Shown in book/12_sanity.md, "A second zoo".
    """
    plain, robust = small_cnn(seed=seed), small_cnn(seed=seed)
    seconds = train(plain, rules.Standard(), digits(), seed=seed, epochs=40)
    seconds += train(robust, rules.ADV(RADIUS["classifier"].eps), digits(), seed=seed, epochs=20)
    x, letters = digits().test.x[:200], digits().ood["letters"][:200]
    found: Row = {}
    for entry in second_zoo(plain, robust, digits(), seed):
        y = letters if entry.kind == "detector" else digits().test.y[:200]
        findings = sanity.check(entry.model_or_detector, x, y, RADIUS[entry.kind], seed=seed)
        found[entry.name] = {"broken": entry.broken, "why": entry.why, **alarms(findings)}
    accuracy = robust_accuracy(robust, x, digits().test.y[:200])
    return {"clean accuracy of the robust network": accuracy, "defences": found, "seconds": seconds}
