"""What a recipe may say: its sections, their keys, types and defaults, and the objective they stand for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from robustood import detectors, generative, models, objectives
from robustood.evaluate import PAPERS
from robustood.objectives import Objective, OutlierTraining

Section = dict[str, Any]
NEEDED = object()  # stands where a default would, for keys that must be given


@dataclass(frozen=True)
class Kind:
    """A type of value: how a message calls it, and how it is read; reading raises for a wrong one."""

    what: str
    read: Callable[[Any], Any]


def fraction(value: Any) -> float:
    """A finite number, or a text such as "8/255" that stands for one."""
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        raise ValueError
    found = float(Fraction(value)) if isinstance(value, str) else float(value)
    if not math.isfinite(found):
        raise ValueError
    return found


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    """A number in [low, high]."""

    def read(value: Any) -> float:
        if not low <= (found := fraction(value)) <= high:
            raise ValueError
        return found

    span = f" in [{low:g}, {high:g}]" if math.isfinite(low) or math.isfinite(high) else ""
    return Kind(f'a number{span} (a fraction as text: "8/255")', read)


def whole(low: int = 0, high: float = math.inf) -> Kind:
    """A whole number of at least low, at most high."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
            raise ValueError
        return int(value)

    most = f", at most {high}" if high < math.inf else ""
    return Kind(f"a whole number of at least {low}{most}", read)


def exactly(kind: type, what: str) -> Kind:
    """A value of one Python type."""

    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError
        return value

    return Kind(what, read)


def one_of(*names: str) -> Kind:
    """One of some words."""

    def read(value: Any) -> str:
        if value not in names:
            raise ValueError
        return value

    return Kind(f"one of {', '.join(names)}", read)


def either(word: str, kind: Kind) -> Kind:
    """A word of its own, or a value of another kind."""
    return Kind(f'"{word}" or {kind.what}', lambda v: v if v == word else kind.read(v))


def several(kind: Kind) -> Kind:
    """A list."""

    def read(value: Any) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return [kind.read(v) for v in value]

    return Kind(f"a list, each entry {kind.what}", read)


TEXT = exactly(str, "a text")
FLAG = exactly(bool, "true or false")
DETECTORS = ("MSP", "MaxLogit", "Energy", "Entropy", "ODIN", "Mahalanobis", "KNN", "ViM", "ReAct",
             "GradNorm", "RejectClass")  # fmt: skip
ATTACKS = ("none", "paper", "adaptive", "strong", "corruption", "compositional_paper",
           "compositional")  # fmt: skip
CLASSIFIERS = ("densenet_bc", "preact_resnet18", "resnet", "small_cnn", "wide_resnet")
GENERATORS = ("plain_cvae", "residual_cvae", "warp_cvae")  # of robustood.generative
MODELS = (*CLASSIFIERS, *GENERATORS)

