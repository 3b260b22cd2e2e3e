"""What tells one run from another: each part counts, nothing else does, and what cannot be told is refused."""

import copy
import dataclasses
import datetime
import enum
import functools
import json
import logging
import os
import re
import subprocess
import sys
import threading
import types
import weakref
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robustood import identity as module
from robustood import objectives
from robustood.attacks import pgd
from robustood.data import Augment, digits
from robustood.detectors import KNN, MSP, ODIN, Detector, Energy, Mahalanobis, MaxLogit, RejectClass
from robustood.engine import Engine
from robustood.evaluate import attack_score, epsilon_curve, four_sides, ood_report
from robustood.identity import check_identity, describe, identity
from robustood.models import preact_resnet18, small_cnn
from robustood.objectives import ALOE, ATOM, OutlierTraining, Standard
from robustood.perturbations import L2, FiniteSubset, Linf
from robustood.smoothing import Smoothed
from robustood.training import fit

LEVEL = 1.0  # globals that functions below read
TABLE = {"a": [1, 2]}
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


def of(value):
    return identity(value=value)


def differ(a, b):
    """The paths that differ."""
    a, b = of(a), of(b)
    return {key for key in a | b if a.get(key) != b.get(key)}


# --- users' own things


class Own(Detector):
    """A detector as a reader writes it: plain attributes."""

    def __init__(self, model, slope=1.0):
        super().__init__(model)
        self.slope = slope

    def score(self, x):
        return self.slope * self.logits(x).amax(1)

    paper_score = score


class Leaky(nn.Module):
    """A network with a number that is no tensor."""

    def __init__(self, slope):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.slope = nn.Linear(64, 10), slope

    def forward(self, x):
        z = self.layer(x.flatten(1))
        return torch.where(z > 0, z, self.slope * z)


def convolutions(stride=1, p=0.5, slope=0.01):
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(2)
    layers = [nn.Conv2d(1, 4, 3, stride), nn.LeakyReLU(slope), nn.Dropout(p), pool, nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 10))


def written(source, name="objective", **scope):
    """A function or class as a cell of a notebook defines it."""
    exec(source, scope := {"__name__": "__main__", "torch": torch, "nn": nn, **scope})
    return scope[name]


def closing(value):
    def attack(detector, x, within, **how):
        return attack_score(detector, x, within, steps=1, **how) * 1.0 if value else x

    return attack


# --- reports


@pytest.fixture(scope="module")
def sets(book):
    return book.test.x[:40], {"noise": book.ood["noise"][:30]}


