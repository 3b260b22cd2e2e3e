"""Each corruption against its own formula; seeds, sizes and severities for all of them."""

import colorsys
import io
import math
from functools import lru_cache

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_image

from robustood import corruptions
from robustood.corruptions import EXTRA, NAMES, STANDARD, corrupt

SEVERITIES = range(1, 6)
EVERY = pytest.mark.parametrize("name", NAMES)
BLURS = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur")
NO_DRAWS = ("defocus_blur", "zoom_blur", "gaussian_blur", "brightness", "contrast")
NO_DRAWS += ("pixelate", "jpeg_compression", "saturate")
SIZES = [(1, 8, 8), (3, 32, 32), (1, 42, 42), (3, 20, 33)]


@lru_cache
def photos(n: int, channels: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    """8-bit crops of a photograph, as (n, channels, height, width) in [0, 1]."""
    photo = Image.fromarray(load_sample_image("china.jpg")).convert("RGB" if channels == 3 else "L")
    rng = np.random.default_rng(0)
    crops = []
    for _ in range(n):
        side = int(rng.integers(96, 257))
        left, top = (int(rng.integers(whole - side)) for whole in photo.size)
        box = (left, top, left + side, top + side)
        crops.append(np.array(photo.resize((width, height), Image.Resampling.BOX, box)))
    pixels = torch.from_numpy(np.stack(crops)).reshape(n, height, width, channels)
    return pixels.permute(0, 3, 1, 2).float() / 255


def smooth(n: int) -> torch.Tensor:
    """Waves of low frequency in three colours, (n, 3, 32, 32), between 0.1 and 0.7."""
    rng = np.random.default_rng(1)
    phase, turn = rng.uniform(0, 2 * math.pi, (2, n, 3, 1, 1))
    y, x = np.indices((32, 32)) / 32 * 2 * math.pi
    wave = np.sin(1.5 * (np.cos(turn) * x + np.sin(turn) * y) + phase)
    return torch.tensor(0.4 + 0.3 * wave, dtype=torch.float32)


def seeds(n: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + n)


def rng_of(name: str, severity: int, seed: int) -> np.random.Generator:
    return np.random.default_rng((NAMES.index(name), severity, seed))


def strength(name: str, severity: int):
    return corruptions._TABLE[name][1][severity - 1]


def impulse(name: str, severity: int, size: int = 31, seed: int = 0) -> np.ndarray:
    """The corruption's answer to one white pixel in the middle."""
    x = torch.zeros(1, 1, size, size, dtype=torch.float64)
    x[..., size // 2, size // 2] = 1
    return corrupt(x, name, severity, seeds(1, seed))[0, 0].numpy()


def test_the_names_are_the_benchmark_and_its_validation_set():
    assert NAMES == STANDARD + EXTRA and len(set(NAMES)) == 19 and len(STANDARD) == 15
    assert STANDARD[0] == "gaussian_noise" and STANDARD[-1] == "jpeg_compression"
    assert EXTRA == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    assert all(len(strengths) == 5 for _, strengths in corruptions._TABLE.values())
    assert strength("gaussian_noise", 5) == 0.1 and strength("contrast", 5) == 0.15
    assert strength("jpeg_compression", 5) == 40


# What every corruption shares


@EVERY
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_images_in_images_out(name, shape):
    x = photos(2, *shape)
    kept = x.clone()
    for severity in SEVERITIES:
        made = corrupt(x, name, severity, seeds(2))
        assert made.shape == x.shape and made.dtype == x.dtype and made.isfinite().all()
        assert made.min() >= 0 and made.max() <= 1
        if name == "saturate" and shape[0] == 1:
            assert torch.equal(made, x)
        elif shape[1] > 8 or name not in ("spatter", "impulse_noise"):  # which may miss 8x8 pixels
            assert torch.equal(made, x) == (shape[1] == 8 and (name, severity) == ("zoom_blur", 1))
    assert torch.equal(x, kept)


@EVERY
def test_extremes_and_other_dtypes(name):
    flat = torch.stack([torch.zeros(3, 9, 9), torch.ones(3, 9, 9)]).double()
    flat[1, 0, 0, 0] += 5e-7  # within the tolerance of the door
    for severity in SEVERITIES:
        made = corrupt(flat, name, severity, seeds(2))
        assert made.dtype == torch.float64 and made.isfinite().all()
        assert made.min() >= 0 and made.max() <= 1
        assert corrupt(flat.half(), name, severity, seeds(2)).dtype == torch.float16


@EVERY
def test_the_seed_alone_decides(name):
    x = photos(1).expand(2, -1, -1, -1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, two = corrupt(x, name, 3, torch.tensor([7, 7])), corrupt(x, name, 3, torch.tensor([7, 8]))
    assert torch.equal(one[0], one[1]) and torch.equal(one[0], two[0])
    assert torch.equal(two[0], two[1]) == (name in NO_DRAWS)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


@given(
    name=st.sampled_from(NAMES),
    severity=st.integers(1, 5),
    chosen=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    seed=st.integers(0, 2**62),
)
def test_companions_and_order_do_not_matter(name, severity, chosen, seed):
    x, index = photos(6, 3, 16, 16), torch.tensor(chosen)
    together = corrupt(x, name, severity, seeds(6, seed))
    assert torch.equal(corrupt(x[index], name, severity, seeds(6, seed)[index]), together[index])


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("name", [*BLURS, "elastic_transform", "pixelate", "contrast"])
def test_a_constant_image_stays(name, size):
    x = torch.tensor([0.2, 0.5, 0.9])[:, None, None].expand(2, 3, size, size)
    for severity in SEVERITIES:
        assert torch.allclose(corrupt(x, name, severity, seeds(2)), x, atol=1e-6)


def test_bad_input_is_refused():
    x = torch.full((2, 3, 8, 8), 0.5)
    for images, fix in (
        (x + 1, "outside"),
        (x[:, :2], "1 or 3 channels"),
        (x[..., :7], "sides >= 8"),
        (x * math.nan, "NaN"),
    ):
        with pytest.raises(ValueError, match=fix):
            corrupt(images, "fog", 1, seeds(2))
    with pytest.raises(ValueError, match=r"'gaussian_noise', .*'saturate', got 'rain'"):
        corrupt(x, "rain", 1, seeds(2))
    for severity in (0, 6, True):
        with pytest.raises(ValueError, match="severity must be a whole number from 1 to 5"):
            corrupt(x, "fog", severity, seeds(2))
    for wrong in (seeds(3), seeds(2)[:, None], seeds(2, -1), torch.tensor(4)):
        with pytest.raises(ValueError, match="seeds must be a tensor of 2 whole numbers >= 0"):
            corrupt(x, "fog", 1, wrong)


# Severity


def distances(x: torch.Tensor, name: str) -> np.ndarray:
    """Mean over images of the root mean square distance, for each severity."""
    made = [corrupt(x, name, severity, seeds(len(x))) for severity in SEVERITIES]
    return np.array([(y - x).square().mean((1, 2, 3)).sqrt().mean().item() for y in made])


@pytest.mark.parametrize("images", [photos, smooth], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("glass_blur", "frost", "elastic_transform", "saturate")]
)
def test_severity_grows_with_the_distance(name, images):
    gaps = distances(images(25), name)
    if name == "motion_blur":  # 3 and 4 differ in the reach alone, far down the tail
        assert abs(gaps[3] / gaps[2] - 1) < 0.15
        gaps = np.delete(gaps, 3)
    steps = np.diff(gaps)
    if name == "spatter":  # water at 1 to 3, mud at 4 and 5
        steps = np.delete(steps, 2)
    assert (steps > 0).all(), gaps


def test_where_it_does_not():
    gaps = {
        n: distances(photos(30), n)
        for n in ("glass_blur", "frost", "elastic_transform", "saturate")
    }
    assert np.argsort(gaps["elastic_transform"]).tolist() == [4, 3, 2, 1, 0]
    saturate = gaps["saturate"]
    assert saturate[0] < saturate[1] > saturate[2] < saturate[3] < saturate[4]
    glass = gaps["glass_blur"]
    assert glass[2] < glass[1] and glass[4] < glass[3] and min(glass[3:]) > max(glass[:3])
    assert gaps["frost"][0] < gaps["frost"][1] > gaps["frost"][3]
    ice = [amount / image for image, amount in corruptions._TABLE["frost"][1]]
    assert ice == sorted(ice)  # the ice gains on the image all the same


# Noise


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_its_moments(severity):
    n, level = 20, 0.5
    x = torch.full((n, 3, 32, 32), level)
    c = {k: strength(k, severity) for k in NAMES if k.endswith("noise")}
    sigma = {
        "gaussian_noise": c["gaussian_noise"],
        "speckle_noise": c["speckle_noise"] * level,
        "shot_noise": math.sqrt(level / c["shot_noise"]),
    }
    for name, expected in sigma.items():
        noise = corrupt(x, name, severity, seeds(n)) - level
        assert noise.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(noise.mean().item()) < 5 * expected / math.sqrt(x.numel())
    counts = corrupt(x, "shot_noise", severity, seeds(n)) * c["shot_noise"]
    assert torch.allclose(counts, counts.round(), atol=1e-4)
    struck = corrupt(x, "impulse_noise", severity, seeds(n))
    assert set(struck.unique().tolist()) == {0.0, 0.5, 1.0}
    for value in (0, 1):
        share = (struck == value).float().mean().item()
        assert share == pytest.approx(c["impulse_noise"] / 2, rel=0.15)


# Blur


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["defocus_blur", "motion_blur", "gaussian_blur"])
def test_kernels_sum_to_one(name, severity):
    kernel = impulse(name, severity, size=41, seed=severity)
    assert kernel.min() >= 0 and kernel.sum() == pytest.approx(1, abs=1e-9)


def test_defocus_and_gaussian_blur_have_their_kernels():
    for severity, sigma in ((1, 0.4), (2, 0.5), (3, 0.6)):  # the disc is one pixel
        weights = np.exp(-(np.arange(-1, 2) ** 2) / (2 * sigma**2))
        expected = np.outer(weights, weights) / weights.sum() ** 2
        assert impulse("defocus_blur", severity)[14:17, 14:17] == pytest.approx(expected)
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]) / 5
    assert impulse("defocus_blur", 4)[14:17, 14:17] == pytest.approx(cross, abs=1e-5)
    assert impulse("defocus_blur", 5)[14:17, 14:17] == pytest.approx(np.full((3, 3), 1 / 9))
    for severity, sigma in enumerate((0.4, 0.6, 0.7, 0.8, 1), start=1):
        row = impulse("gaussian_blur", severity)[15]
        assert row[16] / row[15] == pytest.approx(math.exp(-1 / (2 * sigma**2)))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_motion_blur_is_half_a_gaussian_along_a_ray(severity):
    reach, sigma = strength("motion_blur", severity)
    weights = np.exp(-(np.arange(2 * reach + 1) ** 2) / (2 * sigma**2))
    for seed in range(5):
        angle = math.radians(rng_of("motion_blur", severity, seed).uniform(-45, 45))
        expected = np.zeros((51, 51))
        for i, weight in enumerate(weights / weights.sum()):  # those before see the impulse
            expected[25 - round(i * math.sin(angle)), 25 - round(i * math.cos(angle))] += weight
        assert impulse("motion_blur", severity, 51, seed) == pytest.approx(expected)