# key: (default, kind)
DATA: dict[str, tuple[Any, Kind]] = {
    "train": (NEEDED, TEXT),
    "test": (NEEDED, TEXT),
    "outliers": ("", TEXT),
    "seen": ("", TEXT),  # test images of the outliers' own distribution
    "ood": ([], several(TEXT)),
    "known": ("", TEXT),  # whose classes are dropped from the outliers
    "jpeg": ("auto", either("auto", whole(0, 100))),
    "jpeg_everywhere": (None, FLAG),  # every image once, test images too, in place of copies
    "validation": (1000, whole()),  # images of train that are held out
    "hold_out": ("by class", one_of("by class", "last")),  # which: each class's share, or the last
    "crop": (4, whole()),
    "flip": (True, FLAG),
    "pool_minimum": (0, whole()),  # of an objective that mines
    "pairs": (None, one_of("rts", "corruptions")),  # to learn a perturbation set from
    "images": (None, whole(1)),  # of train, in pairs
}
TRAINING: dict[str, tuple[Any, Kind]] = {
    "epochs": (NEEDED, whole(1)),
    "batch_size": (64, whole(1)),
    "outlier_batch_size": (128, whole(1)),
    "lr": (0.1, number(0)),
    "optimiser": ("sgd", one_of("sgd", "adam")),
    "momentum": (0.9, number(0, 1)),
    "nesterov": (True, FLAG),
    "weight_decay": (1e-4, number(0)),
    "warmup": (0.0, number(0, 1)),
    "milestones": ([], several(number(0, 1))),  # none: a half cosine
    "seed": (0, whole()),
    "precision": ("auto", one_of("auto", "float32", "bf16")),
    "channels_last": ("auto", either("auto", FLAG)),
    "compile": ("auto", either("auto", FLAG)),
}
EVALUATION: dict[str, tuple[Any, Kind]] = {
    "detectors": ([], several(one_of("auto", *DETECTORS))),  # none: by the network
    "attacks": (["none", "paper", "adaptive"], several(one_of(*ATTACKS))),
    "sets": ([], several(TEXT)),  # of data.ood and data.seen; none: all
    "curve": ([], several(number(0, 1))),  # radii at which the adaptive attack is repeated
    "n_in": (1000, whole(1)),
    "n_out": (500, whole(1)),
    "n_fit": (5000, whole(1)),  # training images for detectors that are fitted
    "eps": ("1/255", number(0, 1)),
    "side": ("both", one_of("both", "out")),
    "paper": ("aloe", one_of(*PAPERS)),
    "steps": (40, whole(1)),
    "restarts": (1, whole())  ,
    "targets": (3, whole()),
    "pgd_steps": (20, whole(1)),  # of the attack on the accuracy
    "odin_temperature": (1000.0, number(1e-6)),
    "odin_step": (0.0014, number(0, 1)),
    "batch_size": (500, whole(1)),
}  # fmt: skip

ATTACK: dict[str, tuple[Any, Kind]] = {
    "within": (NEEDED, number(0, 1)),
    "steps": (None, whole(1)),
    "step_size": (None, number(0, 1)),
    "restarts": (None, whole()),
    "ramp": (None, number(0, 1)),
    "mode": (None, one_of("eval", "train", "batch")),
    "keep": (None, one_of("last", "best")),
}
BN: dict[str, tuple[Any, Kind]] = {"bn": (None, one_of("eval", "train", "separate"))}
WEIGHT: dict[str, tuple[Any, Kind]] = {**BN, "weight": (None, number(0))}
SHARE: dict[str, tuple[Any, Kind]] = {**WEIGHT, "attacked_share": (None, number(0, 1))}
MINING: dict[str, tuple[Any, Kind]] = {
    "q": (None, either("auto", number(0, 1))),
    "share": (None, number(1e-9, 1)),
    "sample": (None, whole()),  # 0: the whole pool
}
OBJECTIVES: dict[str, dict[str, tuple[Any, Kind]]] = {
    "Standard": {},
    "Adversarial": ATTACK,
    "TRADES": {**ATTACK, "beta": (None, number(0))},
    "OutlierExposure": WEIGHT,
    "ADV": {**ATTACK, **BN},
    "AOE": {**ATTACK, **WEIGHT},
    "ALOE": {**ATTACK, **SHARE},
    "ACET": {**ATTACK, **SHARE},
    "NTOM": {**WEIGHT, **MINING},
    "ATOM": {**ATTACK, **SHARE, **MINING},
    "MinedALOE": {**ATTACK, **SHARE, **MINING},
    "Variational": {
        "beta": (None, number(0)),
        "schedule": (None, several(several(number(0, 1)))),
        "distance": (None, one_of("squared error", "cross-entropy")),
    },
}
SECTIONS = ("data", "model", "objective", "training", "evaluation")