DETECTORS = {
    "class": (MSP, MaxLogit, r"detector = \S+MSP of model, not \S+MaxLogit of model"),
    "energy": (lambda net: Energy(net, 1.0), lambda net: Energy(net, 100.0),
               r"detector\.temperature = 1\.0, not 100\.0"),
    "odin temperature": (lambda net: ODIN(net, 1000.0), lambda net: ODIN(net, 2.0),
                         r"detector\.temperature = 1000\.0, not 2\.0"),
    "odin step": (lambda net: ODIN(net, step=0.01), lambda net: ODIN(net, step=0.0),
                  r"detector\.step = 0\.01, not 0\.0"),
    "own": (Own, lambda net: Own(net, -2.0), r"detector\.slope = 1\.0, not -2\.0"),
    "slope": (lambda net: MSP(Leaky(0.1)), lambda net: MSP(Leaky(0.9)),
              r"detector\.model\.slope = 0\.1, not 0\.9"),
    "leaky": (lambda net: MSP(convolutions()), lambda net: MSP(convolutions(slope=0.5)),
              r"detector\.model\.1\.negative_slope = 0\.01, not 0\.5"),
    "dropout": (lambda net: MSP(convolutions()), lambda net: MSP(convolutions(p=0.1)),
                r"detector\.model\.2\.p = 0\.5, not 0\.1"),
    "stride": (lambda net: MSP(convolutions()), lambda net: MSP(convolutions(stride=2)),
               r"detector\.model\.0\.stride = \(1, 1\), not \(2, 2\)"),
    "sigma": (lambda net: MSP(Smoothed(net, L2(1.0), 0.1, 4)),
              lambda net: MSP(Smoothed(net, L2(1.0), 0.5, 4)),
              r"detector\.model\.noise\.sigma = 0\.1, not 0\.5"),
    "draws": (lambda net: MSP(Smoothed(net, L2(1.0), 0.5, 4)),
              lambda net: MSP(Smoothed(net, L2(1.0), 0.5, 2)),
              r"detector\.model\.draws = 4, not 2"),
    "seed": (lambda net: MSP(Smoothed(net, L2(1.0), 0.5, 4)),
             lambda net: MSP(Smoothed(net, L2(1.0), 0.5, 4, seed=1)),
             r"detector\.model\.seed = 0, not 1"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:without any attack the AUROC is below one half")
@pytest.mark.parametrize("case", DETECTORS)
def test_another_detector_never_reads_the_first_one_s_scores(net, sets, tmp_path, case):
    first, second, words = DETECTORS[case]
    one = ood_report(first(net), *sets, run_dir=tmp_path / "a")
    with pytest.raises(ValueError, match=rf"^run_dir 'a' holds a report with {words}; use"):
        ood_report(second(net), *sets, run_dir=tmp_path / "a")
    two = ood_report(second(net), *sets, run_dir=tmp_path / "b")
    assert two.rows == ood_report(second(net), *sets).rows
    if case != "dropout":  # which does nothing in eval mode
        assert not np.array_equal(one.scores["in"], two.scores["in"])
    assert ood_report(first(net), *sets, run_dir=tmp_path / "a") == one


@pytest.mark.filterwarnings("ignore:without any attack the AUROC is below one half")
def test_a_temperature_that_turns_the_ranking_round_is_seen(tmp_path):
    """Large logits speak for outliers at one temperature and against them at another."""
    inside, outside = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[4.0, 4.0, 4.0]])
    x = {k: (v / 5).repeat(20, 1) for k, v in (("in", inside), ("out", outside))}

    def auroc(temperature, folder):
        detector = Energy(Times(5.0), temperature)
        return float(
            ood_report(detector, x["in"], {"o": x["out"]}, run_dir=tmp_path / folder)["o"]["auroc"]
        )

    assert auroc(0.1, "cold") == 1.0
    assert auroc(100.0, "hot") == 0.0
    with pytest.raises(ValueError, match=r"detector\.temperature = 0\.1, not 100\.0"):
        auroc(100.0, "cold")


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda net, x, y, other: KNN(net, 20 if other else 5).fit(x, y),
            r"detector\.k = 5, not 20",
        ),
        (
            lambda net, x, y, other: Mahalanobis(net, step=0.01 if other else 0.0).fit(x, y),
            r"detector\.step = 0\.0, not 0\.01",
        ),
        (
            lambda net, x, y, other: KNN(net, 5).fit(x[other:], y[other:]),
            r"detector\.\w+ = torch\.float32 \(100, 64\) \w+, not torch\.float32 \(99, 64\) \w+",
        ),
    ],
    ids=["k", "step", "bank"],
)
def test_fitted_detectors_are_told_apart(net, book, sets, tmp_path, make, words):
    x, y = book.train.x[:100], book.train.y[:100]
    first = ood_report(make(net, x, y, False), *sets, run_dir=tmp_path)
    with pytest.raises(ValueError, match=words):
        ood_report(make(net, x, y, True), *sets, run_dir=tmp_path)
    assert ood_report(make(net, x, y, False), *sets, run_dir=tmp_path) == first


CALLED = "def attack(detector, x, within, **how):\n    return (x + {0}).clamp(0, 1)\n"
ATTACKS = {
    "lambda": (lambda: lambda d, x, w, **how: x * 0.5, lambda: lambda d, x, w, **how: x * 0.6,
               r"attack\.__code__ = code \S+ \w+, not code \S+ \w+"),
    "partial": (lambda: partial(attack_score, steps=1), lambda: partial(attack_score, steps=2),
                r"attack\.steps = 1, not 2"),
    "redefined": (lambda: written(CALLED.format("0.1"), "attack"),
                  lambda: written(CALLED.format("0.2"), "attack"), r"attack\.__code__ = "),
    "global": (lambda: written(CALLED.format("LEVEL"), "attack", LEVEL=0.1),
               lambda: written(CALLED.format("LEVEL"), "attack", LEVEL=0.2),
               r"attack\.LEVEL = 0\.1, not 0\.2"),
    "closure": (lambda: closing(True), lambda: closing(False), r"attack\.value = True, not False"),
    "default": (lambda: lambda d, x, w, k=0.5, **how: x * k, lambda: lambda d, x, w, k=0.7, **how: x * k,
                r"attack\.k = 0\.5, not 0\.7"),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTACKS)
