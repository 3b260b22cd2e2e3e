r"""Small rendered scenes under changing light: image = albedo x shading, with cast shadows.

They replace the photographs of Multi-Illumination (Murmann et al. 2019), which are too large for a
notebook: 25 lights per scene there, any number here, and every *true* light can be tried. A scene
is one solid on the ground, seen from straight above. Only its shading shows what it is; a dome lit from
one side looks much like a dent lit from the other.

With the unit normal $n$ of the height map, the direction $l$ to the light and its colour $c$,

$$\text{image} = \text{albedo} \odot c\, \big(a + (1 - a)\, v \max(0, n^\top l)\big),$$

where $a$ is the ambient share and $v$ the visibility of the light from a point, past higher ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import grid_sample

from robustood.data._base import Data
from robustood.data._pairs import Pairing, Views
from robustood.inputs import (
    check_count,
    check_flag,
    check_generator,
    check_images,
    check_instance,
    check_labels,
    check_number,
    check_seed,
    check_several,
    check_values,
)

SOLIDS = ("dome", "dent", "cone", "pyramid", "box", "ring")
_AMBIENT = 0.25
_STEPS = 14  # along a ray to the light
_HELD_OUT_AZIMUTHS = (0.0, 90.0)


@dataclass(frozen=True)
class Scenes:
    """Solids on the ground.

    Attributes:
        kind: place in ``SOLIDS`` (scenes,).
        height: in units of half the image's side (scenes, size, size).
        albedo: share of light that is reflected (scenes, 3, size, size).
    """

    kind: Int[Tensor, " scenes"]
    height: Float[Tensor, "scenes size size"]
    albedo: Float[Tensor, "scenes 3 size size"]

    def __post_init__(self) -> None:
        check_values(self.height, None, "height")
        if self.height.ndim != 3:
            raise ValueError(
                f"height must be (scenes, size, size), got shape {tuple(self.height.shape)}"
            )
        check_labels(self.kind, self.height, len(SOLIDS), "kind")
        check_images(self.albedo, "albedo")
        n, size = len(self.kind), self.height.shape[-1]
        for name, wanted in (("height", (n, size, size)), ("albedo", (n, 3, size, size))):
            if (found := tuple(getattr(self, name).shape)) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {found}")

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass(frozen=True)
class Lights:
    """Distant lights, the same number for each scene; a first axis of 1 is shared by all scenes.

    Attributes:
        elevation: angle above the ground in degrees (scenes, lights).
        azimuth: direction it comes from in degrees, counter-clockwise from the right (scenes, lights).
        colour: at most 1 (scenes, lights, 3).
    """

    elevation: Float[Tensor, "scenes lights"]
    azimuth: Float[Tensor, "scenes lights"]
    colour: Float[Tensor, "scenes lights 3"]

    def __post_init__(self) -> None:
        check_values(self.elevation, (0, 90), "elevation")
        check_values(self.azimuth, (-360, 360), "azimuth")
        check_values(self.colour, (0, 1), "colour")
        shape = self.elevation.shape
        for name, wanted in (("elevation", shape[:2]), ("azimuth", shape), ("colour", (*shape, 3))):
            if (found := tuple(getattr(self, name).shape)) != tuple(wanted):
                raise ValueError(f"{name} must have shape {tuple(wanted)}, got {found}")


def _tinted(warmth: Tensor, strength: Tensor | float) -> Tensor:
    """Colours from blue (warmth -1) through white to orange (+1), with the brightest channel at ``strength``."""
    colour = torch.stack([1 + 0.3 * warmth, torch.ones_like(warmth), 1 - 0.3 * warmth], -1)
    strength = torch.as_tensor(strength, dtype=colour.dtype).expand(warmth.shape)
    return colour / colour.amax(-1, keepdim=True) * strength[..., None]


REFERENCE = Lights(torch.tensor([[60.0]]), torch.tensor([[135.0]]), torch.full((1, 1, 3), 0.85))


def random_lights(
    scenes: int, lights: int, generator: torch.Generator, held_out: bool = False
) -> Lights:
    """Lights of random direction and colour, different for each scene.

    Elevations are uniform in 30 to 75 degrees, strengths in 0.7 to 1, warmth in -1 to 1. Azimuths are uniform
    over three quarters of the circle, or with ``held_out`` over the remaining one, 0 to 90 degrees.
    """
    scenes, lights = check_count(scenes, "scenes", 1), check_count(lights, "lights", 1)
    check_generator(generator)
    check_flag(held_out, "held_out")
    low, high = _HELD_OUT_AZIMUTHS if held_out else (_HELD_OUT_AZIMUTHS[1], 360.0)
    u = torch.rand(4, scenes, lights, generator=generator)
    return Lights(
        30 + 45 * u[0], low + (high - low) * u[1], _tinted(2 * u[2] - 1, 0.7 + 0.3 * u[3])
    )


def light_grid(
    elevations: Sequence[float] = (30.0, 50.0, 70.0),
    azimuths: Sequence[float] = tuple(range(0, 360, 30)),
    warmths: Sequence[float] = (-1.0, 0.0, 1.0),
    strength: float = 0.85,
) -> Lights:
    """All combinations of the given values, shared by all scenes."""
    limits = {"elevations": (elevations, 0, 90), "azimuths": (azimuths, -360, 360)}
    for name, (given, low, high) in (limits | {"warmths": (warmths, -1, 1)}).items():
        check_several(given, name, "numbers")
        for value in given:
            check_number(float(value) if isinstance(value, Tensor) else value, name, low, high)
    check_number(strength, "strength", 0, 1)
    axes = [torch.tensor([float(v) for v in a]) for a in (elevations, azimuths, warmths)]
    elevation, azimuth, warmth = torch.cartesian_prod(*axes)[None].unbind(2)
    return Lights(elevation, azimuth, _tinted(warmth, strength))


def scenes(n: int, seed: int, size: int = 16) -> Scenes:
    """Random solids at the centre: kind, rotation, size, height and colours.

    Args:
        n: number of scenes.
        seed: of the draw.
        size: height and width of the images.
    """
    n, size = check_count(n, "n", low=1), check_count(size, "size", low=8)
    generator = torch.Generator().manual_seed(check_seed(seed))
    kind = torch.randint(len(SOLIDS), (n,), generator=generator)
    u = torch.rand(n, 3, generator=generator)[..., None, None].unbind(1)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    angle, radius = u[0] * torch.pi, 0.55 + 0.15 * u[1]
    a = (angle.cos() * right - angle.sin() * down) / radius
    b = (angle.cos() * down + angle.sin() * right) / radius
    round_, square = (a * a + b * b).sqrt(), torch.maximum(a.abs(), b.abs())
    dome, edge = (1 - round_**2).clamp_min(0).sqrt(), 4.0
    ring = (1 - ((round_ - 0.65) / 0.35) ** 2).clamp_min(0).sqrt()
    forms = [dome, -dome, 1 - round_, 1 - square, (edge * (1 - square)).clamp_max(1), ring]
    forms = torch.stack(
        [f if name == "dent" else f.clamp_min(0) for name, f in zip(SOLIDS, forms, strict=True)]
    )
    chosen = forms[kind, torch.arange(n)]
    height = chosen * radius * (0.6 + 0.4 * u[2])
    colours = 0.45 + 0.5 * torch.rand(2, n, 3, 1, 1, generator=generator)
    covered = (chosen.abs() * edge).clamp_max(1)[:, None]
    grain = 1 + 0.02 * torch.randn(n, 1, size, size, generator=generator)
    albedo = (colours[0] * (1 - covered) + colours[1] * covered) * grain
    return Scenes(kind, height, albedo.clamp(0, 1))


def render(scenes: Scenes, lights: Lights) -> Float[Tensor, "scenes lights 3 size size"]:
    """Every scene under each of its lights, in [0, 1]."""
    check_instance(scenes, "scenes", Scenes, "Scenes, such as data.scenes(n, seed)")
    check_instance(lights, "lights", Lights, "Lights, such as light_grid()")
    n, size = len(scenes), scenes.height.shape[-1]
    count = lights.elevation.shape[1]
    elevation, azimuth = (
        (angle * torch.pi / 180).expand(n, -1)[..., None, None]
        for angle in (lights.elevation, lights.azimuth)
    )
    height, pixel = scenes.height[:, None], 2 / size
    slope_down, slope_right = torch.gradient(height, spacing=pixel, dim=(2, 3))
    way = azimuth.cos(), azimuth.sin()  # to the right and up
    facing = elevation.sin() - elevation.cos() * (slope_right * way[0] - slope_down * way[1])
    facing = facing / (1 + slope_right**2 + slope_down**2).sqrt()
    axis = (torch.arange(size) + 0.5) * pixel - 1
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    seen = torch.ones(n, count, size, size)
    for step in range(1, _STEPS + 1):
        far = step * 1.5 / _STEPS
        place = torch.stack([right + far * way[0], down - far * way[1]], -1)
        above = grid_sample(
            height, place.flatten(1, 2), align_corners=False, padding_mode="border"
        ).view(n, count, size, size)
        clear = height + far * elevation.tan() - above
        seen = torch.minimum(seen, (1 + clear / pixel).clamp(0, 1))  # a penumbra of one pixel
    shading = _AMBIENT + (1 - _AMBIENT) * seen * facing.clamp_min(0)
    colour = lights.colour.expand(n, -1, -1)[..., None, None]
    return (scenes.albedo[:, None] * colour * shading[:, :, None]).clamp(0, 1)


def relit(
    train: int = 1500,
    val: int = 200,
    test: int = 300,
    lights: int = 12,
    size: int = 16,
    pairing: Pairing = "first",
    seed: int = 0,
) -> Data:
    """Views of rendered scenes: the reference light first, then random ones from three quarters of the circle.

    Args:
        train, val, test: numbers of scenes.
        lights: random lights per scene.
        size: height and width of the images.
        pairing: ``"first"`` takes the view under the reference light as the input; ``"any"`` suits photographs,
            which have no such view.
        seed: of scenes, lights and pairs; the splits have different scenes.

    Returns:
        Data whose splits are :class:`robustood.data.Views` of 8 bits with the kinds of solid as labels.
    """
    for name, n in (("train", train), ("val", val), ("test", test), ("lights", lights)):
        check_count(n, name, low=1)
    check_count(size, "size", low=8)
    seed = check_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    def split(n: int, place: int) -> Views:
        made = scenes(n, 3 * seed + place, size)
        first, others = render(made, REFERENCE), render(made, random_lights(n, lights, generator))
        views = (torch.cat([first, others], 1) * 255).round().to(torch.uint8)
        return Views.of(views, made.kind, pairing, seed)

    first, second, third = (split(n, place) for place, n in enumerate((train, val, test)))
    return Data(first, second, third, first.x[:0])
