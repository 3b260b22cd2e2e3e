"""The content of a recipe: five sections with their keys, types, bounds and defaults, and the objects they build.

A key whose default is None is left out of a run's record unless it is set.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Literal

from torch import nn

from robustood import generative, models, objectives
from robustood.inputs import suggest
from robustood.losses import to_reject
from robustood.objectives import Objective, OutlierTraining
from robustood.recipes.reading import (
    AtLeastZero,
    Bounds,
    Count,
    Positive,
    Share,
    Table,
    checked,
)

__all__ = [
    "METHODS", "SECTIONS", "Attack", "Detector", "Evaluation", "Images", "Method", "Recipe",
    "Settings", "Training", "needs_reject", "settings", "uses_outliers",
]  # fmt: skip

_Network = Table  # its name, and all arguments that differ from their defaults
Detector = Literal[
    "MSP", "MaxLogit", "Energy", "Entropy", "ODIN", "Mahalanobis", "KNN", "ViM", "ReAct",
    "GradNorm", "RejectClass",
]  # fmt: skip
Attack = Literal[
    "none", "paper", "adaptive", "strong", "corruption", "compositional_paper", "compositional"
]
_CLASSIFIERS = ("densenet_bc", "preact_resnet18", "resnet", "small_cnn", "wide_resnet")
_GENERATORS = ("plain_cvae", "residual_cvae", "warp_cvae")  # of robustood.generative
_ATTACK = ("within", "steps", "step_size", "restarts", "ramp", "mode", "keep")
_MINING = ("q", "share", "sample")
METHODS = {  # the keys of each; those in _ATTACK go to its inner maximisations
    "Standard": (),
    "Adversarial": _ATTACK,
    "TRADES": (*_ATTACK, "beta"),
    "OutlierExposure": ("bn", "weight"),
    "ADV": (*_ATTACK, "bn"),
    "AOE": (*_ATTACK, "bn", "weight"),
    "ALOE": (*_ATTACK, "bn", "weight", "attacked_share"),
    "ACET": (*_ATTACK, "bn", "weight", "attacked_share"),
    "NTOM": ("bn", "weight", *_MINING),
    "ATOM": (*_ATTACK, "bn", "weight", "attacked_share", *_MINING),
    "MinedALOE": (*_ATTACK, "bn", "weight", "attacked_share", *_MINING),
    "Variational": ("beta", "schedule", "distance"),
}


@dataclass(frozen=True)
class Images:
    """The section ``[data]``."""

    train: str
    test: str
    outliers: str = ""
    seen: str = ""  # test images from the distribution of the training outliers
    ood: list[str] = field(default_factory=list)
    known: str = ""  # set whose classes are removed from the outliers
    jpeg: Literal["auto"] | Annotated[int, Bounds(0, 100)] = "auto"
    jpeg_everywhere: bool | None = None  # compress test images too, and no copies
    validation: Count = 1000  # number of training images held out
    hold_out: Literal["by class", "last"] = "by class"  # a share of each class, or the last
    crop: Count = 4
    flip: bool = True
    pool_minimum: Count = 0  # smallest pool for an objective that mines
    pairs: Literal["rts", "corruptions"] | None = None  # from which a perturbation set is learned
    images: Positive | None = None  # number of training images used for pairs

    def __post_init__(self) -> None:
        named = self.outlier_sets()
        if len(set(named)) < len(named):
            raise ValueError(f"data.seen and data.ood must name each set once, got {named}")
        if self.jpeg_everywhere and self.pairs:
            raise ValueError(
                "data.jpeg_everywhere has no effect on data.pairs; leave it out, or name a pack of "
                "compressed images in data.train and data.test"
            )
        if self.jpeg_everywhere and self.jpeg in ("auto", 0):
            raise ValueError(
                f"data.jpeg_everywhere needs a quality, got data.jpeg = {self.jpeg!r}; set one, such as "
                "--set data.jpeg=75"
            )

    def outlier_sets(self) -> list[str]:
        """The names of the test outlier sets, the seen distribution first."""
        return [name for name in (self.seen, *self.ood) if name]


@dataclass(frozen=True)
class Method:
    """The section ``[objective]``; None means the default of the library's function of that name."""

    name: str
    within: Share | None = None
    steps: Positive | None = None
    step_size: Share | None = None
    restarts: Count | None = None
    ramp: Share | None = None
    mode: Literal["eval", "train", "batch"] | None = None
    keep: Literal["last", "best"] | None = None
    bn: Literal["eval", "train", "separate"] | None = None
    weight: AtLeastZero | None = None
    attacked_share: Share | None = None
    q: Literal["auto"] | Share | None = None
    share: Annotated[float, Bounds(1e-9, 1)] | None = None
    sample: Count | None = None  # 0: the whole pool
    beta: AtLeastZero | None = None
    schedule: list[list[Share]] | None = None
    distance: Literal["squared error", "cross-entropy"] | None = None

    def __post_init__(self) -> None:
        if self.within is None and "within" in METHODS[self.name]:
            raise ValueError(
                f"objective.within is missing: the radius of {self.name}'s attack; set it in the file, "
                'or with --set objective.within="8/255"'
            )

    def build(self) -> Objective:
        """The training objective.

        Values from the method's function in :mod:`robustood.objectives` are kept unless the section sets them;
        ``step_size``, ``restarts``, ``mode``, ``keep`` and ``ramp`` go to its inner maximisations.
        """
        said = {k: v for k, v in asdict(self).items() if k != "name" and v is not None}
        make = getattr(generative if self.name == "Variational" else objectives, self.name)
        if self.name in ("Standard", "Adversarial", "TRADES", "Variational"):
            return make(**said)
        built = make(**{k: said.pop(k) for k in ("within", "steps") if k in said})
        if mining := {k: said.pop(k) for k in _MINING if k in said}:
            if "sample" in mining:
                mining["sample"] = mining["sample"] or None
            said["mine"] = replace(built.mine, **mining)
        attack = {k: said.pop(k) for k in _ATTACK if k in said}
        built = replace(built, **said)
        for side in ("inside", "outside"):
            if attack and (inner := built.inner(getattr(built, side))):
                built = replace(built, **{side: replace(inner, **attack)})
        return built