def test_another_attack_never_reads_the_first_one_s_scores(net, sets, tmp_path, case):
    first, second, words = ATTACKS[case]
    run = partial(ood_report, MSP(net), *sets, Linf(0.1), side="out")
    one = run(attack=first(), run_dir=tmp_path)
    with pytest.raises(ValueError, match=words):
        run(attack=second(), run_dir=tmp_path)
    assert run(attack=first(), run_dir=tmp_path).rows == one.rows
    assert run(attack=second(), run_dir=tmp_path / "b").rows == run(attack=second()).rows


def test_sets_inputs_and_settings_of_the_attack_are_compared(net, sets, tmp_path):
    x_in, x_out = sets
    run = partial(ood_report, MSP(net), x_in, side="out", run_dir=tmp_path, restarts=1)
    run(x_out, Linf(0.1), steps=1)
    for given_, words in [
        ((x_out, Linf(0.2)), r"within\.eps = 0\.1, not 0\.2"),
        ((x_out, L2(0.1)), r"within = robustood\S+Linf, not robustood\S+L2"),
        (({"noise": x_out["noise"] * 0.9}, Linf(0.1)), r"x_out\['noise'\] = torch\.float32 \(30, "),
        (({"other": x_out["noise"]}, Linf(0.1)), r"x_out\['other'\] = nothing, not "),
    ]:
        with pytest.raises(ValueError, match=words):
            run(*given_, steps=1)
    with pytest.raises(ValueError, match=r"how\['steps'\] = 1, not 2"):
        run(x_out, Linf(0.1), steps=2)
    run(x_out, Linf(0.1), steps=1)


# --- what cannot be identified


class Logging(Own):
    def __init__(self, model, log, slope=1.0):
        super().__init__(model, slope)
        self.log = log


