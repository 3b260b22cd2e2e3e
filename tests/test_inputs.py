"""Every refusal names the argument, the value seen and the fix; what is valid passes."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustood import (
    attacks,
    data,
    detectors,
    evaluate,
    mining,
    objectives,
    plotting,
    sanity,
    smoothing,
)
from robustood.inputs import (
    TOLERANCE,
    check_choice,
    check_count,
    check_images,
    check_labels,
    check_number,
    check_values,
)
from robustood.models import Normalise, small_cnn
from robustood.perturbations import L2, Linf

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])
NAN, INF = math.nan, math.inf


def refuses(call, *parts):
    """The call raises ValueError with all parts in its message."""
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {caught.value}"


def with_value(value):
    x = X.clone()
    x[2, 0, 3, 4] = value
    return x


# ---- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "box", "parts"),
    [
        ([0.5], (0, 1), ("got list", "torch.as_tensor")),
        (X.numpy(), (0, 1), ("got ndarray", "torch.as_tensor")),
        ((X * 255).byte(), (0, 1), ("floating point", "torch.uint8", "divide", "255")),
        (X > 0.5, (0, 1), ("floating point", "torch.bool")),
        (X[:0], (0, 1), ("empty", "(0, 1, 8, 8)", "at least one")),
        (torch.tensor(0.5), (0, 1), ("empty", "()")),
        (with_value(NAN), (0, 1), ("NaN or infinity", "clean")),
        (with_value(INF), None, ("NaN or infinity", "clean")),
        (with_value(-INF), None, ("NaN or infinity", "clean")),
        (with_value(1.5), (0, 1), ("1.5", "outside [0, 1]", "inside the model", "box=None")),
        (with_value(-0.25), (0, 1), ("[-0.25,", "outside [0, 1]", "inside the model")),
        (X * 255, (0, 1), ("outside [0, 1]", "pixels", "divide grey levels", "255")),
        (X * 16, (0, 1), ("outside [0, 1]", "divide grey levels")),  # as scikit-learn's digits are
        (X * 255 - 128, (0, 1), ("outside [0, 1]", "inside the model")),
        (with_value(-3.0), (-1, 1), ("[-3,", "outside [-1, 1]")),
    ],
)
def test_bad_values_are_refused_with_name_value_and_fix(untyped, x, box, parts):
    refuses(lambda: check_values(x, box, "picture"), "picture", *parts)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (X.double().numpy(), {"dtype": torch.float32}),
        (X.numpy(), {}),
        ((X * 255).byte().numpy(), {}),
    ],
    ids=["float64", "float32", "uint8"],
)
def test_an_array_is_told_in_one_message_how_it_fits_a_network(untyped, array, told):
    net = small_cnn()
    for call in (detectors.MSP(net).score, lambda v: attacks.pgd(net, v, Y, 0.1)):
        with pytest.raises(ValueError, match=r"got ndarray; use torch\.as_tensor") as caught:
            call(array)
        assert ("with dtype=torch.float32" in str(caught.value)) is bool(told)
        assert call(torch.as_tensor(array, **told)).dtype == torch.float32


@pytest.mark.parametrize("normalised", [True, False])
def test_channels_that_stand_last_or_are_missing_are_told_the_fix(untyped, normalised):
    net, x = small_cnn(channels=3), torch.rand(4, 8, 8, 3)
    net.normalise = net.normalise if normalised else torch.nn.Identity()
    score = detectors.MSP(net).score
    refuses(lambda: score(x), "(4, 8, 8, 3)", "pass x.permute(0, 3, 1, 2)")
    assert score(x.permute(0, 3, 1, 2)).shape == (4,)
    refuses(lambda: score(X), "(4, 1, 8, 8)", "channels")
    if normalised:  # broadcasting would have made three channels of one
        refuses(lambda: score(X), "x.expand(-1, 3, -1, -1)")
    assert score(X.expand(-1, 3, -1, -1)).shape == (4,)
    one = Normalise([0.5], [0.25])
    assert torch.equal(one(x), (x - 0.5) * 4), "one entry is for all channels"


@given(
    low=st.floats(-5, 5),
    width=st.floats(0.01, 10),
    where=st.floats(0, 1),
    excess=st.floats(1e-3, 100),
    above=st.booleans(),
)
def test_the_box_is_closed_and_nothing_beyond_it_passes(low, width, where, excess, above):
    high = low + width
    inside = torch.tensor([low, low + where * width, high], dtype=torch.float64)
    check_values(inside, (low, high))
    check_values(inside * 1e6, None)
    outside = inside.clone()
    outside[1] = high + excess if above else low - excess
    refuses(lambda: check_values(outside, (low, high)), "outside", "box=None")
    check_values(outside, None)


def test_rounding_is_forgiven_up_to_the_tolerance():
    assert TOLERANCE == 1e-6
    for good in (1 + TOLERANCE / 2, -TOLERANCE / 2):
        check_values(torch.tensor([good], dtype=torch.float64))
    for bad in (1 + 2 * TOLERANCE, -2 * TOLERANCE):
        refuses(lambda bad=bad: check_values(torch.tensor([bad], dtype=torch.float64)), "x lies in")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_passes_and_the_input_is_not_touched(dtype):
    x = X.to(dtype)
    before = x.clone()
    check_images(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(8,), (8, 8), (1, 8, 8), (2, 1, 1, 8, 8)])
def test_images_need_four_axes_and_the_message_shows_how(shape):
    refuses(
        lambda: check_images(torch.zeros(shape), "photo"), "photo", "4 axes", str(shape), "x[None]"
    )


def test_images_are_checked_for_values_too(untyped):
    refuses(lambda: check_images(X * 2 + 1, "photo"), "photo lies in", "outside [0, 1]")
    refuses(lambda: check_images(X[:0], "photo"), "photo is empty")
    refuses(lambda: check_images("cat.png", "photo"), "photo must be a torch.Tensor", "str")


# ---- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "classes", "parts"),
    [
        ([0, 1, 2, 3], None, ("int64 tensor", "got list", ".long()")),
        (Y.float(), None, ("int64 tensor", "torch.float32", ".long()")),
        (Y > 1, None, ("int64 tensor", "torch.bool", ".long()")),
        (Y.int(), None, ("int64 tensor", "torch.int32", ".long()")),
        (Y[:3], None, ("shape (4,)", "one label per sample", "(3,)")),
        (Y[:, None], None, ("shape (4,)", "(4, 1)")),
        (Y - 1, None, ("[-1, 2]", "count from 0")),
        (Y - 1, 10, ("[-1, 2]", "count from 0 to 9")),
        (Y, 3, ("[0, 3]", "0 to 2")),
    ],
)
def test_bad_labels_are_refused_with_name_value_and_fix(untyped, y, classes, parts):
    refuses(lambda: check_labels(y, X, classes, "digit"), "digit", *parts)


@given(st.lists(st.integers(-3, 12), min_size=1, max_size=20), st.integers(1, 12))
def test_labels_pass_exactly_when_they_are_classes(labels, classes):
    y, x = torch.tensor(labels), torch.zeros(len(labels), 2)
    if all(0 <= label < classes for label in labels):
        check_labels(y, x, classes)
    else:
        refuses(lambda: check_labels(y, x, classes), "y lies in", str(min(labels)))


# ---- numbers, counts, choices -----------------------------------------------------------------


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(allow_nan=True, allow_infinity=True))
def test_a_number_passes_exactly_when_it_lies_in_the_closed_interval(a, b, value):
    low, high = min(a, b), max(a, b)
    if low <= value <= high:
        check_number(value, "eps", low, high)
    else:
        refuses(
            lambda: check_number(value, "eps", low, high, "mend it"),
            "eps",
            repr(value),
            "; mend it",
        )


@pytest.mark.parametrize("value", ["0.1", None, True, 1j, [0.1]])
def test_what_is_no_number_is_refused(untyped, value):
    refuses(lambda: check_number(value, "eps", 0, 1, "mend it"), "eps", repr(value), "mend it")


def test_nan_is_no_number_even_without_limits():
    refuses(lambda: check_number(NAN, "eps"), "eps", "nan")


@pytest.mark.parametrize("value", [2, -1, 2.0, "3", None, True, NAN])
def test_a_count_is_whole_and_large_enough(untyped, value):
    refuses(lambda: check_count(value, "steps", low=3), "steps", "at least 3", repr(value))


def test_counts_at_the_limit_pass():
    check_count(0, "steps")
    check_count(3, "steps", low=3)


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), np.float32(3), np.float64(3), 3, 3.0])
def test_numbers_of_numpy_are_numbers(untyped, value):
    check_number(value, "eps", 0, 3)
    if isinstance(value, (int, np.integer)):
        check_count(value, "steps", 3)
    else:
        with pytest.raises(ValueError, match="steps must be a whole number"):
            check_count(value, "steps", 3)


@pytest.mark.parametrize("value", [np.bool_(True), True, np.float32("nan"), np.ones(1)])
def test_what_numpy_has_besides_numbers_is_refused(untyped, value):
    for check in (check_number, check_count):
        with pytest.raises(ValueError, match="steps must be a"):
            check(value, "steps", 0)


def test_an_unknown_choice_is_told_which_exist():
    check_choice("ce", "loss", ("ce", "dlr"))
    refuses(lambda: check_choice("CE", "loss", ("ce", "dlr")), "loss", "'ce', 'dlr'", "'CE'")


# ---- the doors that use them ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: data.digits(0), ("train", "0")),
        (lambda: data.digits(1098), ("train", "1098", "1097")),
        (lambda: data.digits(10.0), ("train", "10.0")),
        (lambda: data.glyphs("capital", 3, 0), ("which", "'capital'", "'lookalike'")),
        (lambda: data.glyphs("test", 0, 0), ("n ", "0", "at least 1")),
        (lambda: data.patches("lookalike", 3, 0), ("which", "'lookalike'", "'auxiliary'")),
        (lambda: data.patches("test", -1, 0), ("n ", "-1")),
        (lambda: data.noise(0, 0), ("n ", "0")),
        (lambda: data.noise(2.5, 0), ("n ", "2.5")),
    ],
)
def test_the_data_refuse_what_they_cannot_give(untyped, call, parts):
    refuses(call, *parts)


# ---- a number for a set, and 8-bit images --------------------------------------------------------


NET = small_cnn(reject=1)
BYTES = (X * 255).round().to(torch.uint8)
PIXELS = BYTES.float() / 255
WITHIN = {
    "pgd": lambda x, w: attacks.pgd(NET, x, Y, w, steps=2),
    "fgsm": lambda x, w: attacks.fgsm(NET, x, Y, w),
    "maximise": lambda x, w: attacks.maximise(lambda v: NET(v)[:, 0], x, w, steps=2),
    "attack_score": lambda x, w: evaluate.attack_score(
        detectors.MSP(NET), x, w, direction="raise", steps=2
    ),
    "in turn": lambda x, w: evaluate.attack_in_turn(
        detectors.MSP(NET), x, [w, w], direction="raise", steps=2
    ),
    "paper_attack": lambda x, w: evaluate.paper_attack(
        detectors.RejectClass(NET), x, w, direction="raise", paper="atom"
    ),
    "ood_report": lambda x, w: evaluate.ood_report(
        detectors.MSP(NET), x, {"a": x}, w, side="both", steps=2
    ),
    "four_sides": lambda x, w: evaluate.four_sides(detectors.MSP(NET), x, {"a": x}, w, steps=2),
    "curve": lambda x, w: evaluate.epsilon_curve(detectors.MSP(NET), x, x, w, [0.0, 0.05], steps=2),
    "worst_case": lambda x, w: attacks.worst_case(NET, x[:2], Y[:2], w),
    "checks": lambda x, w: sanity.check(detectors.MSP(NET), x, x, w, samples=4, steps=2),
}
TAKES = {
    "robust_accuracy": lambda x: attacks.robust_accuracy(NET, x, Y),
    "scores": lambda x: evaluate.scores(detectors.MSP(NET), x),
    "certify": lambda x: smoothing.certify(NET, x, L2(0.1), sigma=0.1, n0=5, n=20, alpha=0.1),
    "interval": lambda x: smoothing.interval_score(NET, x, 0.01)[0],
    "mine": lambda x: mining.mine(NET, x, 2, 0.0),
    "combine": lambda x: detectors.Mahalanobis(NET).fit(x, Y // 2).combine(x, x).score(X),
    "KNN": lambda x: detectors.KNN(NET, 1).fit(x, Y).score(X),
    "ReAct": lambda x: detectors.ReAct(NET).fit(x, Y).score(X),
    "image_grid": lambda x: torch.tensor(
        plotting.image_grid(x, columns=4).axes[0].images[0].get_array().data
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHIN)
def test_a_number_is_the_radius_of_linf_wherever_a_set_is_taken(name):
    assert str(WITHIN[name](PIXELS, 0.05)) == str(WITHIN[name](PIXELS, Linf(0.05)))


def test_a_number_is_the_radius_of_linf_in_training():
    for rule in (objectives.Adversarial, objectives.TRADES, objectives.InnerMax):
        assert rule(0.05).set_at(1) == rule(Linf(0.05)).set_at(1) == Linf(0.05)


@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("bad", ["0.1", True, (0.1,), -0.1, NAN])
def test_what_is_neither_a_set_nor_a_radius_is_refused(untyped, name, bad):
    refuses(
        lambda: WITHIN[name](PIXELS, bad),
        "within" if not isinstance(bad, float) else "eps",
        repr(bad),
    )


def test_smoothing_refuses_a_number_as_the_linf_that_it_means(untyped):
    refuses(lambda: smoothing.certify(NET, X, 0.1, sigma=0.1), "Euclidean", "Linf(eps=0.1")


DOORS = {n: lambda x, f=f: f(x, Linf(0.05)) for n, f in WITHIN.items()} | TAKES


@pytest.mark.parametrize("name", DOORS)
def test_eight_bit_images_are_pixels_at_every_door(untyped, name):
    torch.manual_seed(0)
    expected = DOORS[name](PIXELS)
    found = DOORS[name](BYTES)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    else:
        assert str(found) == str(expected)


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool])
def test_other_integers_are_no_images(untyped, name, dtype):
    refuses(lambda: DOORS[name](BYTES.to(dtype)), "floating point", str(dtype))


def test_eight_bit_vectors_without_a_box_are_refused(untyped):
    flat = BYTES.flatten(1)
    free = Linf(0.05, box=None)
    refuses(lambda: attacks.pgd(NET, flat, Y, free), "floating point", "torch.uint8")
    refuses(lambda: attacks.maximise(NET, flat, free, steps=1), "floating point", "torch.uint8")
    refuses(lambda: evaluate.scores(detectors.MSP(NET), flat), "floating point", "torch.uint8")
