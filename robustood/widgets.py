"""Interactive figures, and exercises with checks.

:func:`explore` renders every frame in advance and needs no kernel: it works in the static page,
offline. :func:`live` draws on demand in a running kernel. Both take the same drawing function.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from robustood.inputs import (
    check_callable,
    check_choice,
    check_count,
    check_mapping,
    check_text,
)

__all__ = ["MOST_FRAMES", "Draw", "attempt", "explore", "live"]

Draw = Callable[..., Figure]
_Answer = TypeVar("_Answer", bound=Callable[..., object])
MOST_FRAMES = 240

_PAGE = """<div id="{name}" class="explore" style="max-width:max({width}px,38em);background:#fff;\
color:#222;padding:8px;border-radius:6px">
<img alt="{alt}" style="width:100%;max-width:{width}px" src="{first}">
{controls}
<script>
(function () {{
  const root = document.getElementById("{name}"), frames = {frames}, labels = {labels};
  const controls = Array.from(root.querySelectorAll("[data-control]")), picture = root.querySelector("img");
  function chosen(control, i) {{
    const slider = control.querySelector("input[type=range]");
    if (!slider) return Number(control.querySelector("input:checked").value);
    control.querySelector("output").textContent = labels[i][Number(slider.value)];
    slider.setAttribute("aria-valuetext", labels[i][Number(slider.value)]);
    return Number(slider.value);
  }}
  function show() {{
    const index = controls.reduce((sum, each, i) => sum * labels[i].length + chosen(each, i), 0);
    picture.src = "data:image/png;base64," + frames[index];
  }}
  root.addEventListener("input", show);
}})();
</script></div>"""

_ROW = "display:grid;grid-template-columns:{columns};align-items:center;gap:4px 10px;margin:2px 0;border:0;padding:0"

# A finger needs more height than a pointer, and a drag along the slider must not scroll the page.
_SLIDER = """<label data-control style="{row}">
<span>{name}</span> <input type="range" min="0" max="{last}"
value="{start}" step="1" style="min-width:0;height:2.4em;touch-action:pan-y" aria-valuetext="{text}">
<output>{text}</output></label>"""

_BUTTONS = """<fieldset data-control style="{row}">
<legend style="float:left;width:auto;font-size:inherit;margin:0;padding:0">{name}</legend>
<div style="display:flex;flex-wrap:wrap;gap:0 10px">{buttons}</div></fieldset>"""

_BUTTON = """<label style="padding:.35em .2em">
<input type="radio" name="{group}" value="{index}"{checked}> {text}</label>"""


class _Page:
    """Self-contained HTML that a notebook shows and stores."""

    def __init__(self, html: str):
        check_text(html, "html")
        self.html = html

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return "interactive figure"


def explore(
    draw: Draw,
    *,
    alt: str,
    labels: dict[str, str] | None = None,
    start: dict[str, object] | None = None,
    dpi: int = 80,
    **values: Iterable[object],
) -> _Page:
    """A figure with one control per parameter that works without a kernel: every combination is drawn in advance.

    A parameter whose values are names gets a row of buttons, any other a slider.

    Args:
        draw: ``draw(name=value, ...)`` returns a figure.
        alt: what the figure shows, for readers who cannot see it.
        labels: text beside each control, by parameter; default its name.
        start: initial value, by parameter; default the middle of its list.
        dpi: resolution of the frames.
        values: a list of values per parameter, at most 240 combinations in all.

    Returns:
        An object that Jupyter shows as HTML.

    Raises:
        ValueError: for an empty list, too many combinations, or a start that is not in its list.
    """
    check_text(alt, "alt")
    check_count(dpi, "dpi", low=1)
    lists = _listed(draw, labels, values)
    if start is not None:
        check_mapping(start, "start", "{name: initial value}")
        for name in start:
            check_choice(name, "each name in start", tuple(lists))
    sizes = [len(options) for options in lists.values()]
    frames = math.prod(sizes)
    if frames > MOST_FRAMES:
        raise ValueError(
            f"{frames} frames are too many for a page, at most {MOST_FRAMES}; shorten the lists"
        )
    firsts = []
    for name, options in lists.items():
        value = (start or {}).get(name, options[len(options) // 2])
        if value not in options:
            raise ValueError(f"start[{name!r}] must be one of {options}, got {value!r}")
        firsts.append(options.index(value))
    pictures = [
        _png(draw(**dict(zip(lists, chosen, strict=True))), dpi)
        for chosen in itertools.product(*lists.values())
    ]
    first = 0
    for index, size in zip(firsts, sizes, strict=True):
        first = first * size + index
    texts = [[f"{v:g}" if isinstance(v, float) else str(v) for v in o] for o in lists.values()]
    encoded = [base64.b64encode(picture).decode() for picture, _ in pictures]
    name = f"explore-{zlib.crc32(''.join(encoded).encode()):08x}"
    controls = [
        _control(f"{name}-{i}", (labels or {}).get(each, each), named, text, index)
        for i, (each, named, text, index) in enumerate(
            zip(lists, map(_are_names, lists.values()), texts, firsts, strict=True)
        )
    ]
    return _Page(
        _PAGE.format(
            name=name,
            width=max(width for _, width in pictures) + 16,
            alt=html.escape(alt),
            first=f"data:image/png;base64,{encoded[first]}",
            controls="\n".join(controls),
            frames=json.dumps(encoded),
            labels=json.dumps(texts).replace("</", "<\\/"),
        )
    )


def _are_names(options: list[object]) -> bool:
    """Whether the values are names, which have no order that a slider could show."""
    return all(isinstance(value, str) for value in options)


def _control(group: str, name: str, named: bool, texts: list[str], start: int) -> str:
    """The part of a page with which a reader chooses one value: a row of buttons for names, a slider otherwise."""
    safe = [html.escape(text) for text in texts]
    if not named:
        return _SLIDER.format(
            row=_ROW.format(columns="minmax(6em,10em) minmax(0,1fr) 4em"),
            name=html.escape(name),
            last=len(safe) - 1,
            start=start,
            text=safe[start],
        )
    buttons = "\n".join(
        _BUTTON.format(group=group, index=i, checked=" checked" * (i == start), text=text)
        for i, text in enumerate(safe)
    )
    row = _ROW.format(columns="minmax(6em,10em) minmax(0,1fr)")
    return _BUTTONS.format(row=row, name=html.escape(name), buttons=buttons)


def _listed(
    draw: Draw, labels: dict[str, str] | None, values: dict[str, Iterable[object]]
) -> dict[str, list[object]]:
    """The values of each parameter, checked."""
    check_callable(draw, "draw", "draw(name=value, ...)")
    for name, options in values.items():
        if isinstance(options, str) or not isinstance(options, Iterable):
            raise ValueError(f"{name} must be a list of values, got {options!r:.80}; use [..]")
    lists = {name: list(options) for name, options in values.items()}
    for name, options in lists.items():
        check_count(len(options), f"number of values for {name}", low=1)
        if any(value is None for value in options):
            raise ValueError(f"{name} must hold values, got None among {options!r:.80}")
    if labels is not None:
        check_mapping(labels, "labels", "{name: text beside the slider}")
        for name, text in labels.items():
            check_choice(name, "each name in labels", tuple(lists))
            check_text(text, f"labels[{name!r}]")
    return lists


def _png(figure: Figure, dpi: int) -> tuple[bytes, int]:
    """A figure as a small palette PNG, and its width in pixels; closes the figure."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)  # savefig would draw twice: once to measure, once to write
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    small = io.BytesIO()
    picture.quantize(48, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue(), picture.width


def live(draw: Draw, *, labels: dict[str, str] | None = None, **values: Iterable[object]) -> None:
    """The same figure drawn on demand by a running kernel, with ipywidgets; without them, a line says so.

    Args:
        draw: ``draw(name=value, ...)`` returns a figure.
        labels: text beside each control, by parameter.
        values: a list of values per parameter.
    """
    from IPython.display import display

    try:
        import ipywidgets
    except ImportError:
        print(
            "The live figure needs ipywidgets: pip install ipywidgets. The rest of the page does not."
        )
        return

    lists = _listed(draw, labels, values)
    controls = {}
    for name, options in lists.items():
        how = {
            "options": options,
            "value": options[len(options) // 2],
            "description": (labels or {}).get(name, name),
        }
        controls[name] = (
            ipywidgets.ToggleButtons(**how)
            if _are_names(options)
            else ipywidgets.SelectionSlider(**how, continuous_update=False)
        )

    def show(**chosen: object) -> None:
        figure = draw(**chosen)
        display(figure)
        plt.close(figure)

    display(ipywidgets.interactive(show, **controls))


def attempt(check: Callable[[_Answer], None], answer: _Answer) -> None:
    """Check the answer to an exercise, and print the result in one line.

    Args:
        check: raises ``AssertionError`` with a helpful message if the answer is wrong.
        answer: the reader's function; if it raises ``NotImplementedError``, it is not solved yet.
    """
    check_callable(check, "check", "check(answer)")
    check_callable(answer, "answer", "in the exercise")
    try:
        check(answer)
    except NotImplementedError:
        print("not solved yet")
    except NameError as missing:
        print(f"stopped: {missing}; is it spelt right, and has the cell above that makes it run?")
    except AssertionError as wrong:
        print(f"not right yet: {wrong}")
    else:
        print("solved")