OPAQUE = {
    "file": lambda: Path(__file__).open(),  # noqa: SIM115
    "generator": lambda: (i for i in range(3)),
    "lock": threading.Lock,
    "frame": sys._getframe,
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_refused_named_and_resumed(net, sets, tmp_path, kind):
    folder = tmp_path / "run"
    run = lambda slope=1.0, **how: ood_report(
        Logging(net, OPAQUE[kind](), slope), *sets, run_dir=folder, **how
    )
    with pytest.raises(ValueError, match=r'^detector\.log is a .* pass name="\.\.\."') as refusal:
        run()
    assert not ADDRESS.search(str(refusal.value))
    assert not folder.exists()
    first = run(name="quiet")
    assert run(name="quiet") == first
    with pytest.raises(ValueError, match="with name = 'quiet', not 'loud'; use the former"):
        run(name="loud")
    with pytest.raises(ValueError, match="with name = 'quiet', not None; use the former"):
        run()
    with pytest.raises(
        ValueError, match=r"detector\.slope = 1\.0, not 2\.0"
    ):  # a name is no excuse
        run(2.0, name="quiet")
    assert run(name="quiet") == first


def test_without_a_folder_nothing_needs_a_name(net, sets):
    assert ood_report(Logging(net, sys._getframe()), *sets).rows


def test_a_name_goes_through_every_door(net, sets, tmp_path):
    x_in, x_out = sets
    detector = Logging(net, threading.Lock())
    how = {"steps": 1, "restarts": 1, "targets": 0, "name": "mine"}
    sides = four_sides(detector, x_in, x_out, Linf(0.1), run_dir=tmp_path / "a", **how)
    again = four_sides(detector, x_in, x_out, Linf(0.1), run_dir=tmp_path / "a", **how)
    assert sides == again
    curve = partial(epsilon_curve, detector, x_in, x_out["noise"], Linf(0.1), [0.0, 0.1])
    assert curve(run_dir=tmp_path / "b", **how) == curve(**how)


def test_what_the_run_itself_changed_can_be_set_back(net, sets, tmp_path):
    calls = []

    def attack(detector, x, within, **how):
        calls.append(len(x))
        return x

    run = partial(
        ood_report, MSP(net), *sets, Linf(0.1), side="out", attack=attack, run_dir=tmp_path
    )
    first = run()
    with pytest.raises(ValueError, match=r"attack\.calls = \[\], not \[30\]; use the former"):
        run()
    calls.clear()
    assert run().rows == first.rows and calls == []


def test_code_of_another_python_asks_for_a_name(net, sets, tmp_path, monkeypatch):
    shrink = lambda d, x, within, **how: x * 0.5
    run = partial(ood_report, MSP(net), *sets, Linf(0.1), side="out", attack=shrink)
    named, bare = (run(run_dir=tmp_path / n, name=n or None) for n in ("n", ""))
    monkeypatch.setattr(module, "_COMPILER", "another-1")
    with pytest.raises(ValueError, match=r"compiled by another Python; a run with a name would"):
        run(run_dir=tmp_path)
    assert run(run_dir=tmp_path / "n", name="n").rows == named.rows == bare.rows


def test_states_of_an_earlier_version_are_refused(net, sets, tmp_path):
    from robustood.checkpoints import read_state, write_state

    ood_report(MSP(net), *sets, run_dir=tmp_path)
    state = read_state(tmp_path / "scores.state")
    del state["identity"]
    write_state(tmp_path / "scores.state", state)
    with pytest.raises(ValueError, match="holds a report of an earlier version"):
        ood_report(MSP(net), *sets, run_dir=tmp_path)


# --- training


OBJECTIVE = "def objective(model, batch):\n    return {0} * model(batch.x).square().mean()\n"
CHANGED = {
    "function": ("objective", lambda v: written(OBJECTIVE.format(1.0 + v)), r"objective\.__code__"),
    "closure": ("objective", lambda v: lambda model, batch: model(batch.x).mean() * v,
                r"objective\.v = 0, not 1"),
    "weight": ("objective", lambda v: OutlierTraining(weight=0.5 + v),
               r"objective\.weight = 0\.5, not 1\.5"),
    "loss": ("objective", lambda v: OutlierTraining(outlier_loss=lambda z: z.mean(1) * (v and 2)),
             r"objective\.outlier_loss\.v = 0, not 1"),
    "augment": ("augment", lambda v: Augment(crop=v), r"augment\.crop = 0, not 1"),
    "own augment": ("augment", lambda v: lambda x, generator: x if v else x * 0.5,
                    r"augment\.v = 0, not 1"),
    "momentum": ("optimiser", lambda v: lambda p, **how: torch.optim.SGD(p, momentum=v / 2, **how),
                 r"optimiser\.groups\[0\]\['momentum'\] = 0\.0, not 0\.5"),
    "network": ("model", lambda v: Leaky(v / 2), r"model\.slope = 0\.0, not 0\.5"),
    "milestones": ("milestones", lambda v: [0.5 + v / 4], r"milestones = \[0\.5\], not \[0\.75\]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def few():
    return digits(train=64)


@pytest.mark.parametrize("case", CHANGED)
def test_training_never_goes_on_with_another_run(few, tmp_path, case):
    what, make, words = CHANGED[case]

    def run(value, **how):
        given_ = {"model": small_cnn(), "objective": Standard(), what: make(value)} | how
        history = fit(data=few, epochs=1, run_dir=tmp_path, **given_)
        return nn.utils.parameters_to_vector(given_["model"].parameters()), history.rows

    weights, rows = run(0)
    with pytest.raises(ValueError, match=rf"holds a run with {words}"):
        run(1)
    again, read = run(0)
    assert torch.equal(weights, again) and rows == read


def test_frozen_layers_make_another_run(few, tmp_path):
    fit(small_cnn(), Standard(), few, epochs=1, run_dir=tmp_path)
    model = small_cnn()
    model.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"held = \[\], not \['head\.weight', 'head\.bias'\]"):
        fit(model, Standard(), few, epochs=1, run_dir=tmp_path)


def test_a_named_training_run_is_resumed(few, tmp_path):
    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.file = Path(__file__).open()  # noqa: SIM115

        def __call__(self, model, batch):
            return nn.functional.cross_entropy(model(batch.x), batch.y)

    run = lambda **how: fit(small_cnn(), Noted(), few, epochs=1, run_dir=tmp_path / "a", **how)
    with pytest.raises(ValueError, match=r'^objective\.file is a _io\.TextIOWrapper .*name="'):
        run()
    assert not (tmp_path / "a").exists()
    assert run(name="one").rows == run(name="one").rows


# --- what counts, and what does not


@dataclasses.dataclass
class Settings:
    eps: float = 0.1
    names: tuple = ("a", "b")
    loss: object = nn.functional.cross_entropy
    seen: int = dataclasses.field(default=0, compare=False)


class Mode(enum.Enum):
    FAST, SLOW = 1, 2


class Slots:
    __slots__ = ("__inner", "outer")

    def __init__(self, inner, outer=0):
        self.__inner, self.outer = inner, outer


class Cached:
    def __init__(self, base):
        self.base = base

    @functools.cached_property
    def twice(self):
        return 2 * self.base


class Numbers(list):
    unit = "px"


def reader(batch):
    return TABLE["a"], batch.LEVEL


def tensor(*values):
    return torch.tensor(values)


BUILT = {
    "numbers": lambda: [1, 1.5, True, None, 1j, b"b", ..., float("nan"), 10**5000],
    "long text": lambda: "words " * 1000,
    "sets": lambda: {"b", "a", ("c", 1), frozenset({1, 2})},
    "dict": lambda: {"a": 1, ("b", 2): [tensor(1.0)], Mode.FAST: 0},
    "dataclass": Settings,
    "enum": lambda: Mode.SLOW,
    "slots": lambda: Slots(3),
    "list subclass": lambda: Numbers([1, 2]),
    "array": lambda: np.arange(6.0).reshape(2, 3),
    "object array": lambda: np.array([{"a": 1}, None], dtype=object),
    "numpy scalar": lambda: np.float32(0.1),
    "bfloat": lambda: torch.ones(3, dtype=torch.bfloat16),
    "empty": lambda: torch.ones(0, 3),
    "scalar": lambda: torch.tensor(2),
    "generator": lambda: torch.Generator().manual_seed(3),
    "numpy generator": lambda: np.random.default_rng(3),
    "fraction": lambda: Fraction(1, 3),
    "path": lambda: Path("a") / "b",
    "pattern": lambda: re.compile("a+"),
    "logger": lambda: logging.getLogger("a"),
    "things of libraries": lambda: [torch.float32, torch.device("cpu"), torch.relu, np.sin, len,
                                    nn.functional.conv2d, str.upper, torch.Tensor.add, nn.Linear, os],
    "bound": lambda: [nn.Identity().forward, [1].append, partial(pgd, steps=3)],
    "duration": lambda: datetime.timedelta(3),
    "function": lambda: lambda x, k=2: x * k,
    "local class": lambda: written("class A(nn.Module):\n    k = 1\n    def f(self): return super()\n", "A")(),
    "slotted": lambda: types.SimpleNamespace(a=1),
    "network": small_cnn,
    "recurrent": lambda: (torch.manual_seed(0), nn.LSTM(3, 3))[1],
    "detector": lambda: ODIN(small_cnn()),
    "smoothed": lambda: Smoothed(small_cnn(), L2(1.0), 0.5),
    "objectives": lambda: [ALOE(0.1), ATOM(0.1), objectives.SOFL(), objectives.CCU(), Standard()],
    "members": lambda: FiniteSubset(Linf(0.1), torch.zeros(3, 4)),
    "cache": lambda: functools.lru_cache(pgd),
    "weak": lambda: weakref.ref(nn.Linear),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT)
def test_built_again_it_is_the_same(name):
    first, second = of(BUILT[name]()), of(BUILT[name]())
    assert first == second and list(first) == list(second)
    assert not any(module._UNKNOWN in text or ADDRESS.search(text) for text in first.values())
    assert first != of(None)


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=4)
    | st.lists(st.integers()) | st.tuples(st.floats()) | st.sets(st.integers())
    | st.dictionaries(st.text(), st.integers())
)  # fmt: skip


