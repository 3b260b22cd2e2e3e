"""Where every image comes from, what can tell it, and that no image stands on two sides."""

import errno
import gzip
import hashlib
import io
import os
import pickle
import re
import tarfile
import threading
import tomllib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from photographs import need
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter
from scipy.stats import chisquare
from sklearn.datasets import load_digits, load_sample_image
from sklearn.linear_model import LogisticRegression
from torchvision import datasets

from robustood import data
from robustood.corruptions import corrupt
from robustood.data import (
    FONTS,
    HELD_OUT,
    LEARNED,
    LETTERS,
    PHOTOS,
    Augment,
    Batch,
    Data,
    Loaded,
    Pairs,
    Scenes,
    Split,
    Views,
    compress,
    corrupted,
    counted_as,
    digest,
    digits,
    draw,
    fetch,
    folder,
    folder_of_views,
    glyphs,
    hold_out,
    light_grid,
    load,
    noise,
    paired,
    patches,
    random_lights,
    read_pack,
    redrawn,
    relit,
    render,
    scenes,
    without_overlap,
    write_pack,
)
from robustood.data import (
    _embedded as embedded,
)
from robustood.data import (
    _fetching as fetching,
)
from robustood.data import (
    _packs as packs,
)
from robustood.data import (
    _sets as sets,
)
from robustood.data._relighting import REFERENCE
from robustood.models import small_cnn
from robustood.objectives import Standard
from robustood.rng import SharedGenerator
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


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.data())
def test_each_class_is_held_out_by_its_share(y, data):
    y = torch.tensor(y)
    split, n = Split(torch.arange(float(len(y)))[:, None], y), data.draw(st.integers(0, len(y) - 1))
    rest, held = hold_out(split, n)
    assert len(held) == n and len(rest) == len(y) - n
    for part in (rest, held):
        places = part.x[:, 0].long()
        assert torch.equal(part.y, y[places]) and (places.diff() > 0).all()
    shares = y.bincount() * n / len(y)
    assert ((held.y.bincount(minlength=len(shares)) - shares).abs() <= 1).all()


def test_what_is_held_out_follows_the_seed_and_leaves_something():
    split = Split(torch.arange(100.0)[:, None], torch.arange(100) % 10)
    draws = [hold_out(split, 15, seed)[1] for seed in (0, 0, 1)]
    assert torch.equal(draws[0].x, draws[1].x) and not torch.equal(draws[0].x, draws[2].x)
    assert not torch.equal(draws[0].y.bincount(), draws[2].y.bincount())  # no class is always first
    assert torch.equal(hold_out(split, 0)[0].x, split.x)
    with pytest.raises(ValueError, match="n must be below the number of samples, 100, got 100"):
        hold_out(split, 100)
    with pytest.raises(ValueError, match=r"split\.y must be an int64 tensor of class labels"):
        hold_out(Split(split.x, split.x[:, 0]), 3)


def test_labels_are_counted_as_another_set_counts_them():
    own = Loaded(
        torch.zeros(4, 1, 1, 1), torch.tensor([0, 1, 2, 0]), name="own", names=("c", "a", "d")
    )
    found = counted_as(own, ("a", "b", "c", "d"), "train")
    assert found.y.tolist() == [2, 0, 3, 2] and found.names == ("a", "b", "c", "d")
    for same in (own.names, ()):
        assert counted_as(own, same, "train") is own
    assert counted_as(replace(own, names=()), ("a", "b"), "train").y.tolist() == [0, 1, 2, 0]
    with pytest.raises(
        ValueError, match=r"own has classes that train does not have: 'd'; known are: 'a', 'c'"
    ):
        counted_as(own, ("a", "c"), "train")
    with pytest.raises(ValueError, match="two of the same name"):
        counted_as(own, ("a", "a", "c", "d"), "train")


