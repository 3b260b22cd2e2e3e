"""The page without a kernel: every slider position must show the right picture."""

import base64
import io
import itertools
import json
import re
import sys
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from robustood import widgets
from robustood.widgets import MOST_FRAMES, attempt, explore, live


@pytest.fixture(autouse=True)
def _clean():
    yield
    plt.close("all")


def solid(red=0.0, green=0.0, blue=0.0):
    """A picture whose colour says which values it was drawn with."""
    return plt.figure(figsize=(0.5, 0.25), facecolor=(red, green, blue))


class Elements(HTMLParser):
    """Every start tag of a page with its attributes, and the text that follows it."""

    def __init__(self, html):
        super().__init__()
        self.found, self.text = [], {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found:
            self.text.setdefault(len(self.found) - 1, data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]

    def texts(self, tag):
        return [self.text.get(i, "") for i, (name, _) in enumerate(self.found) if name == tag]


def read(page):
    """Elements, frames as colours in 0 .. 255, and the labels, as a browser would see them."""
    html = page._repr_html_()
    frames, end = json.JSONDecoder().raw_decode(html.split("frames = ", 1)[1])
    labels, _ = json.JSONDecoder().raw_decode(html.split("labels = ", 1)[1])
    assert end > 0
    return Elements(html), [decoded(frame) for frame in frames], labels


def decoded(frame):
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(frame))).convert("RGB"))
    assert (picture == picture[0, 0]).all()
    return tuple(int(v) for v in picture[0, 0])


def position(chosen, sizes):
    """The frame that the page's script shows: the last slider moves fastest."""
    index = 0
    for value, size in zip(chosen, sizes, strict=True):
        index = index * size + value
    return index


# ---- explore ----------------------------------------------------------------------------------


def test_each_combination_of_sliders_shows_its_own_picture():
    values = {"red": [0.0, 0.4, 1.0], "green": [0.2, 0.8], "blue": [0.0, 0.2, 0.6, 1.0]}
    elements, frames, labels = read(explore(solid, alt="a colour", **values))
    sliders = elements.all("input")
    sizes = [int(slider["max"]) + 1 for slider in sliders]
    assert [slider["min"] for slider in sliders] == ["0"] * 3
    assert sizes == [3, 2, 4] == [len(texts) for texts in labels]
    assert len(frames) == 24
    for chosen in itertools.product(*map(range, sizes)):
        wanted = [options[i] for options, i in zip(values.values(), chosen, strict=True)]
        shown = frames[position(chosen, sizes)]
        assert np.abs(np.array(shown) - 255 * np.array(wanted)).max() <= 1, (chosen, shown)


def test_the_script_counts_as_the_frames_were_drawn():
    """The order above is the script's own: controls in the page's order, the last one fastest."""
    html = explore(solid, alt="a colour", red=[0.0, 1.0])._repr_html_()
    script = re.sub(r"\s+", " ", html.split("<script>")[1])
    assert (
        "controls.reduce((sum, each, i) => sum * labels[i].length + chosen(each, i), 0)" in script
    )
    assert 'root.querySelectorAll("[data-control]")' in script
    assert '"data:image/png;base64," + frames[index]' in script


def test_names_are_chosen_by_buttons_and_numbers_by_sliders():
    page = explore(
        lambda shade, name: solid(shade, float(name == "B & C")),
        alt="a colour",
        start={"name": "B & C"},
        shade=[0.0, 1.0],
        name=["A", "B & C", "D"],
    )
    elements, frames, labels = read(page)
    slider, *buttons = elements.all("input")
    assert slider["type"] == "range" and [b["type"] for b in buttons] == ["radio"] * 3
    assert [b["value"] for b in buttons] == ["0", "1", "2"]
    assert ["checked" in b for b in buttons] == [False, True, False]
    assert len({b["name"] for b in buttons}) == 1, "one of the three is chosen"
    assert elements.texts("legend") == ["name"] and labels[1] == ["A", "B & C", "D"]
    assert len([a for _, a in elements.found if "data-control" in a]) == 2
    assert frames[position((1, 1), (2, 3))] == (255, 255, 0)