@given(VALUES, VALUES)
def test_two_values_are_the_same_exactly_if_they_read_alike(a, b):
    for holder in (lambda v: v, partial(Settings, 0.1), Slots, Cached, lambda v: lambda: v):
        assert of(holder(a)) == of(holder(copy.deepcopy(a)))
        alike = (type(a), repr(sorted(a) if type(a) is set else a)) == (
            type(b),
            repr(sorted(b) if type(b) is set else b),
        )
        assert (of(holder(a)) == of(holder(b))) == alike


def test_each_part_counts():
    assert differ(Settings(), Settings(eps=0.2)) == {"value.eps"}
    assert differ(Settings(), Settings(names=("a", "c"))) == {"value.names"}
    assert differ(Settings(), Settings(loss=nn.functional.mse_loss)) == {"value.loss"}
    assert differ(Slots(1), Slots(2)) == {"value._Slots__inner"}
    assert differ(Cached(1), Cached(2)) == {"value.base"}
    assert differ(Numbers([1]), Numbers([2])) == {"value.items"}
    assert differ(tensor(0.0), tensor(-0.0)) == {"value"}
    assert differ(tensor(1, 2), tensor(2, 1)) == differ(tensor(1), tensor(1.0)) == {"value"}
    assert differ(torch.zeros(2, 3), torch.zeros(3, 2)) == {"value"}
    assert differ({"a": 1, "b": 2}, {"b": 2, "a": 1}) == {"value"}
    assert differ(1, True) == differ(0, 0.0) == differ("1", 1) == differ((1,), [1]) == {"value"}
    assert differ(Mode.FAST, Mode.SLOW) >= {"value._value_"}


