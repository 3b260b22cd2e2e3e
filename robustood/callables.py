"""The objects inside a callable: its closure, the object it is bound to, and its attributes.

A model may be passed as ``lambda x: net(x)``, an attack as ``functools.partial(pgd, steps=7)``, a rule as a bound
method. Each has parts that matter, such as a network whose mode must be set, or a number in which two runs differ.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType

from torch import nn

__all__ = ["OF_EVERY_NETWORK", "codes", "function_state", "installed", "modules", "parts"]

OF_EVERY_NETWORK = vars(nn.Module()).keys()  # mode, hooks and tables


def parts(value: object) -> dict[str, object]:
    """The objects inside a callable or an object by name, one level deep; empty if there are none.

    For functions: their own state (:func:`function_state`) and the globals that their code reads; for bound methods:
    owner and function; for ``functools.partial``: function and arguments; for other objects: attributes and slots.
    """
    if isinstance(value, functools.partial):
        positional = {f"argument {i}": v for i, v in enumerate(value.args)}
        return {"its function": value.func, **positional, **value.keywords, **vars(value)}
    if isinstance(value, MethodType):
        return {"owner": value.__self__, "function": value.__func__}
    if isinstance(value, FunctionType):
        return {**_globals(value), **function_state(value)}
    return _slots(value) | dict(getattr(value, "__dict__", {}))


def function_state(function: FunctionType) -> dict[str, object]:
    """The state of a function: default values, closure and attributes."""
    own = {f"attribute {name}": value for name, value in vars(function).items()}
    return {**_defaults(function), **_closure(function), **own}


def modules(value: object) -> list[nn.Module]:
    """The outermost networks inside a callable or an object, each once; the object itself if it is one."""
    found: dict[int, nn.Module] = {}
    seen: dict[int, object] = {}  # keeps the objects alive, so that no id is reused
    todo = [value]
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        if isinstance(each, nn.Module):
            found[id(each)] = each
        elif isinstance(each, (list, tuple, set, frozenset)):
            todo.extend(each)
        elif isinstance(each, dict):
            todo.extend(each.values())
        elif callable(each) or type(each).__module__ not in ("builtins", "torch"):
            todo.extend(parts(each).values() if not isinstance(each, type) else ())
            todo.extend(_in_modules(each) if isinstance(each, FunctionType) else ())
    inner = {id(child) for module in found.values() for child in list(module.modules())[1:]}
    return [module for key, module in found.items() if key not in inner]


def codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


@functools.cache
def installed(module: str | None) -> bool:
    """Whether a module belongs to this library, to Python or to an installed package."""
    top = (module or "__main__").partition(".")[0]
    if top in (__name__.partition(".")[0], "builtins"):
        return True
    found = sys.modules.get(top)
    if top == "__main__" or found is None:
        return False
    file = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", [])), None)
    if file is None:
        return top in sys.stdlib_module_names
    path, standard = Path(file), Path(sysconfig.get_path("stdlib"))
    return bool({"site-packages", "dist-packages"} & {*path.parts}) or path.is_relative_to(standard)


def _in_modules(function: FunctionType) -> Iterator[object]:
    """What a function's code may reach by name in the user's modules, as in ``zoo.net(x)``."""
    names = {name for code in codes(function.__code__) for name in code.co_names}
    todo = [part for part in _globals(function).values() if isinstance(part, ModuleType)]
    seen: set[int] = set()
    while todo:
        module = todo.pop()
        if id(module) not in seen and not installed(module.__name__):
            found = [vars(module)[name] for name in names & vars(module).keys()]
            todo += [part for part in found if isinstance(part, ModuleType)]
            yield from found
        seen.add(id(module))


def _slots(value: object) -> dict[str, object]:
    """The values of filled slots by name; the name of a private slot includes its class."""
    found = {}
    for kind in reversed(type(value).__mro__):
        for name, slot in vars(kind).items() if "__slots__" in vars(kind) else ():
            if isinstance(slot, MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # a slot that is not filled yet
                    found[name] = slot.__get__(value)
    return found


def _defaults(function: FunctionType) -> dict[str, object]:
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount][code.co_argcount - len(values) :]
    return {**dict(zip(names, values, strict=True)), **(function.__kwdefaults__ or {})}


def _globals(function: FunctionType) -> dict[str, object]:
    """The globals that a function's code reads; attributes with the same names do not count."""
    names = _names_read(function.__code__) & function.__globals__.keys()
    return {name: function.__globals__[name] for name in sorted(names)}


@functools.cache  # attacks ask for every batch, and reading the instructions takes longer than a small batch
def _names_read(code: CodeType) -> frozenset[str]:
    steps = (step for each in codes(code) for step in dis.get_instructions(each))
    return frozenset(s.argval for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME"))


def _closure(function: FunctionType) -> dict[str, object]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that is not assigned yet
            found[name] = cell.cell_contents
    return found