IMAGES, LABELS = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
SPLIT = Split(IMAGES, LABELS)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Split([[0.0]], LABELS), r"x must be a tensor \(samples, \.\.\.\), such as torch\.as_tensor.* list"),
        (lambda: Split(IMAGES.numpy(), LABELS), "x must be a tensor .* got ndarray"),
        (lambda: Split(IMAGES, [0, 0, 0, 0]), "y must be .* got list"),
        (lambda: Split(IMAGES, torch.tensor(3)), "x and y must have an axis of samples"),
        (lambda: Split(IMAGES, LABELS[1:]), "x and y must have the same length, got 4 and 3"),
        (lambda: Pairs(IMAGES, IMAGES, LABELS[1:]), r"labels must be 4 integers, .* of shape \(3,\)"),
        (lambda: Pairs(IMAGES, IMAGES, None), "labels must be a tensor of classes .* got NoneType"),
        (lambda: Views.of(IMAGES.numpy(), LABELS), "views must be a tensor of images"),
        (lambda: Views.of(torch.zeros(4, 2, 1, 2, 2), LABELS[1:]), "labels must be 4 integers"),
        (lambda: Data(SPLIT, (IMAGES, LABELS), SPLIT, IMAGES), r"val must be a Split\(x, y\), got tuple"),
        (lambda: Data(SPLIT, SPLIT, SPLIT, None), "outliers must be a tensor .* got NoneType"),
        (lambda: Data(SPLIT, SPLIT, SPLIT, IMAGES[..., :1]), r"data\.outliers must have samples shaped like those of "
         r"data\.train\.x, \(1, 2, 2\), got \(1, 2, 1\)"),
        (lambda: Data(SPLIT, SPLIT, SPLIT, IMAGES, [IMAGES]), "ood must be "),
        (lambda: Data(SPLIT, SPLIT, SPLIT, IMAGES, {"a": [0]}), r"ood\['a'\] must be a tensor of images, got list"),
        (lambda: Data(SPLIT, SPLIT, SPLIT, IMAGES, compressed=IMAGES[1:]), r"compressed must be .* got \(3, 1, 2, 2\)"),
        (lambda: load(3), r"name and split must be strings such as 'mine', 'test', got 3, None"),
        (lambda: load("mine", 3), "name and split must be strings"),
        (lambda: without_overlap(SPLIT, "cifar10"), "outliers must be a set, .* got Split"),
        (lambda: hold_out(SPLIT, np.bool_(True)), "n must be a whole number"),
        (lambda: hold_out(Split(IMAGES, LABELS - 1), 1), r"split\.y lies in \[-1, -1\]"),
        (lambda: compress([IMAGES], 75), "images must be a uint8 tensor or array, got list"),
    ],
)  # fmt: skip
def test_what_is_no_data_is_refused_at_the_door(untyped, make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_numbers_of_numpy_count_samples(untyped):
    assert len(hold_out(SPLIT, np.int64(3))[1]) == 3


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


# ---- packs ------------------------------------------------------------------------------------

SHA = {
    "cifar10:train": "b0262c7f9ac22856d3fba8fade9ddceaa4099e2f3d48ad46aa94311c5dd23a6e",
    "cifar10:test": "d6498903e40261cecbc0277b07dc33cbe764618c3ba8f29c0cf66cff517cd5e7",
}


def images(n: int, seed: int = 0, size: int = 32, channels: int = 3) -> np.ndarray:
    """Smooth noise as 8-bit images (n, size, size, channels): like photographs to a compressor."""
    rough = np.random.default_rng(seed).normal(size=(n, size, size, channels))
    smooth = gaussian_filter(rough, (0, 2, 2, 0))
    return np.clip(128 + 300 * smooth, 0, 255).astype(np.uint8)


def tensor(rows: np.ndarray) -> torch.Tensor:
    return torch.tensor(rows).permute(0, 3, 1, 2).contiguous()


def jpeg(image: np.ndarray, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def opened(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def sheet(rows: np.ndarray, cols: int) -> np.ndarray:
    """Images beside each other in rows of ``cols``, black where there is none."""
    n, height, width, channels = rows.shape
    out = np.zeros((-(-n // cols) * height, cols * width, channels), np.uint8)
    for i, image in enumerate(rows):
        top, left = i // cols * height, i % cols * width
        out[top : top + height, left : left + width] = image
    return out


def held(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as pack:
        return {key: pack[key] for key in pack.files}


def mosaics(rows: np.ndarray, per: int, cols: int, **options) -> dict[str, np.ndarray | np.generic]:
    """The fields of a pack without checksum and sizes, its mosaics saved with the given options."""
    files = []
    for i in range(0, len(rows), per):
        buffer = io.BytesIO()
        padded = np.zeros((per, *rows.shape[1:]), np.uint8)
        padded[: len(rows[i : i + per])] = rows[i : i + per]
        Image.fromarray(sheet(padded, cols)).save(buffer, **options)
        files.append(buffer.getvalue())
    return {
        "blob": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "n": np.int64(len(rows)),
        "per": np.int64(per),
        "cols": np.int64(cols),
        "labels": np.arange(len(rows), dtype=np.uint8),
    }


def test_a_pack_gives_back_what_was_written(tmp_path):
    rows, y = images(23), np.arange(23) % 7
    names = tuple(f"class {i}" for i in range(7))
    path = write_pack(tmp_path / "new" / "toy.npz", rows, y, names, names[::-1], 80, per=10)
    found = read_pack(path)
    assert found.x.dtype == torch.uint8 and found.y.dtype == torch.int64
    assert torch.equal(found.x, tensor(rows)) and found.y.tolist() == y.tolist()
    assert (found.name, found.names, found.ids) == ("toy", names, names[::-1])
    assert found.jpeg == 80 and read_pack(write_pack(tmp_path / "b.npz", rows, y)).jpeg is None
    assert (
        str(held(path)["sha256"]) == hashlib.sha256(rows.tobytes()).hexdigest() == digest(found.x)
    )
    assert all(value.dtype != object for value in held(path).values())
    again = write_pack(tmp_path / "again.npz", found.x, found.y, names, names[::-1], 80, per=10)
    assert again.read_bytes() == path.read_bytes()  # NCHW tensors and NHWC arrays, byte for byte
    assert sorted(p.name for p in path.parent.iterdir()) == ["toy.npz"]
    part = found[2:5]
    assert isinstance(part, Loaded) and (part.names, part.jpeg, len(part)) == (names, 80, 3)
    assert found.to("meta").ids == found.ids


@given(st.data())
def test_packs_of_any_size_come_back(tmp_path_factory, data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    shape = draw(1, 12), draw(1, 9), draw(1, 9), data.draw(st.sampled_from([1, 3]))
    rows = np.random.default_rng(draw(0, 99)).integers(0, 256, shape, np.uint8)
    y = data.draw(st.lists(st.integers(0, 1000), min_size=shape[0], max_size=shape[0]))
    path = tmp_path_factory.mktemp("any") / "any.npz"
    found = read_pack(write_pack(path, rows, y, per=draw(1, 13)))
    assert torch.equal(found.x, tensor(rows)) and found.y.tolist() == y


def test_mosaics_without_checksum_are_read(tmp_path):
    rows = images(11)
    np.savez(tmp_path / "a.npz", **mosaics(rows, 4, 2, format="WEBP", lossless=True))
    found = read_pack(tmp_path / "a.npz")
    assert torch.equal(found.x, tensor(rows)) and found.y.tolist() == list(range(11))
    assert (found.names, found.ids, found.jpeg) == ((), (), None)


@pytest.mark.parametrize("quality", [60, 90])
def test_jpeg_mosaics_are_read_with_their_quality(tmp_path, quality):
    rows = images(11)
    fields = mosaics(rows, 6, 3, format="JPEG", quality=quality, subsampling=0)
    np.savez(tmp_path / "a.npz", **fields, names=np.array(["x"] * 11))
    found = read_pack(tmp_path / "a.npz")
    first = opened(fields["blob"][: fields["offsets"][1]].tobytes())
    assert np.array_equal(found.x[4].permute(1, 2, 0), first[32:64, 32:64])
    assert found.jpeg == quality and found.names == ("x",) * 11
    assert 0 < (found.x.float() - tensor(rows).float()).abs().mean() < 8


def test_jpeg_bodies_with_one_header_are_read(tmp_path):
    rows = images(5)
    files = [jpeg(image, quality=75) for image in rows]
    size = files[0].index(b"\xff\xda") + 14  # up to the scan: sizes and tables
    bodies = [file[size:-2] for file in files]
    assert len({file[:size] for file in files}) == 1
    np.savez(
        tmp_path / "a.npz",
        head=np.frombuffer(files[0][:size], np.uint8),
        blob=np.frombuffer(b"".join(bodies), np.uint8),
        offsets=np.cumsum([0, *map(len, bodies)]),
        labels=np.zeros(5, np.uint8),
        wnids=np.array(["n01443537"]),
        names=np.array(["goldfish"]),
    )
    found = read_pack(tmp_path / "a.npz")
    assert torch.equal(found.x, tensor(np.stack([opened(file) for file in files])))
    assert (found.jpeg, found.names, found.ids) == (75, ("goldfish",), ("n01443537",))
    assert torch.equal(found.x, compress(tensor(rows), 75))


def change(**new):
    """A damage: other values for some fields of a pack, or none for a field that is to go."""

    def damage(path: Path) -> None:
        fields = held(path) | {k: v(held(path)[k]) if callable(v) else v for k, v in new.items()}
        np.savez(path, **{key: value for key, value in fields.items() if value is not None})

    return damage


def rewrite(new):
    return lambda path: path.write_bytes(new(path.read_bytes()))


DAMAGES = {
    "cut short": rewrite(lambda b: b[: len(b) // 2]),
    "empty": rewrite(lambda b: b""),
    "text": rewrite(lambda b: b"<html>not found</html>"),
    "one array": lambda path: path.write_bytes(_npy(np.zeros(3))),
    "flipped byte": rewrite(lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:]),
    "garbage": change(blob=lambda b: np.random.default_rng(0).integers(0, 256, len(b), np.uint8)),
    "cut mosaic": change(blob=lambda b: b[:-40], offsets=lambda o: np.append(o[:-1], o[-1] - 40)),
    "other pixels": change(blob=lambda b: b, sha256=np.array("0" * 64)),
    "labels": change(labels=lambda y: y[:-1]),
    "negative": change(labels=lambda y: -1 - y.astype(np.int64)),
    "fractions": change(labels=lambda y: y + 0.5),
    "objects": change(names=np.array([{"a": 1}], dtype=object)),
    "too few names": change(names=lambda v: v[:1]),
    "offsets": change(offsets=lambda o: o[::-1]),
    "overlong": change(offsets=lambda o: np.append(o[:-1], o[-1] + 9)),
    "more images": change(n=np.int64(99), labels=np.zeros(99, np.uint8)),
    "width": change(width=np.int64(16)),
    "cols": change(cols=np.int64(0)),
    "per": change(per=np.int64(0)),
    **{f"no {key}": change(**{key: None}) for key in ("blob", "offsets", "labels", "per", "cols")},
}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture
def pack(tmp_path) -> Path:
    names = [f"class {i}" for i in range(4)]
    return write_pack(tmp_path / "toy_test.npz", images(12), np.arange(12) % 4, names, per=5)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pack_is_named_and_nothing_of_it_is_used(pack, damage):
    DAMAGES[damage](pack)
    with pytest.raises(
        ValueError, match=r"toy_test\.npz is damaged: .*[Dd]elete it, then"
    ) as caught:
        read_pack(pack)
    assert damage[:3] != "no " or f"lacks '{damage[3:]}'" in str(caught.value)
    with pytest.raises(ValueError, match="toy_test"):
        load("toy", "test", pack.parent)


def test_a_mosaic_with_too_few_images_is_not_stretched(tmp_path):
    """One image must not be spread over the places of four."""
    fields = mosaics(images(1), 1, 1, format="WEBP", lossless=True)
    np.savez(tmp_path / "a.npz", **fields | {"n": 4, "per": 4, "labels": np.zeros(4, np.uint8)})
    with pytest.raises(ValueError, match="cannot hold 4 images"):
        read_pack(tmp_path / "a.npz")


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_single_changed_byte_gives_other_pixels(tmp_path_factory, place, bits):
    path = tmp_path_factory.mktemp("byte") / "toy.npz"
    write_pack(path, images(4, size=8), [0, 1, 0, 1])
    good, content = read_pack(path), bytearray(path.read_bytes())
    content[place % len(content)] ^= bits
    path.write_bytes(content)
    try:
        found = read_pack(path)
    except ValueError as error:
        outcome = str(error)
    else:
        same = torch.equal(found.x, good.x) and torch.equal(found.y, good.y)
        outcome = "the same" if same else "other pixels"
    assert outcome == "the same" or "toy.npz is damaged" in outcome


def test_no_pack_holds_a_pickle_that_could_run(pack):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    bomb = np.empty(1, dtype=object)
    bomb[0] = Bomb()
    np.savez(pack, **held(pack) | {"names": bomb})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_pack(pack)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 4, 4, 3)), [0, 0]), "images must be uint8 .* got float64"),
        ((np.zeros((2, 3, 4, 4), np.uint8), [0, 0]), "arrays NHWC"),
        ((torch.zeros(2, 4, 4, 3, dtype=torch.uint8), [0, 0]), "tensors are NCHW"),
        ((np.zeros((4, 4, 3), np.uint8), [0, 0]), r"shape \(4, 4, 3\)"),
        ((np.zeros((0, 4, 4, 3), np.uint8), []), "images is empty"),
        ((images(2, size=4), [0]), r"labels must have shape \(2,\)"),
        ((images(2, size=4), [0, -1]), "labels must be integers of at least 0"),
        ((images(2, size=4), [0, 0.5]), "labels must be integers"),
        ((images(2, size=4), ["0", "1"]), "labels must be integers of at least 0, got <U1"),
        ((images(2, size=4), [True, False]), "labels must be integers of at least 0, got bool"),
        ((images(2, size=4), [0, np.nan]), "labels must be integers of at least 0, got float64"),
        ((images(2, size=4), None), r"labels must have shape \(2,\)"),
        ((images(2, size=4).tolist(), [0, 1]), "images must be a uint8 tensor or array, got list"),
        ((images(2, size=4), [0, 1], "ab"), "names must be a list of strings, got 'ab'"),
        ((images(2, size=4), [0, 1], [0, 1]), "each of names must be a str, got int"),
        ((images(2, size=4), [0, 1], [], "ab"), "ids must be a list of strings"),
        ((images(2, size=4), [0, 2], ["a", "b"]), "names must have one entry per class, 3, got 2"),
        ((images(2, size=4), [0, 1], [], [], 101), "jpeg must be .* at most 100, got 101"),
        ((images(2, size=4), [0, 1], [], [], 0), "jpeg must be a whole number of at least 1"),
    ],
)
def test_what_is_no_set_of_images_is_not_written(untyped, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_pack(tmp_path / "a.npz", *arguments)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_the_pack_that_was_there(monkeypatch, pack):
    before = pack.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write .*toy_test.npz \(No space.*make room"
    ) as caught:
        write_pack(pack, images(3), [0, 0, 0])
    assert caught.value.errno == errno.ENOSPC
    assert pack.read_bytes() == before and [*pack.parent.iterdir()] == [pack]


@pytest.fixture
def readonly(tmp_path, monkeypatch) -> Path:
    """A folder that cannot be written; for the superuser, whom no mode stops, by other means."""
    place = tmp_path / "readonly"
    place.mkdir(mode=0o555)
    if os.access(place, os.W_OK):
        opener, maker = Path.open, Path.mkdir

        def refuse(path: Path, wants: bool) -> None:
            if wants and place in [path, *path.parents]:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))

        def guarded(self, mode="r", *rest, **more):
            refuse(self, mode[0] in "wa")
            return opener(self, mode, *rest, **more)

        def made(self, *rest, **more):
            refuse(self, not self.exists())
            return maker(self, *rest, **more)

        monkeypatch.setattr(Path, "open", guarded)
        monkeypatch.setattr(Path, "mkdir", made)
    return place


def test_a_readonly_folder_is_named_with_the_way_out(readonly, tmp_path):
    with pytest.raises(PermissionError, match=r"cannot write .*toy\.npz.*ROBUSTOOD_DATA"):
        write_pack(readonly / "toy.npz", images(2), [0, 0])
    with pytest.raises(PermissionError, match=r"cannot write .*raw.*ROBUSTOOD_DATA"):
        fetch("svhn", "train", readonly)
    save(tmp_path / "tree" / "a.png", images(1)[0])
    with pytest.raises(PermissionError, match=r"cannot write .*mine32\.npz.*ROBUSTOOD_DATA"):
        folder(tmp_path / "tree", "mine", root=readonly)
    assert not any(readonly.iterdir())


# ---- sets by name -----------------------------------------------------------------------------


def test_sets_are_found_by_name_and_parts_are_joined(tmp_path):
    files = [
        "cifar10_test",
        "cifar10_train_a",
        "cifar10_train_b",
        "cifar100_train_q90",
        "textures32",
    ]
    files += ["cifar100_test", "svhn_train_first1083", "tinyimagenet32_train", "tinyimagenet32_val"]
    for i, file in enumerate(files):
        write_pack(tmp_path / f"{file}.npz", images(i + 2, i, 8), [i] * (i + 2))
    wanted = {
        "cifar10:test": [0],
        "cifar10:train": [1, 2],
        "cifar100:train": [3],
        "textures": [4],
        "cifar100:test": [5],
        "svhn:train": [6],
        "tinyimagenet:train": [7],
        "tinyimagenet:val": [8],
    }
    assert data.available(tmp_path) == sorted(wanted)
    for name in ("tiny_imagenet32_train", "tiny_imagenet32_test", "my_own64_test", "night_views32"):
        write_pack(tmp_path / f"{name}.npz", images(2, 0, 8), [0, 0])
    more = ["tiny_imagenet:train", "tiny_imagenet:test", "my_own64:test", "night_views"]
    assert data.available(tmp_path) == sorted([*wanted, *more])
    assert all(len(load(name, root=tmp_path)) == 2 for name in more)
    for name, parts in wanted.items():
        found = load(name, root=tmp_path)
        rows = np.concatenate([images(i + 2, i, 8) for i in parts])
        assert torch.equal(found.x, tensor(rows)), name
        assert found.y.unique().tolist() == parts and found.name == name.partition(":")[0]
        assert torch.equal(load(*name.split(":"), root=tmp_path).x, found.x)
    write_pack(tmp_path / "svhn_train.npz", images(40, 9, 8), [0] * 40)
    assert len(load("svhn", "train", tmp_path)) == 40  # the whole set, and nothing of it twice


def test_what_a_set_holds_is_said(pack):
    assert data.check("toy:test", root=pack.parent) == {
        "n": 12,
        "shape": (3, 32, 32),
        "classes": 4,
        "counts": [3, 3, 3, 3],
        "jpeg": None,
        "notes": (),
        "sha256": hashlib.sha256(images(12).tobytes()).hexdigest(),
    }


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("cifar10:train", "Get it with `robustood data fetch cifar10`"),
        ("textures", "Get it with `robustood data fetch textures`"),
        (
            "places365:test",
            "folder of images with `robustood data pack FOLDER --name places365:test`",
        ),
        ("toy", "there are: toy:test"),
        ("tinyimagenet:val", "robustood data pack FOLDER --name tinyimagenet:val`"),
        ("mnist:train", "ROBUSTOOD_DATA"),
    ],
)
def test_a_missing_set_says_what_is_there_and_how_to_get_it(pack, name, advice):
    with pytest.raises(ValueError, match=re.escape(advice)):
        load(name, root=pack.parent)
    with pytest.raises(ValueError, match="there are: none"):
        load(name, root=pack.parent / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("toy:test", "train"), "split must be given once, got 'test' in the name and 'train'"),
        (("../toy", "test"), "name must consist of letters"),
        (("", "test"), "name must consist of letters"),
        (("toy", "a/b"), "split must consist of letters"),
    ],
)
def test_a_name_is_no_path(pack, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(*arguments, root=pack.parent)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"jpeg": 75}, "differ in jpeg"),
        ({"names": ["a"]}, "differ in names"),
        ({"size": 8}, "different sizes"),
    ],
)
def test_parts_that_do_not_belong_together_are_not_joined(tmp_path, other, message):
    write_pack(tmp_path / "a_train_1.npz", images(2), [0, 0])
    rows = images(2, size=other.pop("size", 32))
    write_pack(tmp_path / "a_train_2.npz", rows, [0, 0], **other)
    with pytest.raises(ValueError, match=message):
        load("a:train", root=tmp_path)