def test_what_does_not_count():
    assert not differ(Settings(seen=1), Settings(seen=2))
    used = Cached(1)
    assert used.twice == 2 and not differ(used, Cached(1))
    assert not differ(small_cnn().train(), small_cnn().eval())
    assert not differ(Engine(measured={"float32": 1.0}), Engine(measured={"float32": 2.0}))
    ball = Linf(0.1)
    assert not differ([ball, ball], [Linf(0.1), Linf(0.1)])
    assert not differ(small_cnn(), copy.deepcopy(small_cnn()))
    late = Settings()
    del late.names
    late.names = ("a", "b")  # set in another order
    assert not differ(late, Settings())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (lambda x: x * 2, lambda x: x * 3),
        (lambda x: x + 2, lambda x: x * 2),
        (lambda x: x.sin(), lambda x: x.cos()),
        (lambda x: [i + 1 for i in x], lambda x: [i + 2 for i in x]),
        (lambda x: lambda y: lambda: 1, lambda x: lambda y: lambda: 2),
        (lambda x: x in {1, 2}, lambda x: x in {1, 3}),
        (lambda x: x * 1, lambda x: x * 1.0),
        (lambda x: x * 0.0, lambda x: x * -0.0),
        (lambda x: LEVEL, lambda x: TABLE),
        (lambda x, k=1: x, lambda x, k=2: x),
        (lambda x, *, k=1: x, lambda x, *, k=2: x),
        (lambda x: pgd, lambda x: attack_score),
    ],
    ids=range(12),
)
def test_functions_differ_by_their_code(a, b):
    assert differ(a, b)
    assert differ(partial(map, a), partial(map, b))
    holder = types.SimpleNamespace(rule=a), types.SimpleNamespace(rule=b)
    assert differ(*holder)
    for path in differ(a, b):
        assert path.startswith("value")


def test_where_a_function_stands_does_not_count():
    assert not differ(written(OBJECTIVE.format(2)), written("\n\n# moved\n" + OBJECTIVE.format(2)))


def test_globals_that_the_code_reads_count_and_others_do_not(monkeypatch):
    before = of(reader)
    assert not any("LEVEL" in path for path in before)
    monkeypatch.setitem(globals(), "LEVEL", 2.0)  # only an attribute of that name is read
    assert of(reader) == before
    monkeypatch.setitem(globals(), "TABLE", {"a": [1, 3]})
    assert of(reader) != before


def test_a_function_is_followed_through_other_functions_and_own_modules():
    mine = types.ModuleType("a_module_of_mine")
    exec(
        "factor = 2\nother = open\ndef helper(x): return deep(x)\ndef deep(x): return x * 3",
        vars(mine),
    )
    mine.handle = threading.Lock()  # which the code does not reach
    outer = written("def objective(model, batch):\n    return mine.helper(mine.factor)", mine=mine)
    before = of(outer)
    assert before["value.mine.factor"] == "2"
    assert not any(module._UNKNOWN in text for text in before.values())
    mine.factor = 5
    assert of(outer)["value.mine.factor"] == "5"
    mine.factor = 2
    exec("def deep(x): return x * 4", vars(mine))
    assert {k for k in before if before[k] != of(outer)[k]} == {"value.mine.helper.deep.__code__"}


