"""Every public function against a table of bad and unusual values, one argument at a time.

What comes back is either right (the same as for the plain value), or an error of our own: raised by a ``raise`` in
``robustood/``, naming the argument and saying what to do. An error from inside another library, or a result that
differs in silence, is a failure. ``doors.py`` holds one right call of each function.
"""

import ast
import contextlib
import copy
import dataclasses
import fnmatch
import functools
import importlib
import inspect
import io
import itertools
import math
import re
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FunctionType

import doors
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import robustood
from robustood.detectors import Detector
from robustood.perturbations import Linf, PerturbationSet

PACKAGE = Path(robustood.__file__).parent
MODULES = """
artefacts attacks callables challenge checkpoints corruptions costs data detectors distributed engine evaluate
generative identity inputs losses metrics mining models objectives perturbations plotting recipes results rng sanity
smoothing streams tables toy training widgets
""".split()  # noqa: SIM905
REFUSED, SAME, EITHER, ANY = (
    "an error",
    "the same result",
    "an error or the same result",
    "anything",
)
OURS = (ValueError, TypeError, RuntimeError, KeyError, FileNotFoundError)
FIX = re.compile(
    r"must|;|there (is|are)|\buse\b|\bpass\b|\bgive\b|\bwrite\b|needs|no folder|not found"
)


# --- the public callables


def public(module):
    """The names of a module that users import: functions and classes, and the methods of these classes."""
    home = importlib.import_module(f"robustood.{module}")
    for name in getattr(home, "__all__", None) or vars(home):
        value = getattr(home, name)
        listed = "" if hasattr(home, "__all__") else f".{module}"
        own = getattr(value, "__module__", "").startswith(f"robustood{listed}")
        if name.startswith("_") or not own or not callable(value) or isinstance(value, nn.Module):
            continue
        yield f"{module}.{name}"
        if isinstance(value, type):
            for method, found in vars(value).items():
                found = getattr(found, "__func__", found)
                hidden = method.startswith("_") and method != "__call__"
                if isinstance(found, FunctionType) and not hidden:
                    yield f"{module}.{name}.{method}"


def exempt(name):
    return any(re.fullmatch(re.escape(p).replace(r"\*", r"[^.]+"), name) for p in doors.EXEMPT)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return doors.calls(doors.prepare(tmp_path_factory.mktemp("doors")))


RUNS = itertools.count()


def fresh(value):
    """A copy that a call may change."""
    if isinstance(value, dict):
        return {k: fresh(v) for k, v in value.items()}
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, Path) and value.name == "run":  # a run of its own
        return value.with_name(f"run{next(RUNS)}")
    return value if isinstance(value, (type, Figure, Axes)) else copy.deepcopy(value)


def find(name, arguments):
    """The callable of a name; a method of the object under ``self``."""
    module, first, *rest = name.split(".")
    value = getattr(importlib.import_module(f"robustood.{module}"), first)
    return getattr(arguments["self"], rest[0]) if rest else value


# --- bad and unusual values, by the kind of the argument


class Answers(nn.Module):
    """A network whose outputs are spoilt."""

    def __init__(self, inner, spoil):
        super().__init__()
        self.inner, self.spoil = inner, spoil

    def forward(self, x):
        return self.spoil(self.inner(x))


def spoilt(at, value):
    def spoil(x):
        x = x.clone() if isinstance(x, Tensor) else np.array(x, dtype=float)
        x.reshape(-1)[at] = value
        return x

    return spoil


