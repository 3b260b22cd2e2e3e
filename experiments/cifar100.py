"""Kept networks on CIFAR-100: what compression does to the numbers."""

from __future__ import annotations

import torch

from experiments.cifar10 import restored, stored
from experiments.harness import Row, experiment, grid
from robustood import artefacts, metrics, results
from robustood.data import compress, pixels
from robustood.detectors import MSP
from robustood.evaluate import scores

RUNS = [f"{name}_cifar100_cpu" for name in ("standard", "oe", "aoe", "aloe")]
NEW = ["svhn:train", "textures", "scenes", "cifar10:test"]
KEPT: Row = {
    "inputs": "cifar100:test",
    "new": NEW,
    "images": 1000,
    "images a set": 500,
    "quality": 90,
}


@experiment(grid(run=RUNS), KEPT, seeds=(0,))
def compressed(run: str, seed: int) -> Row:
    """AUROC of MSP if all images, CIFAR-100 alone, or none went through the JPEG of the training images.

    Shown in book/13_results.md, "A hundred classes".
    """
    detector = MSP(restored(run)[0])
    inside, outside = results.pooled(artefacts.scores(run), "MSP", "none", NEW)
    x = stored(KEPT["inputs"], KEPT["images"])
    u = torch.cat([stored(name, KEPT["images a set"]) for name in NEW])
    plain_x, plain_u, through = (
        scores(detector, pixels(i)) for i in (x, u, compress(x, KEPT["quality"]))
    )
    assert abs(inside - through).max() < 1e-3, "the kept scores are those of compressed images"
    pairs = {
        "all": (inside, outside),
        "CIFAR-100 alone": (inside, plain_u),
        "none": (plain_x, plain_u),
    }
    return {
        words: metrics.confidence_interval(metrics.auroc, *pair) for words, pair in pairs.items()
    }
