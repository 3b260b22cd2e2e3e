"""The book: pairs of text and notebook, what a chapter must have, and links that lead somewhere."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
import refresh
import robustood_book
import yaml
from jaxtyping import Int
from torch import Tensor

from robustood.metrics import Estimate

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
TWINS = refresh.twins()
CHAPTERS = [twin for twin in TWINS if twin.stem[:2].isdigit()]
PAGES = [*sorted(BOOK.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
MAX_NOTEBOOK_BYTES = int(2.5 * 2**20)
COLAB_CELL = """import importlib.util

if importlib.util.find_spec("robustood") is None:
    %pip install -q "robustood @ git+{address}"
"""
GRADES = ("★", "★★", "★★★")
HIDDEN = {"hide-input", "hide-cell", "remove-cell", "exercise", "check", "solution"}

each_notebook = pytest.mark.parametrize("twin", TWINS, ids=lambda p: p.stem)
each_chapter = pytest.mark.parametrize("twin", CHAPTERS, ids=lambda p: p.stem)


def notebook(twin: Path) -> nbformat.NotebookNode:
    path = twin.with_suffix(".ipynb")
    assert path.exists(), f"{path.name} is missing: run python book/_tools/refresh.py {twin.stem}"
    return nbformat.read(path, as_version=4)


def tagged(cells: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in cells.cells if tag in refresh.tags(cell)]


def squeeze(source: str) -> str:
    """A cell without its blank lines and trailing blanks."""
    return "\n".join(line.rstrip() for line in source.splitlines() if line.strip())


def prose(twin: Path) -> str:
    """The text of a chapter as its Markdown cells hold it."""
    return "\n\n".join(c.source for c in notebook(twin).cells if c.cell_type == "markdown")


def test_every_notebook_has_a_text_twin():
    alone = [p.name for p in BOOK.glob("*.ipynb") if not p.with_suffix(".md").exists()]
    assert not alone, f"notebooks without a text twin: {alone}"


@each_notebook
def test_the_pair_says_the_same(twin):
    text, stored = jupytext.read(twin, fmt="md:myst"), notebook(twin)
    advice = f"{twin.stem}: text and notebook differ; run python book/_tools/refresh.py {twin.stem}"
    assert len(text.cells) == len(stored.cells), advice
    for number, (a, b) in enumerate(zip(text.cells, stored.cells, strict=True)):
        where = f"{advice} (cell {number})"
        assert a.cell_type == b.cell_type, where
        assert a.source.strip() == b.source.strip(), where
        assert refresh.tags(a) == refresh.tags(b), where
        assert a.metadata.get("mystnb") == b.metadata.get("mystnb"), where


@each_notebook
def test_the_outputs_are_not_stale(twin):
    stored = notebook(twin)
    assert refresh.stored_hash(stored) == refresh.fingerprint(stored), (
        f"{twin.stem}: its code or a module it imports changed after it was executed; "
        "run make notebooks"
    )


@each_notebook
def test_outputs_are_complete_small_and_neutral(twin):
    stored = notebook(twin)
    size = twin.with_suffix(".ipynb").stat().st_size
    assert size <= MAX_NOTEBOOK_BYTES, f"{twin.stem}.ipynb has {size} bytes, at most 2.5 MB"
    assert "widgets" not in stored.metadata, f"{twin.stem}: stored widget state"
    for cell in refresh.code_cells(stored):
        live = "live" in refresh.tags(cell)
        assert live or cell.execution_count is not None, f"{twin.stem}: not run: {cell.source[:60]}"
        for output in cell.outputs:
            assert output.output_type != "error", f"{twin.stem}: a stored error: {cell.source[:60]}"
            noisy = output.output_type == "stream" and output.name == "stderr"
            assert not noisy, f"{twin.stem}: a cell writes to stderr: {output.text[:200]}"


@each_notebook
def test_pictures_have_alternative_text(twin):
    for cell in refresh.code_cells(notebook(twin)):
        if not any("image/png" in output.get("data", {}) for output in cell.outputs):
            continue
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(alt.split()) >= 5, f"{twin.stem}: a picture without alt text: {cell.source[:80]}"


@each_notebook
def test_the_colab_cell_installs_from_the_repository(twin):
    wanted = squeeze(COLAB_CELL.format(address=refresh.address()))
    hidden = [squeeze(cell.source) for cell in tagged(notebook(twin), "remove-cell")]
    assert wanted in hidden, f"{twin.stem}: no cell tagged remove-cell that reads\n{wanted}"


@each_chapter
def test_a_chapter_opens_as_every_chapter_does(twin):
    stored = notebook(twin)
    text = prose(twin)
    assert stored.cells[0].source.startswith("# "), f"{twin.stem}: the first cell is no title"
    order = [
        "# ",
        "{admonition} The question",
        "{admonition} You will be able to",
        "**Before you start:**",
        "**Time:**",
    ]
    places = [text.find(part) for part in order]
    missing = [part for part, place in zip(order, places, strict=True) if place < 0]
    assert not missing, f"{twin.stem}: missing {missing}"
    assert places == sorted(places), f"{twin.stem}: the opening parts come in the order {order}"
    box = text[places[2] : places[3]]
    goals = re.findall(r"^\s*(?:[-*]|\d+\.) ", box, flags=re.MULTILINE)
    assert len(goals) == 3, f"{twin.stem}: three objectives, not {len(goals)}"
    hidden = {"hide-cell", "remove-cell"}
    first = [cell for cell in refresh.code_cells(stored) if not hidden & set(refresh.tags(cell))][
        :3
    ]
    shown = any("image/png" in out.get("data", {}) for cell in first for out in cell.outputs)
    assert shown, f"{twin.stem}: no picture among the outputs of the first three cells of a page"


@each_chapter
def test_a_chapter_has_its_parts(twin):
    text = prose(twin)
    slug = twin.stem.split("_", 1)[1]
    parts = {
        "a predict box": r"\{admonition\} Predict before you read on",
        "a theorem block": r"\{prf:(theorem|proposition|lemma|definition|algorithm)\}",
        "what goes wrong in practice": r"^## What goes wrong in practice",
        "what to do": r"^## What to do",
        "a quiz": r"^## Check yourself",
        "common wrong beliefs": r"(^## Common wrong beliefs|\{admonition\} Common wrong beliefs)",
        "exercises": r"^## Exercises",
        "a take-away": r"(^## Take-away|\{admonition\} Take-away)",
        "further reading": r"^## Further reading",
        "read the code": r"^## Read the code",
        "a link to its module": rf"\{{doc\}}`[^`]*api/{slug}>?`",
        "a citation": r"\{cite:[pt]\}`",
    }
    missing = [part for part, rule in parts.items() if not re.search(rule, text, re.MULTILINE)]
    assert not missing, f"{twin.stem}: no {', no '.join(missing)}"


def section(text: str, title: str) -> str:
    """A part of a chapter, from its heading to the next one of the same level."""
    return re.split(r"^## ", text.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


@each_chapter
def test_the_argument_comes_before_the_code(twin):
    """At most a quarter of the lines are visible code, and what a page asserts stands apart from what it prints."""
    stored, visible = notebook(twin), 0
    for cell in refresh.code_cells(stored):
        tags = set(refresh.tags(cell))
        visible += 0 if tags & HIDDEN else len(cell.source.splitlines())
        asserts = re.search(r"^assert ", cell.source, re.MULTILINE)
        if asserts and not tags & {"hide-cell", "remove-cell", "solution"}:
            pytest.fail(f"{twin.stem}: an assertion outside a hide-cell: {asserts.string[:80]}")
    lines = twin.read_text("utf-8").count("\n")
    assert visible <= lines / 4, f"{twin.stem}: {visible} of {lines} lines are visible code"


@each_chapter
def test_a_chapter_ends_with_advice_and_few_slips(twin):
    text = prose(twin)
    advice = re.findall(r"^(?:\d+\.|-) ", section(text, "What to do"), re.MULTILINE)
    assert 5 <= len(advice) <= 8, (
        f"{twin.stem}: what to do in five to eight lines, not {len(advice)}"
    )
    slips = re.findall(r"^### ", section(text, "What goes wrong in practice"), re.MULTILINE)
    assert len(slips) <= 5, f"{twin.stem}: at most five slips, not {len(slips)}"


def test_no_directive_is_read_as_text():
    """CommonMark takes a line of backticks for a paragraph if another backtick follows."""
    spoiled = re.compile(r"^ *`{3,}(?!`)[^`\n]*`.*$", re.MULTILINE)
    assert spoiled.search("```{quiz} Is `x` in the set?")
    pages = ROOT.glob("book/**/*.md")
    assert not {path.name: found for path in pages if (found := spoiled.findall(path.read_text()))}


@each_chapter
def test_a_chapter_asks_three_questions(twin):
    """The build checks that a quiz is well formed (``robustood_quiz``)."""
    found = re.findall(r"^```\{quiz\} (.+)\n((?:.+\n)+?)```", prose(twin), re.MULTILINE)
    assert len(found) == 3, f"{twin.stem}: three questions, not {len(found)}"
    rights = []
    for question, body in found:
        answers = yaml.safe_load(body)
        assert 3 <= len(answers) <= 4, f"{twin.stem}: {question}"
        assert all(len(each["why"].split()) >= 8 for each in answers), f"{twin.stem}: {question}"
        rights.append([each.get("right", False) for each in answers].index(True))
    assert len(set(rights)) > 1, f"{twin.stem}: the right answer is always at the same place"


@each_chapter
def test_a_chapter_has_an_interactive_figure_for_both_readers(twin):
    stored = notebook(twin)
    still, live = tagged(stored, "explore"), tagged(stored, "live")
    assert still, f"{twin.stem}: no cell tagged explore, the figure of the static page"
    assert live, f"{twin.stem}: no cell tagged live, the figure of a running kernel"
    for cell in still:
        assert "nbval-ignore-output" in refresh.tags(cell), f"{twin.stem}: explore: tags"
        html = any("text/html" in output.get("data", {}) for output in cell.outputs)
        assert html, f"{twin.stem}: the explore cell stores no HTML"
    for cell in live:
        wanted = {"nbval-ignore-output", "remove-output"}
        assert wanted <= set(refresh.tags(cell)), f"{twin.stem}: a live cell needs tags {wanted}"
        assert not cell.outputs, f"{twin.stem}: a live cell keeps no output"


def exercises(twin: Path) -> list[dict]:
    """Each exercise: title, label, its code cells, and whether a solution follows."""
    found: list[dict] = []
    for cell in notebook(twin).cells:
        if start := re.search(r"\{exercise-start\} (.+)\n:label: (\S+)", cell.source):
            found.append({"title": start[1], "label": start[2], "cells": {}, "solved": None})
        if solution := re.search(
            r"\{solution-start\} (\S+)\n(?:.*\n)*?:class: dropdown", cell.source
        ):
            assert found, f"{twin.stem}: a solution before any exercise"
            found[-1]["solved"] = solution[1]
        for tag in {"exercise", "check", "solution"} & set(refresh.tags(cell)):
            assert found, f"{twin.stem}: a cell tagged {tag} before any exercise"
            found[-1]["cells"][tag] = cell
    return found


@each_chapter
def test_exercises_follow_one_pattern(twin):
    found = exercises(twin)
    grades = [each["title"].split()[0] for each in found]
    missing = [grade for grade in GRADES if grade not in grades]
    assert not missing, f"{twin.stem}: no exercise of grade {missing}"
    assert len(found) == 5, f"{twin.stem}: five exercises, not {len(found)}"
    assert grades == sorted(grades), f"{twin.stem}: from easy to hard, not {grades}"
    text = prose(twin)
    for mark in ("exercise-end", "solution-end"):
        assert text.count(f"{{{mark}}}") == len(found), f"{twin.stem}: {mark} is not there for each"
    for each in found:
        where = f"{twin.stem}, {each['label']}"
        assert each["label"].startswith("ex-"), f"{where}: labels begin with ex-"
        assert each["solved"] == each["label"], f"{where}: no dropdown solution with its label"
        cells = each["cells"]
        assert set(cells) == {"exercise", "check", "solution"}, f"{where}: cells {sorted(cells)}"
        assert "raise NotImplementedError" in cells["exercise"].source, f"{where}: nothing to do"
        assert "attempt(" in cells["check"].source, f"{where}: the check does not call attempt"
        printed = "".join(out.get("text", "") for out in cells["check"].outputs)
        assert "not solved yet" in printed, f"{where}: the check must print that it is open"
        checker = re.search(r"def (check_\w+)", cells["check"].source)
        assert checker, f"{where}: no check_ function"
        assert f"{checker[1]}(" in cells["solution"].source, f"{where}: its solution is not checked"


@each_chapter
def test_the_page_of_a_module_links_to_its_chapter(twin):
    page = BOOK / "api" / f"{twin.stem.split('_', 1)[1]}.rst"
    assert f":doc:`/book/{twin.stem}`" in page.read_text("utf-8")


def test_every_row_about_the_papers_is_answered():
    """A row leads to a chapter, an appendix or a kept result, or it says what is missing."""
    rows = re.findall(
        r"^\| (?!question|---)(.+) \|$", (BOOK / "papers.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) > 50
    for row in rows:
        assert row.count("|") == 3, f"papers.md: four columns, not {row}"
        status = row.rsplit("|", 1)[1].strip()
        answered = "{doc}" in status or re.search(r"not yet: .+", status)
        assert answered, f"papers.md: no answer in {row}"


def test_the_table_of_contents_is_complete():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    chapters = [entry for part in toc["parts"] for entry in part["chapters"]]
    entries = chapters + [inner for entry in chapters for inner in entry.get("sections", [])]
    listed = {toc["root"], *[entry["file"] for entry in entries if "file" in entry]}
    missing = [f for f in listed if not list(ROOT.glob(f"{f}.md")) + list(ROOT.glob(f"{f}.ipynb"))]
    assert not missing, f"_toc.yml names what is not there: {missing}"
    forgotten = [page.stem for page in BOOK.glob("*.md") if f"book/{page.stem}" not in listed]
    assert not forgotten, f"_toc.yml forgets {forgotten}"
    order = [e["file"] for e in entries if re.match(r"book/\d", e.get("file", ""))]
    assert order == sorted(order), f"chapters out of order in _toc.yml: {order}"


def test_the_page_on_other_libraries_names_every_comparison_and_the_versions_compared():
    page = (BOOK / "oracles.md").read_text("utf-8")
    named = {}
    for part in page.split("\n## ")[1:]:
        named[re.search(r"tests/oracles/(\w+)\.py", part)[1]] = set(
            re.findall(r"`(test_\w+)`", part)
        )
    for path in (ROOT / "tests" / "oracles").glob("test_*.py"):
        written = set(re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE))
        assert named.pop(path.stem) == written, path.name
    assert not named
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for library, version in re.findall(r"^## ([\w-]+) ([\d.]+)$", page, re.MULTILINE):
        assert f" {library}=={version}" in makefile


def test_every_style_sheet_is_linked():
    """A sheet in a static folder is copied; only one that the settings name is also used."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["sphinx"]["config"]
    (folder,) = config["html_static_path"]
    sheets = sorted(p.name for p in (ROOT / folder).glob("*.css"))
    assert config["html_css_files"] == sheets and sheets