def test_two_whole_sets_of_one_name_are_one_too_many(tmp_path):
    for file in ("a_train", "a32_train"):
        write_pack(tmp_path / f"{file}.npz", images(2), [0, 0])
    with pytest.raises(ValueError, match=r"a_train.npz are the same set|a32_train.npz and a_train"):
        load("a:train", root=tmp_path)


def test_the_folder_is_the_argument_else_the_environment_else_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("ROBUSTOOD_DATA", raising=False)
    checkout = Path(data.__file__).parents[2]
    assert data.root() == checkout / "data" / "cache"
    monkeypatch.setenv("ROBUSTOOD_DATA", str(tmp_path / "env"))
    assert data.root() == tmp_path / "env" and data.root(tmp_path) == tmp_path
    write_pack(tmp_path / "env" / "toy.npz", images(2), [0, 0])
    assert len(load("toy")) == 2
    monkeypatch.delenv("ROBUSTOOD_DATA")
    monkeypatch.setattr(sets, "__file__", str(tmp_path / "lib" / "robustood" / "data" / "sets.py"))
    monkeypatch.chdir(tmp_path)  # installed, not a checkout
    assert data.root() == tmp_path / "data" / "cache"


def idx(array: np.ndarray) -> bytes:
    sizes = np.array(array.shape, ">i4").tobytes()
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def test_mnist_is_read_as_published_where_no_pack_is(tmp_path):
    rows, y = images(6, size=28, channels=1), np.arange(6, dtype=np.uint8)
    (tmp_path / "mnist").mkdir()
    for part in ("train", "t10k"):
        (tmp_path / f"mnist/{part}-images-idx3-ubyte.gz").write_bytes(idx(rows[..., 0]))
        (tmp_path / f"mnist/{part}-labels-idx1-ubyte.gz").write_bytes(idx(y))
    assert data.available(tmp_path) == ["mnist:test", "mnist:train"]
    found = load("mnist", "test", tmp_path)
    assert torch.equal(found.x, tensor(rows)) and found.y.tolist() == y.tolist()
    assert (found.name, found.names, found.jpeg) == ("mnist", tuple("0123456789"), None)
    write_pack(tmp_path / "mnist_test.npz", rows[:2], y[:2])
    assert load("mnist", "test", tmp_path).x.shape == (2, 1, 28, 28)  # a pack comes first
    labels = tmp_path / "mnist/train-labels-idx1-ubyte.gz"
    for bad in (labels.read_bytes()[:-9], b"", idx(y.view(np.uint8))[:12], gzip.compress(b"\1\2")):
        labels.write_bytes(bad)
        with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz is damaged"):
            load("mnist", "train", tmp_path)


# ---- downloads --------------------------------------------------------------------------------