def test_glass_blur_copies_as_the_swap_of_views_does():
    x = photos(1)[0].permute(1, 2, 0).double().numpy().copy()
    made = corrupt(photos(1), "glass_blur", 1, seeds(1, 3))[0].permute(1, 2, 0).numpy()
    moves = rng_of("glass_blur", 1, 3).integers(0, 2, (2, 30, 30))
    for row in range(31, 1, -1):
        for column in range(31, 1, -1):
            up, left = moves[:, row - 2, column - 2]
            there = row - up, column - left
            x[row, column], x[there] = x[there], x[row, column]  # arrays: the second is undone
    assert made == pytest.approx(x, abs=1e-6)


@pytest.mark.parametrize("n", [8, 32, 42])
@pytest.mark.parametrize("factor", [1.0, 1.04, 1.25, 1.75, 2.25])
def test_zoom_is_scipys(n, factor):
    x = np.random.default_rng(0).random((n, n))
    kept = math.ceil(n / factor)
    top = (n - kept) // 2
    larger = ndimage.zoom(x[top : top + kept, top : top + kept], factor, order=1, mode="nearest")
    trim = (len(larger) - n) // 2
    matrix = corruptions._zoom(n, factor)
    assert matrix @ x @ matrix.T == pytest.approx(larger[trim : trim + n, trim : trim + n])
    assert matrix.sum(1) == pytest.approx(np.ones(n))