def suggest(name: str, known: Iterable[str]) -> str:
    """What was meant, perhaps, and what there is."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}there are: {', '.join(known) or 'none'}"


def resolve(recipe: str, given: Mapping[str, Any]) -> dict[str, Section]:
    """All sections with their defaults, every value checked; nothing is loaded.

    Raises:
        ValueError: naming recipe, key, value and the fix.
    """
    for name, section in given.items():
        if name not in SECTIONS:
            raise ValueError(f"recipe {recipe}: no section [{name}]; {suggest(name, SECTIONS)}")
        if not isinstance(section, Mapping):
            raise ValueError(f"recipe {recipe}: {name} must be a section [{name}], got {section!r}")
    parts = {name: dict(given.get(name, {})) for name in SECTIONS}
    objective = named(recipe, "objective", parts["objective"], OBJECTIVES)
    model = named(recipe, "model", parts["model"], MODELS)
    kinds = {
        "data": DATA, "training": TRAINING, "evaluation": EVALUATION,
        "objective": OBJECTIVES[objective], "model": arguments(model),
    }  # fmt: skip
    settings = {name: filled(recipe, name, section, kinds[name]) for name, section in parts.items()}
    settings["objective"] = {"name": objective, **settings["objective"]}
    settings["model"] = {"name": model, **settings["model"]}
    check_together(recipe, settings)
    return settings


def recorded(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a run left them on record, with what held when there was no key for it."""
    images = settings.get("data", {})
    return (
        {**settings, "data": {"hold_out": "last", **images}}
        if isinstance(images, dict)
        else settings
    )


def named(recipe: str, section: str, given: Section, known: Iterable[str]) -> str:
    """The section's ``name``, taken out of it."""
    if "name" not in given:
        raise ValueError(f"recipe {recipe}: {section}.name is missing; {suggest('', known)}")
    name = given.pop("name")
    if name not in known:
        raise ValueError(
            f"recipe {recipe}: no {section} {name!r} ({section}.name); {suggest(str(name), known)}"
        )
    return name


def filled(
    recipe: str, section: str, given: Section, kinds: dict[str, tuple[Any, Kind]]
) -> Section:
    """The section's values, checked, with defaults for those that were left out."""
    for key in given:
        if key not in kinds:
            raise ValueError(f"recipe {recipe}: no key {section}.{key}; {suggest(key, kinds)}")
    values: Section = {}
    for key, (default, kind) in kinds.items():
        value = given.get(key, default)
        if value is NEEDED:
            raise ValueError(f"recipe {recipe}: {section}.{key} is missing; give {kind.what}")
        if value is None:
            continue
        try:
            values[key] = kind.read(value)
        except (ValueError, TypeError, ZeroDivisionError, OverflowError):
            raise ValueError(
                f"recipe {recipe}: {section}.{key} must be {kind.what}, got {value!r}"
            ) from None
    return values


def network(name: str) -> Callable[..., Any]:
    """The function that builds a network, of :mod:`robustood.models` or :mod:`robustood.generative`."""
    return getattr(generative if name in GENERATORS else models, name)


def arguments(model: str) -> dict[str, tuple[Any, Kind]]:
    """The keys of a network: the arguments of its function, but for the seed.

    Where an argument has a default, its type says what is allowed.
    """
    kinds: dict[str, tuple[Any, Kind]] = {}
    for name, parameter in inspect.signature(network(model)).parameters.items():
        if name == "seed":
            continue
        default = parameter.default
        needed = default is inspect.Parameter.empty
        kind = TEXT
        if name == "shape":
            kind = several(whole(1))
        elif isinstance(default, bool):
            kind = FLAG
        elif needed or isinstance(default, int):
            kind = whole()
        elif isinstance(default, float):
            kind = number()
        elif isinstance(default, (tuple, list)):
            kind = several(number())
        kinds[name] = (NEEDED if needed else None, kind)
    return kinds