WRONG = [
    ("None", lambda v: None, REFUSED),
    ("text", lambda v: "text", REFUSED),
    ("object", lambda v: object(), REFUSED),
]
TENSOR = [
    ("NaN inside", spoilt(1, math.nan), REFUSED),
    ("empty", lambda v: v[:0], REFUSED),
    ("requires_grad", lambda v: v.clone().requires_grad_(), SAME),
    ("float64", lambda v: v.double(), EITHER),
    ("float16", lambda v: v.half(), ANY),
    ("array", lambda v: v.numpy(), EITHER),
    ("list", lambda v: v.tolist(), EITHER),
    ("complex", lambda v: v + 0j, REFUSED),
    ("number", lambda v: 0.5, REFUSED),
]
KINDS = {
    "images": [
        *WRONG,
        *TENSOR,
        ("infinity inside", spoilt(1, math.inf), REFUSED),
        ("negative inside", spoilt(1, -0.5), REFUSED),
        ("times 255", lambda v: 255 * v, REFUSED),
        ("one image", lambda v: v[0], REFUSED),
        ("five axes", lambda v: v[None], REFUSED),
        ("uint8", lambda v: (255 * v).round().byte(), EITHER),
        ("int64", lambda v: (255 * v).long(), REFUSED),
        ("bool", lambda v: v > 0.5, REFUSED),
        ("strided", lambda v: v.transpose(2, 3).contiguous().transpose(2, 3), SAME),
    ],
    "bytes": [
        *WRONG,
        ("empty", lambda v: v[:0], REFUSED),
        ("array", lambda v: v.numpy(), EITHER),
        ("list", lambda v: v.tolist(), EITHER),
        ("number", lambda v: 5, REFUSED),
        ("one image", lambda v: v[0], REFUSED),
        ("int64", lambda v: v.long(), EITHER),
    ],
    "labels": [
        *WRONG,
        ("list", lambda v: v.tolist(), EITHER),
        ("array", lambda v: v.numpy(), EITHER),
        ("float", lambda v: v.float(), EITHER),
        ("int32", lambda v: v.int(), EITHER),
        ("bool", lambda v: v > 0, REFUSED),
        ("too few", lambda v: v[:-1], REFUSED),
        ("empty", lambda v: v[:0], REFUSED),
        ("two axes", lambda v: v[:, None], REFUSED),
        ("negative inside", spoilt(1, -1), REFUSED),
        ("number", lambda v: 1, REFUSED),
    ],
    "classes": [("too large", spoilt(1, 1000), REFUSED)],
    "tensor": [
        *WRONG,
        *TENSOR,
        ("one axis more", lambda v: v[None], REFUSED),
        ("int64", lambda v: v.long(), ANY),
    ],
    "array": [
        *WRONG,
        ("NaN inside", spoilt(1, math.nan), REFUSED),
        ("empty", lambda v: v[:0], REFUSED),
        ("list", lambda v: v.tolist(), EITHER),
        ("tensor", torch.tensor, EITHER),
        ("requires_grad", lambda v: torch.tensor(v).requires_grad_(), EITHER),
        ("complex", lambda v: v + 0j, REFUSED),
        ("number", lambda v: 0.5, REFUSED),
        ("one axis more", lambda v: v[None], REFUSED),
    ],
    "scores": [
        *WRONG,
        ("NaN inside", spoilt(1, math.nan), REFUSED),
        ("empty", lambda v: [], REFUSED),
        ("array", np.array, SAME),
        ("float32", np.float32, SAME),
        ("tensor", torch.tensor, SAME),
        ("float64", lambda v: torch.tensor(v).double(), SAME),
        ("requires_grad", lambda v: torch.tensor(v).requires_grad_(), SAME),
        ("tuple", tuple, SAME),
        ("two axes", lambda v: np.array(v)[:, None], REFUSED),
        ("complex", lambda v: np.array(v) + 0j, REFUSED),
        ("complex tensor", lambda v: torch.tensor(v) + 0j, REFUSED),
        ("texts", lambda v: ["a"] * len(v), REFUSED),
        ("Nones", lambda v: [None] * len(v), REFUSED),
        ("number", lambda v: 0.5, REFUSED),
    ],
    "number": [
        *WRONG,
        ("NaN", lambda v: math.nan, REFUSED),
        ("infinity", lambda v: math.inf, REFUSED),
        ("negative", lambda v: -1.0, REFUSED),
        ("numeral", str, REFUSED),
        ("complex", lambda v: v + 1j, REFUSED),
        ("list", lambda v: [v], REFUSED),
        ("two", lambda v: np.array([v, v]), REFUSED),
        ("float64", np.float64, SAME),
        ("float32", np.float32, SAME),
        ("tensor", torch.tensor, EITHER),
        ("requires_grad", lambda v: torch.tensor(v, requires_grad=True), EITHER),
    ],
    "count": [
        *WRONG,
        ("NaN", lambda v: math.nan, REFUSED),
        ("infinity", lambda v: math.inf, REFUSED),
        ("negative", lambda v: -1, REFUSED),
        ("fraction", lambda v: v + 0.5, REFUSED),
        ("numeral", str, REFUSED),
        ("float", float, EITHER),
        ("bool", bool, REFUSED),
        ("list", lambda v: [v], REFUSED),
        ("int64", np.int64, SAME),
        ("tensor", torch.tensor, EITHER),
        ("array", lambda v: np.array([v, v]), REFUSED),
    ],
    "choice": [
        *WRONG,
        ("misspelt", lambda v: v + "z", REFUSED),
        ("empty", lambda v: "", REFUSED),
        ("number", lambda v: 3, REFUSED),
        ("list", lambda v: [v], REFUSED),
        ("array", lambda v: np.array([1, 2]), REFUSED),
    ],
    "text": [
        ("None", lambda v: None, REFUSED),
        ("object", lambda v: object(), REFUSED),
        ("number", lambda v: 3, REFUSED),
        ("list", lambda v: [v], REFUSED),
    ],
    "name": [("unknown", lambda v: "unknown", REFUSED), ("empty", lambda v: "", REFUSED)],
    "path": [
        ("object", lambda v: object(), REFUSED),
        ("number", lambda v: 3, REFUSED),
        ("list", lambda v: [v], REFUSED),
        ("text", str, SAME),
    ],
    "read": [("missing", lambda v: v.with_name(f"missing{v.suffix}"), REFUSED)],
    "flag": [
        *WRONG,
        ("no", lambda v: "no", REFUSED),
        ("number", lambda v: 2, REFUSED),
        ("list", lambda v: [v], REFUSED),
        ("bool_", np.bool_, SAME),
    ],
    "model": [
        *WRONG,
        ("number", lambda v: 3, REFUSED),
        ("class", type, REFUSED),
        ("NaN outputs", lambda v: Answers(v, lambda z: z * math.nan), REFUSED),
        ("dict", lambda v: Answers(v, lambda z: {"logits": z}), REFUSED),
        ("one logit", lambda v: Answers(v, lambda z: z[:, :1]), REFUSED),
        ("one axis", lambda v: Answers(v, lambda z: z[:, 0]), REFUSED),
        ("fewer rows", lambda v: Answers(v, lambda z: z[:1]), REFUSED),
        ("arrays", lambda v: Answers(v, lambda z: z.detach().numpy()), REFUSED),
        ("detached", lambda v: Answers(v, lambda z: z.detach()), EITHER),
        ("wrapped", lambda v: Answers(v, lambda z: z), EITHER),
        ("function", lambda v: lambda x: v(x), EITHER),
        ("list", lambda v: [v], REFUSED),
    ],
    "detector": [
        *WRONG,
        ("number", lambda v: 3, REFUSED),
        ("class", type, REFUSED),
        ("network", lambda v: v.model, REFUSED),
        ("NaN outputs", lambda v: type(v)(Answers(v.model, lambda z: z * math.nan)), REFUSED),
        ("dict", lambda v: type(v)(Answers(v.model, lambda z: {"logits": z})), REFUSED),
        ("one axis", lambda v: type(v)(Answers(v.model, lambda z: z[:, 0])), REFUSED),
    ],
    "within": [
        *WRONG,
        ("NaN", lambda v: math.nan, REFUSED),
        ("negative", lambda v: -0.1, REFUSED),
        ("grey levels", lambda v: 8, REFUSED),
        ("class", type, REFUSED),
        ("list", lambda v: [0.1, 0.2], REFUSED),
    ],
    "linf": [("number", lambda v: v.eps, EITHER), ("float32", lambda v: np.float32(v.eps), EITHER)],
    "generator": [
        ("text", lambda v: "text", REFUSED),
        ("object", lambda v: object(), REFUSED),
        ("seed", lambda v: 0, EITHER),
        ("NumPy's", lambda v: np.random.default_rng(0), REFUSED),
        ("class", type, REFUSED),
    ],
    "rng": [
        *WRONG,
        ("seed", lambda v: 0, EITHER),
        ("torch's", lambda v: torch.Generator(), REFUSED),
    ],
    "instance": [
        *WRONG,
        ("number", lambda v: 3, REFUSED),
        ("class", type, REFUSED),
        ("list", lambda v: [v], REFUSED),
    ],
    "callable": [*WRONG, ("number", lambda v: 3, REFUSED), ("list", lambda v: [v], REFUSED)],
    "numbers": [
        *WRONG,
        ("number", lambda v: 3, REFUSED),
        ("empty", lambda v: [], REFUSED),
        ("NaN", lambda v: [math.nan, *v[1:]], REFUSED),
        ("infinity", lambda v: [math.inf, *v[1:]], REFUSED),
        ("negative", lambda v: [-1, *v[1:]], REFUSED),
        ("Nones", lambda v: [None] * len(v), REFUSED),
        ("texts", lambda v: ["a"] * len(v), REFUSED),
        ("array", np.array, EITHER),
        ("tensor", torch.tensor, EITHER),
        ("tuple", tuple, SAME),
    ],
    "names": [
        *WRONG,
        ("number", lambda v: 3, REFUSED),
        ("numbers", lambda v: [3] * len(v), REFUSED),
        ("tuple", tuple, SAME),
    ],
    "mapping": [
        *WRONG,
        ("number", lambda v: 3, REFUSED),
        ("list", lambda v: [3], REFUSED),
        ("numbers", lambda v: dict.fromkeys(v, 3), REFUSED),
        ("Nones", lambda v: dict.fromkeys(v), REFUSED),
    ],
    "device": [
        ("text", lambda v: "text", REFUSED),
        ("number", lambda v: -3, REFUSED),
        ("object", lambda v: object(), REFUSED),
        ("device", torch.device, SAME),
    ],
    "anything": [(label, make, ANY) for label, make, _ in WRONG],
}
READ = {
    "data.read_pack",
    "data.folder",
    "data.folder_of_views",
    "checkpoints.load_weights",
    "checkpoints.read_json",
    "results.load",
}
FREE = {
    "by",
    "fix",
    "label",
    "alt",
    "html",
    "source",
    "text",
    "name",
    "ids",
}  # texts of any content