def test_a_wrapper_of_a_library_does_not_hide_what_it_wraps():
    make = lambda factor: torch.no_grad()(lambda x: x * factor)
    assert not differ(make(1), make(1))
    assert differ(make(1), make(2))
    assert differ(functools.lru_cache(lambda: 1), functools.lru_cache(lambda: 2))

    def spoofed(x):
        return x

    functools.update_wrapper(spoofed, nn.functional.relu)
    assert differ(spoofed, nn.functional.relu)


CLASS = """
class Mine(Detector):
    bias = {bias}
    def __init__(self, model): super().__init__(model)
    def score(self, x): return self.logits(x).amax(1) + {constant}
    @staticmethod
    def rule(z): return z + {static}
    @property
    def paper_score(self): return {property}
"""


@pytest.mark.parametrize("part", ["bias", "constant", "static", "property"])
def test_the_code_of_one_s_own_class_counts(part):
    values = dict.fromkeys(["bias", "constant", "static", "property"], 1)
    net = small_cnn()
    make = lambda **new: written(CLASS.format(**(values | new)), "Mine", Detector=Detector)(net)
    assert not differ(make(), make())
    assert all(path.startswith("value.__class__.") for path in differ(make(), make(**{part: 2})))
    assert differ(make(), make(**{part: 2}))


def test_a_base_class_of_one_s_own_counts_too():
    source = "class Base:\n    k = {}\nclass Mine(Base): pass"
    assert differ(*(written(source.format(k), "Mine")() for k in (1, 2)))


def test_a_method_set_on_the_object_counts():
    one, two = Energy(small_cnn()), Energy(small_cnn())
    two.score = lambda x: x.flatten(1)[:, 0]
    assert "value.score.__code__" in differ(one, two)


def test_hooks_order_and_tied_weights_of_networks_count():
    net, other = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    other.load_state_dict(net.state_dict())
    assert not differ(net, other)
    handle = other.register_forward_hook(lambda m, x, y: y * 2)
    assert differ(net, other)
    handle.remove()
    assert not differ(net, other)
    other[1].weight = other[0].weight
    net[1].weight.data.copy_(net[0].weight.data)
    assert {path.split("[")[0] for path in differ(net, other)} == {"value.tied tensors"}
    layers = {"a": nn.ReLU(), "b": nn.Sigmoid()}
    ordered, turned = nn.Sequential(), nn.Sequential()
    for name in layers:
        ordered.add_module(name, layers[name])
    for name in reversed(layers):
        turned.add_module(name, layers[name])
    assert differ(ordered, turned) == {"value"}


def test_circles_and_long_chains_end():
    class Link:
        def __init__(self, value, further=None):
            self.value, self.further = value, further

    def ring(value):
        first = Link(value)
        first.further = Link(0, first)
        return first

    assert not differ(ring(1), ring(1))
    assert differ(ring(1), ring(2)) == {"value.value"}
    loop = []
    loop.append(loop)
    assert "levels above" in of(loop)["value[0]"]
    doubled = [1.0, object()]
    for _ in range(60):  # 2 ** 60 ways through
        doubled = [doubled, doubled]
    assert len(of(doubled)) < 300
    chain = None
    for i in range(5000):
        chain = Link(i, chain)
    with pytest.raises(ValueError, match=r'value is a .*Link, nested too deeply, .* pass name="'):
        check_identity(None, of(chain), "")


def test_differences_behind_equal_parts_are_told():
    """What is told once for two places is compared at both."""
    pair = lambda a, b: [Linf(a), Linf(b)]
    for kept, wanted, words in [
        ((0.1, 0.1), (0.1, 0.2), r"value\[1\]\.eps = 0\.1, not 0\.2"),
        ((0.1, 0.2), (0.1, 0.1), r"value\[1\]\.eps = 0\.2, not 0\.1"),
        ((0.1, 0.1), (0.2, 0.2), r"value\[0\]\.eps = 0\.1, not 0\.2"),
    ]:
        with pytest.raises(ValueError, match=f"^x with {words}"):
            check_identity({"identity": of(pair(*kept))}, of(pair(*wanted)), "x")
    a, b = Linf(0.1), Linf(0.2)
    with pytest.raises(ValueError, match=r"^x with value\[2\]\.eps = 0\.1, not 0\.2"):
        check_identity({"identity": of([a, b, a])}, of([a, b, b]), "x")


