"""The experiments of the chapters on outliers; run by ``results_digits.py``, which keeps the rows.

Networks are small CNNs on the digits. AUROC has DeLong's interval; rates at a fixed threshold have
exact binomial ones. The first images of each test set are used, as many as the settings say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from keeping import Experiment, Task
from torch import Tensor

from robustood import metrics
from robustood.attacks import pgd, robust_accuracy
from robustood.data import Data, glyphs
from robustood.data import digits as load_digits
from robustood.detectors import MSP, ODIN, Detector, Mahalanobis, RejectClass, post_hoc
from robustood.evaluate import (
    attack_in_turn,
    attack_score,
    four_sides,
    measure,
    ood_report,
    paper_attack,
    scores,
)
from robustood.losses import to_reject
from robustood.models import Classifier, ccu_model, frozen, small_cnn
from robustood.objectives import (
    ACET,
    ADV,
    ALOE,
    AOE,
    ATOM,
    CCU,
    NTOM,
    ROWL,
    SOFL,
    MinedALOE,
    OutlierExposure,
    OutlierTraining,
    Standard,
)
from robustood.perturbations import Corruption, Linf
from robustood.training import fit

EPS = 0.1
RECIPE: dict[str, Any] = {
    "train_digits": 1097, "batch_size": 64, "outlier_batch_size": 128, "epochs": 40, "optimiser": "Adam",
    "lr": 3e-3, "schedule": "15 % linear warm-up, then half a cosine to zero",
    "model": "robustood.models.small_cnn", "images_a_set": 200,
    "adaptive": "APGD, 40 steps, 1 random start, every objective of the detector, best by its score",
    "aloe": "the surrogate of Chen et al. 2020, 10 steps of eps from the clean image, last iterate",
    "atom": "the surrogate of Chen et al. 2021, 40 steps of eps / 8, random start, best by the surrogate",
}  # fmt: skip
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "adaptive": attack_score,
    "aloe": partial(paper_attack, paper="aloe"),
    "atom": partial(paper_attack, paper="atom"),
}
RULES = {
    "standard": Standard(),
    "OE": OutlierExposure(),
    "reject": OutlierTraining(outlier_loss=to_reject, weight=1.0),
}
digits = lru_cache(load_digits)


@lru_cache
def network(rule: str, seed: int) -> tuple[Classifier, float]:
    """A trained network and its CPU seconds."""
    model = small_cnn(seed=seed, reject=int(rule == "reject"))
    began = time.process_time()
    fit(model, RULES[rule], digits(), epochs=RECIPE["epochs"], batch_size=64, seed=seed)
    return model, time.process_time() - began


def detectors(model: Classifier) -> dict[str, Detector]:
    """All detectors that fit the network, with two more kinds of Mahalanobis."""
    data: Data = digits()
    x, y = data.train.x, data.train.y
    layers = Mahalanobis(model, "all").fit(x, y).combine(data.val.x, data.outliers[::5])
    found = post_hoc(model, x, y)
    found |= {"Mahalanobis, all layers": layers}
    found |= {"Mahalanobis, input step": Mahalanobis(model, step=0.005).fit(x, y)}
    return found | ({"RejectClass": RejectClass(model)} if model.reject else {})


def images() -> tuple[Tensor, dict[str, Tensor]]:
    n = RECIPE["images_a_set"]
    return digits().test.x[:n], {name: x[:n] for name, x in digits().ood.items()}


# --- experiments: each yields (settings of a row, function that measures it) for one seed


def transfer(seed: int) -> Iterator[Task]:
    """AUROC of each detector under every attack: its own adaptive one, the papers', the others'."""
    for rule, eps in (("standard", 0.05), ("OE", 0.1), ("reject", 0.1)):
        for direction in ("raise", "lower"):
            yield (
                {"training": rule, "eps": eps, "direction": direction},
                partial(matrix, rule, eps, direction, seed),
            )


def matrix(rule: str, eps: float, direction: str, seed: int) -> dict[str, Any]:
    model, seconds = network(rule, seed)
    known = detectors(model)
    inside, outside = images()
    mixed = torch.cat([outside["letters"][:67], outside["patches"][:67], outside["noise"][:66]])
    attacked, still = (mixed, inside) if direction == "raise" else (inside, mixed)
    how: dict[str, Any] = {"within": Linf(eps), "direction": direction}
    moved = {f"adaptive {name}": attack_score(d, attacked, **how) for name, d in known.items()}
    papers = ("aloe", "atom")

    def pair(detector: Detector, x: Tensor) -> tuple[Any, Any]:
        sides = scores(detector, still), scores(detector, x)
        return sides if direction == "raise" else sides[::-1]

    rows: dict[str, Any] = {}
    for name, detector in known.items():
        own = pair(detector, moved[f"adaptive {name}"])
        others = {key: pair(detector, x) for key, x in moved.items() if key != f"adaptive {name}"}
        others |= {p: pair(detector, ATTACKS[p](detector, attacked, **how)) for p in papers}
        found = {key: metrics.auroc(*sides) for key, sides in others.items()}
        strongest = min(found, key=found.__getitem__)
        gap = metrics.paired_difference(metrics.auroc, others[strongest], own, resamples=500)
        rows[name] = {"clean": metrics.auroc(*pair(detector, attacked)), "own": metrics.auroc(*own),
                      "others": found, "strongest": strongest, "gap": gap}  # fmt: skip
    return {"detectors": rows, "seconds": seconds}


def fall(seed: int) -> Iterator[Task]:
    """Every detector, clean and with one or both sides attacked, by three attacks."""
    for rule in ("standard", "OE"):
        for name in detectors(network(rule, 0)[0]):
            yield (
                {"training": rule, "detector": name, "eps": 0.1},
                partial(fallen, rule, name, seed),
            )


def fallen(rule: str, name: str, seed: int) -> dict[str, Any]:
    model, seconds = network(rule, seed)
    row: dict[str, Any] = {}
    for attack, function in ATTACKS.items():
        reports = four_sides(detectors(model)[name], *images(), Linf(0.1), attack=function)
        for side, report in reports.items():
            key = "clean" if side == "none" else f"{attack} {side}"
            kept = ("auroc", "fpr", "fpr_attacked", "rejected", "tie_rate")
            row[key] = {r["set"]: {metric: r[metric] for metric in kept} for r in report.rows}
    return {"sides": row, "seconds": seconds}


# --- training against outliers

ROBUST: dict[str, Any] = RECIPE | {
    "epochs": 60, "model": "robustood.models.small_cnn, width 2", "eps": EPS,
    "train_attack": "2 steps of 1.25 eps from a random start, last iterate (ACET, ATOM, MinedALOE: "
    "5 steps of eps / 2, best iterate)",
}  # fmt: skip
METHODS: dict[str, Any] = {
    "standard": Standard(),
    "OE": OutlierExposure(),
    "ADV": ADV(EPS),
    "AOE": AOE(EPS),
    "ALOE": ALOE(EPS),
    "ACET": ACET(EPS),
    "SOFL": SOFL(),
    "CCU": CCU(),
    "ROWL": ROWL(EPS),
    "NTOM": NTOM(0.0),
    "ATOM": ATOM(EPS, 0.0),
    "MinedALOE": MinedALOE(EPS, 0.0),
}
MAIN = (
    "standard",
    "OE",
    "ADV",
    "AOE",
    "ALOE",
)  # attacked towards every class, the others towards 3
REJECTS = {"SOFL": 5, "ROWL": 1, "NTOM": 1, "ATOM": 1, "MinedALOE": 1}


@lru_cache
def defended(method: str, seed: int) -> tuple[Any, float]:
    """A network trained by a method, and its CPU seconds."""
    began = time.process_time()
    model: Any = small_cnn(seed=seed, width=2, reject=REJECTS.get(method, 0))
    if method == "CCU":
        model = ccu_model(model, digits().train.x, digits().outliers)
    fit(model, METHODS[method], digits(), epochs=ROBUST["epochs"], batch_size=64, seed=seed)
    return model, time.process_time() - began


def own_score(model: Any) -> Detector:
    """The score that goes with the training: the reject class where there is one, else MSP."""
    return RejectClass(model) if model.reject else MSP(model)


def accuracies(model: Any) -> dict[str, Any]:
    """Clean and attacked accuracy over the classes, whatever is rejected."""
    test = digits().test

    def classes(x: Tensor) -> Tensor:
        return model(x)[:, : model.classes]

    attack = partial(pgd, within=Linf(EPS), loss="targets")
    with frozen(model):
        return {
            "accuracy": robust_accuracy(classes, test.x, test.y),
            "robust_accuracy": robust_accuracy(classes, test.x[:200], test.y[:200], attack),
        }


def defences(seed: int) -> Iterator[Task]:
    """Every method: accuracy, and its detector clean and with one or both sides attacked."""
    for method in METHODS:
        yield {"method": method}, partial(defence, method, seed)


def defence(method: str, seed: int) -> dict[str, Any]:
    model, seconds = defended(method, seed)
    row: dict[str, Any] = {**accuracies(model), "sides": sides(own_score(model))}
    if method in ("OE", "ALOE"):
        row["with ODIN"] = sides(ODIN(model))
    return row | {"seconds": seconds}


def sides(detector: Detector, attacks: tuple[str, ...] = ("adaptive", "aloe")) -> dict[str, Any]:
    """Rates of each set of outliers for clean inputs and each attacked side."""
    found: dict[str, Any] = {}
    for attack in attacks:
        for side, report in four_sides(
            detector, *images(), Linf(EPS), attack=ATTACKS[attack]
        ).items():
            key = "clean" if side == "none" else f"{attack} {side}"
            kept = ("auroc", "fpr", "fpr_attacked", "rejected", "tie_rate")
            found[key] = {r["set"]: {metric: r[metric] for metric in kept} for r in report.rows}
    return found


def conditions(seed: int) -> Iterator[Task]:
    """The four test conditions of ATOM on outliers, and the side that it leaves open."""
    for method in METHODS:
        yield {"method": method}, partial(four_conditions, method, seed)


def four_conditions(method: str, seed: int) -> dict[str, Any]:
    model, seconds = defended(method, seed)
    detector, ball = own_score(model), Linf(EPS)
    inside, outside = images()
    tests: dict[str, list[Any]] = {
        "natural": [], "corruption": [Corruption()], "linf": [ball], "compositional": [Corruption(), ball],
    }  # fmt: skip
    row: dict[str, Any] = {}
    for name, sets in tests.items():
        attack = partial(attack_in_turn, steps=40)
        row[name] = {}
        for kind, x in outside.items():
            v = attack(detector, x[:100], sets, direction="raise")
            rates = measure(scores(detector, inside), scores(detector, inside), scores(detector, v))
            row[name][kind] = {metric: rates[metric] for metric in ("auroc", "fpr")}
    return row | {"seconds": seconds}


def pool(seed: int) -> Iterator[Task]:
    """Mining from pools that hold look-alike letters or digits without their labels."""
    for kind, share in (("none", 0.0), ("letters", 0.15), ("letters", 0.4), ("digits", 0.15)):
        for q in (0.0, 0.125, 0.25, 0.5, "auto"):
            setting = {"contamination": kind, "share": share, "q": q}
            yield setting, partial(mined, kind, share, q, seed)


def contaminated(kind: str, share: float, seed: int) -> Tensor:
    """2,000 images, of which a share are look-alike letters drawn by a pen, or training digits."""
    data, hidden = digits(), int(2000 * share)
    clean = [data.outliers[:1000], data.outliers[1000:]]
    parts = [half[: (2000 - hidden) // 2] for half in clean]
    if hidden and kind == "letters":
        parts.append(glyphs("lookalike", hidden, 100 + seed, pen=True))
    elif hidden:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
        parts.append(data.train.x[order[:hidden]])
    return torch.cat(parts)


def mined(kind: str, share: float, q: Any, seed: int) -> dict[str, Any]:
    model = small_cnn(seed=seed, reject=1)
    began = time.process_time()
    data = replace(digits(), outliers=contaminated(kind, share, seed))
    history = fit(model, NTOM(q), data, epochs=25, batch_size=64, seed=seed)
    seconds = time.process_time() - began
    detector, test = RejectClass(model), digits().test
    report = ood_report(detector, test.x, digits().ood)
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


def ablations(seed: int) -> Iterator[Task]:
    """ALOE with another weight, radius, number of steps, or batch normalisation during the attack."""
    changed = [{}, *({"weight": w} for w in (0.1, 1.0, 2.0)), *({"eps": e} for e in (0.05, 0.15))]
    changed += [
        {"steps": 1},
        {"steps": 5},
        *({"bn": mode} for mode in ("eval", "train", "separate")),
    ]
    for change in changed:
        yield {"change": change}, partial(ablated, change, seed)


def ablated(change: dict[str, Any], seed: int) -> dict[str, Any]:
    how = {"within": EPS, **change}
    if "eps" in how:
        how["within"] = how.pop("eps")
    model = small_cnn(seed=seed, width=2, batch_norm="bn" in change)
    began = time.process_time()
    fit(model, ALOE(**how), digits(), epochs=ROBUST["epochs"], batch_size=64, seed=seed)
    seconds = time.process_time() - began
    both = ood_report(MSP(model), *images(), Linf(EPS), side="both", targets=3)
    found = {row["set"]: row["auroc"] for row in both.rows}
    return {**accuracies(model), "both": found, "seconds": seconds}


EXPERIMENTS: dict[str, Experiment] = {
    "transfer": (transfer, RECIPE | {"outliers": "67 letters, 67 patches, 66 noise; gap over 500 resamples"}),
    "fall": (fall, RECIPE),
    "defences": (defences, ROBUST | {"targets": "every class for standard, OE, ADV, AOE and ALOE; the 3 "
                                     "likeliest for ODIN and the other methods"}),
    "conditions": (conditions, ROBUST | {"images_a_set": "100 a set of outliers, 200 digits"}),
    "pool": (pool, RECIPE | {"epochs": 25, "pool": 2000}),
    "ablations": (ablations, ROBUST | {"adaptive": "as elsewhere, but the 3 likeliest targets"}),
}  # fmt: skip
