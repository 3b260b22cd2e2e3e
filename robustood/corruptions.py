r"""The common corruptions of Hendrycks and Dietterich (2019), at the strengths for small images.

Fifteen are the benchmark, four more its validation set; each has five severities. The strengths
are those of CIFAR-10-C (the authors' ``make_cifar_c.py``): lengths are pixels of a 32x32 image,
also at other sizes, except that ``elastic_transform`` and ``pixelate`` scale with the image.

Differences from the released images, whose numbers are therefore not comparable:

* Results are not rounded to 8 bits, except in ``jpeg_compression``; random draws are NumPy's.
* ``frost`` blends with photographs of frost. **A drawn texture of ice needles replaces them.**
* ``motion_blur`` and ``snow`` follow ImageMagick's rule, half a Gaussian along a ray with its
  taps rounded to pixels, and ``spatter`` follows OpenCV's edges, with an exact distance.
* Quirks of the release are kept: ``glass_blur`` copies a neighbour instead of swapping with it (two array
  views overwrite each other), and ``saturate`` turns grey pixels reddish, since their hue is 0.
* On grey images a colour becomes its luminance, and ``saturate`` changes nothing.

The distance from the clean image does not always grow with severity: ``saturate`` first removes
colour, then adds it; ``frost`` fades the image from 3 on; ``elastic_transform`` replaces tilt by waves;
``glass_blur`` smooths more at 3 and 5; ``spatter`` is water up to 3, then mud; ``motion_blur`` is
nearly the same at 3 and 4. ``zoom_blur`` rounds to pixels: at 1 it leaves an 8x8 image unchanged.
"""

from __future__ import annotations

import math
from functools import lru_cache
from io import BytesIO
from numbers import Integral

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.random import Generator
from PIL import Image
from scipy import ndimage
from torch import Tensor

from robustood.inputs import check_choice, check_images

__all__ = ["NAMES", "Array", "Images", "corrupt"]

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)
_LUMA = np.array([[[0.299]], [[0.587]], [[0.114]]])  # ITU-R BT.601, as in OpenCV and Pillow
ICE, WATER, MUD = (204, 235, 255), (175, 238, 238), (63, 42, 20)
Images = Float[Tensor, "batch channel height width"]
Array = np.ndarray  # one image (channel, height, width) in [0, 1], unless said


def corrupt(x: Images, name: str, severity: int, seeds: Int[Tensor, "..."]) -> Images:
    """Corrupt each image; sample i depends only on ``x[i]``, name, severity and ``seeds[i]``.

    Args:
        x: images in [0, 1] with 1 or 3 channels and sides of 8 pixels or more, on any device.
        name: one of ``NAMES``.
        severity: 1 (mild) to 5 (strong).
        seeds: (batch,) whole numbers of at least 0; global random states are unchanged.

    Returns:
        Images in [0, 1], computed on the CPU, with the shape, dtype and device of x.

    Raises:
        ValueError: if an argument is not as above.
    """
    check_images(x)
    check_choice(name, "name", NAMES)
    if isinstance(severity, bool) or not isinstance(severity, Integral) or not 1 <= severity <= 5:
        raise ValueError(f"severity must be a whole number from 1 to 5, got {severity!r}")
    shape = tuple(x.shape)
    if shape[1] not in (1, 3) or min(shape[2:]) < 8:
        raise ValueError(f"x must have 1 or 3 channels and sides >= 8, got {shape}; resize it")
    whole = isinstance(seeds, Tensor) and seeds.shape == shape[:1] and seeds.dtype in _WHOLE
    if not whole or seeds.min() < 0:
        raise ValueError(
            f"seeds must be a tensor of {shape[0]} whole numbers >= 0, one per image, got {seeds!r:.80}"
        )
    function, strengths = _TABLE[name]
    rngs = (np.random.default_rng((NAMES.index(name), severity, s)) for s in seeds.tolist())
    clean = x.detach().cpu().double().numpy().clip(0, 1)
    made = [function(image, strengths[severity - 1], rng) for image, rng in zip(clean, rngs)]
    return torch.from_numpy(np.stack(made).clip(0, 1)).to(x)


def _tint(colour: tuple[int, int, int], x: Array) -> Array:
    """An 8-bit colour as (channel, 1, 1) in [0, 1]; its luminance for a grey image."""
    rgb = np.reshape(colour, (3, 1, 1)) / 255
    return rgb if len(x) == 3 else (_LUMA * rgb).sum(0, keepdims=True)