def test_the_chapter_tables_are_current():
    for page, text in refresh.chapter_tables().items():
        assert page.read_text("utf-8") == text, (
            f"{page.name}: its chapter table is old; run python book/_tools/refresh.py --tables"
        )


def test_citations_and_terms_exist():
    keys = set(re.findall(r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text("utf-8"), re.M))
    glossary = (BOOK / "glossary.md").read_text("utf-8")
    terms = {line.strip().lower() for line in glossary.splitlines() if line.strip()}
    for page in PAGES:
        text = page.read_text("utf-8")
        for group in re.findall(r"\{cite:\w+\}`([^`]+)`", text):
            unknown = [key for key in map(str.strip, group.split(",")) if key not in keys]
            assert not unknown, f"{page.name}: no entry in references.bib for {unknown}"
        for term in re.findall(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`", text):
            assert term.lower() in terms, f"{page.name}: {term!r} is not in the glossary"


def test_bibliography_entries_are_traceable():
    for entry in (BOOK / "references.bib").read_text("utf-8").split("\n@"):
        key = entry.split("{", 1)[1].split(",", 1)[0]
        for field in ("author", "title", "year"):
            assert re.search(rf"^\s+{field}\s+= \{{.+\}}", entry, re.M), f"{key}: no {field}"
        assert re.search(r"^\s+(doi|eprint)\s+= ", entry, re.M), f"{key}: neither DOI nor arXiv id"


def test_internal_links_lead_to_files():
    for page in PAGES:
        text = page.read_text("utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in link and not link.startswith("mailto:"):
                assert (page.parent / link).exists(), f"{page.name}: a dead link to {link}"
        for doc in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", text):
            target = page.parent / doc
            if doc.startswith("api/"):
                module = doc.removeprefix("api/")
                assert refresh.sources(module), f"{page.name}: no module {doc}"
            else:
                there = any(target.with_suffix(end).exists() for end in (".md", ".ipynb"))
                assert there, f"{page.name}: a dead reference to {doc}"


def test_each_signature_on_the_pages_reads_as_python():
    """What Sphinx cannot read as Python it prints as it stands, without links."""
    read = 0
    for page in (BOOK / "api").glob("*.rst"):
        module = importlib.import_module(f"robustood.{page.stem}")
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.isfunction(value) and not inspect.isclass(value):
                continue
            kind = "class" if inspect.isclass(value) else "function"
            found = robustood_book.write_signature(None, kind, name, value, None, "", "")
            if found and found[0]:
                ast.parse(f"def f{found[0]}: ...")
                assert "e+308" not in found[0] and "qualname" not in found[0], name
                read += 1
    assert read > 200


def test_docstrings_may_hold_formulas_between_dollar_signs():
    lines = ["A ball, $|z| \\le r$.", "", "    $$a", "    + b.$$"]
    robustood_book.read_formulas(None, "function", "f", None, None, lines)
    text = "\n".join(lines)
    assert r"\ :math:`|z| \le r`\ ." in text
    assert "\n    .. math:: a + b.\n" in text


def test_signatures_show_shapes_and_link_our_own_classes():
    scope = {"Labels": Int[Tensor, " batch"], "Estimate": Estimate}
    shape = robustood_book.as_written("Labels | None", scope)
    assert shape == "~jaxtyping.Int[Tensor, 'batch'] | None"
    assert robustood_book.as_written("Estimate", scope) == "~robustood.metrics.Estimate"
    for plain in ("torch.Tensor", "Sequence[Callable]", "Float[Tensor, 'batch']"):
        assert robustood_book.as_written(plain, scope) == plain


def test_imports_are_followed_inside_the_package():
    assert refresh.imported("%pip install x\nfrom robustood import attacks, nothing") == {"attacks"}
    assert {"attacks", "inputs"} <= refresh.closure({"attacks"})