HOLDERS = ("smoothing.Smoothed", "sanity.zoo")  # hold a network without running it


def kinds(name, argument, value, parameter):
    """Which lists of values an argument is tried with."""
    annotation = str(parameter.annotation) if parameter else ""
    if name.startswith("callables."):
        return ["anything"]
    if argument in ("path", "root", "folder", "run_dir") or isinstance(value, Path):
        return ["path", "read"] if name in READ and argument in ("path", "folder") else ["path"]
    if argument == "device":
        return ["device"]
    if isinstance(value, bool):
        return ["flag"]
    if argument.startswith("scores") or (argument == "clean" and isinstance(value, list)):
        return ["mapping"] if isinstance(value, dict) else ["scores"]
    if isinstance(value, Detector):
        return ["detector"]
    if isinstance(value, nn.Module):
        runs = name.split(".")[0] in ("attacks", "evaluate", "mining", "sanity", "smoothing")
        return ["model"] if runs and name not in HOLDERS else ["instance"]
    if isinstance(value, torch.Generator):
        return ["generator"]
    if isinstance(value, np.random.Generator):
        return ["rng"]
    if isinstance(value, Linf):
        return ["within", "linf"]
    if isinstance(value, PerturbationSet):
        return ["within"]
    if isinstance(value, Tensor):
        if value.dtype == torch.uint8:
            return ["bytes"]
        if not value.is_floating_point():
            return ["labels", "classes"] if argument == "y" else ["labels"]
        return ["images"] if value.ndim == 4 else ["tensor"]
    if isinstance(value, np.ndarray):
        return ["array"]
    if isinstance(value, int) and "float" not in annotation:
        return ["count"]
    if isinstance(value, (int, float)):
        return ["number"]
    if isinstance(value, str):
        return (
            ["text"]
            if argument in FREE
            else ["text", "name"]
            if "Literal" not in annotation
            else ["choice"]
        )
    if isinstance(value, dict):
        return ["mapping"]
    if isinstance(value, (list, tuple)) and value:
        return (
            ["names"]
            if isinstance(value[0], str)
            else ["numbers"]
            if isinstance(value[0], (int, float))
            else ["instance"]
        )
    if dataclasses.is_dataclass(value) or isinstance(value, list):
        return ["instance"]
    return ["callable"] if callable(value) else []


