"""How notebooks are compared: by words, by exact numbers, and by what an arithmetic may move."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import arithmetic
import nbformat
import notebook_numbers
import pytest
import refresh
import spread
from hypothesis import given
from hypothesis import strategies as st
from notebook_numbers import agree, close, number, numbers, words

ROOT = Path(__file__).parents[1]
each_notebook = pytest.mark.parametrize("twin", refresh.twins(), ids=lambda p: p.stem)

# --- one notebook, as pytest --nbval sees it: what a cell prints, what is stored, the spread, the verdict

TABLE = "from IPython.display import Markdown\nMarkdown('| AUROC |\\n|---|\\n| {} |')"
CELLS = {
    "the same": ("print('AUROC 0.76')", "AUROC 0.76\n", {}, True),
    "one unit of a number that moves": ("print('AUROC 0.77')", "AUROC 0.76\n", {0: 0.0}, True),
    "twice its spread": ("print('AUROC 0.80')", "AUROC 0.76\n", {0: 0.02}, True),
    "more than twice its spread": ("print('AUROC 0.81')", "AUROC 0.76\n", {0: 0.02}, False),
    "two units without a spread": ("print('AUROC 0.78')", "AUROC 0.76\n", {0: 0.0}, False),
    "a number that never moves": ("print('AUROC 0.77')", "AUROC 0.76\n", {}, False),
    "an exact number beside one that moves": ("print('eps 0.2 0.76')", "eps 0.1 0.76\n", {1: 0.02}, False),
    "a wrong sign": ("print('gain -0.30')", "gain 0.30\n", {0: 0.02}, False),
    "a lost sign": ("print('gain 0.30')", "gain −0.30\n", {0: 0.02}, False),
    "a missing line": ("print('a 0.5')", "a 0.5\nb 0.5\n", {0: 0.02, 1: 0.02}, False),
    "a line too many": ("print('a 0.5\\nb 0.5')", "a 0.5\n", {0: 0.02}, False),
    "a changed word": ("print('ALOE 0.76')", "AOE 0.76\n", {0: 0.02}, False),
    "a number that became none": ("print('AUROC nan')", "AUROC 0.76\n", {0: 0.02}, False),
    "a column that is aligned anew": ("print('AUROC  9.9')", "AUROC 10.1\n", {0: 0.1}, True),
    "times": ("print('in 3.1 s: 0.77')", "in 2.0 s: 0.76\n", {0: 0.0}, True),
    "a table near enough": (TABLE.format("0.77"), "| AUROC |\n|---|\n| 0.76 |", {0: 0.01}, True),
    "a table too far": (TABLE.format("0.79"), "| AUROC |\n|---|\n| 0.76 |", {0: 0.01}, False),
    "nothing printed": ("pass", "AUROC 0.76\n", {0: 0.02}, False),
    "a picture of text": ("print(0.5)", "0.5\n", {7: 0.1}, True),
}  # fmt: skip


def outputs(source: str, stored: str) -> list[nbformat.NotebookNode]:
    """What the notebook holds for a cell."""
    if "Markdown" not in source:
        return [nbformat.v4.new_output("stream", name="stdout", text=stored)]
    plain = "<IPython.core.display.Markdown object>"
    data = {"text/markdown": stored, "text/plain": plain}
    return [nbformat.v4.new_output("execute_result", data=data, execution_count=1)]


def verdicts(folder: Path, *options: str) -> dict[str, bool]:
    """Which cells pass ``pytest --nbval`` in a folder of their own."""
    notebook, moved = nbformat.v4.new_notebook(), {}
    for i, (source, stored, spreads, _) in enumerate(CELLS.values()):
        cell = nbformat.v4.new_code_cell(source, outputs=outputs(source, stored), execution_count=1)
        cell["id"] = f"cell{i}"
        moved[cell["id"]] = {"moves": {str(place): value for place, value in spreads.items()}}
        notebook.cells.append(cell)
    path = folder / "some.ipynb"
    nbformat.write(notebook, path)
    notebook_numbers.record(path).write_text(json.dumps({"cells": moved}))
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "--nbval", "-v", "--tb=no", "-p", "no:cacheprovider"]
    sanitize = f"--nbval-sanitize-with={ROOT / 'tests' / 'nbval_sanitize.cfg'}"
    paths = os.pathsep.join([str(ROOT / "book" / "_tools"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, sanitize, *options, str(path)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    seen = re.findall(r"::Cell (\d+) (PASSED|FAILED)", done.stdout)
    assert len(seen) == len(CELLS), done.stdout + done.stderr
    return dict(zip(CELLS, (verdict == "PASSED" for _, verdict in seen), strict=True))


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> dict[str, bool]:
    return verdicts(tmp_path_factory.mktemp("on"), "-p", "notebook_numbers")


@pytest.mark.parametrize("case", CELLS)
def test_a_cell_is_judged_by_what_it_says(judged, case):
    assert judged[case] == CELLS[case][3]


def test_without_the_plugin_every_digit_counts(tmp_path):
    plain = verdicts(tmp_path)
    assert [case for case in CELLS if plain[case]] == ["the same", "a picture of text"]


# --- the rule


def test_numbers_are_found_as_they_are_printed():
    text = "conv2d 1,797 -0.5 PGD-10 [.25, +3e-05] 8/255 0.1-0.2 −7 x1 12% 1.2 (-4)"
    assert numbers(text) == [
        "1,797", "-0.5", "10", ".25", "+3e-05", "8", "255", "0.1", "0.2", "−7", "12", "1.2", "-4",
    ]  # fmt: skip
    assert words("a  0.5 b\t-3") == "a # b #"
    assert number("−1,234.50") == (-1234.5, 0.01)
    assert number("2.50e-03") == (0.0025, pytest.approx(1e-5))
    assert number("17") == (17.0, 1.0)


two_digits = st.integers(-999, 999).map(lambda n: n / 100)


@given(two_digits, st.integers(-400, 400), st.integers(0, 40))
def test_a_number_agrees_if_and_only_if_it_lies_within_twice_its_spread(value, steps, spread_):
    """In hundredths, so that the rule is whole numbers: |new - stored| <= max(2 spread, 1)."""
    new = f"{value + steps / 100:.2f}"
    assert close(new, f"{value:.2f}", spread_ / 100) == (abs(steps) <= max(2 * spread_, 1))


@given(st.lists(two_digits, min_size=1, max_size=6), st.data())
def test_a_number_without_a_spread_is_exact(values, data):
    stored = " and ".join(f"{v:.2f}" for v in values)
    place = data.draw(st.integers(0, len(values) - 1))
    new = " and ".join(f"{v + 0.01 * (i == place):.2f}" for i, v in enumerate(values))
    others = {i: 9.0 for i in range(len(values)) if i != place}
    assert agree(stored, stored, {})
    assert not agree(new, stored, others)
    assert agree(new, stored, {place: 0.0})


# --- the spreads


def test_a_number_moves_where_a_line_changed():
    stored = "eps 0.1: 0.76\nmean 0.50 of 12"
    assert list(spread.changed(stored, stored)) == []
    assert list(spread.changed("eps 0.1: 0.77\nmean 0.50 of 12", stored)) == [1]
    assert list(spread.changed("eps 0.1: broke\nmean 0.51 of 12", stored)) == [0, 1, 2]


def test_an_assertion_that_nearly_failed_is_told():
    held = {
        "avx2": {"3: a < b": 0.08, "4: c > 0": 0.5},
        "oldest": {"3: a < b": 0.01, "4: c > 0": 0.2},
    }
    (told,) = spread.near_misses(held)
    assert "3: a < b" in told and "oldest 0.01" in told


def test_what_a_notebook_measures_of_itself(tmp_path, monkeypatch):
    """A toy notebook: what training makes moves, what is counted does not, and room is read off."""
    monkeypatch.setattr(refresh, "BOOK", tmp_path)
    training = (
        "import torch\ntorch.manual_seed(0)\nw = torch.nn.Parameter(torch.rand(4))\n"
        "adapt = torch.optim.SGD([w], lr=.1)\nfor _ in range(9):\n    adapt.zero_grad()\n"
        "    (w.sin().sum()).backward()\n    adapt.step()\nprint(f'{w.sum():.6f} of {len(w)}')"
    )
    check = "assert 0 < len(w) < 6 and not len(w) < 2, 'four'\nassert w.sum() < 100"
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, (training, check))])
    ((plain,), _), held = spread.executed(notebook, spread.Run())
    ((moved,), _), _ = spread.executed(notebook, spread.DISTURBED["disturbed"])
    assert list(spread.changed(moved, plain)) == [0]
    assert held["2: 0 < len(w) < 6"] == 2
    assert 100 < held["2: w.sum() < 100"] < 108  # no weight falls below -2
    assert len(held) == 2


def test_another_processor_widens_a_record_and_narrows_none(tmp_path, monkeypatch):
    """The cell prints .5 here; .52 and .7 are on record, with spreads of .01 and .3."""
    monkeypatch.setattr(refresh, "BOOK", tmp_path)
    source = "print(f'{.5:.2f} and {.5:.2f} of 3')"
    cell = nbformat.v4.new_code_cell(source, outputs=outputs(source, "0.52 and 0.70 of 3\n"))
    path = tmp_path / "some.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    kept = {"runs": [], "cells": {cell["id"]: {"numbers": 3, "moves": {"0": 0.01, "1": 0.3}}}}
    notebook_numbers.record(path).write_text(spread.as_text(kept))
    found = spread.measure(path.with_suffix(".md"), widen=["native"])
    notebook_numbers.spreads.cache_clear()
    assert found.faults == []
    assert notebook_numbers.spreads(path) == {cell["id"]: {0: 0.02, 1: 0.3}}


@each_notebook
def test_every_cell_was_measured(twin):
    assert not spread.is_stale(twin), f"{twin.stem}: run make spread"


@each_notebook
def test_what_is_on_record_fits_the_notebook(twin):
    """The places exist, and a number is as wide on record as it may differ, not wider than it is large."""
    path = twin.with_suffix(".ipynb")
    cells = {c["id"]: c for c in refresh.code_cells(nbformat.read(path, as_version=4))}
    for name, moved in notebook_numbers.spreads(path).items():
        printed = [n for text in spread.printed(cells[name]) for n in numbers(text)]
        assert all(0 <= i < len(printed) and width >= 0 for i, width in moved.items())


def test_an_arithmetic_is_chosen_by_name(monkeypatch):
    monkeypatch.setattr(arithmetic.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("ROBUSTOOD_ISA", raising=False)
    assert arithmetic.environment() == arithmetic.environment("avx2")
    monkeypatch.setenv("ROBUSTOOD_ISA", "oldest")
    assert arithmetic.environment()["ONEDNN_MAX_CPU_ISA"] == "SSE41"
    assert arithmetic.environment("native") == arithmetic.THREADS
    with pytest.raises(
        ValueError, match=r"ROBUSTOOD_ISA must be one of avx2, oldest, native, got 'sse'"
    ):
        arithmetic.environment("sse")
    monkeypatch.setattr(arithmetic.platform, "machine", lambda: "arm64")
    assert arithmetic.environment("oldest") == arithmetic.THREADS


def test_a_record_of_other_numbers_is_stale(tmp_path):
    """A cell that prints one number more has its others in other places."""
    twin = tmp_path / "some.md"
    cell = nbformat.v4.new_code_cell("f()", outputs=outputs("f()", "1 and 0.5"), execution_count=1)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, twin.with_suffix(".ipynb"))
    assert spread.is_stale(twin)
    kept = {"runs": [], "cells": {cell["id"]: {"numbers": 2, "moves": {"1": 0.1}}}}
    notebook_numbers.record(twin.with_suffix(".ipynb")).write_text(spread.as_text(kept))
    assert not spread.is_stale(twin)
    cell.outputs = outputs("f()", "0 of 1 and 0.5")
    nbformat.write(notebook, twin.with_suffix(".ipynb"))
    assert spread.is_stale(twin)
