"""The library's pages: one for each module, with an example, and every example does what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import robustood

PAGES = sorted((Path(__file__).parents[1] / "book" / "api").glob("*.rst"))
MODULES = [m.name for m in pkgutil.walk_packages(robustood.__path__, "robustood.")]


def test_each_module_has_a_page():
    top = {name.split(".")[1] for name in MODULES}
    assert {page.stem for page in PAGES} == {name for name in top if not name.startswith("_")}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_shows_its_module_and_an_example_that_runs(page):
    text = page.read_text("utf-8")
    assert re.search(rf"^\.\. automodule:: robustood\.{page.stem}$", text, re.M)
    found = doctest.testfile(str(page), module_relative=False)
    plt.close("all")
    assert found.attempted and not found.failed


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_the_examples_in_docstrings_run(name):
    assert not doctest.testmod(importlib.import_module(name)).failed