class Server:
    """Files on 127.0.0.1, which may drop the connection: ``cuts`` bytes into one answer after the other."""

    def __init__(self, ranges: bool = True) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: list[int | None] = []
        self.asked: list[tuple[str, int]] = []  # which file, from which byte
        self.sent = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content, start = server.files.get(self.path), 0
                if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                    start = int(found[1]) * ranges
                server.asked.append((self.path, start))
                if content is None or (start and start >= len(content)):
                    self.send_error(404 if content is None else 416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                cut = server.cuts.pop(0) if server.cuts else None
                body = content[start:] if cut is None else content[start : start + cut]
                server.sent += len(body)  # first: once the client has the bytes, the test may go on
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def put(self, name: str, content: bytes) -> tuple[str, str]:
        self.files[f"/{name}"] = content
        return f"{self.url}/{name}", hashlib.md5(content).hexdigest()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(params=[True], ids=["ranges"])
def server(request, monkeypatch) -> Iterator[Server]:
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    found = Server(request.param)
    yield found
    found.close()


PAYLOAD = np.random.default_rng(0).bytes(10**6)


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    url, md5 = server.put("file", PAYLOAD)
    server.cuts = [400_000, 300_000, None]
    fetching.download(url, tmp_path / "file", md5)
    assert (tmp_path / "file").read_bytes() == PAYLOAD and server.sent == len(PAYLOAD)
    assert [start for _, start in server.asked] == [0, 400_000, 700_000]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    fetching.download(url, tmp_path / "file", md5)
    assert len(server.asked) == 3  # what is there is not fetched again


def test_the_next_call_goes_on_where_the_last_one_gave_up(server, tmp_path):
    url, md5 = server.put("file", PAYLOAD)
    server.cuts = [400_000, 0]
    with pytest.raises(ConnectionError, match=r"400,000 bytes so far.*Try again later.*put it at"):
        fetching.download(url, tmp_path / "file", md5)
    assert (tmp_path / "file.partial").read_bytes() == PAYLOAD[:400_000]
    fetching.download(url, tmp_path / "file", md5)
    assert server.asked[-1] == ("/file", 400_000) and server.sent == len(PAYLOAD)
    assert (tmp_path / "file").read_bytes() == PAYLOAD
    os.replace(tmp_path / "file", tmp_path / "file.partial")  # stopped after the last byte
    fetching.download(url, tmp_path / "file", md5)
    assert server.sent == len(PAYLOAD) and (tmp_path / "file").read_bytes() == PAYLOAD


@pytest.mark.parametrize("server", [False], indirect=True, ids=["no ranges"])
def test_a_server_that_knows_no_ranges_sends_all_again(server, tmp_path):
    url, md5 = server.put("file", PAYLOAD)
    server.cuts = [400_000, None]
    fetching.download(url, tmp_path / "file", md5)
    assert (tmp_path / "file").read_bytes() == PAYLOAD and server.sent == 1_400_000
    server.cuts = [400_000, 400_000, None]
    with pytest.raises(ConnectionError, match=r"cut off at 400,000 of 1,000,000 bytes"):
        fetching.download(url, tmp_path / "other", md5)


def test_a_wrong_checksum_is_said_and_the_file_removed(server, tmp_path):
    url, md5 = server.put("file", PAYLOAD)
    with pytest.raises(ValueError, match=f"file has md5 {md5}, torchvision expects {'0' * 32}"):
        fetching.download(url, tmp_path / "file", "0" * 32)
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_bytes(b"put here by hand, and wrong")
    with pytest.raises(ValueError, match=r"delete .*file.* and fetch again"):
        fetching.download(url, tmp_path / "file", md5)
    assert (tmp_path / "file").exists()  # a reader's own file is not ours to remove


def test_a_full_disk_keeps_what_has_come(server, tmp_path, monkeypatch):
    url, md5 = server.put("train_32x32.mat", PAYLOAD)
    monkeypatch.setitem(datasets.SVHN.split_list, "train", [url, "train_32x32.mat", md5])
    opener = Path.open

    class Full:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self.file.close()

        def write(self, chunk: bytes) -> None:
            self.file.write(chunk[: 600_000 - self.file.tell()])
            if self.file.tell() == 600_000:
                raise OSError(errno.ENOSPC, "No space left on device")

    def small(path, mode="r", *rest, **more):
        file = opener(path, mode, *rest, **more)
        return Full(file) if path.suffix == ".partial" and mode[0] in "wa" else file

    monkeypatch.setattr(Path, "open", small)
    with pytest.raises(OSError, match=r"cannot write .*svhn \(No space left.*make room") as caught:
        fetch("svhn", "train", tmp_path)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(Path, "open", opener)
    raw = tmp_path / "raw" / "svhn"
    assert [(p.name, p.stat().st_size) for p in raw.iterdir()] == [
        ("train_32x32.mat.partial", 600_000)
    ]
    fetching.download(url, raw / "train_32x32.mat", md5)
    assert server.asked[-1] == ("/train_32x32.mat", 600_000)


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    gone = Server()
    gone.close()
    where = [f"{gone.url}/train_32x32.mat", "train_32x32.mat", "0" * 32]
    monkeypatch.setitem(datasets.SVHN.split_list, "train", where)
    with pytest.raises(ConnectionError) as caught:
        fetch("svhn:train", root=tmp_path)
    message = str(caught.value)
    for part in ("put it at", "raw/svhn/train_32x32.mat", "copy the set's pack", "ROBUSTOOD_DATA"):
        assert part in message
    with pytest.raises(ValueError, match="robustood data fetch svhn"):
        load("svhn:train", root=tmp_path)


def svhn() -> tuple[np.ndarray, np.ndarray, bytes]:
    rows, y = images(7), np.array([10, 1, 2, 3, 10, 9, 1])
    buffer = io.BytesIO()
    savemat(buffer, {"X": rows.transpose(1, 2, 3, 0), "y": y[:, None]})
    return rows, y % 10, buffer.getvalue()


def test_a_fetched_set_is_checked_packed_and_loaded(server, tmp_path, monkeypatch):
    rows, y, content = svhn()
    url, md5 = server.put("train_32x32.mat", content)
    monkeypatch.setitem(datasets.SVHN.split_list, "train", [url, "train_32x32.mat", md5])
    server.cuts = [len(content) // 2]
    assert fetch("svhn", "train", tmp_path) == [tmp_path / "svhn_train.npz"]
    found = load("svhn:train", root=tmp_path)
    assert torch.equal(found.x, tensor(rows)) and found.y.tolist() == y.tolist()
    assert server.sent == len(content)
    raw = tmp_path / "raw" / "svhn"
    assert [p.name for p in raw.iterdir()] == ["train_32x32.mat"]  # nothing half unpacked stays
    assert fetch("svhn:train", root=tmp_path) == [tmp_path / "svhn_train.npz"]
    (tmp_path / "svhn_train.npz").unlink()
    fetch("svhn:train", root=tmp_path)  # from the file that was put or left there
    assert len(server.asked) == 2 and digest(load("svhn:train", root=tmp_path).x) == digest(rows)


def test_a_download_with_a_wrong_checksum_makes_no_pack(server, tmp_path, monkeypatch):
    url, _ = server.put("train_32x32.mat", svhn()[2])
    monkeypatch.setitem(datasets.SVHN.split_list, "train", [url, "train_32x32.mat", "0" * 32])
    with pytest.raises(ValueError, match=r"train_32x32\.mat has md5"):
        fetch("svhn", "train", tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_cifar_comes_from_the_official_archive_in_official_order(server, tmp_path, monkeypatch):
    def batch(rows: np.ndarray) -> bytes:
        flat = rows.transpose(0, 3, 1, 2).reshape(len(rows), -1)
        return pickle.dumps({"data": flat, "labels": [*range(len(rows))]})

    parts = {f"data_batch_{i}": batch(images(3, i)) for i in (1, 2)}
    parts |= {"test_batch": batch(images(2, 3))}
    meta = pickle.dumps({"label_names": ["airplane", "automobile", "bird"]})
    files = parts | {"batches.meta": meta}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    content = archive({f"cifar-10-batches-py/{name}": c for name, c in files.items()})
    url, whole = server.put("cifar-10-python.tar.gz", content)
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "url", url)
    monkeypatch.setattr(kind, "tgz_md5", whole)
    monkeypatch.setattr(kind, "train_list", [[n, md5[n]] for n in parts if n[0] == "d"])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5["batches.meta"]})
    paths = fetch("cifar10", root=tmp_path)
    assert [path.name for path in paths] == ["cifar10_train.npz", "cifar10_test.npz"]
    train, test = load("cifar10:train", root=tmp_path), load("cifar10:test", root=tmp_path)
    assert torch.equal(train.x, tensor(np.concatenate([images(3, 1), images(3, 2)])))
    assert torch.equal(test.x, tensor(images(2, 3))) and train.y.tolist() == [0, 1, 2] * 2
    assert train.names == test.names == ("airplane", "automobile", "bird")
    assert len(server.asked) == 1  # one archive for both


def test_mnist_is_asked_for_at_the_next_address_when_one_fails(server, tmp_path, monkeypatch):
    rows, y = images(4, size=28, channels=1), np.arange(4, dtype=np.uint8)
    contents = {
        f"{part}-{kind}-ubyte.gz": idx(array)
        for part in ("train", "t10k")
        for kind, array in (("images-idx3", rows[..., 0]), ("labels-idx1", y))
    }
    resources = [(name, server.put(f"good/{name}", c)[1]) for name, c in contents.items()]
    kind = datasets.MNIST
    monkeypatch.setattr(kind, "mirrors", [f"{server.url}/gone/", f"{server.url}/good/"])
    monkeypatch.setattr(kind, "resources", resources)
    fetch("mnist", "test", tmp_path)
    found = load("mnist:test", root=tmp_path)
    assert torch.equal(found.x, tensor(rows)) and len(found.names) == 10
    monkeypatch.setattr(kind, "mirrors", [f"{server.url}/gone/"])
    said = r"(404|Error downloading)[\s\S]*put it at"  # torchvision's words, then ours
    with pytest.raises(ConnectionError, match=said):
        fetch("mnist", "train", tmp_path / "other")


def test_textures_are_shrunk_and_their_splits_joined(server, tmp_path, monkeypatch):
    files, photos = {}, {}
    for part, count in {"train": 2, "val": 1, "test": 1}.items():
        names = [f"{c}/{part}_{i}.jpg" for c in ("banded", "zigzag") for i in range(count)]
        files[f"dtd/labels/{part}1.txt"] = "\n".join(names).encode()
        for name in names:
            photos[name] = jpeg(images(1, len(photos), 80)[0, :, 8:72], quality=90)
            files[f"dtd/images/{name}"] = photos[name]
    url, md5 = server.put("dtd-r1.0.1.tar.gz", archive(files))
    monkeypatch.setattr(datasets.DTD, "_URL", url)
    monkeypatch.setattr(datasets.DTD, "_MD5", md5)
    assert fetch("textures", root=tmp_path) == [tmp_path / "textures32.npz"]
    found = load("textures", root=tmp_path)
    assert found.y.tolist() == [0, 0, 1, 1, 0, 1, 0, 1] and found.names == ("banded", "zigzag")
    small = Image.open(io.BytesIO(photos["banded/train_0.jpg"])).resize((32, 40), 2)  # bilinear
    assert np.array_equal(found.x[0].permute(1, 2, 0), np.asarray(small)[4:36])
    assert found.jpeg is None and len(server.asked) == 1