def test_zoom_blur_is_the_mean_of_its_enlargements():
    x = photos(1, 1, 32, 32)
    for severity, count in enumerate((7, 12, 16, 21, 26), start=1):
        grown = [corruptions._zoom(32, 1 + i * (1.01 - 1)) for i in range(count)]
        expected = (x + sum(torch.tensor(m @ x[0, 0].numpy() @ m.T) for m in grown)) / (count + 1)
        assert torch.allclose(corrupt(x, "zoom_blur", severity, seeds(1)).double(), expected)


# Weather


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_pales_and_falls_on_both_sides(severity):
    *_, keep = strength("snow", severity)
    x = torch.tensor([0.1, 0.2, 0.3])[:, None, None].expand(4, 3, 32, 32)
    grey = 0.299 * 0.1 + 0.587 * 0.2 + 0.114 * 0.3
    pale = keep * x + (1 - keep) * (1.5 * grey + 0.5)
    flakes = corrupt(x, "snow", severity, seeds(4)) - pale
    assert flakes.min() > -1e-6 and flakes.max() > 0.05
    white = (flakes + pale > 1 - 1e-6).any(1, keepdim=True)
    assert torch.allclose(flakes.where(~white, 0), flakes[:, :1].where(~white, 0), atol=1e-6)
    assert torch.allclose(flakes, flakes.flip(2, 3), atol=1e-6)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_is_a_cloud_under_the_brightest_value(severity):
    amount, _ = strength("fog", severity)
    x = torch.full((3, 1, 32, 32), 0.6, dtype=torch.float64)
    x[2] = 0
    made = corrupt(x, "fog", severity, seeds(3))
    cloud = (made[:2] * (0.6 + amount) / 0.6 - 0.6) / amount
    assert cloud.amin((1, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-9)
    assert cloud.amax((1, 2, 3)).tolist() == pytest.approx([1, 1])
    assert not made[2].any()  # under a peak of 0 nothing can shine


def test_plasma_is_rougher_where_the_noise_decays_slowly():
    def roughness(decay: float) -> float:
        maps = [corruptions._plasma(np.random.default_rng(i), 32, 32, decay) for i in range(10)]
        return float(np.mean([abs(np.diff(z)).mean() for z in maps]))

    assert roughness(3) < roughness(2.5) < roughness(2) < roughness(1.75)
    small = corruptions._plasma(np.random.default_rng(0), 20, 33, 2)
    assert small.shape == (20, 33) and small.min() >= 0 and small.max() <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_frost_is_a_tinted_blend(severity):
    image, amount = strength("frost", severity)
    ice = corrupt(torch.zeros(4, 3, 32, 32), "frost", severity, seeds(4)) / amount
    tint = torch.tensor(corruptions.ICE)[:, None, None] / 255
    assert torch.allclose(ice / tint, (ice / tint)[:, 2:].expand_as(ice), atol=1e-6)
    assert ice.max() <= 1 and 0.3 < ice.mean() < 0.7
    x = photos(4) * 0.5
    made = corrupt(x, "frost", severity, seeds(4))
    assert torch.allclose(made, (image * x + amount * ice).clamp_max(1), atol=1e-6)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_spatter_is_water_then_mud(severity):
    *_, amount, mud = strength("spatter", severity)
    n = 6
    grey = torch.full((n, 3, 32, 32), 0.2)
    made = corrupt(grey, "spatter", severity, seeds(n))
    if mud:
        colour = torch.tensor(corruptions.MUD)[:, None, None] / 255
        cover = (made - grey) / (colour - grey)
        assert ((cover.abs() < 1e-5) | ((cover > 0.79) & (cover < 1 + 1e-5))).all()
    else:
        colour = torch.tensor(corruptions.WATER)[:, None, None] / 255
        cover = (made - grey) / (amount * colour)
        assert cover.amax((1, 2, 3)).tolist() == pytest.approx([1] * n, abs=1e-5)
    assert torch.allclose(cover, cover[:, :1].expand_as(cover), atol=1e-5)
    assert 0.001 < (cover[:, 0] > 0.01).float().mean() < 0.5


def test_drops_are_outlined_and_lit():
    assert not corruptions._film(np.zeros((9, 9))).any()
    assert not corruptions._edges(np.full((9, 9), 200.0)).any()
    drop = np.zeros((24, 24))
    drop[6:16, 8:18] = 200
    edges = corruptions._edges(drop)
    outline = ndimage.binary_dilation(drop > 0) & ~ndimage.binary_erosion(drop > 0)
    assert edges.any(0)[8:17].all() and edges.any(1)[6:15].all() and not (edges & ~outline).any()
    weak = drop / 10  # gradients above 50 everywhere, above 150 nowhere
    assert not corruptions._edges(weak).any()
    film = corruptions._film(drop)
    assert film.max() == 1 and film.min() == 0 and not film[drop == 0].any()


# Colour and light


def by_colorsys(x: torch.Tensor, change) -> torch.Tensor:
    """Apply ``change(h, s, v)`` to each pixel of (batch, 3, height, width)."""
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    made = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in pixels]
    n, _, h, w = x.shape
    return torch.tensor(made, dtype=x.dtype).reshape(n, h, w, 3).permute(0, 3, 1, 2)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_and_saturate_in_hsv(severity):
    x = photos(2, 3, 12, 12).clone()
    x[0, :, 0, :4] = torch.tensor([0, 0.3, 0.7, 1])  # grey pixels, black and white among them
    x[0, :, 1, 0] = torch.tensor([0.5, 0, 0])
    amount, (scale, shift) = strength("brightness", severity), strength("saturate", severity)
    bright = by_colorsys(x, lambda h, s, v: (h, s, min(v + amount, 1)))
    assert torch.allclose(corrupt(x, "brightness", severity, seeds(2)), bright, atol=1e-6)
    vivid = by_colorsys(x, lambda h, s, v: (h, min(s * scale + shift, 1), v))
    assert torch.allclose(corrupt(x, "saturate", severity, seeds(2)), vivid, atol=1e-6)
    grey = x[:, :1]
    assert torch.allclose(
        corrupt(grey, "brightness", severity, seeds(2)), (grey + amount).clamp(max=1)
    )
    assert torch.equal(corrupt(grey, "saturate", severity, seeds(2)), grey)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_scales_about_each_channels_mean(severity):
    x, factor = photos(3), strength("contrast", severity)
    made = corrupt(x, "contrast", severity, seeds(3))
    assert torch.allclose(made.mean((2, 3)), x.mean((2, 3)), atol=1e-5)
    assert torch.allclose(made.std((2, 3)), factor * x.std((2, 3)), atol=1e-5)