@pytest.mark.parametrize("start", [None, {"green": 1.0}, {"red": 0.0, "green": 0.0}])
def test_the_first_picture_belongs_to_the_first_positions(start):
    values = {"red": [0.0, 0.4, 1.0], "green": [0.0, 0.6, 0.8, 1.0]}
    elements, frames, labels = read(explore(solid, alt="a colour", start=start, **values))
    sliders = elements.all("input")
    places = [int(slider["value"]) for slider in sliders]
    wanted = {name: options[len(options) // 2] for name, options in values.items()} | (start or {})
    assert [o[i] for o, i in zip(values.values(), places)] == list(wanted.values())
    (image,) = elements.all("img")
    first = decoded(image["src"].removeprefix("data:image/png;base64,"))
    assert first == frames[position(places, [3, 4])]
    assert np.abs(np.array(first[:2]) - 255 * np.array(list(wanted.values()))).max() <= 1
    shown = [texts[i] for texts, i in zip(labels, places)]
    assert elements.texts("output") == shown == [s["aria-valuetext"] for s in sliders]


def test_picture_and_sliders_say_what_they_are():
    page = explore(
        lambda eps, name: solid(eps),
        alt="accuracy falls with eps",
        labels={"eps": "radius"},
        eps=[0.0, 0.1, 1 / 3],
        name=["standard", "robust"],
    )
    elements, _, labels = read(page)
    assert [image["alt"] for image in elements.all("img")] == ["accuracy falls with eps"]
    assert elements.texts("span") == ["radius"] and elements.texts("legend") == ["name"]
    assert len(elements.all("label")) == 3  # a text belongs to its slider or button
    assert labels == [["0", "0.1", "0.333333"], ["standard", "robust"]]
    assert repr(page) == "interactive figure"


def test_the_page_needs_nothing_from_outside_and_is_the_same_each_time():
    page, again = (explore(solid, alt="a", red=[0.0, 0.5])._repr_html_() for _ in range(2))
    assert page == again
    assert not re.search(r"https?://|\bsrc=\"(?!data:)|\bimport\b|\brequire\b", page)
    other = explore(solid, alt="a", red=[0.0, 1.0])._repr_html_()
    names = [Elements(html).all("div")[0]["id"] for html in (page, other)]
    assert names[0] != names[1]  # two figures on one page do not answer to each other's sliders
    assert f'getElementById("{names[0]}")' in page


def test_numpy_values_are_welcome_and_figures_are_closed(untyped):
    open_before = plt.get_fignums()
    elements, frames, labels = read(explore(solid, alt="a", red=np.linspace(0, 1, 3)))
    assert labels == [["0", "0.5", "1"]]
    assert [frame[0] for frame in frames] == [0, pytest.approx(128, abs=1), 255]
    assert elements.all("input")[0]["value"] == "1"
    assert plt.get_fignums() == open_before


def test_dpi_sets_the_size_of_the_frames():
    for dpi, width in ((40, 20), (80, 40)):
        src = Elements(explore(solid, alt="a", dpi=dpi, red=[0.0])._repr_html_()).all("img")[0]
        raw = base64.b64decode(src["src"].split(",")[1])
        assert Image.open(io.BytesIO(raw)).size == (width, width // 2)


def test_the_limit_is_told_before_anything_is_drawn():
    def never(**values):
        pytest.fail("a frame was drawn")

    assert MOST_FRAMES == 240
    with pytest.raises(ValueError, match=r"241 frames are too many .* at most 240; shorten"):
        explore(never, alt="a", red=range(241))
    with pytest.raises(ValueError, match="260 frames"):
        explore(never, alt="a", red=range(20), green=range(13))
    with pytest.raises(
        ValueError, match=r"number of values for green must be .* at least 1, got 0"
    ):
        explore(never, alt="a", red=[0.0, 1.0], green=[])
    with pytest.raises(ValueError, match=r"start\['red'\] must be one of \[0.0, 1.0\], got 0.5"):
        explore(never, alt="a", start={"red": 0.5}, red=[0.0, 1.0])


def test_exactly_the_limit_is_drawn(monkeypatch):
    monkeypatch.setattr(widgets, "_png", lambda figure, dpi: (bytes([figure]), 10))
    html = explore(lambda red, green: red * 12 + green, alt="a", red=range(20), green=range(12))
    frames, _ = json.JSONDecoder().raw_decode(html.html.split("frames = ", 1)[1])
    assert [base64.b64decode(frame)[0] for frame in frames] == list(range(240))


# ---- live -------------------------------------------------------------------------------------


def test_live_draws_what_its_sliders_say(monkeypatch):
    ipywidgets = pytest.importorskip("ipywidgets", reason="ipywidgets comes with the book's extras")
    import IPython.display

    shown, asked = [], []
    monkeypatch.setattr(IPython.display, "display", shown.append)

    def draw(**values):
        asked.append(values)
        return solid(values["red"])

    live(draw, labels={"red": "redness"}, red=[0.0, 0.5, 1.0], green=[1, 2], name=["A", "B"])
    (box,) = [thing for thing in shown if isinstance(thing, ipywidgets.interactive)]
    red, green, name = box.kwargs_widgets
    assert isinstance(red, ipywidgets.SelectionSlider)
    assert isinstance(name, ipywidgets.ToggleButtons) and name.value == "B"
    assert (red.description, green.description) == ("redness", "green")
    assert (red.value, green.value) == (0.5, 2)
    red.value = 1.0
    box.update()
    assert asked[-1] == {"red": 1.0, "green": 2, "name": "B"}
    assert shown[-1].get_facecolor() == (1.0, 0.0, 0.0, 1.0)
    assert not plt.get_fignums()


def test_without_ipywidgets_a_line_says_so_and_the_page_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    live(lambda **values: pytest.fail("nothing to draw on"), red=[0.0, 1.0])
    assert "pip install ipywidgets" in capsys.readouterr().out


# ---- attempt ----------------------------------------------------------------------------------


def check_double(f):
    assert f(2) == 4, "f(2) should be 4"
    assert f(-1) == -2, "f(-1) should be -2"


def unsolved(x):
    raise NotImplementedError("your turn")


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (unsolved, "not solved yet"),
        (lambda x: x * x, "not right yet: f(-1) should be -2"),
        (lambda x: x, "not right yet: f(2) should be 4"),
        (lambda x: 2 * x, "solved"),
    ],
)
def test_an_attempt_has_three_outcomes_each_in_one_line(capsys, answer, line):
    attempt(check_double, answer)
    assert capsys.readouterr().out.startswith(line)


def test_an_attempt_says_no_more_than_one_line_and_hides_no_other_error(capsys):
    attempt(check_double, unsolved)
    attempt(check_double, lambda x: 2 * x)
    assert capsys.readouterr().out == "not solved yet\nsolved\n"
    with pytest.raises(ZeroDivisionError):
        attempt(check_double, lambda x: x / 0)


def test_an_attempt_says_which_name_a_cell_above_has_to_make(capsys):
    attempt(check_double, lambda x: made_above * x)  # noqa: F821
    assert capsys.readouterr().out.startswith("stopped: name 'made_above' is not defined; ")