def _smooth(x: Array, sigma: float) -> Array:
    """Gaussian blur of the last two axes, cut at 4 sigma, edges repeated."""
    reach = min(int(4 * sigma + 0.5), (min(x.shape[-2:]) - 1) // 2)
    return ndimage.gaussian_filter(x, sigma, mode="nearest", radius=reach, axes=(-2, -1))


def _defocus_blur(x: Array, strength: tuple[float, float], rng: Generator) -> Array:
    """Average over a disc of radius at most 2 pixels, softened by a 3x3 Gaussian."""
    i = np.arange(-2, 3)
    square = i[:, None] ** 2 + i**2
    soft = np.exp(-square[1:4, 1:4] / (2 * strength[1] ** 2))
    kernel = ndimage.convolve(1.0 * (square <= strength[0] ** 2), soft, mode="constant")
    return ndimage.convolve(x, (kernel / kernel.sum())[None], mode="mirror")


def _glass_blur(x: Array, strength: tuple[float, int], rng: Generator) -> Array:
    """Replace each pixel by itself or a neighbour above or left; rows and columns 0 and 1 stay."""
    x = _smooth(x, strength[0])
    for _ in range(strength[1]):
        row, column = np.indices(x.shape[1:])[:, 2:, 2:]
        row, column = (row, column) - rng.integers(0, 2, (2, *row.shape))
        x[:, 2:, 2:] = x[:, row, column]
    return _smooth(x, strength[0])


def _line_blur(x: Array, radius: int, sigma: float, degrees: float) -> Array:
    """Average along a ray at an angle, weighted by half a Gaussian."""
    (h, w), angle = x.shape[1:], math.radians(degrees)
    taps = min(2 * radius + 1, h, w)
    weights = np.exp(-(np.arange(taps) ** 2) / (2 * sigma**2))
    padded = np.pad(x, ((0, 0), (taps, taps), (taps, taps)), mode="edge")
    steps = np.outer(np.arange(taps), (math.sin(angle), math.cos(angle)))
    starts = taps + np.ceil(steps - 0.5).astype(int)
    parts = (padded[:, top : top + h, left : left + w] for top, left in starts)
    return sum(part * weight for part, weight in zip(parts, weights / weights.sum()))


@lru_cache
def _zoom(n: int, factor: float) -> Array:
    """Matrix that enlarges the centre of n pixels to n pixels, by linear interpolation."""
    kept = math.ceil(n / factor)
    size = round(kept * factor)
    at = np.linspace(0, kept - 1, size)[(size - n) // 2 :][:n] + (n - kept) // 2
    return np.clip(1 - abs(at[:, None] - np.arange(n)), 0, None)


def _zoom_blur(x: Array, end: float, rng: Generator) -> Array:
    """Mean of the image and its enlargements by 1, 1.01, ... (arange, rounded as in the release)."""
    factors = np.arange(1, end, 0.01).tolist()
    rows, columns = (np.stack([_zoom(n, factor) for factor in factors]) for n in x.shape[1:])
    larger = rows[:, None] @ x @ columns[:, None].swapaxes(2, 3)
    return (x + larger.sum(0)) / (len(factors) + 1)


def _snow(x: Array, strength: tuple[float, ...], rng: Generator) -> Array:
    """Pale the image; add a layer of streaked flakes, and the same turned by 180 degrees."""
    mean, spread, factor, threshold, radius, sigma, keep = strength
    rows, columns = (_zoom(n, factor) for n in x.shape[1:])
    flakes = rows @ rng.normal(mean, spread, (1, *x.shape[1:])) @ columns.T
    flakes = np.where(flakes < threshold, 0, flakes.clip(0, 1))
    flakes = _line_blur(flakes, int(radius), sigma, rng.uniform(-135, -45))
    grey = (_LUMA * x).sum(0)  # a grey image is its own luminance: the weights sum to 1
    pale = keep * x + (1 - keep) * np.maximum(x, 1.5 * grey + 0.5)
    return pale + flakes + flakes[:, ::-1, ::-1]


def _frost(x: Array, strength: tuple[float, float], rng: Generator) -> Array:
    """Blend with a substitute for frost: clouds, and 30 needles at multiples of 60 degrees."""
    h, w = x.shape[1:]
    top, left, length, light, bend = rng.random((5, 30, 1, 1))
    angle = rng.uniform(0, math.pi) + math.pi / 3 * np.arange(30)[:, None, None] + 0.2 * bend
    dy, dx = np.arange(h)[:, None] / h - top, np.arange(w) / w - left
    along = abs(dx * np.cos(angle) + dy * np.sin(angle)) / (0.2 + 0.4 * length)
    across = (dy * np.cos(angle) - dx * np.sin(angle)) / 0.025
    needles = (0.5 + 0.5 * light) * (1 - along).clip(0) * np.exp(-(across**2) / 2)
    ice = np.maximum(needles.max(0), 0.6 * _plasma(rng, h, w, decay=2.0))
    return strength[0] * x + strength[1] * _tint(ICE, x) * ice


def _plasma(rng: Generator, h: int, w: int, decay: float) -> Array:
    """Diamond-square height map (h, w) in [0, 1], cropped from the next power of two."""
    n = 1 << (max(h, w) - 1).bit_length()
    z, noise, step, wibble = np.zeros((n, n)), rng.uniform(-1, 1, (n, n)), n, 100.0
    while step >= 2:
        old, new = slice(0, n, step), slice(step // 2, n, step)
        noise_now = wibble**2 * noise
        pair = z[old, old] + np.roll(z[old, old], -1, 0)
        z[new, new] = (pair + np.roll(pair, -1, 1)) / 4 + noise_now[new, new]
        # The release pairs the corners along rows for both diamonds; one should use columns.
        middle, pair = z[new, new], z[old, old] + np.roll(z[old, old], -1, 1)
        z[old, new] = (middle + np.roll(middle, 1, 0) + pair) / 4 + noise_now[old, new]
        z[new, old] = (middle + np.roll(middle, 1, 1) + pair) / 4 + noise_now[new, old]
        step, wibble = step // 2, wibble / decay
    z -= z.min()
    return (z / z.max())[:h, :w]


def _fog(x: Array, strength: tuple[float, float], rng: Generator) -> Array:
    """Add a cloud, then rescale so that the largest value does not increase."""
    cloud = strength[0] * _plasma(rng, *x.shape[1:], strength[1])
    return (x + cloud) * x.max() / (x.max() + strength[0])


def _spatter(x: Array, strength: tuple[float, ...], rng: Generator) -> Array:
    """Drops where smooth noise exceeds a threshold: shiny water, or opaque mud."""
    mean, spread, sigma, threshold, amount, mud = strength
    liquid = _smooth(rng.normal(mean, spread, x.shape[1:]), sigma).clip(0, 1)
    drops = liquid >= threshold
    if not mud:
        return x + amount * _film(np.floor(255 * liquid * drops)) * _tint(WATER, x)
    cover = _smooth(drops.astype(float), amount)
    cover[cover < 0.8] = 0
    return x * (1 - cover) + cover * _tint(MUD, x)


def _film(drops: Array) -> Array:
    """Light through drops (h, w) in 0 to 255: embossed distance from their edges, with maximum 1."""
    edges = _edges(drops)
    away = np.minimum(ndimage.distance_transform_edt(~edges), 20) if edges.any() else 0 * drops
    depth = ndimage.uniform_filter(away, 3, mode="mirror").astype(int)
    counts = np.bincount(depth.ravel())
    counts[depth.min()] = 0  # histogram equalisation sends the lowest level to 0
    depth = np.round(255 * counts.cumsum() / max(counts.sum(), 1))[depth]
    relief = ndimage.correlate(depth, [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], mode="mirror")
    light = drops * np.round(ndimage.uniform_filter(relief.clip(0, 255), 3, mode="mirror"))
    return light / max(light.max(), 1)


def _edges(grey: Array) -> Array:
    """Canny edges (h, w): peaks of the gradient above 50, connected to one above 150."""
    dy, dx = (ndimage.sobel(grey, axis, mode="nearest") for axis in (0, 1))
    size, tangent = abs(dy) + abs(dx), math.tan(math.pi / 8)
    flat, steep = abs(dy) < tangent * abs(dx), abs(dx) < tangent * abs(dy)
    i = np.where(flat, 0, 1)  # the neighbours across the edge, to the nearest 45 degrees
    j = np.where(steep, 0, np.where((dx * dy < 0) & ~flat, -1, 1))
    around, (y, x) = np.pad(size, 1), np.indices(size.shape) + 1
    before, after = around[y - i, x - j], around[y + i, x + j]
    peak = (size > 50) & (size > before) & ((size > after) | ((size == after) & (i * j == 0)))
    joined, _ = ndimage.label(peak, np.ones((3, 3)))
    return peak & np.isin(joined, joined[peak & (size > 150)])


def _brightness(x: Array, amount: float, rng: Generator) -> Array:
    """Increase the value of HSV; hue and saturation stay, so the channels scale together."""
    value = x.max(0)
    raised = (value + amount).clip(0, 1)
    return np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)


def _saturate(x: Array, strength: tuple[float, float], rng: Generator) -> Array:
    """Scale and shift the saturation of HSV; hue and value stay. One channel has none."""
    value, spread = x.max(0), np.ptp(x, 0)
    unit = (value - x) / np.where(spread > 0, spread, 1)
    unit[1:] += spread == 0  # a grey pixel has hue 0: red stays, green and blue fall
    saturation = spread / np.where(value > 0, value, 1)
    return value * (1 - unit * (strength[0] * saturation + strength[1]).clip(0, 1))


def _elastic_transform(x: Array, strength: tuple[float, ...], rng: Generator) -> Array:
    """A random affine map of three points, then smooth random shifts; lengths in units of the image side."""
    side, at = min(x.shape[1:]), np.indices(x.shape[1:])
    shift, sigma, tilt = (side * part for part in strength)
    points = np.array(x.shape[1:]) // 2 + side // 3 * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = np.column_stack([points + rng.uniform(-tilt, tilt, (3, 2)), np.ones(3)])
    *matrix, offset = np.linalg.solve(moved, points)
    source = np.einsum("ji,jhw->ihw", matrix, at) + offset[:, None, None]
    x = np.stack([ndimage.map_coordinates(c, source, order=1, mode="mirror") for c in x])
    waves = ndimage.gaussian_filter(rng.uniform(-1, 1, at.shape), sigma, truncate=3, axes=(1, 2))
    at = at + shift * waves
    return np.stack([ndimage.map_coordinates(c, at, order=1, mode="reflect") for c in x])


@lru_cache
def _pixels(n: int, factor: float) -> Array:
    """Matrix of Pillow's box filter: n pixels down to a share ``factor`` of them and up again."""
    few, box = int(n * factor), Image.Resampling.BOX
    eye = Image.fromarray(np.eye(n, dtype=np.float32))
    return np.asarray(eye.resize((n, few), box).resize((n, n), box))


def _jpeg_compression(x: Array, quality: int, rng: Generator) -> Array:
    """Round to 8 bits, encode and decode with Pillow."""
    file, bits = BytesIO(), np.round(255 * x).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(bits.squeeze()).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(bits.shape).transpose(2, 0, 1) / 255


# fmt: off
_TABLE: dict[str, tuple] = {  # function(image, strength, generator), strengths of severity 1 to 5
    "gaussian_noise": (lambda x, c, g: x + g.normal(0, c, x.shape), (0.04, 0.06, 0.08, 0.09, 0.1)),
    "shot_noise": (lambda x, c, g: g.poisson(c * x) / c, (500, 250, 100, 75, 50)),
    "impulse_noise": (lambda x, c, g: np.where((u := g.random(x.shape)) < c, u < c / 2, x), (
        0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (_glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": (lambda x, c, g: _line_blur(x, *c, g.uniform(-45, 45)), (
        (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (_snow, (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8))),
    "frost": (_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (lambda x, c, g: c * x + (1 - c) * x.mean((1, 2), keepdims=True), (
        0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (_elastic_transform, (
        (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))),
    "pixelate": (lambda x, c, g: _pixels(x.shape[1], c) @ x @ _pixels(x.shape[2], c).T, (
        0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),
    "speckle_noise": (lambda x, c, g: x + x * g.normal(0, c, x.shape), (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (lambda x, c, g: _smooth(x, c), (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": (_spatter, (
        (0.62, 0.1, 0.7, 0.7, 0.5, False), (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1, 0.69, 0.5, False), (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True))),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}
# fmt: on
NAMES = tuple(_TABLE)
STANDARD, EXTRA = NAMES[:15], NAMES[15:]