ALIASES = {
    "clean": ("scores_in", "scores"),
    "detector": ("model",),
    "inner": ("within", "eps"),
    "inside": ("within", "eps"),
    "known": ("list",),
    "model": ("layer", "network"),
    "model_or_detector": ("detector", "model", "network", "y"),
    "name": ("set", "recipe"),
    "outliers": ("x",),
    "outside": ("within", "eps"),
    "pool": ("x",),
    "x_in": ("x",),
    "x_out": ("x",),
    "name_or_path": ("recipe",),
    "split": ("set",),
    "radii": ("radius", "eps"),
    "views": ("labels",),
    "within": ("eps", "perturbation set"),
    "x": (
        "y",
        "at",
        "batch",
        "lower",
    ),  # where two arguments do not fit together, either may be named
}
# What a value may give beside the table's: by function and argument, or by argument alone.
HELD = {  # by a container: judged by what reads it, as `fit` does
    **dict.fromkeys(
        ("NaN inside", "infinity inside", "negative inside", "times 255", "complex"), ANY
    ),
    **dict.fromkeys(
        ("uint8", "int64", "bool", "too large", "two axes", "one image", "five axes"), ANY
    ),
    "empty": ANY,
}
VECTORS = {"negative inside": ANY, "times 255": ANY}  # no set says that there is a box
SIGNED = {"negative": ANY}
ARRAYS = {"list": ANY, "two": ANY}  # an array for an array
ENDLESS = {"infinity": ANY}
ACCEPTED = {
    # a score stands in an attack's loop: kinds are refused, values are judged by what attacks and measures
    **{
        f"detectors.{kind}.{method}.x": HELD | {"uint8": EITHER, "int64": REFUSED, "bool": REFUSED}
        for kind in doors.DETECTORS
        for method in ("attack_objectives", "paper_score", "score")
    },
    **{f"detectors.{kind}.fit.x": VECTORS for kind in doors.DETECTORS},
    **{f"detectors.{kind}.fit.y": {"too large": ANY} for kind in doors.DETECTORS},
    "plotting.band.label": {"number": ANY},  # a legend shows numbers as they are
    "detectors.PRO.base": {
        "NaN outputs": ANY,
        "dict": ANY,
        "one axis": ANY,
    },  # it does not score yet
    "detectors.Mahalanobis.combine.x": VECTORS,
    "detectors.Mahalanobis.combine.outliers": VECTORS,
    "detectors.post_hoc.x": VECTORS,
    "detectors.post_hoc.y": {"too large": ANY},
    "evaluate.scores.x": VECTORS,
    # inputs that are no pixels are a finding
    **{f"sanity.check.{part}": VECTORS for part in ("x", "y")},
    **{f"sanity.Defence.check.{part}": VECTORS for part in ("x", "outliers")},
    "sanity.check.threshold": SIGNED,
    "attacks.maximise.objective": {"list": ANY},
    # inputs of any shape; a wider dtype draws other initial points
    "attacks.maximise.x": {"float64": ANY, "one image": ANY, "five axes": ANY},
    "evaluate.four_sides.within": {"float32": ANY},  # told with all its digits
    "evaluate.surrogate.detector": {"NaN outputs": ANY, "dict": ANY, "one axis": ANY},
    "smoothing.certified_accuracy.y": {"too large": ANY},
    "smoothing.lower_bound.hits": {"too few": ANY},
    "smoothing.mean_bound.mean": {"one axis more": ANY},
    **{f"smoothing.{f}.at": VECTORS for f in ("certified_score", "certify", "predict", "votes")},
    **{
        f"smoothing.{f}.{end}": VECTORS
        for f in ("interval_bounds", "margin_bounds", "worst_cross_entropy")
        for end in ("lower", "upper")
    },
    "mining.margins.pool": VECTORS,
    "mining.mine.pool": VECTORS,
    "objectives": {"number": ANY, "float32": ANY},
    "data.Data.notes": {"numbers": ANY},
    "data.folder.split": {"unknown": ANY, "empty": ANY},
    "engine.Engine.measured": {"numbers": ANY},
    "models.Normalise.mean": SIGNED,
    "models.mlp.hidden": {"empty": ANY},
    "recipes.read.plan": {"empty": ANY},
    "models.frozen.model": {"*": ANY},  # what is no network passes through
    "data.Data.compressed": HELD | {"empty": REFUSED, "one image": REFUSED, "five axes": REFUSED},
    "data.Data.outliers": HELD,
    "data.light_grid.azimuths": SIGNED,
    "data.light_grid.warmths": SIGNED,
    "data.pixels.images": HELD,
    **{
        f"data.{name}.{part}": HELD | {"empty": REFUSED, "one image": REFUSED, "five axes": REFUSED}
        for name in ("Drawn", "Pairs", "Split", "Views")
        for part in ("x", "y")
    },
    "data.Views.views": HELD,
    "data.Views.of.views": HELD,
    **{
        f"data.{name}.labels": {"negative inside": ANY, "bool": ANY}
        for name in ("Drawn", "Pairs", "Views", "Views.of")
    },
    "data.draw.augment": {"class": REFUSED},
    "metrics.acceptance.threshold": SIGNED | ENDLESS,
    "perturbations.L2.box": SIGNED,
    "perturbations.Latent.box": SIGNED,
    "perturbations.Linf.box": SIGNED,
    "perturbations.Spatial.grid.points": {"number": ANY},
    "plotting.band.x": SIGNED,
    "plotting.image_grid.images": {"five axes": REFUSED},
    "plotting.score_histograms.bins": SIGNED | {"number": ANY},  # edges, or how many bins
    "toy.TsiprasDistribution.answer.t": ENDLESS,
    "toy.TsiprasDistribution.bound.delta": ARRAYS,
    "toy.TsiprasDistribution.frontier.t": ARRAYS | ENDLESS,
    "toy.TsiprasDistribution.gap.t": ARRAYS | ENDLESS,
    "toy.TsiprasDistribution.linear_accuracy.bias": SIGNED,
    "toy.TsiprasDistribution.symmetric_accuracy.t": ARRAYS | ENDLESS,
    "toy.adversarial_linear.y": {"negative inside": ANY},
    "toy.phi.x": SIGNED | ARRAYS,
    "toy.population_hinge.s": ARRAYS,
    "toy.population_hinge.w1": SIGNED | ARRAYS,
    "training.fit.minutes": ENDLESS,
    "widgets.explore.a": {
        "*": ANY,
        "None": REFUSED,
        "number": REFUSED,
        "object": REFUSED,
        "empty": REFUSED,
    },
    "widgets.live.a": {
        "*": ANY,
        "None": REFUSED,
        "number": REFUSED,
        "object": REFUSED,
        "empty": REFUSED,
    },
}