def test_traffic_signs_come_with_the_addresses_inside_torchvision(tmp_path, monkeypatch):
    asked, rows = [], images(4, size=32)
    table = "Filename;Width;ClassId\n" + "\n".join(f"{i}.ppm;32;{i % 2}" for i in range(4))
    zips = {"GTSRB_Final_Test_GT.zip": {"GT-final_test.csv": table.encode()}, "images": {}}
    for i, image in enumerate(rows):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PPM")
        zips["images"][f"GTSRB/Final_Test/Images/{i}.ppm"] = buffer.getvalue()

    def fake(url: str, target: Path, md5: str) -> None:
        asked.append((url, md5))
        with zipfile.ZipFile(target, "w") as file:
            for name, content in zips.get(target.name, zips["images"]).items():
                file.writestr(name, content)

    monkeypatch.setattr(fetching, "download", fake)
    assert fetch("gtsrb", "test", tmp_path) == [tmp_path / "gtsrb32_test.npz"]
    found = load("gtsrb:test", root=tmp_path)
    assert torch.equal(found.x, tensor(rows)) and found.y.tolist() == [0, 1, 0, 1]
    assert all(url.startswith("https://") and len(md5) == 32 for url, md5 in asked)


def test_only_published_sets_are_fetched(tmp_path):
    with pytest.raises(ValueError, match=r"cannot fetch 'lsun', only cifar10.*data pack FOLDER"):
        fetch("lsun", root=tmp_path)
    with pytest.raises(ValueError, match="split must be one of 'train', 'test', got 'val'"):
        fetch("cifar10", "val", tmp_path)


# ---- your own images --------------------------------------------------------------------------


def save(path: Path, image: np.ndarray, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two classes, one of them with a folder inside, and files that are no images."""
    place, rows = tmp_path / "tree", images(5, size=32)
    for name, image in zip(["b/2", "b/10", "a/images/1", "a/0"], rows):
        save(place / f"{name}.png", image)
    (place / "words.txt").write_text("boxes")
    (place / ".cache").mkdir()
    (place / ".cache" / "x.png").write_bytes(b"hidden")
    return place


def test_a_tree_becomes_a_set_sorted_by_path(tree, tmp_path):
    rows, cache = images(5, size=32), tmp_path / "cache"
    found = folder(tree, "mine", root=cache, split="test")
    assert torch.equal(found.x, tensor(rows[[3, 2, 1, 0]])) and found.y.tolist() == [0, 0, 1, 1]
    assert (found.name, found.names, found.jpeg) == ("mine", ("a", "b"), None)
    assert [p.name for p in cache.iterdir()] == ["mine32_test.npz"]
    assert torch.equal(load("mine:test", root=cache).x, found.x)
    larger = folder(tree, "mine", size=40, root=cache)
    assert larger.x.shape == (4, 3, 40, 40) and (cache / "mine40.npz").exists()


def test_the_second_call_reads_the_pack_until_the_tree_changes(tree, tmp_path, monkeypatch):
    calls, original = [], sets.read_image
    monkeypatch.setattr(sets, "read_image", lambda *a: calls.append(a[0].name) or original(*a))
    first = folder(tree, "mine", root=tmp_path)
    assert len(calls) == 4
    assert torch.equal(folder(tree, "mine", root=tmp_path).x, first.x) and len(calls) == 4
    white = np.full((32, 32, 3), 255, np.uint8)
    save(tree / "b" / "2.png", white)
    second = folder(tree, "mine", root=tmp_path)
    assert len(calls) == 8 and (second.x[3] == 255).all() and torch.equal(second.x[:3], first.x[:3])
    (tree / "a" / "0.png").unlink()
    assert len(folder(tree, "mine", root=tmp_path)) == 3
    os.utime(tree / "b" / "2.png", (1, 1))
    assert len(folder(tree, "mine", root=tmp_path)) == 3 and len(calls) == 14


def test_photographs_are_shrunk_by_their_shorter_side_and_cut(tmp_path):
    save(tmp_path / "tree" / "wide.png", images(1, size=80)[0, 8:72])
    save(tmp_path / "tree" / "grey.png", images(1, size=32)[0, :, :, 0])
    found = folder(tmp_path / "tree", "mine", root=tmp_path)
    small = np.asarray(Image.fromarray(images(1, size=80)[0, 8:72]).resize((40, 32), 2))
    assert np.array_equal(found.x[1].permute(1, 2, 0), small[:, 4:36])
    assert torch.equal(found.x[0], tensor(images(1, size=32)[..., [0, 0, 0]])[0])
    assert found.y.tolist() == [0, 0] and found.names == ()


def test_only_jpeg_files_of_that_size_carry_their_blocks(tmp_path):
    for i, image in enumerate(images(4)):
        save(tmp_path / "small" / f"{i}.jpg", image, quality=60)
        save(tmp_path / "mixed" / f"{i}.{'jpg' if i else 'png'}", image)
        save(tmp_path / "even" / f"{i}.{'jpg' if i % 2 else 'png'}", image)
    for i, image in enumerate(images(4, size=64)):
        save(tmp_path / "large" / f"{i}.jpg", image, quality=60)
    found = {n: folder(tmp_path / n, n, root=tmp_path) for n in ("small", "mixed", "even", "large")}
    assert {n: loaded.jpeg for n, loaded in found.items()} == {
        "small": 60,
        "mixed": 75,
        "even": None,
        "large": None,
    }
    assert torch.equal(found["small"].x, compress(tensor(images(4)), 60))


def test_a_tree_that_is_none_is_refused_by_name(tree, tmp_path):
    (tree / "b" / "broken.jpg").write_bytes(jpeg(images(1)[0])[:300])
    with pytest.raises(ValueError, match=r"broken\.jpg is not a readable image"):
        folder(tree, "mine", root=tmp_path)
    assert not list(tmp_path.glob("*.npz"))
    (tree / "b" / "broken.jpg").unlink()
    save(tree / "stray.png", images(1)[0])
    with pytest.raises(ValueError, match="images beside folders of images"):
        folder(tree, "mine", root=tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        folder(tmp_path / "none", "mine", root=tmp_path)
    with pytest.raises(ValueError, match="path must be a folder of images"):
        folder(tmp_path / "nowhere", "mine", root=tmp_path)
    write_pack(tmp_path / "taken32.npz", images(2), [0, 0])
    with pytest.raises(ValueError, match="not made from a folder; choose another name"):
        folder(tree, "taken", root=tmp_path)
    (tmp_path / "mine32.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"mine32\.npz is damaged"):
        folder(tree, "mine", root=tmp_path)


def one(path: Path, **options: object) -> Loaded:
    """What the only file of a tree becomes at 32 pixels."""
    return folder(path.parent, path.stem, root=path.parents[1], **options)


def shown(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Pixels (32, 32, 3) of a tree's only file, and the notes without their count."""
    found = one(path)
    return found.x[0].permute(1, 2, 0).numpy(), tuple(n.partition(": ")[2] for n in found.notes)


RAMP = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)


