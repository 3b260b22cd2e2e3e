"""The experiments of the chapters on outliers; run by ``results_digits.py``, which keeps the rows.

Networks are small CNNs on the digits. AUROC has DeLong's interval; rates at a fixed threshold have
exact binomial ones. The first images of each test set are used, as many as the settings say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from robustood import metrics
from robustood.data import Data
from robustood.data import digits as load_digits
from robustood.detectors import Detector, Mahalanobis, RejectClass, post_hoc
from robustood.evaluate import attack_score, four_sides, paper_attack, scores
from robustood.models import Classifier, small_cnn
from robustood.objectives import OutlierExposure, OutlierTraining, Standard, to_reject
from robustood.perturbations import Linf
from robustood.training import fit

Task = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
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


EXPERIMENTS: dict[str, tuple[Callable[[int], Iterator[Task]], dict[str, Any]]] = {
    "transfer": (transfer, RECIPE | {"outliers": "67 letters, 67 patches, 66 noise; gap over 500 resamples"}),
    "fall": (fall, RECIPE),
}  # fmt: skip
