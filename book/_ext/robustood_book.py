"""What the book needs of Sphinx beyond its theme and extensions: two hooks for autodoc, and one repair.

``sphinx.ext.autodoc`` makes the library's pages from its docstrings. The hooks let it read formulas between dollar
signs, and write types as the source names them.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from enum import EnumMeta

from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import stringify_annotation

from robustood.inputs import MOST

DISPLAYED = re.compile(r"^( *)\$\$(.+?)\$\$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"\$([^$]+)\$")
NAME = re.compile(r"(?<![.\w])[A-Z]\w*")


def read_formulas(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Hand ``$x$`` and ``$$x$$`` to Sphinx as its role and its directive ``math``."""

    def displayed(found: re.Match[str]) -> str:
        return f"\n{found[1]}.. math:: {' '.join(found[2].split())}\n"

    text = DISPLAYED.sub(displayed, "\n".join(lines))
    lines[:] = INLINE.sub(r"\\ :math:`\1`\\ ", text).split("\n")


def as_written(annotation: object, scope: dict[str, object]) -> object:
    """A type as its source has it, but for classes of our own, which become links, and for shapes.

    ``Estimate`` is linked, ``Labels`` becomes ``Int[Tensor, "batch"]``, ``ArrayLike`` stays as it is.
    """

    def known(found: re.Match[str]) -> str:
        kind = scope.get(found[0])
        ours = isinstance(kind, type) and kind.__module__.startswith("robustood.")
        return stringify_annotation(kind, "smart") if ours or hasattr(kind, "dim_str") else found[0]

    if not isinstance(annotation, str):
        return annotation
    return NAME.sub(known, annotation).replace("' ", "'")  # Float[Tensor, ' batch'] pleases linters


def write_signature(
    app: Sphinx,
    what: str,
    name: str,
    value: Callable[..., object],
    options: object,
    arguments: str,
    returns: str,
) -> tuple[str, str] | None:
    """Leave types unevaluated: NumPy's ``ArrayLike`` would fill three lines. Enumerations are not called."""
    if getattr(value, "_is_protocol", False) or isinstance(value, EnumMeta):
        return "", ""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):  # a property, or a class written in C
        return None
    scope = vars(sys.modules[value.__module__])
    parameters = [
        each.replace(annotation=as_written(each.annotation, scope))
        for each in found.parameters.values()
        if each.name != "self"
    ]
    result = inspect.Signature.empty if what == "class" else found.return_annotation
    written = found.replace(parameters=parameters, return_annotation=as_written(result, scope))
    call, _, result = stringify_signature(written, unqualified_typehints=True).partition(" -> ")
    # Sphinx links only what reads as Python: no made default, no function or class as it prints.
    call = call.replace("<factory>", "...").replace(repr(MOST), "MOST")
    return re.sub(r"<(?:function|class) '?([\w.]+)[^>]*>", r"\1", call), result


def drop_repeats(
    app: Sphinx, page: str, template: str, context: dict[str, list], doctree: object
) -> None:
    """Keep one of equal inline scripts: Thebe's constants are declared twice, which browsers report."""
    seen: set[str] = set()
    kept = []
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body")
        if not body or body not in seen:
            kept.append(script)
        seen.add(body or "")
    context["script_files"] = kept


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", read_formulas)
    app.connect("autodoc-process-signature", write_signature)
    app.connect("html-page-context", drop_repeats, priority=1000)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
