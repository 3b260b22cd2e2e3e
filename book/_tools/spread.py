"""Measure how far the printed numbers of the notebooks move from one arithmetic to another.

    python book/_tools/spread.py                 all notebooks
    python book/_tools/spread.py toy attacks     only these
    python book/_tools/spread.py --stale         those with cells that were not measured yet
    python book/_tools/spread.py --widen native  add what the native arithmetic of this processor shows

Each notebook is executed in the stored arithmetic (AVX2), in the native one of the processor, with the oldest
instructions, and on two threads. Two more runs perturb the weights after each training step like another rounding, to
stand for processors that are not available. The spread of a number is the difference between its largest and smallest
value in these runs. It is saved in ``book/NN_slug.spread.json``, which ``notebook_numbers.py`` uses for its tolerances.

Some numbers that depend on training may happen to print identically in all these runs. Two last runs therefore perturb
training a thousand times more; numbers that change only there are recorded with a spread of 0.

A processor of another kind may show more. On such a processor, ``--widen`` executes only the runs it names, compares
them with the stored outputs, and keeps the wider of the recorded and the new spreads.

The tool also lists assertions that nearly failed, namely those whose margin was below a quarter of that in another
arithmetic, words that changed, and the numbers that moved most.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import refresh
from arithmetic import environment
from nbval.plugin import coalesce_streams, get_sanitize_patterns
from notebook_numbers import Spread, number, numbers, record, spreads, texts, words

SANITIZE = refresh.ROOT / "tests" / "nbval_sanitize.cfg"
TOOLS = Path(__file__).parent
QUARTER = 0.25


class Run(NamedTuple):
    """One way to execute a notebook."""

    isa: str = "avx2"
    threads: int = 1
    noise: float = 0.0
    phase: float = 0.0


RUNS = {
    "avx2": Run(),
    "native": Run("native"),
    "oldest": Run("oldest"),
    "two threads": Run(threads=2),
    "rounded": Run(noise=1e-7, phase=1.0),
    "rounded again": Run(noise=1e-7, phase=2.0),
}
DISTURBED = {"disturbed": Run(noise=1e-4, phase=3.0), "disturbed again": Run(noise=1e-4, phase=4.0)}


@dataclass
class Found:
    """The result for one notebook."""

    name: str
    cells: dict[str, Spread] = field(default_factory=dict)
    wide: list[tuple[float, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def executed(notebook: nbformat.NotebookNode, run: Run) -> tuple[list[list[str]], dict[str, float]]:
    """The texts that each code cell prints, and the margin of each assertion."""
    from nbclient import NotebookClient

    mine = copy.deepcopy(notebook)
    disturbed = run in DISTURBED.values()
    install = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import measuring\n"
        f"measuring.install({run.noise}, {run.phase}, {disturbed})"
    )
    first, last = (nbformat.v4.new_code_cell(c) for c in (install, "print(measuring.told())"))
    mine.cells = [first, *mine.cells, last]
    for cell in refresh.code_cells(mine):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        mine,
        timeout=4 * refresh.CELL_LIMIT_S,
        kernel_name="python3",
        allow_errors=disturbed,
        skip_cells_with_tag="live",
        resources={"metadata": {"path": str(refresh.BOOK)}},
        extra_arguments=["--log-level=ERROR"],
    )
    threads = {key: str(run.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    client.execute(env={**unpinned(), **environment(run.isa), **threads})
    cells = refresh.code_cells(mine)[1:-1]
    said = [list(printed(cell)) if compared(cell) else [] for cell in cells]
    return said, json.loads(last.outputs[0]["text"])


def unpinned() -> dict[str, str]:
    """The environment of this process without the variables that fix an arithmetic."""
    return {k: v for k, v in os.environ.items() if k not in environment("oldest")}


def printed(cell: nbformat.NotebookNode) -> Iterator[str]:
    """The texts that a cell printed, as the tests compare them."""
    patterns = get_sanitize_patterns(SANITIZE.read_text("utf-8"))
    for holder, key in texts(coalesce_streams(copy.deepcopy(cell.outputs))):
        text = holder[key]
        for pattern, replacement in patterns:
            text = re.sub(pattern, replacement, text)
        yield text


def compared(cell: nbformat.NotebookNode) -> bool:
    """Whether nbval compares the output of a cell."""
    return not {"live", "nbval-ignore-output"} & set(refresh.tags(cell))


def count(cell: nbformat.NotebookNode) -> int:
    """The count of numbers that a cell printed."""
    return sum(len(numbers(text)) for text in printed(cell))


def as_text(kept: dict[str, Any]) -> str:
    """A record as JSON, with one line per cell."""
    cells = [f"  {json.dumps(name)}: {json.dumps(cell)}" for name, cell in kept["cells"].items()]
    inside = ",\n".join(cells)
    return f'{{\n "runs": {json.dumps(kept["runs"])},\n "cells": {{\n{inside}\n }}\n}}\n'


def measure(twin: Path, widen: Sequence[str] = ()) -> Found:
    """Execute a notebook in all kinds of arithmetic, and save its spreads.

    Args:
        widen: the only runs to execute; their spreads widen the recorded ones instead of replacing them.
    """
    path = twin.with_suffix(".ipynb")
    notebook, found = nbformat.read(path, as_version=4), Found(twin.stem)
    began = time.perf_counter()
    chosen = {name: RUNS[name] for name in widen} or RUNS | DISTURBED
    known = spreads(path) if widen else {}
    runs = {name: executed(notebook, run) for name, run in chosen.items()}
    for place, cell in enumerate(refresh.code_cells(notebook)):
        if compared(cell):
            each = {name: texts_[place] for name, (texts_, _) in runs.items()}
            new = spread(found, cell, list(printed(cell)), each)
            found.cells[cell["id"]] = widest(known.get(cell["id"], {}), new)
    kept = {
        "runs": list(RUNS),
        "cells": {
            cell["id"]: {"numbers": count(cell), "moves": found.cells[cell["id"]]}
            for cell in refresh.code_cells(notebook)
            if compared(cell)
        },
    }
    record(path).write_text(as_text(kept), encoding="utf-8")
    if not widen:
        held = {name: margins for name, (_, margins) in runs.items() if name in RUNS}
        found.faults += near_misses(held)
    print(f"{twin.stem}: measured in {time.perf_counter() - began:.0f} s", flush=True)
    return found


def spread(
    found: Found, cell: nbformat.NotebookNode, stored: list[str], each: dict[str, list[str]]
) -> Spread:
    """How far each number of a cell moved; numbers that never moved are left out."""
    first = cell.source.splitlines()[0][:60]
    moved: Spread = {}
    at = 0
    for place, text in enumerate(stored):
        values: dict[int, list[float]] = {i: [number(n).value] for i, n in enumerate(numbers(text))}
        units = [number(n).unit for n in numbers(text)]
        for name, said in each.items():
            other = said[place] if place < len(said) else ""
            if name in RUNS and words(other) != words(text):
                found.faults.append(
                    f"cell {first!r} prints other words in the run {name!r}:\n{other}\ninstead of\n{text}"
                )
            elif name in RUNS:
                for i, n in enumerate(numbers(other)):
                    values[i].append(number(n).value)
            else:
                moved |= {at + i: 0.0 for i in changed(other, text)}
        for i, seen in values.items():
            if (width := max(seen) - min(seen)) > 0:
                moved[at + i] = round(width, 12)
                found.wide.append(
                    (width / units[i], f"{first!r}: {numbers(text)[i]} by {width:.3g}")
                )
        at += len(values)
    return dict(sorted(moved.items()))


def widest(one: Spread, other: Spread) -> Spread:
    """The wider of two spreads of each number."""
    both = sorted(one.keys() | other.keys())
    return {i: max(each[i] for each in (one, other) if i in each) for i in both}


def changed(new: str, stored: str) -> Iterator[int]:
    """The indices of stored numbers that a new text prints differently, compared line by line."""
    ours, theirs = (text.splitlines() for text in (stored, new))
    match = difflib.SequenceMatcher(
        None, *([words(line) for line in lines] for lines in (ours, theirs)), autojunk=False
    )
    partner = {a + k: b + k for a, b, size in match.get_matching_blocks() for k in range(size)}
    at = 0
    for place, line in enumerate(ours):
        mine = numbers(line)
        other = numbers(theirs[partner[place]]) if place in partner else [None] * len(mine)
        yield from (at + i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
        at += len(mine)


def near_misses(held: dict[str, dict[str, float]]) -> Iterator[str]:
    """Assertions whose margin was below a quarter of that in another arithmetic."""
    for key in held["avx2"]:
        rooms = {name: room[key] for name, room in held.items() if key in room}
        least, most = min(rooms.values()), max(rooms.values())
        if least < QUARTER * most:
            said = ", ".join(f"{name} {room:.4g}" for name, room in rooms.items())
            yield f"near miss, cell {key}: margins {said}"


def is_stale(twin: Path) -> bool:
    """Whether the record has other cells than the notebook, or other counts of numbers in them."""
    path = twin.with_suffix(".ipynb")
    cells = refresh.code_cells(nbformat.read(path, as_version=4))
    if not record(path).exists():
        return True
    known = json.loads(record(path).read_text("utf-8"))["cells"]
    now = {cell["id"]: count(cell) for cell in cells if compared(cell)}
    return {name: cell["numbers"] for name, cell in known.items()} != now


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="slugs such as toy (default: all)")
    parser.add_argument("--stale", action="store_true", help="only notebooks with unmeasured cells")
    parser.add_argument(
        "--widen", nargs="+", default=(), choices=RUNS, metavar="RUN", help=f"of {', '.join(RUNS)}"
    )
    parser.add_argument("--jobs", type=int, default=2, help="notebooks executed at the same time")
    args = parser.parse_args()
    chosen = refresh.chosen(args.names, parser.error)
    if args.stale:
        chosen = [twin for twin in chosen if is_stale(twin)]
    if args.widen and (unmeasured := [twin.stem for twin in chosen if is_stale(twin)]):
        parser.error(f"first measure the new cells of {', '.join(unmeasured)} (--stale)")
    with ProcessPoolExecutor(args.jobs) as pool:
        results = list(pool.map(partial(measure, widen=args.widen), chosen))
    for found in results:
        for fault in found.faults:
            print(f"{found.name}: {fault}")
    wide = sorted(
        ((w, found.name, cell) for found in results for w, cell in found.wide), reverse=True
    )
    for width, name, cell in wide[:10]:
        print(f"{width:6.0f} units of the last digit  {name}  {cell}")
    return 1 if any(found.faults for found in results) else 0


if __name__ == "__main__":
    sys.exit(main())