def tries(name, arguments):
    """(argument, label, make, accepted) for each value that an argument is tried with."""
    function = find(name, arguments)
    parameters = inspect.signature(function).parameters
    swallows = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument, value in given(name, arguments).items():
        parameter = parameters.get(argument)
        optional = parameter and ("None" in str(parameter.annotation) or parameter.default is None)
        for kind in kinds(name, argument, value, parameter):
            for label, make, accepted in KINDS[kind]:
                if label == "None" and optional:
                    accepted = ANY
                own = ACCEPTED.get(f"{name}.{argument}", {}) | ACCEPTED.get(name.split(".")[0], {})
                yield argument, label, make, own.get(label, own.get("*", accepted))
    if parameters and not (swallows and name in TAKES_NAMES):
        yield list(given(name, arguments))[-1], "misspelt", None, REFUSED


TAKES_NAMES = {"widgets.explore", "widgets.live", "checkpoints.save_weights", "plotting.band"}


def given(name, arguments):
    """The arguments of the right call, and what else has a value by default."""
    parameters = inspect.signature(find(name, arguments)).parameters
    defaults = (
        {p.name: p.default for p in parameters.values() if p.default not in (p.empty, None)}
        if parameters
        else {}
    )
    return {**defaults, **{k: v for k, v in arguments.items() if k != "self"}}


