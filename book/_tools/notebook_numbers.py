"""A pytest plugin beside nbval: what a cell prints is compared by its meaning.

Words must agree exactly. So must numbers, but for those that depend on how a processor rounds: numbers that come from
a trained network. ``spread.py`` finds them by executing each notebook in several kinds of arithmetic and keeps, beside
the notebook in ``NN_slug.spread.json``, how far each printed number moved. Such a number may differ from the stored one
by ``MARGIN`` times its spread, and by one unit of its last printed digit in any case. A number that no
arithmetic moves has no spread on record and stays exact, as does a cell that nobody measured.

nbval still does the comparing and the telling: where a new output agrees with the stored one by this rule, it is
given the stored one to compare with itself.
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
Spread = dict[int, float]  # place of a number among a cell's -> how far it moved


class Number(NamedTuple):
    """A printed number, and one unit of its last digit."""

    value: float
    unit: float


def number(text: str) -> Number:
    """What a printed number says.

    >>> number("−1,234.50")
    Number(value=-1234.5, unit=0.01)
    """
    digits, _, power = text.replace(",", "").replace("−", "-").partition("e")
    exponent = int(power or 0)
    return Number(float(f"{digits}e{exponent}"), 10.0 ** (exponent - len(digits.partition(".")[2])))


def numbers(text: str) -> list[str]:
    """The numbers in a text as they are printed, without the digits of names such as "conv2d".

    >>> numbers("conv2d of 1,797 digits: -0.5 of .25 at 8/255")
    ['1,797', '-0.5', '.25', '8', '255']
    """
    return NUMBER.findall(text)


def words(text: str) -> str:
    """A text without its numbers, and without the blanks by which columns are aligned."""
    return re.sub(r"[ \t]+", " ", NUMBER.sub("#", text))


def agree(new: str, stored: str, spread: Spread) -> bool:
    """Whether two texts say the same: equal words, and numbers that differ by no more than they may.

    Args:
        spread: of the numbers that move, by their place; the others must be printed alike.
    """
    if new == stored:
        return True
    if words(new) != words(stored):
        return False
    pairs = enumerate(zip(numbers(new), numbers(stored), strict=True))
    return all(a == b or (i in spread and close(a, b, spread[i])) for i, (a, b) in pairs)


def close(new: str, stored: str, spread: float) -> bool:
    """Whether a number that moves lies near enough to the stored one."""
    a, b = number(new), number(stored)
    unit = max(a.unit, b.unit)
    return abs(a.value - b.value) <= max(MARGIN * spread, unit) + 1e-6 * unit


def texts(outputs: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """The dicts and keys under which a cell's outputs hold text, in one order for numbering."""
    for output in outputs:
        if output["output_type"] == "stream":
            yield output, "text"
        for kind in sorted(output.get("data", {})):
            if kind not in PICTURES and isinstance(output["data"][kind], str):
                yield output["data"], kind


def reconciled(new: Sequence[Any], stored: Sequence[Any], spread: Spread, clean: Any) -> list[Any]:
    """The new outputs, with the stored text wherever the two agree.

    Args:
        clean: takes out of a text what no comparison should see, such as times.
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


# --- the spreads on record


def record(notebook: Path) -> Path:
    """Where a notebook's spreads are kept."""
    return notebook.with_suffix(".spread.json")


@lru_cache
def spreads(notebook: Path) -> dict[str, Spread]:
    """How far the numbers of each cell move, by the cell's id; empty without a record."""
    file = record(notebook)
    cells = json.loads(file.read_text("utf-8"))["cells"] if file.exists() else {}
    return {
        name: {int(i): moved for i, moved in cell["moves"].items()} for name, cell in cells.items()
    }


# --- the plugin


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Let every notebook cell compare by meaning."""
    from nbval.plugin import IPyNbCell

    for item in items:
        if isinstance(item, IPyNbCell):
            item.compare_outputs = partial(compare, item, item.compare_outputs)


def compare(item: Any, exactly: Any, new: Sequence[Any], stored: Sequence[Any], *skip: Any) -> bool:
    """nbval's comparison, after numbers that may move were reconciled."""
    spread = spreads(Path(item.parent.path)).get(item.cell.get("id", ""), {})
    return exactly(reconciled(new, stored, spread, item.sanitize) if spread else new, stored, *skip)
