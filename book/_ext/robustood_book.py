"""What the book needs of Sphinx beyond its theme: the library's pages, and one repair.

The pages of the library, one for each module, are made from the source text before each build, so that
they cannot be out of date. The source is parsed, not imported: a signature reads as it was written, with
its tensor shapes. Docstrings are Markdown with ``$formulas$`` and Google sections (Args, Returns, ...).
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {"Args", "Arguments", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples"}
RULE = re.compile(r"^=+( +=+)+\s*$")
ENTRY = re.compile(r"^([*\w][\w*, .()]*?):\s+(.*)$")


def sections(doc: str) -> list[tuple[str, list[str]]]:
    """Split a docstring into (heading, lines); the text before the first heading has none."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in doc.splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            found.append((line.rstrip(":"), []))
        elif found[-1][0] and line and not line.startswith(" "):
            found.append(("", [line]))
        else:
            found[-1][1].append(line)
    return found


def entries(lines: list[str]) -> list[tuple[str, str]]:
    """The ``name: text`` items of a section; text that goes on is indented further than its name."""
    rows = [row for row in lines if row.strip()]
    margin = min((len(row) - len(row.lstrip()) for row in rows), default=0)
    items: list[tuple[str, str]] = []
    for row in rows:
        text = row[margin:]
        match = None if text.startswith(" ") else ENTRY.match(text)
        if match:
            items.append((match[1], match[2]))
        elif items:
            items[-1] = (items[-1][0], f"{items[-1][1]} {text.strip()}")
        else:
            items.append(("", text.strip()))
    return items


def table(rows: list[str]) -> list[str]:
    """A simple table, whose columns are ruled with ``=`` signs, as a Markdown table."""
    spans = [match.span() for match in re.finditer("=+", rows[0])]
    ends = [start for start, _ in spans[1:]] + [None]
    cells: list[list[str]] = []
    for row in rows:
        if RULE.match(row):
            continue
        parts = [row[span[0] : end].strip() for span, end in zip(spans, ends, strict=True)]
        if parts[0] or not cells:
            cells.append(parts)
        else:
            cells[-1] = [f"{a} {b}".strip() for a, b in zip(cells[-1], parts, strict=True)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(spans), *lines[1:]]


def prose(lines: list[str]) -> str:
    """Paragraphs as they are; doctests and indented blocks as code; ruled tables as tables."""
    out: list[str] = []
    fence = ""
    rules = [number for number, line in enumerate(lines) if RULE.match(line)]
    if len(rules) >= 3:
        first, last = rules[0], rules[2]
        lines = lines[:first] + table(lines[first : last + 1]) + lines[last + 1 :]
    for line in lines:
        doctest = line.lstrip().startswith((">>>", "..."))
        indented = line.startswith("    ") and (fence or not out or not out[-1].strip())
        if fence and not line.strip():
            out += ["```", ""]
            fence = ""
            continue
        if not fence and (doctest or indented):
            fence = "pycon" if doctest else "text"
            out.append(f"```{fence}")
        out.append(line)
    return "\n".join([*out, "```"] if fence else out).strip("\n")


def render_doc(doc: str | None) -> str:
    """A docstring as MyST Markdown; a role such as ``:func:`` becomes plain code."""
    parts = []
    for heading, lines in sections(re.sub(r":\w+:`~?(?=[\w.]+`)", "`", doc or "")):
        if not heading:
            parts.append(prose(lines))
        elif heading.startswith("Example"):
            parts.append(f"**{heading}**\n\n" + prose([line.strip() for line in lines]))
        else:
            rows = [f"- `{k}`: {v}" if k else f"- {v}" for k, v in entries(lines)]
            parts.append(f"**{heading}**\n\n" + "\n".join(rows))
    return "\n\n".join(part for part in parts if part.strip())


def signature(node: ast.FunctionDef, *, bound: bool = False) -> str:
    """A function's signature as it was written."""
    arguments = node.args
    if bound and arguments.args:
        arguments.args = arguments.args[1:]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(arguments)}){returns}"


def directive(kind: str, name: str, body: str, *, colons: int, options: str = "") -> str:
    fence = ":" * colons
    return f"{fence}{{py:{kind}}} {name}\n{options}\n{body}\n{fence}"


def fields(node: ast.ClassDef) -> str:
    """A dataclass's constructor, from its annotated fields; of other classes, that of ``__init__``."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            return signature(child, bound=True).removeprefix("__init__").removesuffix(" -> None")
    if not any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
        return ""
    rows = [
        f"{ast.unparse(item.target)}: {ast.unparse(item.annotation)}"
        + (f" = {ast.unparse(item.value)}" if item.value else "")
        for item in node.body
        if isinstance(item, ast.AnnAssign)
    ]
    return f"({', '.join(rows)})"


def render_class(node: ast.ClassDef) -> str:
    methods = [
        directive(
            "method",
            signature(item, bound=True),
            render_doc(ast.get_docstring(item)),
            colons=4,
        )
        for item in node.body
        if isinstance(item, ast.FunctionDef)
        and not item.name.startswith("_")
        and ast.get_docstring(item)
    ]
    body = "\n\n".join([render_doc(ast.get_docstring(node)), *methods])
    return directive("class", node.name + fields(node), body, colons=5)


def render_module(path: Path) -> str:
    """The page of one module, or of a part of the package that has several files."""
    parts = [f"# `{path.stem}`", f"```{{py:module}} robustood.{path.stem}\n```"]
    told: set[str] = set()  # two files of a package may each have a helper of one name
    for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        parts.append(render_doc(ast.get_docstring(tree)))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                parts.append(render_class(node))
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                body = render_doc(ast.get_docstring(node))
                again = ":no-index:\n" if node.name in told else ""
                parts.append(directive("function", signature(node), body, colons=5, options=again))
                told.add(node.name)
    return "\n\n".join(parts) + "\n"


def write_pages(app: Any, config: Any) -> None:
    """Write ``book/api``; runs after the table of contents was read, which knows the pages by a pattern."""
    folder = ROOT / "book" / "api"
    folder.mkdir(exist_ok=True)
    package = ROOT / "robustood"
    found = [*package.glob("*.py"), *(init.parent for init in package.glob("*/__init__.py"))]
    modules = sorted(p for p in found if not p.stem.startswith("_"))
    for old in folder.glob("*.md"):
        if old.stem not in {module.stem for module in modules}:
            old.unlink()
    for module in modules:
        page, text = folder / f"{module.stem}.md", render_module(module)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
    config.exclude_patterns[:] = [
        pattern for pattern in config.exclude_patterns if not pattern.startswith("book/api/")
    ]


def drop_repeats(app: Any, page: str, template: str, context: dict, doctree: Any) -> None:
    """Keep one of equal inline scripts: Thebe's constants are declared twice, which browsers report."""
    seen: set[str] = set()
    kept = []
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body")
        if not body or body not in seen:
            kept.append(script)
        seen.add(body or "")
    context["script_files"] = kept


def setup(app: Any) -> dict[str, bool]:
    app.connect("config-inited", write_pages, priority=1000)
    app.connect("html-page-context", drop_repeats, priority=1000)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