# --- what came back


def outcome(name, arguments):
    """The result of a call, with iterators and contexts run through."""
    torch.manual_seed(0)
    function = find(name, arguments)
    result = function(**{k: v for k, v in arguments.items() if k != "self"})
    if isinstance(result, AbstractContextManager) and not isinstance(result, (nn.Module, Path)):
        with result:
            return None
    return list(result) if isinstance(result, Iterator) else result


def same(a, b, exact=False):
    """Whether two results are equal, up to the rounding of another number type."""
    if isinstance(a, nn.Module) or isinstance(b, nn.Module):
        return type(a) is type(b) and same(dict(a.state_dict()), dict(b.state_dict()))
    if isinstance(a, (Tensor, np.ndarray, float, int, np.number)) and not isinstance(a, bool):
        if not isinstance(b, (Tensor, np.ndarray, float, int, np.number)):
            return False
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        if both and a.dtype == b.dtype and torch.equal(a, b):
            return True
        a, b = (
            np.asarray(v.detach() if isinstance(v, Tensor) else v, dtype=np.float64) for v in (a, b)
        )
        return a.shape == b.shape and np.allclose(a, b, rtol=2e-3, atol=2e-4, equal_nan=True)
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        if type(a) is not type(b):
            return False
        mine, other = ({f.name: getattr(v, f.name) for f in dataclasses.fields(a)} for v in (a, b))
        return same(mine, other)
    if isinstance(a, dict):
        timed = {"seconds"}
        return (
            isinstance(b, dict)
            and a.keys() == b.keys()
            and all(same(a[k], b[k]) for k in a.keys() - timed)
        )
    if isinstance(a, (list, tuple)):
        b = b.tolist() if isinstance(b, (Tensor, np.ndarray)) else b
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    if a is None or isinstance(a, (str, bool, bytes, Path, torch.device, torch.dtype)):
        return a == b
    return type(a) is type(b)