def png(rows: np.ndarray, clear: int) -> bytes:
    """A grey PNG of 16 bits in which one value is transparent; Pillow writes none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    size = b"".join(side.to_bytes(4) for side in rows.shape)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", size + bytes([16, 0, 0, 0, 0])), chunk(b"tRNS", clear.to_bytes(2)),
         chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ramp.png", "little.tif", "big.tif", "ramp.pgm", "clear.png"])
def test_sixteen_bits_keep_their_range(tmp_path, kind):
    path = tmp_path / "tree" / kind
    path.parent.mkdir()
    if kind == "ramp.pgm":
        path.write_bytes(b"P5 32 32 65535\n" + RAMP.astype(">u2").tobytes())
    elif kind == "clear.png":
        path.write_bytes(png(RAMP, int(RAMP[0, 1])))
    else:
        save(path, RAMP.astype(">u2") if kind == "big.tif" else RAMP)
    found, notes = shown(path)
    wanted = np.round(RAMP / 65535 * 255)
    if kind == "clear.png":
        wanted[0, 1] = 255  # transparent, blended with white
    assert np.array_equal(found, np.repeat(wanted[..., None], 3, 2))
    assert notes == ("16 bits, converted to 8",)


def test_floats_from_0_to_1_keep_their_range_and_others_are_refused(tmp_path):
    path = tmp_path / "tree" / "floats.tif"
    save(path, (RAMP / 65535).astype(np.float32))
    found, notes = shown(path)
    assert np.array_equal(found[..., 0], np.round(RAMP / 65535 * 255))
    assert notes == ("floats, converted to 8 bits",)
    for wrong, said in [
        (RAMP.astype(np.float32), r"lie in \[0, 65535\].*; save .* floats in \[0, 1\]"),
        (np.full((32, 32), -0.5, np.float32), r"lie in \[-0\.5, -0\.5\]"),
        (np.full((32, 32), np.nan, np.float32), r"lie in \[nan, nan\]"),
        (
            RAMP.astype(np.int32),
            r"lie in .* their range is unknown; save integers in 8 or 16 bits",
        ),
    ]:
        save(path, wrong)
        with pytest.raises(
            ValueError, match=rf"floats\.tif is not a readable image \(its values {said}"
        ):
            one(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    path = tmp_path / "tree" / ("image.tif" if mode == "PA" else "image.png")
    path.parent.mkdir()
    options, half = {}, 0
    if "A" in mode:
        image = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
        image.paste((0, 0, 0, 0), (0, 0, 16, 32))
        image.paste((0, 0, 0, 51), (16, 0, 24, 32))  # a fifth
        opacity, half = image.getchannel("A"), 204
        image = image.convert(mode)
        image.putalpha(opacity)  # Pillow before 11.1 loses it between RGBA and PA
    elif mode == "P":
        image = Image.new("P", (32, 32), 1)
        image.putpalette([9, 9, 9, 0, 0, 0])
        image.paste(0, (0, 0, 16, 32))
        options = {"transparency": 0}
    else:
        image = Image.new(mode, (32, 32), 0)
        image.paste((9,) * len(mode) if mode == "RGB" else 9, (0, 0, 16, 32))
        options = {"transparency": (9, 9, 9) if mode == "RGB" else 9}
    image.save(path, **options)
    found, notes = shown(path)
    assert (found[:, :16] == 255).all() and (found[:, 16:24] == half).all()
    assert (found[:, 24:] == 0).all() and notes == ("transparent, blended with white",)


def test_what_is_opaque_stays_as_it_is_and_without_a_note(tmp_path):
    rows = images(1)[0]
    for mode in ("RGBA", "P", "L", "1", "LA"):
        image = Image.fromarray(rows).convert(mode)
        path = tmp_path / mode / f"{mode}.png"
        path.parent.mkdir()
        image.save(path)
        found, notes = shown(path)
        assert np.array_equal(found, np.asarray(image.convert("RGB"))) and notes == ()


def turned(stored, orientation):
    """EXIF data that name an orientation, and the stored pixels as they are to be seen."""
    turns = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}
    turns |= {5: stored.swapaxes(0, 1), 6: np.rot90(stored, -1), 8: np.rot90(stored)}
    turns[7] = stored[::-1, ::-1].swapaxes(0, 1)
    exif = Image.Exif()
    exif[274] = orientation
    return exif, turns[orientation]


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_once(tmp_path, ending, orientation):
    stored = images(1)[0]
    exif, upright = turned(stored, orientation)
    path = tmp_path / "tree" / f"image.{ending}"
    save(path, stored, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    found, notes = shown(path)
    assert np.array_equal(found, upright)
    assert notes == (("rotated upright by the EXIF data",) if orientation > 1 else ())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright_as_its_camera_says(tmp_path, orientation):
    """JPEG, as phones write it: four quarters of different grey, compared up to the loss of the format."""
    stored = np.kron([[40, 90], [150, 220]], np.ones((16, 16)))[..., None].repeat(3, 2)
    stored = stored.astype(np.uint8)
    exif, upright = turned(stored, orientation)
    path = tmp_path / "tree" / "photograph.jpg"
    save(path, stored, exif=exif, quality=95)
    found, notes = shown(path)
    assert np.abs(found.astype(int) - upright).max() <= 4
    assert ("rotated upright by the EXIF data" in notes) == (orientation > 1)


def test_the_first_frame_is_taken_and_cmyk_becomes_rgb(tmp_path):
    path = tmp_path / "tree" / "moving.gif"
    path.parent.mkdir()
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    first.save(path, save_all=True, append_images=[second])
    found, notes = shown(path)
    assert (found == [255, 0, 0]).all() and notes == ("several frames or pages, the first used",)
    path.unlink()
    Image.new("CMYK", (32, 32), (255, 0, 0, 0)).save(path.with_suffix(".tif"))
    found, notes = shown(path.with_suffix(".tif"))
    assert (found == [0, 255, 255]).all() and notes == ("CMYK, converted to RGB",)


def test_the_notes_count_and_stay_with_the_pack(tree, tmp_path):
    save(tree / "a" / "deep.png", RAMP)
    (tree / "b" / "phone.heic").write_bytes(b"anything")
    (tree / "b" / "phone.HEIC").write_bytes(b"anything")
    (tree / "b" / "LICENSE").write_text("free")
    wanted = (
        "1 of 5 images: 16 bits, converted to 8",
        "4 left out: 2 .heic, 1 .txt, 1 without ending",
    )
    assert folder(tree, "mine", root=tmp_path).notes == wanted
    assert load("mine", root=tmp_path).notes == data.check("mine", root=tmp_path)["notes"] == wanted
    (tree / "b" / "phone.heic").unlink()
    assert folder(tree, "mine", root=tmp_path).notes[1].startswith("3 left out: 1 .heic")
    old = held(tmp_path / "mine32.npz")
    del old["notes"]
    np.savez(tmp_path / "mine32.npz", **old)
    assert load("mine", root=tmp_path).notes == ()  # packs of before have none


def test_a_class_without_images_is_named(tree, tmp_path):
    (tree / "c").mkdir()
    with pytest.raises(
        ValueError, match=r"tree/c contains no image, so its class would be missing"
    ):
        folder(tree, "mine", root=tmp_path)
    (tree / "c" / "deeper").mkdir()
    for i in range(2):
        (tree / "c" / "deeper" / f"{i}.heic").write_bytes(b"anything")
    with pytest.raises(
        ValueError, match=r"tree/c contains no image.*, and here are 2 \.heic\. Convert"
    ):
        folder(tree, "mine", root=tmp_path)
    with pytest.raises(ValueError, match=r"no images in .*, and here are 2 \.heic"):
        folder(tree / "c", "mine", root=tmp_path)
    assert not list(tmp_path.glob("*.npz"))
    flat = tmp_path / "flat"
    save(flat / "0.png", images(1)[0])
    (flat / "about").mkdir()  # no class: there are none
    assert folder(flat, "flat", root=tmp_path).names == ()


def test_links_are_followed_and_loops_and_dead_ends_are_named(tree, tmp_path):
    rows = images(5)
    save(tmp_path / "elsewhere" / "0.png", rows[4])
    (tree / "c").symlink_to(tmp_path / "elsewhere")
    found = folder(tree, "mine", root=tmp_path)
    assert found.names == ("a", "b", "c") and torch.equal(found.x[4], tensor(rows)[4])
    loop = tree / "a" / "again"
    for target in (tree, tree / "a", tmp_path):
        loop.symlink_to(target)
        with pytest.raises(ValueError, match=r"again is a link to a folder that contains it"):
            folder(tree, "mine", root=tmp_path)
        loop.unlink()
    (tmp_path / "elsewhere" / "back").symlink_to(tree)
    with pytest.raises(ValueError, match=r"is a link to a folder that contains it"):
        folder(tree, "mine", root=tmp_path)
    (tmp_path / "elsewhere" / "back").unlink()
    (tree / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"gone\.png is a broken link"):
        folder(tree, "mine", root=tmp_path)


def test_an_image_beyond_pillows_limit_is_named(tree, tmp_path, monkeypatch):
    for limit in (1000, 100):  # Pillow warns, then refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=rf"0\.png has more than {limit:,} pixels.*smaller"):
            folder(tree, "mine", root=tmp_path)


def test_paths_and_class_names_of_all_kinds(tmp_path, monkeypatch):
    place, rows = tmp_path / "my photos é", images(3)
    composed, apart = "cab\u00e9", "cabe\u0301"  # the second is how a Mac writes it
    for name, image in zip(("Cats", "cats", apart), rows):
        save(place / name / "0 a.png", image)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = folder("~/my photos é/", "mine", root="~/packs ü")
    assert found.names == ("Cats", composed, "cats") and found.y.tolist() == [0, 1, 2]
    assert torch.equal(found.x, tensor(rows[[0, 2, 1]]))
    assert found.notes == ("separate classes, though their names differ only in case: Cats, cats",)
    pack = tmp_path / "packs ü" / "mine32.npz"
    assert torch.equal(read_pack("~/packs ü/mine32.npz").x, read_pack(pack).x)
    again = write_pack("~/packs ü/again.npz", found.x, found.y)
    assert again == tmp_path / "packs ü" / "again.npz" and again.is_file()
    for name, image in zip(("Cats", "cats", apart), rows):
        save(place / name / "1.png", image)
    assert len(folder_of_views(f"~/{place.name}/").labels) == 3


def test_a_folder_with_one_image_is_a_set(tmp_path):
    path = tmp_path / "tree" / "one.png"
    save(path, np.full((1, 1, 3), 7, np.uint8))  # the smallest there is
    found = one(path)
    assert found.x.shape == (1, 3, 32, 32) and (found.x == 7).all() and found.y.tolist() == [0]


# ---- compression ------------------------------------------------------------------------------


@pytest.mark.parametrize(("quality", "channels"), [(75, 3), (30, 3), (75, 1)])
def test_compression_is_pillows(quality, channels):
    rows = images(6, channels=channels)
    found = compress(tensor(rows), quality)
    assert found.dtype == torch.uint8 and found.shape == (6, channels, 32, 32)
    for image, twin in zip(rows, found.permute(0, 2, 3, 1)):
        plain = image if channels == 3 else image[..., 0]
        again = np.asarray(Image.open(io.BytesIO(jpeg(plain, quality=quality))))
        assert np.array_equal(twin, again.reshape(32, 32, channels))
    assert not torch.equal(found, tensor(rows))


def test_the_quality_is_read_off_the_file():
    for mode in ("L", "RGB"):
        for quality in range(1, 101, 3):
            buffer = io.BytesIO()
            Image.new(mode, (16, 16)).save(buffer, "JPEG", quality=quality)
            assert packs.jpeg_quality(Image.open(buffer)) == quality


@pytest.mark.parametrize("quality", [0, 101, 75.0])
def test_a_quality_is_from_1_to_100(untyped, quality):
    with pytest.raises(ValueError, match="quality must be"):
        compress(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), quality)


def blockiness(x: torch.Tensor) -> np.ndarray:
    """Mean step from each row to the next and each column to the next: 2 x 31 features an image."""
    x = x.float().mean(1)
    down, right = x.diff(dim=1).abs().mean(2), x.diff(dim=2).abs().mean(1)
    return torch.cat([down, right], 1).numpy()


def test_compression_tells_outliers_until_the_own_images_have_it_too():
    """Both sides are the same noise; a linear classifier knows one from the other by its blocks."""
    mean = lambda x: gaussian_filter(x, (0, 4, 4, 0))
    rough = np.random.default_rng(0).normal(size=(2000, 32, 32, 3))
    x = tensor(np.uint8(np.clip(128 + 500 * mean(rough) + 4 * rough, 0, 255)))
    own, twins, outliers = x[:1000], compress(x[:1000], 75), compress(x[1000:], 75)

    def told_apart(inside: torch.Tensor) -> float:
        features = [np.log1p(blockiness(side)) for side in (inside, outliers)]
        fit_on = np.concatenate([f[:600] for f in features])
        spread = fit_on.std(0)
        classifier = LogisticRegression(C=0.1, max_iter=500)
        classifier.fit((fit_on - fit_on.mean(0)) / spread, [1] * 600 + [0] * 600)
        scores = [
            classifier.decision_function((f[600:] - fit_on.mean(0)) / spread) for f in features
        ]
        return auroc(*scores)

    assert told_apart(own) > 0.9
    assert 0.4 < told_apart(twins) < 0.6


# ---- outliers that are none -------------------------------------------------------------------

LISTS = tomllib.loads(Path(sets.__file__).with_name("overlap.toml").read_text("utf-8"))


def test_the_lists_name_each_class_once_by_its_id():
    for known, count in {"cifar10": 35, "cifar100": 83}.items():
        ids = LISTS["tinyimagenet"][known]
        assert len(set(ids)) == len(ids) == count
        assert all(re.fullmatch(r"n\d{8}", one) for one in ids) and ids == sorted(ids)


@pytest.mark.parametrize(
    ("known", "kept"),
    [("cifar10", [1, 3]), ("cifar100", [3])],
)
def test_classes_that_the_own_set_shows_are_dropped(known, kept):
    ids = ("n02085620", "n01443537", "n02129165", "n02666196")  # Chihuahua, goldfish, lion, abacus
    x, y = torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1), torch.arange(8) % 4
    if known == "cifar100":
        kept = [0, *kept]  # no dog is in CIFAR-100
    made = Loaded(x, y, name="tinyimagenet", names=("a", "b", "c", "d"), ids=ids, jpeg=75)
    left = without_overlap(made, known)
    assert left.y.tolist() == kept * 2 and left.x.flatten().tolist() == kept + [k + 4 for k in kept]
    assert (left.names, left.ids, left.jpeg) == (made.names, ids, 75)
    by_name = without_overlap(replace(made, ids=(), names=ids), known)
    assert by_name.y.tolist() == left.y.tolist()


def test_without_a_list_nobody_knows_the_overlap():
    made = Loaded(torch.zeros(1, 1, 1, 1), torch.zeros(1).long(), name="places365", names=("a",))
    with pytest.raises(ValueError, match=r"add \[places365\] cifar10 = "):
        without_overlap(made, "cifar10")
    with pytest.raises(ValueError, match=r"add \[tinyimagenet\] svhn = "):
        without_overlap(replace(made, name="tinyimagenet"), "svhn")
    with pytest.raises(ValueError, match="give the outlier set ids or names"):
        without_overlap(replace(made, name="tinyimagenet", names=()), "cifar10")


def test_outliers_that_are_all_known_are_refused():
    outliers = Loaded(
        torch.zeros(2, 3, 1, 1), torch.tensor([0, 0]), "tinyimagenet", ids=("n02099601",)
    )
    with pytest.raises(ValueError, match="all images of 'tinyimagenet' show classes of 'cifar10'"):
        without_overlap(outliers, "cifar10")


def test_classes_that_are_named_in_another_way_than_in_the_list_do_not_pass_as_no_overlap():
    """The validation images of the official Tiny-ImageNet lie in one folder called images."""
    x, y = torch.zeros(3, 3, 1, 1, dtype=torch.uint8), torch.zeros(3).long()
    made = Loaded(x, y, name="tinyimagenet", names=("images",))
    said = r"classes of 'tinyimagenet' \(images, \.\.\.\) must be named by WordNet id.* per class, such as n01641577"
    with pytest.raises(ValueError, match=said):
        without_overlap(made, "cifar10")
    with pytest.raises(ValueError, match="must be named by WordNet id"):
        without_overlap(replace(made, ids=("n01641577", "frog")), "cifar10")


# ---- the real files ---------------------------------------------------------------------------


def real(name: str) -> Loaded:
    """A set from the data folder, else the test is skipped with a reason."""
    need(name)
    return load(name)


@pytest.mark.parametrize("name", SHA)
def test_cifar10_decodes_to_the_pixels_of_the_reference(name):
    found = real(name)
    assert digest(found.x) == SHA[name] and found.jpeg is None
    assert torch.bincount(found.y).tolist() == [len(found) // 10] * 10


def test_the_packs_of_tinyimagenet_say_how_they_were_compressed():
    found = real("tinyimagenet:val")
    assert found.jpeg == 75
    assert len(found.names) == len(found.ids) == 165
    assert torch.equal(without_overlap(found, "cifar10").x, found.x)  # dropped when it was made
    left = without_overlap(found, "cifar100")
    assert len(left) == 94 * 50 and set(LISTS["tinyimagenet"]["cifar10"]).isdisjoint(found.ids)
    ours = {
        name.partition(",")[0]
        for name, i in zip(found.names, found.ids)
        if i not in LISTS["tinyimagenet"]["cifar100"]
    }
    assert not ours & {"goldfish", "mushroom", "orange", "lawn mower", "plate", "bee", "snail"}


def test_the_packs_of_cifar100_say_how_they_were_compressed():
    assert real("cifar100:train").jpeg == 90
    found = real("cifar100:test")
    assert found.jpeg is None and len(found.names) == 100


# ---- batches


def test_an_augmented_image_is_one_of_its_crops_and_flips():
    """Found among all of them by comparison; each offset and each side of the flip comes up equally often."""
    n, crop = 4000, 2
    image = torch.randint(1, 255, (1, 3, 6, 5), dtype=torch.uint8)
    found = Augment(crop)(image.expand(n, -1, -1, -1), torch.Generator().manual_seed(1))
    assert found.dtype == torch.uint8
    framed = torch.nn.functional.pad(image, [crop] * 4)
    counts = []
    for flip in (False, True):
        for down in range(2 * crop + 1):
            for right in range(2 * crop + 1):
                cut = framed[:, :, down : down + 6, right : right + 5]
                cut = cut.flip(3) if flip else cut
                counts.append(int((found == cut).flatten(1).all(1).sum()))
    assert sum(counts) == n
    assert chisquare(counts).pvalue > 1e-3


def test_augmentation_may_be_nothing_or_one_of_its_parts():
    x = torch.rand(20, 3, 8, 8)
    noise = torch.Generator().manual_seed(0)
    assert torch.equal(Augment(0, flip=False)(x, noise), x)
    flipped = Augment(0)(x, noise)
    same = (flipped == x).flatten(1).all(1)
    assert 2 < same.sum() < 18 and torch.equal(flipped[~same], x[~same].flip(3))
    with pytest.raises(ValueError, match="crop must be"):
        Augment(-1)


def test_half_of_the_images_come_as_their_twins(book):
    x = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    made = Data(Split(x, torch.arange(200)), book.val, book.test, x[:0], compressed=x + 1)
    seen = torch.cat(
        [b.x[:, 0, 0, 0] * 255 - b.y for b in draw(made, 50, 1, torch.Generator().manual_seed(0))]
    )
    assert set(seen.round().int().tolist()) == {0, 1} and 70 < seen.sum() < 130


def test_the_batches_of_several_processes_are_parts_of_one(book):
    def epoch(place):
        noise = SharedGenerator("cpu")
        noise.place = place
        made = replace(book, compressed=1 - book.train.x)
        return list(draw(made, 60, 30, noise.manual_seed(2), Augment(1)))

    for whole, first, second in zip(epoch((0, 1)), epoch((0, 2)), epoch((1, 2)), strict=True):
        for name in ("x", "y", "outliers"):
            parts = getattr(first, name), getattr(second, name)
            assert torch.equal(getattr(whole, name), torch.stack(parts, 1).flatten(0, 1))


# ---- pairs ------------------------------------------------------------------------------------


def noisy(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random perturbation, one number per image."""
    return (x + torch.rand(len(x), 1, 1, 1, generator=generator) / 2).clamp(0, 1)