PRINTED = """
import json, torch
from torch import nn
from robustood.detectors import Energy
from robustood.identity import identity
from robustood.models import small_cnn
from robustood.objectives import ALOE
NAMES = {"b", "a", "c", "d"}
class Mine(Energy):
    kinds = frozenset({"x", "y", "z"})
    def score(self, x): return super().score(x) * (self.name in {"p", "q", "r"})
mine = Mine(small_cnn())
mine.name = {"u": {"v", "w"}}
print(json.dumps(identity(a=mine, b=lambda x: NAMES, c=ALOE(0.1), d=torch.zeros(2))))
"""


def test_it_is_the_same_in_every_process():
    found = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        said = subprocess.run(
            [sys.executable, "-c", PRINTED], env=env, capture_output=True, text=True
        )
        assert said.returncode == 0, said.stderr
        found.append(json.loads(said.stdout))
    assert found[0] == found[1] and found[0]["a.temperature"] == "1.0"


def test_a_large_network_is_read_once(monkeypatch):
    """However often it is met: each tensor is hashed one time."""
    model, hashed = preact_resnet18(), []
    read = module._array
    monkeypatch.setattr(module, "_array", lambda t: (hashed.append(id(t)), read(t))[1])
    identity(detectors=[MSP(model), MSP(model)])
    assert sorted(hashed) == sorted(id(t) for t in [*model.parameters(), *model.buffers()])
    told = identity(model=model, detector=MSP(model))
    assert told["detector.model"] == "as model" and len(told) < 1000


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_is_known():
    model = small_cnn()
    told = of(torch.compile(model))
    assert "value._orig_mod.head.weight" in told
    assert not any(module._UNKNOWN in text for text in told.values())


@pytest.mark.filterwarnings("ignore")
def test_a_network_of_torchscript_is_known():
    build = lambda slope: torch.jit.trace(
        nn.Sequential(nn.Flatten(), nn.LeakyReLU(slope), nn.Linear(64, 3)), torch.rand(2, 1, 8, 8)
    )
    torch.manual_seed(0)
    first, again, other = build(0.1), build(0.1), build(0.2)
    for each in (again, other):
        each.load_state_dict(first.state_dict())
    assert of(first) == of(again) != of(other)  # a number in the code
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not any(module._UNKNOWN in text for text in of(first).values())
    assert any(of(first)[key] != text for key, text in of(other).items() if key.endswith("weight"))


def test_strange_tensors_are_refused_not_guessed():
    for strange in (torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")):
        assert module._UNKNOWN in of(strange)["value"]
    assert module._UNKNOWN in of(nn.LazyLinear(3))["value.weight"]
    assert of(torch.ones(2, dtype=torch.complex64).conj()) == of(
        torch.ones(2, dtype=torch.complex64).conj()
    )


def test_a_line_for_people():
    assert describe(Linf(0.1)) == "Linf(eps=0.1, box=[0, 1])"
    assert describe({"steps": 5, "rule": None}) == "[['steps', 5], ['rule', None]]"
    assert describe(attack_score) == "robustood.evaluate._attack.attack_score"
    assert describe(partial(attack_score, steps=1)) == f"[{describe(attack_score)}, ['steps', 1]]"
    assert "cross_entropy" in describe(Settings()) and "seen" not in describe(Settings())
    big = [FiniteSubset(Linf(0.1), torch.full((300, 300), k)) for k in (0.0, 1.0)]
    assert describe(big[0]) != describe(big[1])
    nets = [small_cnn(seed=s) for s in (0, 0, 1)]
    assert describe(nets[0]) == describe(nets[1]) != describe(nets[2])
    for value in (lambda: 0, object(), threading.Lock(), RejectClass(small_cnn(reject=1))):
        assert not ADDRESS.search(describe(value))