@dataclass(frozen=True)
class Training:
    """The section ``[training]``."""

    epochs: Positive
    batch_size: Positive = 64
    outlier_batch_size: Positive = 128
    lr: AtLeastZero = 0.1
    optimiser: Literal["sgd", "adam"] = "sgd"
    momentum: Share = 0.9
    nesterov: bool = True
    weight_decay: AtLeastZero = 1e-4
    warmup: Share = 0.0
    milestones: list[Share] = field(default_factory=list)  # empty: half-cosine decay
    seed: Count = 0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    compile: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("training.nesterov needs a momentum above 0; set nesterov to false")


@dataclass(frozen=True)
class Evaluation:
    """The section ``[evaluation]``."""

    # Empty: chosen by the network.
    detectors: list[Literal["auto"] | Detector] = field(default_factory=list)
    attacks: list[Attack] = field(default_factory=lambda: ["none", "paper", "adaptive"])
    sets: list[str] = field(default_factory=list)  # from data.ood and data.seen; empty: all
    # Radii at which the adaptive attack is repeated.
    curve: list[Share] = field(default_factory=list)
    n_in: Positive = 1000
    n_out: Positive = 500
    n_fit: Positive = 5000  # training images for detectors that must be fitted
    eps: Share = 1 / 255
    side: Literal["both", "out"] = "both"
    paper: Literal["aloe", "atom"] = "aloe"
    steps: Positive = 40
    restarts: Count = 1
    targets: Count = 3
    pgd_steps: Positive = 20  # of the attack on accuracy
    odin_temperature: Annotated[float, Bounds(1e-6)] = 1000.0
    odin_step: Share = 0.0014
    batch_size: Positive = 500

    def __post_init__(self) -> None:
        if self.curve != sorted(self.curve):
            raise ValueError(f"evaluation.curve must increase, got {self.curve}; sort it")