# Geometry and coding


@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_moves_three_points_where_it_says(severity):
    x = photos(1)[0].double().numpy()
    still = corruptions._elastic_transform(x, (0, 0, 0), np.random.default_rng(0))
    assert still == pytest.approx(x, abs=1e-12)
    *_, tilt = strength("elastic_transform", severity)
    rng = np.random.default_rng(severity)
    ramp = np.indices((32, 32)) / 32  # a picture of its own coordinates
    made = corruptions._elastic_transform(ramp, (0, 0, tilt), np.random.default_rng(severity))
    points = np.array([[26, 26], [26, 6], [6, 6]])
    moved = points + rng.uniform(-32 * tilt, 32 * tilt, (3, 2))
    for point, at in zip(points, moved):
        seen = [ndimage.map_coordinates(c, at[:, None], order=1)[0] for c in made]
        assert 32 * np.array(seen) == pytest.approx(point, abs=1e-9)


def test_elastic_waves_are_as_strong_as_the_filtered_noise():
    rng, (shift, sigma, _) = np.random.default_rng(4), strength("elastic_transform", 5)
    ramp = np.indices((64, 64)) / 64
    made = corruptions._elastic_transform(ramp, (shift, sigma, 0), np.random.default_rng(4))
    rng.uniform(size=(3, 2))
    noise = rng.uniform(-1, 1, (2, 64, 64))
    waves = (
        64
        * shift
        * np.stack([ndimage.gaussian_filter(wave, 64 * sigma, truncate=3) for wave in noise])
    )
    inner = np.s_[:, 8:-8, 8:-8]
    assert 64 * (made - ramp)[inner] == pytest.approx(waves[inner], abs=1e-9)
    assert abs(waves).max() < 8


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_and_pixelate_are_pillows_round_trips(severity, shape):
    x = photos(3, *shape)
    bits = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    files = [Image.fromarray(image.squeeze()) for image in bits]
    coded, coarse = [], []
    side = int(shape[1] * strength("pixelate", severity))
    for image in files:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
        coded.append(np.array(Image.open(buffer)).reshape(bits.shape[1:]))
        small = image.resize((side, side), Image.Resampling.BOX)
        coarse.append(
            np.array(small.resize(image.size, Image.Resampling.BOX)).reshape(bits.shape[1:])
        )
    made = corrupt(x, "jpeg_compression", severity, seeds(3)).permute(0, 2, 3, 1) * 255
    assert np.array_equal(made.round().numpy(), np.stack(coded))
    assert torch.allclose(made, made.round(), atol=1e-4)  # 8-bit levels
    made = corrupt(x, "pixelate", severity, seeds(3)).permute(0, 2, 3, 1) * 255
    assert abs(made.numpy() - np.stack(coarse)).max() < 1.01  # Pillow rounds after each axis
