"""Code for the kernel of a notebook: perturb trained weights like another rounding, and record margins of assertions.

``spread.py`` loads this module before the first cell; the notebook itself does not refer to it.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Sequence
from typing import Any

ORDER: dict[str, Any] = {
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
}
NEAREST: dict[str, float] = {}


def install(noise: float, phase: float, keep_going: bool) -> None:
    """Prepare this kernel.

    Args:
        noise: relative change of each weight after each optimiser step.
        phase: chooses one of many such changes.
        keep_going: ignore failed assertions outside functions.
    """
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    shell.user_ns["__nearest__"] = nearest
    shell.ast_transformers.append(Assertions(shell, keep_going))
    if noise:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(lambda optimiser, *_: rounded(optimiser, noise, phase))


def rounded(optimiser: Any, noise: float, phase: float) -> None:
    """Change each weight slightly, as a function of its value only, so that equal runs stay equal."""
    import torch

    with torch.no_grad():
        for group in optimiser.param_groups:
            for p in group["params"]:
                p.mul_(1 + noise * torch.sin(1e5 * p + phase))


class Assertions(ast.NodeTransformer):
    """Make each comparison inside an assertion record its margin."""

    def __init__(self, shell: Any, keep_going: bool):
        self.shell, self.keep_going, self.depth = shell, keep_going, 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        # Two less: one for the cell that loads this module, one because the count is that of the next cell.
        node.test = Comparisons(f"{self.shell.execution_count - 2}").visit(node.test)
        if self.keep_going and not self.depth:
            name = ast.Name("_asserted", ast.Store())
            return ast.fix_missing_locations(ast.copy_location(ast.Assign([name], node.test), node))
        return ast.fix_missing_locations(node)


class Comparisons(ast.NodeTransformer):
    """Wrap the comparisons that must hold; leave out those that are negated or one of several alternatives."""

    def __init__(self, cell: str):
        self.cell = cell

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        kinds = [type(op).__name__ for op in node.ops]
        if not all(kind in ORDER for kind in kinds):
            return node
        key = ast.Constant(f"{self.cell}: {ast.unparse(node)}")
        ways = ast.List([ast.Constant(kind) for kind in kinds], ast.Load())
        values = [node.left, *node.comparators]
        return ast.Call(ast.Name("__nearest__", ast.Load()), [key, ways, *values], [])

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        return self.generic_visit(node) if isinstance(node.op, ast.And) else node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        alternatives = isinstance(node.func, ast.Name) and node.func.id in ("any", "sum", "len")
        return node if alternatives else self.generic_visit(node)


def nearest(key: str, kinds: Sequence[str], *values: Any) -> Any:
    """The result of a comparison; records its margin, the smallest if the comparison is made several times."""
    result: Any = True
    for kind, a, b in zip(kinds, values, values[1:]):
        result = ORDER[kind](a, b)
        if (gap := least(a, b) if kind in ("Lt", "LtE") else least(b, a)) is not None:
            NEAREST[key] = min(gap, NEAREST.get(key, gap))
        if len(kinds) > 1 and not result:
            break
    return result


def least(a: Any, b: Any) -> float | None:
    """The minimum of b - a, or None if these are not numbers."""
    import numpy as np

    low, high = (v.detach() if hasattr(v, "detach") else v for v in (a, b))
    try:
        return float(np.min(np.asarray(high, float) - np.asarray(low, float)))
    except (TypeError, ValueError):
        return None


def told() -> str:
    """The recorded margins, as JSON."""
    return json.dumps(NEAREST)
