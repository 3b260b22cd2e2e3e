"""Where every image comes from, what can tell it, and that no image stands on two sides."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from sklearn.datasets import load_digits, load_sample_image

from robustood import data
from robustood.data import (
    FONTS,
    LETTERS,
    PHOTOS,
    Batch,
    Split,
    digits,
    embedded,
    glyphs,
    noise,
    patches,
)
from robustood.models import small_cnn
from robustood.objectives import Standard
from robustood.training import fit


@pytest.fixture(scope="module")
def book():
    return digits()


@pytest.fixture(scope="module")
def another():
    return digits(seed=1)


def keys(x: torch.Tensor) -> set[bytes]:
    """Each image as its bytes: equal exactly where every pixel is equal."""
    return {image.numpy().tobytes() for image in x}


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """Probability that an inside value is the larger one, ties half."""
    difference = inside[:, None] - outside[None]
    return float(np.mean(difference > 0) + np.mean(difference == 0) / 2)


def everything(book) -> dict[str, torch.Tensor]:
    own = {"train": book.train.x, "val": book.val.x, "test": book.test.x}
    return {**own, "outliers": book.outliers, **book.ood}


# ---- the digits -------------------------------------------------------------------------------


def test_every_pixel_is_in_sixteenths_from_zero_to_one(book):
    counts = {"train": 1097, "val": 200, "test": 500, "outliers": 2000}
    for name, x in everything(book).items():
        assert x.dtype == torch.float32 and x.shape == (counts.get(name, 500), 1, 8, 8), name
        assert torch.equal((x * 16).round() / 16, x), name
        assert x.min() >= 0 and x.max() <= 1, name
    assert set((book.train.x * 16).long().unique().tolist()) == set(range(17))


def test_the_splits_share_no_image_and_make_up_the_data_set_with_its_labels(book):
    raw = load_digits()
    label = {
        (image[None] / 16).astype(np.float32).tobytes(): int(y)
        for image, y in zip(raw.images, raw.target, strict=True)
    }
    assert len(label) == 1797  # no image occurs twice, so equal bytes mean the same digit
    splits = [book.train, book.val, book.test]
    seen = [keys(split.x) for split in splits]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 1797
    for split in splits:
        for image, y in zip(split.x, split.y, strict=True):
            assert label[image.numpy().tobytes()] == y
        assert torch.bincount(split.y, minlength=10).min() >= 0.05 * len(split)


@pytest.mark.parametrize("train", [1, 700])
def test_smaller_training_sets_are_nested_and_leave_all_else_alone(book, train):
    before, before_numpy = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    small = digits(train)
    assert torch.equal(torch.get_rng_state(), before)  # the global random states are left alone
    assert np.array_equal(np.random.get_state()[1], before_numpy[1])  # noqa: NPY002
    assert len(small.train) == train
    assert torch.equal(small.train.x, book.train.x[:train])
    assert torch.equal(small.train.y, book.train.y[:train])
    for name, x in everything(small).items():
        assert name == "train" or torch.equal(x, everything(book)[name]), name


def test_the_seed_decides_the_split_and_every_draw(book, another):
    again = digits(seed=0)
    for name, x in everything(book).items():
        assert torch.equal(everything(again)[name], x), name
        assert not torch.equal(everything(another)[name], x), name
    assert torch.equal(again.test.y, book.test.y)


# ---- the outliers -----------------------------------------------------------------------------


def test_no_test_outlier_is_an_auxiliary_outlier_or_a_digit(book, another):
    own = keys(torch.cat([book.train.x, book.val.x, book.test.x]))
    for drawn in (book, another):
        auxiliary = keys(drawn.outliers)
        assert not auxiliary & own
        for name, x in drawn.ood.items():
            assert not keys(x) & auxiliary, name
            assert not keys(x) & own, name


@pytest.mark.parametrize("make", [glyphs, patches])
def test_long_draws_from_both_pools_never_meet(make):
    assert not keys(make("auxiliary", 1000, 50)) & keys(make("test", 1000, 51))


def test_the_outliers_are_the_stated_draws(book):
    assert torch.equal(book.outliers[:50], glyphs("auxiliary", 50, 1))
    assert torch.equal(book.outliers[1000:1050], patches("auxiliary", 50, 2))
    assert list(book.ood) == ["letters", "patches", "noise"]
    assert torch.equal(book.ood["letters"][:50], glyphs("test", 50, 3))
    assert torch.equal(book.ood["patches"][:50], patches("test", 50, 4))
    assert torch.equal(book.ood["noise"], noise(500, 5))


def test_the_tables_share_no_letter_no_font_and_no_photo():
    assert sorted("".join(LETTERS.values())) == sorted("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert not set(FONTS["auxiliary"].split()) & set(FONTS["test"].split())
    assert FONTS["lookalike"] == FONTS["auxiliary"]
    assert PHOTOS["auxiliary"] != PHOTOS["test"]
    shipped = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for font in {name for names in FONTS.values() for name in names.split()}:
        assert (shipped / f"{font}.ttf").exists(), font


@pytest.mark.parametrize("which", LETTERS)
def test_only_the_letters_and_fonts_of_the_table_are_drawn(monkeypatch, which):
    drawn = []
    original = embedded._glyph

    def spy(letter, font, rng, pen):
        drawn.append((letter, font))
        return original(letter, font, rng, pen)

    monkeypatch.setattr(embedded, "_glyph", spy)
    glyphs(which, 300, 0)
    assert {letter for letter, _ in drawn} == set(LETTERS[which])
    assert {font for _, font in drawn} == set(FONTS[which].split())


@pytest.fixture(scope="module")
def penned():
    return glyphs("test", 500, 3, pen=True)


def test_a_letter_fills_the_image_from_top_to_bottom_like_a_digit(book, penned):
    for x in (book.ood["letters"], book.outliers[:1000], penned, book.test.x):
        rows = x[:, 0].amax(2) > 0
        assert rows.all(1).float().mean() > 0.9
        assert 0.15 < x.mean() < 0.4


def test_a_pen_makes_letters_as_wide_and_as_heavy_as_digits(book, penned):
    kinds = {"print": book.ood["letters"], "pen": penned, "own": book.test.x}
    ink = {name: float(x.mean()) for name, x in kinds.items()}
    columns = {n: float((x[:, 0].amax(1) > 0).float().sum(1).mean()) for n, x in kinds.items()}
    assert ink["print"] < ink["own"] - 0.02 and columns["print"] > columns["own"] + 0.5
    assert abs(ink["pen"] - ink["own"]) < 0.05 and abs(columns["pen"] - columns["own"]) < 1.5


def test_the_grey_levels_do_not_tell_a_penned_letter_from_a_digit(book, penned):
    """The making leaves no trace: neither the number of levels nor the share of empty pixels."""
    traces = {
        "levels": lambda x: np.array([len(image.unique()) for image in x]),
        "empty": lambda x: (x == 0).flatten(1).float().mean(1).numpy(),
    }
    for name, trace in traces.items():
        assert 0.4 < auroc(trace(book.test.x), trace(penned)) < 0.7, name
    levels = traces["levels"]
    assert auroc(levels(book.test.x), levels(book.ood["patches"])) > 0.9  # the probe is no dud


def area_means(photo: np.ndarray, left: int, top: int, side: int) -> np.ndarray:
    """8x8 means over a square, exact also where a block ends inside a pixel: by the integral image."""
    total = np.pad(photo.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    edges = np.arange(9) * side / 8
    lines = np.arange(side + 1)
    part = total[top : top + side + 1, left : left + side + 1]
    rows = np.stack([np.interp(edges, lines, column) for column in part.T], axis=1)
    corners = np.stack([np.interp(edges, lines, row) for row in rows])
    return np.diff(np.diff(corners, axis=0), axis=1) / (side / 8) ** 2


@pytest.mark.parametrize("which", PHOTOS)
def test_a_patch_is_a_square_of_its_photo_averaged_and_rounded(which):
    grey = load_sample_image(PHOTOS[which]) @ np.array([0.299, 0.587, 0.114]) / 255
    rng, wanted = np.random.default_rng(9), []
    while len(wanted) < 40:
        side = rng.integers(16, 97)
        left = rng.integers(grey.shape[1] - side + 1)
        top = rng.integers(grey.shape[0] - side + 1)
        square = area_means(grey, left, top, side)
        assert abs(square.std() - data.FLAT) > 1e-4  # none of these stands on the edge
        if square.std() >= data.FLAT:
            wanted.append(square)
    # Pillow counts whole pixels where a block ends inside one: half a grey level on average.
    assert np.abs(patches(which, 40, 9)[:, 0].numpy() - np.stack(wanted)).mean() < 1 / 32


def test_flat_patches_are_left_out():
    for which in PHOTOS:
        x = patches(which, 1000, 9)
        assert x.flatten(1).std(1).min() > data.FLAT - 1 / 32  # rounding moves a pixel by 1/32
        assert len(keys(x)) > 990


def test_noise_is_uniform_over_the_levels_and_independent():
    x = noise(500, 5)
    counts = torch.bincount((x * 16).long().flatten(), minlength=17)
    assert chisquare(counts.numpy()).pvalue > 1e-4
    correlation = torch.corrcoef(x.flatten(1).T)
    off = correlation[~torch.eye(64, dtype=torch.bool)]
    assert off.abs().max() < 5.5 / 500**0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: glyphs("test", 20, seed),
        lambda seed: glyphs("lookalike", 20, seed),
        lambda seed: patches("auxiliary", 20, seed),
        lambda seed: noise(20, seed),
    ],
)
def test_each_draw_follows_its_seed(make):
    assert torch.equal(make(3), make(3))
    assert not torch.equal(make(3), make(4))


def test_longer_draws_continue_shorter_ones():
    for make in (glyphs, patches):
        assert torch.equal(make("test", 30, 6)[:10], make("test", 10, 6))


def test_a_network_takes_lookalikes_for_digits_more_often_than_test_letters(book):
    model = small_cnn()
    fit(model, Standard(), book, epochs=6)
    with torch.no_grad():
        share = {
            name: (model(x).softmax(1).amax(1) > 0.9).float().mean().item()
            for name, x in [
                ("digits", book.test.x),
                ("lookalike", glyphs("lookalike", 500, 11)),
                ("letters", book.ood["letters"]),
            ]
        }
        assert (model(book.test.x).argmax(1) == book.test.y).float().mean() > 0.9
    assert share["digits"] > share["lookalike"] > share["letters"] + 0.1, share


# ---- the containers ---------------------------------------------------------------------------


def test_a_split_is_cut_and_measured_with_its_labels(book):
    part = book.test[3:7]
    assert isinstance(part, Split) and len(part) == 4
    assert torch.equal(part.x, book.test.x[3:7]) and torch.equal(part.y, book.test.y[3:7])
    ones = book.test[book.test.y == 1]
    assert (ones.y == 1).all() and len(ones) == (book.test.y == 1).sum()
    picked = book.test[torch.tensor([9, 0, 9])]
    assert torch.equal(picked.x, book.test.x[[9, 0, 9]])


def test_everything_moves_to_the_device(book):
    moved = book.to("meta")
    tensors = [t for s in (moved.train, moved.val, moved.test) for t in (s.x, s.y)]
    tensors += [moved.outliers, *moved.ood.values()]
    assert all(t.device.type == "meta" for t in tensors)
    assert list(moved.ood) == list(book.ood) and book.train.x.device.type == "cpu"
    assert torch.equal(book.to("cpu").ood["noise"], book.ood["noise"])


def test_a_batch_without_outliers_is_a_finished_one(book):
    batch = Batch(book.train.x[:2], book.train.y[:2])
    assert (batch.outliers, batch.generator, batch.progress) == (None, None, 1.0)