def own_error(error):
    """Whether an error was raised by a ``raise`` of ours."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, OURS) or PACKAGE not in Path(frame.filename).parents:
        return False
    tree = parsed(frame.filename)
    return any(node.lineno <= frame.lineno <= node.end_lineno for node in tree)


@functools.cache
def parsed(file):
    tree = ast.parse(Path(file).read_text("utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]


def verdict(name, table, argument, label, make, accepted, reference):
    """What is wrong with the outcome; empty where nothing is."""
    arguments = fresh(table[name])
    if make is None:
        arguments[argument + "z"] = arguments.pop(argument, None)
    else:
        arguments[argument] = make(given(name, arguments)[argument])
    where = f"{name}({argument}: {label})"
    try:
        result = outcome(name, arguments)
    except Exception as error:
        says = f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
        if make is None:
            function = find(name, arguments)
            family = function.__mro__ if isinstance(function, type) else (function,)
            named = any(one.__name__ in str(error) for one in family)
            # ADV(..) and its like hand on to OutlierTraining(..) at once
            named |= name.startswith("objectives.") and "OutlierTraining" in str(error)
            ours = own_error(error) or (isinstance(error, TypeError) and named)
            return "" if f"'{argument}z'" in str(error) and ours else f"{where}: {says}"
        if accepted == SAME:
            return f"{where} should work: {says}"
        if not own_error(error):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"{where}: raw {says} [{Path(frame.filename).name}:{frame.lineno}]"
        if accepted == ANY:
            return ""
        if not any(
            re.search(rf"\b{re.escape(n)}\b", str(error))
            for n in (argument, *ALIASES.get(argument, ()))
        ):
            return f"{where}: does not name it: {says}"
        return "" if FIX.search(str(error)) else f"{where}: does not help: {says}"
    if accepted == REFUSED:
        return f"{where} is not refused: {result!r:.80}".replace("\n", " ")
    return (
        ""
        if accepted == ANY or same(reference, result)
        else f"{where}: another result: {result!r:.80}"
    )


# --- the tests


def test_every_public_callable_is_swept_or_exempt_with_a_reason(table):
    names = {name for module in MODULES for name in public(module)}
    swept = set(table)
    missing = sorted(name for name in names - swept if not exempt(name))
    assert not missing, f"add a right call to doors.calls, or a reason to doors.EXEMPT: {missing}"
    assert not (both := sorted(filter(exempt, swept))), f"swept and exempt: {both}"
    stale = [p for p in doors.EXEMPT if not fnmatch.filter(names, p)]
    assert not stale, f"patterns that match nothing: {stale}"


@pytest.fixture
def drawing_as_before():
    """``plotting.use_style`` is swept too; what comes after must not be drawn by it."""
    with matplotlib.rc_context():
        yield
    plt.close("all")


@pytest.mark.parametrize("name", sorted(doors.calls(Path("nowhere"))))
def test_what_comes_back_is_right_or_an_error_of_our_own(untyped, drawing_as_before, table, name):
    arguments = table[name]
    reference = outcome(name, fresh(arguments))
    assert same(reference, outcome(name, fresh(arguments))), (
        f"{name} gives another result each time"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        found = [verdict(name, table, *one, reference) for one in tries(name, arguments)]
    bad = "\n".join(filter(None, found))
    assert not bad, bad


def test_thousands_of_values_are_tried(table):
    count = sum(len(list(tries(name, arguments))) for name, arguments in table.items())
    assert count >= 5000, f"{count} values are tried"
