"""Update the notebooks from their text twins, and execute them with the current library.

    python book/_tools/refresh.py               all notebooks
    python book/_tools/refresh.py toy attacks   only these
    python book/_tools/refresh.py --stale       those whose code or modules changed
    python book/_tools/refresh.py --tables      only the chapter tables of README.md and book/intro.md

The text twin ``book/NN_slug.md`` is the source. Its code cells are formatted, and all cells are copied into
``book/NN_slug.ipynb``, which is executed on one thread in the arithmetic that the tests expect, and saved with its
outputs. The metadata contain a hash of the code cells and of the library modules they import, so that a test can detect
stale outputs without executing anything.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jupytext
import nbformat
import yaml
from arithmetic import environment
from jupytext.combine import combine_inputs_with_outputs

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
PACKAGE = ROOT / "robustood"
PICTURE = BOOK / "_static" / "break_and_repair.png"  # shown at the top of README.md
WELCOME = BOOK / "welcome.html"  # the interactive figure of the same page, shown on the first page
CELL_LIMIT_S = 600
TABLE = re.compile(r"(<!-- chapters -->\n).*?(<!-- end of chapters -->)", re.DOTALL)


def twins() -> list[Path]:
    """The text twins of all notebooks, in the order of the book."""
    return sorted(p for p in BOOK.glob("*.md") if "jupytext:" in p.read_text("utf-8")[:400])


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sources(module: str) -> list[Path]:
    """The files of a module or subpackage of the library; empty if there is none."""
    if (PACKAGE / module).is_dir():
        return sorted((PACKAGE / module).glob("*.py"))  # __init__ comes first
    return [path for path in [PACKAGE / f"{module}.py"] if path.exists()]


def imports(module: str) -> set[str]:
    """The other modules of the library that a module imports."""
    found = [imported(path.read_text("utf-8")) for path in sources(module)]
    return set().union(*found) - {module}


def imported(source: str) -> set[str]:
    """The modules of the library that some Python source imports by name.

    Lines with IPython commands, such as ``%pip``, are removed first.
    """
    plain = re.sub(
        r"^\s*[%!].*$",
        lambda line: line[0][: -len(line[0].lstrip())] + "pass",
        source,
        flags=re.MULTILINE,
    )
    found: set[str] = set()
    for node in ast.walk(ast.parse(plain)):
        if isinstance(node, ast.ImportFrom) and node.module == "robustood":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robustood."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {part[1] for part in parts if part[0] == "robustood" and len(part) > 1}
    return {name for name in found if sources(name)}


def closure(modules: set[str]) -> set[str]:
    """These modules and all modules of the library that they import, directly or not."""
    known: set[str] = set()
    todo = set(modules)
    while todo:
        name = todo.pop()
        known.add(name)
        todo |= imports(name) - known
    return known


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of everything that the outputs depend on: code cells, their tags, and the library modules they use."""
    cells = code_cells(notebook)
    modules = closure(set().union(*[imported(cell.source) for cell in cells]) if cells else set())
    digest = hashlib.sha256()
    for cell in cells:
        digest.update(f"{sorted(tags(cell))}\n{cell.source.strip()}\n".encode())
    for name in sorted(modules):
        text = "".join(path.read_text("utf-8") for path in sources(name))
        digest.update(f"# {name}\n{text}".encode())
    return digest.hexdigest()


def stored_hash(notebook: nbformat.NotebookNode) -> str | None:
    return notebook.metadata.get("robustood", {}).get("hash")


def merged(twin: Path) -> nbformat.NotebookNode:
    """The cells of the twin, with the outputs that the notebook has for equal cells."""
    source = jupytext.read(twin, fmt="md:myst")
    path = twin.with_suffix(".ipynb")
    if path.exists():
        old = nbformat.read(path, as_version=4)
        hash_ = stored_hash(old)
        source = combine_inputs_with_outputs(source, old, fmt="md:myst")
        if hash_:
            source.metadata["robustood"] = {"hash": hash_}
    return source


def execute(notebook: nbformat.NotebookNode, folder: Path = BOOK, **variables: str) -> None:
    """Execute all cells except those tagged "live", whose widgets need a running kernel.

    Args:
        notebook: its outputs are replaced.
        folder: in which the kernel starts.
        variables: of its environment, besides those of this process.
    """
    from nbclient import NotebookClient

    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=CELL_LIMIT_S,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        skip_cells_with_tag="live",
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute(env={**os.environ, **environment("avx2"), **variables})


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Remove everything that differs between runs or machines."""
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        seen[cell.source] = seen.get(cell.source, 0) + 1
        cell["id"] = hashlib.sha256(f"{cell.source}{seen[cell.source]}".encode()).hexdigest()[:8]
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code" and "live" in tags(cell):
            cell.outputs, cell.execution_count = [], None
        for output in cell.get("outputs", []):
            if "data" in output:
                output.data.pop("application/vnd.jupyter.widget-view+json", None)
    meta = notebook.metadata
    meta.pop("widgets", None)
    meta["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    meta["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    meta["jupytext"] = {"formats": "ipynb,md:myst"}
    meta["robustood"] = {"hash": fingerprint(notebook)}
    notebook.nbformat, notebook.nbformat_minor = 4, 5


def tidy(twin: Path) -> None:
    """Format the code cells of a text twin in place, except those with IPython commands."""
    text = twin.read_text("utf-8")
    for cell in code_cells(jupytext.reads(text, fmt="md:myst")):
        if re.search(r"^\s*[%!]", cell.source, re.MULTILINE):
            continue
        command = [sys.executable, "-m", "ruff", "format", "-q", "--stdin-filename", "cell.py", "-"]
        done = subprocess.run(command, input=cell.source, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{twin.name}: cannot format a cell: {done.stderr}\n{cell.source}")
        text = text.replace(cell.source, done.stdout.rstrip("\n"), 1)
    if text != twin.read_text("utf-8"):
        twin.write_text(text, encoding="utf-8")


def refresh(twin: Path, *, only_stale: bool = False) -> bool:
    """Update one notebook; True if it was executed. If only the prose changed, the outputs are kept."""
    tidy(twin)
    notebook = merged(twin)
    path = twin.with_suffix(".ipynb")
    run = not only_stale or stored_hash(notebook) != fingerprint(notebook)
    if run:
        began = time.perf_counter()
        execute(notebook)
        print(f"{twin.stem}: executed in {time.perf_counter() - began:.1f} s", flush=True)
    normalise(notebook)
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    if str(ROOT) in text or str(Path.home()) + "/" in text:
        raise ValueError(f"{path.name}: an output has a path of this machine; do not print paths")
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return run


def last_output(notebook: nbformat.NotebookNode, kind: str) -> str:
    """The last output of a kind, such as ``image/png``, in a notebook."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [o.data[kind] for o in outputs if kind in o.get("data", {})][-1]


