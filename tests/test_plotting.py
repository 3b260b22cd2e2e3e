"""What a figure shows is what it was given: read back from the drawn objects."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb, to_rgba

from robustood.metrics import Estimate, proportion
from robustood.plotting import COLOURS, STYLE, band, image_grid, use_style

OKABE_ITO = {
    "blue": (0, 114, 178),
    "orange": (230, 159, 0),
    "green": (0, 158, 115),
    "red": (213, 94, 0),
    "purple": (204, 121, 167),
    "sky": (86, 180, 233),
    "yellow": (240, 228, 66),
    "black": (0, 0, 0),
}


@pytest.fixture(autouse=True)
def _clean():
    with plt.rc_context():
        yield
    plt.close("all")


# ---- the style --------------------------------------------------------------------------------


def test_the_colours_are_those_of_okabe_and_ito():
    for name, rgb in OKABE_ITO.items():
        assert tuple(round(255 * part) for part in to_rgb(COLOURS[name])) == rgb, name
    grey = to_rgb(COLOURS["grey"])
    assert grey[0] == grey[1] == grey[2]
    assert set(COLOURS) == {*OKABE_ITO, "grey"}


def test_the_style_draws_on_white_in_the_palette_and_without_yellow():
    use_style()
    figure, axis = plt.subplots()
    lines = [axis.plot([0, 1], [i, i])[0] for i in range(6)]
    colours = [to_hex(line.get_color()).upper() for line in lines]
    assert len(set(colours)) == 6
    assert set(colours) <= set(COLOURS.values()) - {COLOURS["yellow"]}  # faint on white
    assert figure.get_facecolor() == to_rgba("white")
    assert axis.get_facecolor() == to_rgba("white")
    assert not axis.spines["top"].get_visible() and not axis.spines["right"].get_visible()
    for key in STYLE:
        wanted = STYLE[key]
        assert plt.rcParams[key] == (list(wanted) if isinstance(wanted, tuple) else wanted), key


# ---- the grid of images -----------------------------------------------------------------------


@pytest.mark.parametrize(("n", "columns", "rows"), [(5, 3, 2), (3, 3, 1), (1, 4, 1), (9, 2, 5)])
def test_each_image_has_its_place_and_what_is_left_stays_empty(n, columns, rows):
    images = torch.rand(n, 1, 4, 6, generator=torch.Generator().manual_seed(n))
    figure = image_grid(images, [f"image {i}" for i in range(n)], columns=columns)
    assert len(figure.axes) == rows * columns
    for place, axis in enumerate(figure.axes):
        assert not axis.axison
        if place >= n:
            assert not axis.images and axis.get_title() == ""
            continue
        (shown,) = axis.images
        assert np.array_equal(shown.get_array(), images[place, 0].numpy())
        assert shown.get_clim() == (0, 1)  # a dim image stays dim
        assert axis.get_title() == f"image {place}"
        spec = axis.get_subplotspec()
        assert (spec.rowspan.start, spec.colspan.start) == divmod(place, columns)


def test_colour_images_keep_their_channels():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    figure = image_grid(images, columns=2)
    for place, axis in enumerate(figure.axes):
        assert np.array_equal(axis.images[0].get_array(), images[place].permute(1, 2, 0).numpy())
        assert axis.get_title() == ""


def test_scale_is_the_width_of_one_image_in_inches():
    images = torch.zeros(6, 1, 2, 2)
    width, height = image_grid(images, columns=3, scale=0.5).get_size_inches()
    assert width == pytest.approx(1.5)
    assert image_grid(images, columns=3, scale=1.0).get_size_inches()[0] == pytest.approx(3)
    titled = image_grid(images, ["t"] * 6, columns=3, scale=0.5).get_size_inches()
    assert titled[1] > height and titled[0] == width


def test_images_that_carry_a_gradient_are_shown_and_kept():
    images = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = images.detach().clone()
    image_grid(images)
    assert images.requires_grad and torch.equal(images.detach(), before)


# ---- the band ---------------------------------------------------------------------------------


def test_the_band_goes_from_low_to_high_and_the_line_through_the_values():
    estimates = [proportion(k, 20) for k in (3, 11, 20)]
    x = [0.0, 0.1, 0.3]
    _, axis = plt.subplots()
    band(axis, x, estimates, label="robust", colour="green")
    (line,), (area,) = axis.lines, axis.collections
    assert np.array_equal(line.get_xdata(), x)
    assert np.array_equal(line.get_ydata(), [e.value for e in estimates])
    corners = {(float(a), float(b)) for a, b in area.get_paths()[0].vertices}
    ends = {(a, end) for a, e in zip(x, estimates) for end in (e.low, e.high)}
    assert corners == ends and len(ends) == 6
    assert to_hex(line.get_color()).upper() == COLOURS["green"]
    assert to_hex(area.get_facecolor()[0]).upper() == COLOURS["green"]
    assert 0 < area.get_facecolor()[0][3] < 0.5  # what lies behind can be seen
    assert axis.get_legend_handles_labels()[1] == ["robust"]


def test_a_line_can_differ_by_more_than_its_colour():
    _, axis = plt.subplots()
    estimates = [Estimate(0.5, 0.4, 0.6, 10)] * 2
    band(axis, [0, 1], estimates)
    band(axis, [0, 1], estimates, colour="red", marker="s", linestyle="--", linewidth=3)
    first, second = axis.lines
    assert (first.get_marker(), first.get_linestyle()) == ("o", "-")
    assert (second.get_marker(), second.get_linestyle()) == ("s", "--")
    assert second.get_linewidth() == 3
    assert to_hex(first.get_color()).upper() == COLOURS["blue"]


def test_nothing_is_shown_or_closed_behind_the_readers_back(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plt.show was called"))
    figure = image_grid(torch.zeros(1, 1, 2, 2))
    band(figure.axes[0], [0], [proportion(1, 2)])
    assert plt.fignum_exists(figure.number)