def check_together(recipe: str, settings: dict[str, Section]) -> None:
    """Refuse values that are fine alone and not together."""
    start = f"recipe {recipe}: "
    try:
        built = objective(settings["objective"])
    except ValueError as error:
        raise ValueError(f"{start}objective: {error}") from error
    name = settings["objective"]["name"]
    if uses_outliers(built) and not settings["data"]["outliers"]:
        raise ValueError(
            f"{start}{name} learns from outliers; name a set, such as --set "
            "data.outliers=tinyimagenet:train"
        )
    images = settings["data"]
    if images.get("jpeg_everywhere") and "pairs" in images:
        raise ValueError(
            f"{start}data.jpeg_everywhere has no effect on data.pairs; leave it out, or name a pack "
            "of compressed images in data.train and data.test"
        )
    if images.get("jpeg_everywhere") and images["jpeg"] in ("auto", 0):
        raise ValueError(
            f"{start}data.jpeg_everywhere needs a quality; got data.jpeg = {images['jpeg']!r}; give "
            "one, such as --set data.jpeg=75"
        )
    model = settings["model"]
    learns = [name == "Variational", model["name"] in GENERATORS, "pairs" in settings["data"]]
    if any(learns) and not all(learns):
        raise ValueError(
            f"{start}Variational, a network such as residual_cvae, and data.pairs need one another; got "
            f"{name}, {model['name']} and data.pairs = {settings['data'].get('pairs')!r}"
        )
    if needs_reject(built) and not model.setdefault("reject", 1):
        raise ValueError(f"{start}{name} needs model.reject of at least 1, got 0; leave it out")
    if "RejectClass" in settings["evaluation"]["detectors"] and not model.get("reject"):
        raise ValueError(
            f"{start}evaluation.detectors holds RejectClass, which needs a reject output; take "
            "MSP or ODIN, or set model.reject=1"
        )
    named_sets = [settings["data"]["seen"], *settings["data"]["ood"]]
    for name in settings["evaluation"]["sets"]:
        if name not in named_sets:
            raise ValueError(
                f"{start}no set {name!r} (evaluation.sets); {suggest(name, named_sets)}"
            )
    radii = settings["evaluation"]["curve"]
    if radii != sorted(radii):
        raise ValueError(f"{start}evaluation.curve must increase, got {radii}")
    if len(set(named_sets)) < len(named_sets):
        raise ValueError(f"{start}data.seen and data.ood must name each set once, got {named_sets}")
    if settings["objective"].get("q") == "auto" and not settings["data"]["validation"]:
        raise ValueError(f'{start}objective.q="auto" needs held-out images: set data.validation')
    if settings["training"]["nesterov"] and not settings["training"]["momentum"]:
        raise ValueError(f"{start}training.nesterov needs a momentum above 0; set it to false")


def objective(given: Section) -> Objective:
    """The training rule that a section stands for.

    What the method's function in :mod:`robustood.objectives` fixes is kept unless the section says
    otherwise; ``step_size``, ``restarts``, ``mode``, ``keep`` and ``ramp`` go to its inner maxima.
    """
    name, rest = given["name"], {k: v for k, v in given.items() if k != "name"}
    make = getattr(generative if name == "Variational" else objectives, name)
    if name in ("Standard", "Adversarial", "TRADES", "Variational"):
        return make(**rest)
    built = make(**{k: rest.pop(k) for k in ("within", "steps") if k in rest})
    if mining := {k: rest.pop(k) for k in MINING if k in rest}:
        if "sample" in mining:
            mining["sample"] = mining["sample"] or None
        rest["mine"] = replace(built.mine, **mining)
    attack = {k: rest.pop(k) for k in ATTACK if k in rest}
    built = replace(built, **rest)
    for side in ("inside", "outside"):
        if attack and (inner := built.inner(getattr(built, side))):
            built = replace(built, **{side: replace(inner, **attack)})
    return built


def uses_outliers(built: Objective) -> bool:
    """Whether a training rule looks at outliers."""
    return isinstance(built, OutlierTraining) and built.weight > 0


def needs_reject(built: Objective) -> bool:
    """Whether a training rule needs an output that rejects."""
    return isinstance(built, OutlierTraining) and built.outlier_loss is objectives.to_reject


def detector(name: str, model: Any, evaluation: Section) -> detectors.Detector:
    """One detector with the recipe's settings, not yet fitted."""
    if name == "ODIN":
        return detectors.ODIN(model, evaluation["odin_temperature"], evaluation["odin_step"])
    return getattr(detectors, name)(model)