def address() -> str:
    """The address of the repository, from ``_config.yml``."""
    return yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["url"]


def badge(stem: str) -> str:
    """A Colab badge for a notebook."""
    path = address().removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{path}/blob/main/book/{stem}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


def facts(twin: Path) -> dict[str, str]:
    """What the chapter tables say about a chapter, read from its opening."""
    text = twin.read_text("utf-8")
    number, slug = twin.stem.split("_", 1)
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    question = re.search(r"\{admonition\} The question\n(?::\w+:.*\n)*\s*([^?]+\?)", text)
    times = re.search(r"\*\*Time:\*\* about (\d+) s of CPU, (\d+) minutes of reading", text)
    goal = re.search(r"You will be able to\n(?::\w+:.*\n)*\s*- ((?:.+\n)(?:  .+\n)*)", text)
    found = {"title": title, "question": question, "time": times, "goal": goal}
    missing = [name for name, match in found.items() if match is None]
    if missing or not (title and question and times and goal):
        raise ValueError(f"{twin.name}: no {', '.join(missing)} found")
    opening = text[text.index("**Before you start:**") : times.start()]
    earlier = sorted(
        set(map(int, re.findall(r"\{doc\}`(\d\d)_", opening))) & set(range(int(number)))
    )
    return {
        "number": str(int(number)),
        "slug": slug,
        "title": title[1].strip(),
        "question": " ".join(question[1].split()),
        "goal": " ".join(goal[1].split()).rstrip(";."),
        "seconds": times[1],
        "minutes": times[2],
        "after": ", ".join(map(str, earlier)),
    }


def chapter_tables() -> dict[Path, str]:
    """The texts of README.md and book/intro.md with updated chapter tables."""
    rows = [(twin, facts(twin)) for twin in twins() if twin.stem[:2].isdigit()]
    readme = ["| chapter | question | module | CPU time | |", "|---|---|---|---|---|"]
    intro = [
        "| chapter | question | afterwards you can | minutes | builds on |",
        "|---|---|---|---|---|",
    ]
    for twin, fact in rows:
        slug, stem = fact["slug"], twin.stem
        name = f"{fact['number']}. {fact['title']}"
        code = slug if (PACKAGE / slug).is_dir() else f"{slug}.py"
        readme.append(
            f"| [{name}](book/{stem}.ipynb) | {fact['question']} "
            f"| [`{slug}`](robustood/{code}) | {fact['seconds']} s | {badge(stem)} |"
        )
        intro.append(
            f"| {{doc}}`{name} <{stem}>` | {fact['question']} | {fact['goal']} "
            f"| {fact['minutes']} | {fact['after'] or '–'} |"
        )
    pages = {ROOT / "README.md": readme, BOOK / "intro.md": intro}
    return {
        page: TABLE.sub(
            lambda m, t=table: m[1] + "\n".join(t) + "\n" + m[2], page.read_text("utf-8")
        )
        for page, table in pages.items()
    }


def chosen(names: Sequence[str], refuse: Callable[[str], object]) -> list[Path]:
    """The twins with these slugs in the order of the book; all of them if none is named."""
    if not names:
        return twins()
    slug = lambda stem: re.sub(r"^\d+_", "", stem)
    wanted = {slug(Path(name).stem) for name in names}
    known = {slug(twin.stem): twin for twin in twins()}
    if unknown := wanted - known.keys():
        refuse(f"no notebook called {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return [twin for slug, twin in known.items() if slug in wanted]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="slugs such as toy (default: all)")
    parser.add_argument("--stale", action="store_true", help="execute only changed notebooks")
    parser.add_argument("--tables", action="store_true", help="rewrite only the chapter tables")
    args = parser.parse_args()
    selected = chosen(args.names, parser.error)
    if not args.tables:
        for twin in selected:
            if not refresh(twin, only_stale=args.stale):
                print(f"{twin.stem}: outputs are current")
        opening = nbformat.read(BOOK / "break_and_repair.ipynb", as_version=4)
        PICTURE.write_bytes(base64.b64decode(last_output(opening, "image/png")))
        WELCOME.write_text(last_output(opening, "text/html") + "\n", encoding="utf-8")
    for page, text in chapter_tables().items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
