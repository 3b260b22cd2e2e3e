"""Detectors on the digits, and training against outliers: the tables of chapters 7 to 9.

Networks are small CNNs. AUROC values have DeLong intervals, rates at a fixed threshold exact binomial intervals. Of
each test set the first images are used, as many as the settings say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.harness import OPTIMISER, Row, digits, experiment, grid, train
from robustood import evaluate, metrics
from robustood import objectives as rules
from robustood.attacks import pgd, robust_accuracy
from robustood.data import glyphs
from robustood.detectors import (
    MSP,
    ODIN,
    PRO,
    Detector,
    Direction,
    Mahalanobis,
    RejectClass,
    post_hoc,
)
from robustood.evaluate import attack_score, ood_report, scores
from robustood.losses import to_reject
from robustood.models import Classifier, ccu_model, frozen, small_cnn
from robustood.perturbations import Corruption, Linf, PerturbationSet
from robustood.training import fit

EPS = 0.1
FIT: Row = {"batch_size": 64, "outlier_batch_size": 128, "epochs": 40, "lr": 3e-3}
FIT_LONG: Row = FIT | {"epochs": 60}
FIT_SHORT: Row = FIT | {"epochs": 25}
RECIPE: Row = {
    **OPTIMISER,
    **FIT,
    "train_digits": 1097,
    "model": "robustood.models.small_cnn",
    "images_a_set": 200,
    "adaptive": "APGD, 40 steps, 1 random start, every objective of the detector, best by its score",
    "aloe": "the surrogate of Chen et al. 2020, 10 steps of eps from the clean image, last iterate",
    "atom": "the surrogate of Chen et al. 2021, 40 steps of eps / 8, random start, best by the surrogate",
}
ROBUST: Row = {
    **RECIPE,
    **FIT_LONG,
    "model": "robustood.models.small_cnn, width 2",
    "eps": EPS,
    "train_attack": "2 steps of 1.25 eps from a random start, last iterate (ACET, ATOM, MinedALOE: "
    "5 steps of eps / 2, best iterate)",
}
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "adaptive": attack_score,
    "aloe": partial(evaluate.paper_attack, paper="aloe"),
    "atom": partial(evaluate.paper_attack, paper="atom"),
}
METHODS: dict[str, rules.Objective] = {
    "standard": rules.Standard(),
    "OE": rules.OutlierExposure(),
    "reject": rules.OutlierTraining(outlier_loss=to_reject, weight=1.0),
    "ADV": rules.ADV(EPS),
    "AOE": rules.AOE(EPS),
    "ALOE": rules.ALOE(EPS),
    "ACET": rules.ACET(EPS),
    "SOFL": rules.SOFL(),
    "CCU": rules.CCU(),
    "ROWL": rules.ROWL(EPS),
    "NTOM": rules.NTOM(0.0),
    "ATOM": rules.ATOM(EPS, 0.0),
    "MinedALOE": rules.MinedALOE(EPS, 0.0),
}
REJECTS = {"reject": 1, "SOFL": 5, "ROWL": 1, "NTOM": 1, "ATOM": 1, "MinedALOE": 1}
TARGETS = "every class for standard, OE, ADV, AOE and ALOE; the 3 likeliest for ODIN and the other methods"
MAIN = ("standard", "OE", "ADV", "AOE", "ALOE")
MINING = ("NTOM", "ATOM", "MinedALOE")
PLAIN = ("MSP", "MaxLogit", "Energy", "Entropy", "ODIN")
LEARNED = ("Mahalanobis", "KNN", "ViM", "ReAct", "GradNorm")
VARIANTS = ("Mahalanobis, all layers", "Mahalanobis, input step")


@lru_cache
def trained(method: str, seed: int, *, robust: bool = False) -> tuple[Any, float]:
    """A trained network and its CPU seconds; a robust one is wider and trained longer."""
    model: Any = small_cnn(seed=seed, width=1 + robust, reject=REJECTS.get(method, 0))
    if method == "CCU":
        model = ccu_model(model, digits().train.x, digits().outliers)
    return model, train(model, METHODS[method], digits(), seed=seed, **FIT_LONG if robust else FIT)


defended = partial(trained, robust=True)


def detectors(model: Classifier) -> dict[str, Detector]:
    """All detectors that suit the network, with two more variants of Mahalanobis."""
    data = digits()
    x, y = data.train.x, data.train.y
    layers = Mahalanobis(model, "all").fit(x, y).combine(data.val.x, data.outliers[::5])
    found = post_hoc(model, x, y)
    found |= {"Mahalanobis, all layers": layers}
    found |= {"Mahalanobis, input step": Mahalanobis(model, step=0.005).fit(x, y)}
    return found | ({"RejectClass": RejectClass(model)} if model.reject else {})


def own_score(model: Any) -> Detector:
    """The score for which the network was trained: the reject class if there is one, else MSP."""
    return RejectClass(model) if model.reject else MSP(model)


def images() -> tuple[Tensor, dict[str, Tensor]]:
    """The test digits, and the sets of outliers by name."""
    n = RECIPE["images_a_set"]
    return digits().test.x[:n], {name: x[:n] for name, x in digits().ood.items()}


def sides(detector: Detector, attacks: Iterable[str] = ("adaptive", "aloe")) -> Row:
    """Rates for each set of outliers, clean and with each side attacked."""
    rates = ("auroc", "fpr", "fpr_attacked", "rejected", "tie_rate")
    found: Row = {}
    for attack in attacks:
        reports = evaluate.four_sides(detector, *images(), Linf(EPS), attack=ATTACKS[attack])
        for side, report in reports.items():
            key = "clean" if side == "none" else f"{attack} {side}"
            found[key] = {row["set"]: {rate: row[rate] for rate in rates} for row in report.rows}
    return found


# --- chapter 7: detectors on three networks


@experiment(
    [
        {"training": training, "eps": eps, "direction": direction}
        for training, eps in (("standard", 0.05), ("OE", 0.1), ("reject", 0.1))
        for direction in ("raise", "lower")
    ],
    RECIPE | {"outliers": "67 letters, 67 patches, 66 noise; gap over 500 resamples"},
    seeds=(0, 1),
)
def transfer(training: str, eps: float, direction: str, seed: int) -> Row:
    """AUROC of each detector under every attack: its own adaptive one, those of the papers and of other detectors.

    Shown in book/07_evaluate.md, "Every attack on every detector".
    """
    model, seconds = trained(training, seed)
    known = detectors(model)
    inside, outside = images()
    mixed = torch.cat([outside["letters"][:67], outside["patches"][:67], outside["noise"][:66]])
    attacked, still = (mixed, inside) if direction == "raise" else (inside, mixed)
    how: Row = {"within": Linf(eps), "direction": direction}
    moved = {f"adaptive {name}": attack_score(d, attacked, **how) for name, d in known.items()}

    def pair(detector: Detector, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        sides = scores(detector, still), scores(detector, x)
        return sides if direction == "raise" else sides[::-1]

    rows: Row = {}
    for name, detector in known.items():
        own = pair(detector, moved[f"adaptive {name}"])
        others = {key: pair(detector, x) for key, x in moved.items() if key != f"adaptive {name}"}
        for paper in ("aloe", "atom"):
            others[paper] = pair(detector, ATTACKS[paper](detector, attacked, **how))
        found = {key: metrics.auroc(*sides) for key, sides in others.items()}
        strongest = min(found, key=found.__getitem__)
        rows[name] = {
            "clean": metrics.auroc(*pair(detector, attacked)),
            "own": metrics.auroc(*own),
            "others": found,
            "strongest": strongest,
            "gap": metrics.paired_difference(metrics.auroc, others[strongest], own, resamples=500),
        }
    return {"detectors": rows, "seconds": seconds}


@experiment(
    grid(training=("standard", "OE"), detector=(*PLAIN, *LEARNED, *VARIANTS), eps=[EPS]),
    RECIPE,
    seeds=(0, 1),
)
def fall(training: str, detector: str, eps: float, seed: int) -> Row:
    """Every detector, clean and with one or both sides attacked, by three attacks.

    Shown in book/05_detectors.md, "Near and far, side by side", and in book/07_evaluate.md, "Half the radius".
    """
    model, seconds = trained(training, seed)
    return {"sides": sides(detectors(model)[detector], ATTACKS), "seconds": seconds}


@experiment(
    grid(detector=(*PLAIN, *LEARNED, *VARIANTS)),
    RECIPE | {"training": "standard", "eps": 2 * EPS},
    seeds=(0, 1),
)
def doubled(detector: str, seed: int) -> Row:
    """AUROC of every detector with both sides attacked at twice the radius.

    Shown in book/07_evaluate.md, "The fall".
    """
    model, seconds = trained("standard", seed)
    report = ood_report(detectors(model)[detector], *images(), Linf(2 * EPS), side="both")
    return {"auroc": {row["set"]: row["auroc"] for row in report.rows}, "seconds": seconds}


# --- chapters 8 and 9: training against outliers


def accuracies(model: Any) -> Row:
    """Clean and attacked accuracy over the classes, without rejection."""
    test = digits().test

    def classes(x: Tensor) -> Tensor:
        return model(x)[:, : model.classes]

    attack = partial(pgd, within=Linf(EPS), loss="targets")
    with frozen(model):
        return {
            "accuracy": robust_accuracy(classes, test.x, test.y),
            "robust_accuracy": robust_accuracy(classes, test.x[:200], test.y[:200], attack),
        }


@experiment(
    lambda seed: grid(method=MAIN if seed else (*MAIN, "ACET", *MINING)),
    ROBUST | {"targets": TARGETS},
)
def defences(method: str, seed: int) -> Row:
    """Every method: accuracy, and its detector clean and with one or both sides attacked.

    Shown in book/08_objectives.md, "Does it hold?", and in book/09_mining.md, "What ATOM leaves open".
    """
    model, seconds = defended(method, seed)
    row = {**accuracies(model), "sides": sides(own_score(model))}
    if method in ("OE", "ALOE"):
        row["with ODIN"] = sides(ODIN(model))
    return row | {"seconds": seconds}


@experiment(
    grid(method=(*MINING, "OE", "ACET", "SOFL", "ROWL", "CCU", "ALOE", "standard")),
    ROBUST | {"images_a_set": "100 a set of outliers, 200 digits"},
    seeds=(0,),
)
def conditions(method: str, seed: int) -> Row:
    """The four test conditions of ATOM on outliers, and the side that it leaves open.

    Shown in book/09_mining.md, "Against the baselines: four conditions".
    """
    model, seconds = defended(method, seed)
    detector, ball = own_score(model), Linf(EPS)
    inside, outside = images()
    still = scores(detector, inside)
    tests: dict[str, list[PerturbationSet]] = {
        "natural": [],
        "corruption": [Corruption()],
        "linf": [ball],
        "compositional": [Corruption(), ball],
    }
    row: Row = {name: {} for name in tests}
    for name, sets in tests.items():
        for kind, v in outside.items():
            v = v[:100]
            if sets:
                v = evaluate.attack_in_turn(detector, v, sets, direction="raise", steps=40)
            rates = evaluate.measure(still, still, scores(detector, v))
            row[name][kind] = {metric: rates[metric] for metric in ("auroc", "fpr")}
    return row | {"seconds": seconds}


@experiment(
    [
        {"contamination": kind, "share": share, "q": q}
        for kind, share in (("none", 0.0), ("letters", 0.15), ("letters", 0.4), ("digits", 0.15))
        for q in (0.0, 0.125, 0.25, 0.5, "auto")
    ],
    RECIPE | FIT_SHORT | {"pool": 2000},
)
def pool(contamination: str, share: float, q: Any, seed: int) -> Row:
    """Mining from pools that hold look-alike letters or digits without their labels.

    Shown in book/09_mining.md, "Digits, and a pool that nobody has checked".
    """
    model = small_cnn(seed=seed, reject=1)
    began = time.process_time()
    data = replace(digits(), outliers=contaminated(contamination, share, seed))
    history = fit(model, rules.NTOM(q), data, seed=seed, **FIT_SHORT)
    seconds = time.process_time() - began
    test = digits().test
    report = ood_report(RejectClass(model), test.x, digits().ood)
    with torch.no_grad():
        right = int((model(test.x).argmax(1) == test.y).sum())
    turned = int((report.scores["in"] < 0).sum())
    return {
        "read and accepted": metrics.proportion(right, len(test)),
        "digits rejected": metrics.proportion(turned, len(test)),
        "auroc": {row["set"]: row["auroc"] for row in report.rows},
        "fpr": {row["set"]: row["fpr"] for row in report.rows},
        "q used": history.rows[-1]["q"],
        "seconds": seconds,
    }


def contaminated(kind: str, share: float, seed: int) -> Tensor:
    """2,000 outliers, a share of them replaced by look-alike letters drawn with a pen, or by training digits."""
    data, hidden = digits(), int(2000 * share)
    clean = [data.outliers[:1000], data.outliers[1000:]]
    parts = [half[: (2000 - hidden) // 2] for half in clean]
    if hidden and kind == "letters":
        parts.append(glyphs("lookalike", hidden, 100 + seed, pen=True))
    elif hidden:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
        parts.append(data.train.x[order[:hidden]])
    return torch.cat(parts)


DIALS = {
    "weight": (0.1, 1.0, 2.0),
    "eps": (0.05, 0.15),
    "steps": (1, 5),
    "bn": ("eval", "train", "separate"),
}


@experiment(
    grid(change=[{}, *({dial: value} for dial, values in DIALS.items() for value in values)]),
    ROBUST | {"adaptive": "as elsewhere, but the 3 likeliest targets"},
    seeds=(0,),
)
def ablations(change: Row, seed: int) -> Row:
    """ALOE with another weight, radius, number of steps, or batch normalisation during the attack.

    Shown in book/08_objectives.md, "Turning the dials".
    """
    how: Row = {"within": EPS}
    how |= {"within" if key == "eps" else key: value for key, value in change.items()}
    model = small_cnn(seed=seed, width=2, batch_norm="bn" in change)
    objective = rules.ALOE(**how)
    seconds = train(model, objective, digits(), seed=seed, **FIT_LONG)
    both = ood_report(MSP(model), *images(), Linf(EPS), side="both", targets=3)
    found = {row["set"]: row["auroc"] for row in both.rows}
    return {**accuracies(model), "both": found, "seconds": seconds}


# --- the defender's own descent


PRO_STEPS, PRO_STEP = 5, 0.01


@experiment(
    lambda seed: grid(training=("standard", "ADV") if seed else ("standard", "ADV", "ALOE")),
    ROBUST
    | {
        "images_a_set": "100 letters, 100 digits",
        "adaptive": "APGD, 40 steps, 1 random start, the score and its 3 likeliest targets, best by the score",
        "base": "MSP",
        "steps": PRO_STEPS,
        "step": PRO_STEP,
        "worst": "of each image, the worse of the attack on PRO and the attack on MSP",
    },
)
def perturbed(training: str, seed: int) -> Row:
    """PRO on MSP: AUROC on four sides, attacked through its own descent, and through MSP alone.

    Shown in book/12_sanity.md, "A published idea, measured again".
    """
    model, seconds = defended(training, seed)
    base, pro = MSP(model), PRO(MSP(model), PRO_STEPS, PRO_STEP)
    area = partial(metrics.confidence_interval, metrics.auroc)
    x = {"in": digits().test.x[:100], "out": digits().ood["letters"][:100]}

    def attacked(detector: Detector) -> dict[str, Tensor]:
        directions: dict[str, Direction] = {"in": "lower", "out": "raise"}
        return {
            side: attack_score(detector, x[side], Linf(EPS), direction=to, targets=3)
            for side, to in directions.items()
        }

    def four(detector: Detector, *moved: dict[str, Tensor]) -> Row:
        still = {side: scores(detector, v) for side, v in x.items()}
        worst = {side: [still[side], *(scores(detector, v[side]) for v in moved)] for side in x}
        low, high = np.minimum.reduce(worst["in"]), np.maximum.reduce(worst["out"])
        return {
            "none": area(still["in"], still["out"]),
            "in": area(low, still["out"]),
            "out": area(still["in"], high),
            "both": area(low, high),
        }

    through_base, through_descent = attacked(base), attacked(pro)
    return {
        "MSP": four(base, through_base),
        "PRO, attacked through MSP": four(pro, through_base),
        "PRO, attacked through its descent": four(pro, through_descent),
        "PRO, worst": four(pro, through_base, through_descent),
        "clean by step": {
            str(step): area(*(scores(PRO(base, PRO_STEPS, step), v) for v in x.values()))
            for step in (0.0, 0.002, 0.005, 0.01, 0.02)
        },
        "seconds": seconds,
    }