def viewed(pairing: str, views: int = 4, n: int = 60) -> Views:
    """Things whose view v is the constant image (10 i + v) / 1000."""
    number = 10 * torch.arange(n)[:, None] + torch.arange(views)
    images = (number / 1000)[:, :, None, None, None].expand(n, views, 1, 2, 2)
    return Views.of(images, torch.arange(n), pairing)


def test_pairs_keep_their_labels_when_cut_and_redrawn(book):
    made = paired(book, noisy, border=2, seed=3)
    train = made.train
    assert train.x.shape[1:] == (1, 12, 12) and torch.equal(train.x[:, :, 2:-2, 2:-2], book.train.x)
    assert train.x[:, :, :2].max() == 0 and torch.equal(train.labels, book.train.y)
    cut = train[5:9].to("cpu")
    assert isinstance(cut, Pairs) and torch.equal(cut.labels, book.train.y[5:9])
    assert torch.equal(cut.y, train.y[5:9]) and torch.equal(cut.labelled.y, cut.labels)
    fresh = [redrawn(made, torch.Generator().manual_seed(s)).train for s in (1, 1, 2)]
    assert torch.equal(fresh[0].y, fresh[1].y) and not torch.equal(fresh[0].y, fresh[2].y)
    assert torch.equal(fresh[0].x, train.x)
    assert torch.equal(paired(book, noisy, border=2, seed=3).test.y, made.test.y)
    assert redrawn(book, torch.Generator()).train is book.train
    fixed = Pairs(train.x, train.y, train.labels)
    assert fixed.redraw(torch.Generator()) is fixed


@pytest.mark.parametrize("pairing", ["first", "others", "any"])
def test_views_are_paired_as_they_say(pairing):
    views, seen = viewed(pairing), set()
    for seed in range(20):
        drawn = views.redraw(torch.Generator().manual_seed(seed))
        thing = torch.arange(60) * 10
        first, second = (
            (images[:, 0, 0, 0] * 1000).round().long() - thing for images in (drawn.x, drawn.y)
        )
        seen |= set(zip(first.tolist(), second.tolist(), strict=True))
    ordered = {(a, b) for a in range(4) for b in range(4) if a != b}
    wanted = {
        "first": {(0, b) for b in (1, 2, 3)},
        "others": {(a, b) for a, b in ordered if a and b},
        "any": ordered,
    }
    assert seen == wanted[pairing]


