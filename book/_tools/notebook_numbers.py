"""A pytest plugin for nbval that compares the printed output of cells with tolerances for numbers.

Words must agree exactly. So must numbers, except those that depend on how a processor rounds: numbers that come from a
trained network. ``spread.py`` finds them by executing each notebook in several kinds of arithmetic, and records in
``NN_slug.spread.json`` beside the notebook how far each printed number moved. Such a number may differ from the stored
one by ``MARGIN`` times its spread, or by one unit of its last printed digit if that is more. Numbers that moved in no
arithmetic have no recorded spread and must agree exactly, as must cells that were not measured.

nbval still compares and reports: if a new output agrees with the stored one by this rule, nbval is given the stored
one instead.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

MARGIN = 2.0
SIGN = r"(?:(?<![\w.)])[-+−])?(?<![\w.])"
NUMBER = re.compile(
    rf"{SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:e[-+]?\d+)?|{SIGN}\.\d+"
)
PICTURES = ("image/png", "image/jpeg", "application/vnd.jupyter.widget-view+json")
Outputs = Sequence[Any]  # of a cell, as notebooks hold them
Spread = dict[int, float]  # index of a number within its cell -> how far it moved


class Number(NamedTuple):
    """A printed number, and one unit of its last printed digit."""

    value: float
    unit: float


def number(text: str) -> Number:
    """The value and the unit of a printed number.

    >>> number("−1,234.50")
    Number(value=-1234.5, unit=0.01)
    """
    digits, _, power = text.replace(",", "").replace("−", "-").partition("e")
    exponent = int(power or 0)
    return Number(float(f"{digits}e{exponent}"), 10.0 ** (exponent - len(digits.partition(".")[2])))


def numbers(text: str) -> list[str]:
    """The numbers in a text as printed, without digits inside names such as "conv2d".

    >>> numbers("conv2d of 1,797 digits: -0.5 of .25 at 8/255")
    ['1,797', '-0.5', '.25', '8', '255']
    """
    return NUMBER.findall(text)


def words(text: str) -> str:
    """A text without its numbers and without the spaces that align columns."""
    return re.sub(r"[ \t]+", " ", NUMBER.sub("#", text))


def agree(new: str, stored: str, spread: Spread) -> bool:
    """Whether two texts agree: equal words, and numbers within their tolerances.

    Args:
        spread: how far numbers move, by their index; all others must be printed identically.
    """
    if new == stored:
        return True
    if words(new) != words(stored):
        return False
    pairs = enumerate(zip(numbers(new), numbers(stored), strict=True))
    return all(a == b or (i in spread and close(a, b, spread[i])) for i, (a, b) in pairs)


def close(new: str, stored: str, spread: float) -> bool:
    """Whether a number that moves is close enough to the stored one."""
    a, b = number(new), number(stored)
    unit = max(a.unit, b.unit)
    return abs(a.value - b.value) <= max(MARGIN * spread, unit) + 1e-6 * unit


def texts(outputs: Outputs) -> Iterator[tuple[Any, str]]:
    """The dicts and keys that hold the text outputs of a cell, always in the same order."""
    for output in outputs:
        if output["output_type"] == "stream":
            yield output, "text"
        for kind in sorted(output.get("data", {})):
            if kind not in PICTURES and isinstance(output["data"][kind], str):
                yield output["data"], kind


def reconciled(new: Outputs, stored: Outputs, spread: Spread, clean: Any) -> Outputs:
    """The new outputs, with the stored text wherever the two agree.

    Args:
        clean: removes from a text what must not be compared, such as times.
    """
    result = copy.deepcopy(list(new))
    at = 0
    for (ours, key), (theirs, other) in zip(texts(result), texts(stored), strict=False):
        before, after = clean(theirs[other]), clean(ours[key])
        count = len(numbers(before))
        here = {i - at: moved for i, moved in spread.items() if at <= i < at + count}
        if key == other and agree(after, before, here):
            ours[key] = theirs[other]
        at += count
    return result


# --- recorded spreads


def record(notebook: Path) -> Path:
    """The file that holds the spreads of a notebook."""
    return notebook.with_suffix(".spread.json")


@lru_cache
def spreads(notebook: Path) -> dict[str, Spread]:
    """The spreads of each cell by its id; empty if none are recorded."""
    file = record(notebook)
    cells = json.loads(file.read_text("utf-8"))["cells"] if file.exists() else {}
    return {
        name: {int(i): moved for i, moved in cell["moves"].items()} for name, cell in cells.items()
    }


# --- the plugin


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Make every notebook cell compare with tolerances."""
    from nbval.plugin import IPyNbCell

    for item in items:
        if isinstance(item, IPyNbCell):
            item.compare_outputs = partial(compare, item, item.compare_outputs)


def compare(item: Any, exactly: Any, new: Outputs, stored: Outputs, *skip: Any) -> bool:
    """nbval's comparison, after replacing outputs that agree within their tolerances."""
    spread = spreads(Path(item.parent.path)).get(item.cell.get("id", ""), {})
    return exactly(reconciled(new, stored, spread, item.sanitize) if spread else new, stored, *skip)
