"""One of each: objectives, networks, detectors, autoencoders. All are small, because only the path matters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustood import attacks, detectors, generative, models, objectives, perturbations, smoothing
from robustood.data import Data, Split, paired
from robustood.perturbations import Random, Spatial

SIDE, CLASSES = 16, 3
EPS = 4 / 255


def photos(n: int = 96) -> Data:
    """Colour images whose class is their main colour, and grey outliers."""
    made = torch.Generator().manual_seed(3)
    y = torch.arange(n) % CLASSES
    x = 0.3 * torch.rand(n, 3, SIDE, SIDE, generator=made)
    x[torch.arange(n), y] += 0.5
    grey = torch.rand(n, 1, SIDE, SIDE, generator=made).expand(-1, 3, -1, -1).contiguous()
    split = Split(x, y)
    return Data(split, split[:24], split[:24], grey, {"grey": grey[:24]})


def turned(n: int = 64) -> Data:
    """Images with turned partners, for an autoencoder."""
    plain = photos(n)
    empty = Data(plain.train, plain.val, plain.test, plain.outliers[:0])
    return paired(empty, Random(Spatial(20, 1)), border=0)


# --- networks


def small(reject: int = 1) -> nn.Module:
    return models.small_cnn(CLASSES, reject, channels=3, size=SIDE, batch_norm=True)


def guarded(reject: int = 0) -> nn.Module:
    """A network whose densities the objective CCU trains."""
    known = photos()
    base = models.small_cnn(CLASSES, channels=3, size=SIDE)
    return models.ccu_model(base, known.train.x, known.outliers, components=3)


def foreign(reject: int = 1) -> nn.Module:
    """A network from elsewhere, whose layers draw."""
    with models.seeded(0):
        return models.adapt(
            nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, CLASSES + reject),
            ),
            reject=reject,
        )  # fmt: skip


def linear(reject: int = 1) -> nn.Module:
    width = 3 * SIDE * SIDE
    weight = torch.rand(CLASSES + reject, width, generator=torch.Generator().manual_seed(1)) / width
    return models.readout(weight, reject=reject)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "small_cnn": small,
    "mlp": lambda reject: models.mlp(3 * SIDE * SIDE, (16,), CLASSES, reject),
    "readout": linear,
    "densenet_bc": lambda reject: models.densenet_bc(10, 4, CLASSES, reject),
    "resnet": lambda reject: models.resnet(8, 8, CLASSES, reject),
    "wide_resnet": lambda reject: models.wide_resnet(10, 1, CLASSES, reject),
    "preact_resnet18": lambda reject: models.preact_resnet18(CLASSES, reject),
    "adapt": foreign,
    "ccu_model": guarded,
}


# --- training rules


def inner(**how: object) -> objectives.InnerMax:
    return objectives.InnerMax(EPS, steps=2, **how)


def learned(device: str = "cpu") -> perturbations.Latent:
    """A ball of latent variables."""
    return perturbations.Latent(cvae("warp_cvae").to(device), 1.0)


OBJECTIVES: dict[str, Callable[..., objectives.Objective]] = {
    "Standard": objectives.Standard,
    "Adversarial": lambda: objectives.Adversarial(EPS, steps=2),
    "Adversarial, best of two": lambda: objectives.Adversarial(EPS, steps=2, restarts=2),
    "Adversarial, a radius that grows": lambda: objectives.Adversarial(EPS, steps=2, ramp=0.5),
    "Adversarial, L2": lambda: objectives.Adversarial(perturbations.L2(0.3), steps=2, clean=True),
    "Adversarial, turned": lambda: objectives.Adversarial(Spatial(10, 1), steps=2),
    "Adversarial, learned set": lambda device="cpu": objectives.Adversarial(
        learned(device), steps=2
    ),
    "TRADES": lambda: objectives.TRADES(EPS, steps=2),
    "OutlierExposure": objectives.OutlierExposure,
    "ADV": lambda: objectives.ADV(EPS),
    "AOE": lambda: objectives.AOE(EPS),
    "ALOE": lambda: objectives.ALOE(EPS),
    "ALOE, statistics of the batch": lambda: objectives.ALOE(EPS, bn="train"),
    "ALOE, separate statistics": lambda: objectives.ALOE(EPS, bn="separate"),
    "ACET": lambda: objectives.ACET(EPS, steps=2),
    "NTOM": objectives.NTOM,
    "ATOM": lambda: objectives.ATOM(EPS, steps=2),
    "MinedALOE": lambda: objectives.MinedALOE(EPS, steps=2),
    "SOFL": lambda: objectives.SOFL(start=0.25),
    "ROWL": lambda: objectives.ROWL(EPS, steps=2),
    "CCU": objectives.CCU,
    "IntervalOutliers": lambda: smoothing.IntervalOutliers(EPS),
}


def network_for(objective: str) -> nn.Module:
    """A network that an objective can train."""
    if objective == "IntervalOutliers":
        return models.small_cnn(CLASSES, 1, channels=3, size=SIDE)
    return guarded() if objective == "CCU" else small()


# --- scores


def fitted(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, detectors.Detector]:
    """Every detector, fitted."""
    found = detectors.post_hoc(model, x, y) | {"RejectClass": detectors.RejectClass(model)}
    found["PRO"] = detectors.PRO(detectors.MSP(model), 2, 0.01)
    found["wrap"] = detectors.wrap(lambda x: model(x).amax(1), higher="in")
    return found


# --- autoencoders

AUTOENCODERS: dict[str, Callable[[], nn.Module]] = {
    "plain_cvae": lambda: generative.plain_cvae((3, SIDE, SIDE), 3, 16, 16),
    "basis_cvae": lambda: generative.basis_cvae((3, SIDE, SIDE), 3, 16, 16, pictures=4),
    "warp_cvae": lambda: generative.warp_cvae((3, SIDE, SIDE), 3, 16),
    "residual_cvae": lambda: generative.residual_cvae((3, SIDE, SIDE), 3, 8, 2, pool=2),
}


def cvae(name: str) -> nn.Module:
    return AUTOENCODERS[name]()


def plain_sgd(parameters: object, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Gradient descent that has no fused form, so that both devices do the same sums."""
    return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, foreach=False)


RULES: dict[str, Callable[[], attacks.Rule]] = {
    "Ascent": attacks.Ascent,
    "APGD": attacks.APGD,
    "Square": attacks.Square,
}