def test_all_partners_are_equally_likely():
    views = viewed("any", n=6000)
    second = (views.y[:, 0, 0, 0] * 1000).round().long() - torch.arange(6000) * 10
    counts = torch.bincount(second, minlength=4)
    assert (counts - 1500).abs().max() < 4 * (6000 * 0.25 * 0.75) ** 0.5


def test_corrupted_views_are_the_corruptions(book):
    few = Split(book.train.x[:3], book.train.y[:3])
    views = corrupted(few, ("contrast", "brightness"), severity=5, seed=1)
    assert views.views.shape == (3, 3, 1, 8, 8) and views.views.dtype == torch.uint8
    assert torch.equal(views.views[:, 0], (few.x * 255).round().to(torch.uint8))
    plain = corrupt(few.x, "contrast", 5, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(views.views[:, 1], (plain * 255).round().to(torch.uint8))
    assert torch.equal(views.x, views.views[:, 0]) and torch.equal(views.labels, few.y)
    assert len(LEARNED) == 12 and len(HELD_OUT) == 3 and not set(LEARNED) & set(HELD_OUT)
    assert not any("noise" in name for name in LEARNED)


def test_a_folder_of_views_is_read_and_bad_ones_are_named(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    for thing in range(2):
        (tmp_path / f"room{thing}").mkdir()
        for light in range(3):
            image = Image.fromarray(pixels[thing, light])
            image.save(tmp_path / f"room{thing}" / f"light{light}.png")
    views = folder_of_views(tmp_path, size=8)
    assert torch.equal(views.views, torch.as_tensor(pixels).movedim(-1, 2))
    assert views.pairing == "any" and views.labels.tolist() == [0, 1]
    (tmp_path / "room1" / "light2.png").unlink()
    with pytest.raises(ValueError, match=r"as many views as the first, 3; room1 has 2"):
        folder_of_views(tmp_path, size=8)
    (tmp_path / "room1" / "light2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"light2.png is not a readable image"):
        folder_of_views(tmp_path, size=8)
    Image.fromarray(pixels[0, 0]).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"stray.png lies in no subfolder"):
        folder_of_views(tmp_path, size=8)
    with pytest.raises(ValueError, match="path must be a folder of images"):
        folder_of_views(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("views", "pairing", "words"),
    [
        (torch.zeros(2, 1, 1, 4, 4), "first", r"at least 2 views .* got shape \(2, 1, 1, 4, 4\)"),
        (torch.zeros(2, 2, 1, 4, 4), "others", "at least 3 views"),
        (torch.zeros(2, 3, 4, 4), "any", "views must be"),
        (torch.zeros(2, 3, 1, 4, 4), "pairs", "pairing must be one of .* got 'pairs'"),
    ],
)
def test_views_that_cannot_be_paired_are_refused(untyped, views, pairing, words):
    with pytest.raises(ValueError, match=words):
        Views.of(views, torch.zeros(2, dtype=torch.int64), pairing)


# ---- rendered scenes --------------------------------------------------------------------------


def solid(height: torch.Tensor) -> Scenes:
    """One grey solid."""
    return Scenes(torch.tensor([0]), height[None], torch.full((1, 3, *height.shape), 0.8))


def hill(size: int = 16, at: tuple[float, float] = (0.0, 0.0)) -> torch.Tensor:
    """A dome of height 0.4; place in half sides, to the right and up."""
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    return 0.4 * (1 - ((right - at[0]) ** 2 + (down + at[1]) ** 2) / 0.36).clamp_min(0).sqrt()


def test_flat_ground_is_lambert():
    """albedo x colour x (a + (1 - a) sin(elevation)), whatever the azimuth."""
    for elevation, azimuth, warmth in [(30.0, 0.0, 0.0), (70.0, 200.0, 1.0)]:
        lights = light_grid((elevation,), (azimuth,), (warmth,))
        shade = 0.25 + 0.75 * np.sin(np.radians(elevation))
        wanted = 0.8 * lights.colour[0, 0] * shade
        got = render(solid(torch.zeros(16, 16)), lights)[0, 0]
        assert torch.allclose(got, wanted[:, None, None].expand_as(got), atol=1e-5)


def test_light_from_a_side_lights_that_side_and_casts_a_shadow_on_the_other():
    right, up, left, below = render(
        solid(hill()), light_grid((35.0,), (0.0, 90.0, 180.0, 270.0), (0.0,))
    )[0, :, 0]
    assert right[8, 10] > right[8, 5] + 0.1 and right[8, 3] < right[8, 14] - 0.1
    assert torch.allclose(left, right.flip(1), atol=1e-5)  # the scene is its own mirror image
    assert torch.allclose(up, right.rot90(1), atol=1e-5)
    assert torch.allclose(below, up.flip(0), atol=1e-5)
    dent = render(solid(-hill()), light_grid((35.0,), (0.0,), (0.0,)))[0, 0, 0]
    assert dent[8, 5] > dent[8, 10] + 0.1, (
        "a dent lit from the right looks like a dome lit from the left"
    )


def test_a_low_sun_makes_longer_shadows():
    dark = lambda image: (image < 0.8 * image[0, 0]).sum()
    low, high = (
        render(solid(hill()), light_grid((e,), (0.0,), (0.0,)))[0, 0, 0] for e in (20.0, 60.0)
    )
    assert dark(low[:, :5]) > dark(high[:, :5])


def test_held_out_lights_come_from_directions_never_seen():
    noise = torch.Generator().manual_seed(0)
    seen, other = (random_lights(200, 20, noise, held_out=h).azimuth for h in (False, True))
    assert seen.min() >= 90 and seen.max() <= 360 and other.min() >= 0 and other.max() <= 90
    assert light_grid().azimuth.shape == (1, 3 * 12 * 3)


def test_relit_scenes_are_seeded_and_split():
    made = [relit(30, 10, 10, lights=3, seed=s) for s in (0, 0, 1)]
    assert torch.equal(made[0].train.views, made[1].train.views)
    assert not torch.equal(made[0].train.views, made[2].train.views)
    assert not torch.equal(made[0].train.views[:10], made[0].test.views)
    test = made[0].test
    reference = render(scenes(10, 2), REFERENCE)
    assert torch.equal(test.x, (reference[:, 0] * 255).round().to(torch.uint8))
    assert torch.equal(test.labels, scenes(10, 2).kind) and test.views.shape == (10, 4, 3, 16, 16)
    with pytest.raises(ValueError, match="size must be a whole number of at least 8"):
        scenes(3, 0, size=4)


# --- images from wherever they lie


@pytest.fixture
def places(tmp_path):
    """The same ten images in a folder, a pack, a .npy and a .npz file, by its name."""
    from PIL import Image

    x = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(x):
        Image.fromarray(image).save(tmp_path / "photos" / f"{number}.png")
    moved = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    np.save(tmp_path / "x.npy", moved)
    np.savez(tmp_path / "x.npz", moved)
    np.save(tmp_path / "floats.npy", moved / 255)
    data.write_pack(tmp_path / "mine_test.npz", x, [0] * 10)
    return tmp_path, torch.from_numpy(moved)


def test_images_are_the_same_wherever_they_lie(places):
    folder, x = places
    for source in ("photos", "x.npy", "x.npz", "mine_test.npz"):
        assert data.sample(folder / source, size=8).equal(x), source
        few = data.sample(folder / source, 4, size=8, seed=3)
        rows = [(x == each).flatten(1).all(1).nonzero().item() for each in few]
        assert len(few) == 4 and rows == sorted({*rows}), "in their order, each once"
        assert few.equal(data.sample(str(folder / source), 4, size=8, seed=3))
    assert data.sample("mine:test", root=folder).equal(x)
    floats = data.sample(folder / "floats.npy")
    assert floats.dtype == torch.float32 and (255 * floats - x).abs().max() < 1e-4
    assert len(data.sample(folder / "photos", 99, size=8)) == 10
    draws = [data.sample(folder / "x.npy", 4, seed=seed) for seed in (0, 1)]
    assert not draws[0].equal(draws[1])


def test_images_that_cannot_be_read_are_named(places):
    folder, x = places
    np.savez(folder / "two.npz", a=x, b=x)
    np.save(folder / "whole.npy", x.numpy().astype(int))
    np.save(folder / "none.npy", x[:0].numpy())
    (folder / "text.npy").write_text("no array")
    for source, said in {
        "two.npz": r"two\.npz is not a \.npy file.*it holds 2 arrays, not one.*np\.save",
        "whole.npy": r"must hold \(samples, \.\.\.\) of 8-bit pixels or floats, got int64",
        "none.npy": r"none\.npy is empty \(shape \(0, 3, 8, 8\)\)",
        "text.npy": r"text\.npy is not a \.npy file",
        "missing.npy": r"source must be a folder of images, .* there is no .*missing\.npy",
    }.items():
        with pytest.raises(ValueError, match=said):
            data.sample(folder / source)
    with pytest.raises(ValueError, match=r"no set 'yours' in .*there are: mine:test"):
        data.sample("yours", root=folder)


@pytest.mark.parametrize(
    "spoil", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:60] + b"x" + raw[61:]]
)
def test_a_damaged_array_file_is_named(tmp_path, spoil):
    file = tmp_path / "mine.npz"
    np.savez(file, images=images(3, 0, 8))
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=r"mine\.npz is not a \.npy file"):
        data.sample(file)


def test_sixteen_bits_of_colour_are_noted(tmp_path):
    """Pillow reads the higher byte of each value of a 16-bit colour PNG, and says nothing."""
    rows = np.arange(8 * 8 * 3, dtype=np.uint16).reshape(8, 8, 3) * 257
    chunk = lambda kind, body: (
        len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)
    )
    head = (8).to_bytes(4) + (8).to_bytes(4) + bytes([16, 2, 0, 0, 0])
    body = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    file = tmp_path / "a.png"
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )
    pixels, _, changes = sets.read_image(file, 8)
    assert changes == ["16 bits, converted to 8"] and np.array_equal(pixels, rows // 257)
