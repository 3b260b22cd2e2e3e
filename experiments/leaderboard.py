"""The rows of the leaderboard: detectors of networks that ship with the project, by the standard evaluation.

    python -m experiments.leaderboard                       measure the missing rows
    python -m experiments.leaderboard digits_aloe_msp       measure this one again

Each becomes ``data/results/leaderboard_NAME.json``, as ``robustood attack --out`` writes it; the page
``book/leaderboard.md`` shows them all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from experiments import cifar10
from robustood import artefacts, challenge
from robustood.checkpoints import load_weights
from robustood.data import digits, pixels
from robustood.detectors import PRO, Detector, post_hoc
from robustood.evaluate import StandardReport, standard
from robustood.models import small_cnn

PREFIX = "leaderboard_"
DETECTORS = (
    "MSP", "MaxLogit", "Energy", "Entropy", "ODIN", "PRO", "Mahalanobis", "KNN", "ViM", "ReAct", "GradNorm",
)  # fmt: skip
TRAININGS = {
    "standard": "standard training",
    "oe": "OE",
    "adv": "ADV",
    "aoe": "AOE",
    "aloe": "ALOE",
    "acet": "ACET",
    "ntom": "NTOM",
    "atom": "ATOM",
    "minedaloe": "MinedALOE",
}
PLAIN = "small CNN, standard training"


def of_box(name: str, detector: str, network: str, width: int) -> StandardReport:
    """A detector of the network of a box of :mod:`robustood.challenge`, without its mask: 100 digits, 100 letters."""
    model = small_cnn(width=width)
    load_weights(artefacts.find("weights", f"challenge_{name.lower()}"), model)
    known, letters = challenge.clean_images().split(challenge.DIGITS)
    every: dict[str, Detector] = post_hoc(model, digits().train.x, digits().train.y)
    every["PRO"] = PRO(every["MSP"])
    report = standard(every[detector], known, {"letters": letters}, challenge.WITHIN, say=print)
    return report.labelled(network=network, data="digits")


def of_run(run: str, training: str) -> StandardReport:
    """The deployed detector of a kept run, on images of CIFAR-10, SVHN and textures, within 1/255."""
    outliers = {"SVHN": "svhn:train", "textures": "textures"}
    x_out = {name: pixels(cifar10.stored(pack, 30)) for name, pack in outliers.items()}
    detector, *_ = cifar10.network(run)
    report = standard(
        detector, pixels(cifar10.stored("cifar10:test", 60)), x_out, 1 / 255, say=print
    )
    return report.labelled(network=f"small residual network, {training}", data="CIFAR-10")


ROWS: dict[str, Callable[[], StandardReport]] = {
    "digits_aloe_msp": partial(of_box, "C", "MSP", "small CNN of width 2, ALOE", 2),
    **{
        f"digits_standard_{each.lower()}": partial(of_box, "A", each, PLAIN, 1)
        for each in DETECTORS
    },
    **{
        f"cifar10_{name}": partial(of_run, f"{name}_cifar10_cpu", words)
        for name, words in TRAININGS.items()
    },
}


def main() -> None:
    """Measure the rows that are named, or those that are missing."""
    torch.set_num_threads(1)
    there = artefacts.names("results")
    missing = [name for name in ROWS if PREFIX + name not in there]
    for name in sys.argv[1:] or missing:
        ROWS[name]().to_json(artefacts.FOLDERS[0] / "results" / f"{PREFIX}{name}.json")


if __name__ == "__main__":
    main()