@dataclass(frozen=True)
class Settings:
    """All settings of a recipe, section by section."""

    data: Images
    model: _Network
    objective: Method
    training: Training
    evaluation: Evaluation

    def __post_init__(self) -> None:
        """Refuse combinations of values that do not fit; add a reject output if the method needs one."""
        try:
            rule = self.objective.build()
        except ValueError as error:
            raise ValueError(f"objective: {error}") from error
        name = self.objective.name
        if uses_outliers(rule) and not self.data.outliers:
            raise ValueError(
                f"{name} learns from outliers, but data.outliers is empty; name a set, such as --set "
                "data.outliers=tinyimagenet:train"
            )
        network = self.model["name"]
        learns = [name == "Variational", network in _GENERATORS, self.data.pairs is not None]
        if any(learns) and not all(learns):
            raise ValueError(
                "Variational, a network such as residual_cvae and data.pairs need one another, got "
                f"{name}, {network} and data.pairs = {self.data.pairs!r}; set all three or none"
            )
        if needs_reject(rule) and not self.model.setdefault("reject", 1):
            raise ValueError(f"{name} needs model.reject of at least 1, got 0; leave it out")
        if "RejectClass" in self.evaluation.detectors and not self.model.get("reject"):
            raise ValueError(
                "evaluation.detectors contains RejectClass, which needs a reject output; use MSP or "
                "ODIN, or set model.reject=1"
            )
        known = self.data.outlier_sets()
        for each in self.evaluation.sets:
            if each not in known:
                raise ValueError(f"no set {each!r} (evaluation.sets); {suggest(each, known)}")
        if self.objective.q == "auto" and not self.data.validation:
            raise ValueError('objective.q="auto" needs held-out images: set data.validation')

    def to_dict(self) -> dict[str, Table]:
        """The sections as they are written to a file."""
        return {
            section: {key: value for key, value in values.items() if value is not None}
            for section, values in asdict(self).items()
        }


SECTIONS = {
    "data": Images,
    "model": dict,  # of the arguments of its function
    "objective": Method,
    "training": Training,
    "evaluation": Evaluation,
}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        name: that of its file.
        about: one line of description.
        settings: with all defaults filled in and fractions as numbers.
        plan: that of the evaluation; empty for the recipe's own.
    """

    name: str
    about: str
    settings: Settings
    plan: str = ""

    def objective(self) -> Objective:
        """The training objective."""
        return self.settings.objective.build()

    def model(self) -> nn.Module:
        """The untrained network, a classifier or an autoencoder; its weights depend on the training seed."""
        given = dict(self.settings.model)
        try:
            return _builder(given.pop("name"))(**given, seed=self.settings.training.seed)
        except ValueError as error:
            raise ValueError(f"recipe {self.name}: model: {error}") from error

    def to_json(self) -> str:
        """The whole recipe as JSON, which :func:`robustood.recipes.read` can read."""
        whole = {"name": self.name, "about": self.about, **self.settings.to_dict()}
        return json.dumps(whole, indent=1)


def settings(given: Mapping[str, Table]) -> Settings:
    """Check the sections of a file; no data are loaded.

    Raises:
        ValueError: for an unknown section or key, or an invalid value; the message names key, value and fix.
    """
    for name, section in given.items():
        if name not in SECTIONS:
            raise ValueError(f"no section [{name}]; {suggest(name, SECTIONS)}")
        if not isinstance(section, Mapping):
            raise ValueError(f"{name} must be a section [{name}], got {section!r}")
    parts = {name: given.get(name, {}) for name in SECTIONS}
    method = _named(parts["objective"], "objective", METHODS)
    network = _named(parts["model"], "model", (*_CLASSIFIERS, *_GENERATORS))
    build, own = _builder(network), {k: v for k, v in parts["model"].items() if k != "name"}
    arguments = [key for key in inspect.signature(build).parameters if key != "seed"]
    return Settings(
        Images(**checked(Images, parts["data"], "data")),
        {"name": network, **checked(build, own, "model", arguments)},
        Method(**checked(Method, parts["objective"], "objective", ("name", *METHODS[method]))),
        Training(**checked(Training, parts["training"], "training")),
        Evaluation(**checked(Evaluation, parts["evaluation"], "evaluation")),
    )


def _named(given: Table, section: str, known: Collection[str]) -> str:
    """The ``name`` in a section, checked against the known names."""
    if "name" not in given:
        raise ValueError(f"{section}.name is missing; {suggest('', known)}")
    name = str(given["name"])
    if name not in known:
        raise ValueError(f"no {section} {name!r} ({section}.name); {suggest(name, known)}")
    return name


def _builder(network: str) -> Callable[..., nn.Module]:
    """The function that builds a network, from :mod:`robustood.models` or :mod:`robustood.generative`."""
    return getattr(generative if network in _GENERATORS else models, network)


def uses_outliers(rule: Objective) -> bool:
    """Whether an objective uses outliers."""
    return isinstance(rule, OutlierTraining) and rule.weight > 0


def needs_reject(rule: Objective) -> bool:
    """Whether an objective needs a reject output."""
    return isinstance(rule, OutlierTraining) and rule.outlier_loss is to_reject
