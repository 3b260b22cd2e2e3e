"""The checker behind the annotations while tests run, which checks each kind of call to a function once.

Whether arguments and result fit their annotations depends on their types and, for tensors and arrays, on dtype and
shape alone. A call whose kinds were checked before is therefore let through: attacks call a few small functions
thousands of times. Containers that are long or not built in have no kind here, and are checked in each call.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence, Set
from types import FunctionType
from typing import ClassVar

import jaxtyping
import numpy as np
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import _decorator

# An int may stand for a float (PEP 484).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

# Containers whose entries are told apart: how many entries, how deep inside one another.
LONGEST, DEEPEST = 8, 2
MODES: dict[type, str] = {}  # of each type that has been met: how its values are told apart
every_call = _decorator.jaxtyped


class Unknown(Exception):  # noqa: N818  (a signal, not an error)
    """A value that must be looked at in each call."""


def mode(kind: type) -> str:
    if kind in (torch.Tensor, torch.nn.Parameter, np.ndarray):
        return "array"
    if kind in (str, bytes, bool, type(None)) or issubclass(kind, type):
        return "value"
    if kind in (list, tuple, set, frozenset):
        return "sequence"
    if kind is dict:
        return "mapping"
    strange = issubclass(kind, torch.Tensor | np.ndarray | Mapping | Sequence | Set)
    return "strange" if strange else "type"


def kind(value: object, depth: int = 0) -> object:
    """What an annotation can tell of a value: equal for two values that pass the same checks."""
    own = type(value)
    how = MODES.get(own) or MODES.setdefault(own, mode(own))
    if how == "type":
        return own
    if how == "array":
        return own, value.dtype, tuple(value.shape)
    if how == "value":
        return own, value
    if how == "strange" or len(value) > LONGEST or depth > DEEPEST:
        raise Unknown
    if how == "mapping":
        value = (each for item in value.items() for each in item)
    return own, tuple(kind(entry, depth + 1) for entry in value)


class Checks:
    """The checks of a function, or of all functions that another one makes from the same code."""

    # Held by the class: the library searches what functions hold for networks, entry after entry.
    of: ClassVar[dict[int, "Checks"]] = {}

    def __init__(self, fn: FunctionType, typechecker: Callable):
        todo: list[Callable] = []

        def body(*args, **how):
            return todo.pop()(*args, **how)

        # Annotations that are strings are read now, and in the module of the function.
        body = FunctionType(body.__code__, fn.__globals__, fn.__name__, None, body.__closure__)
        self.whole = every_call(functools.wraps(fn)(body), typechecker=typechecker)
        self.todo, self.passed = todo, set()

    def of_all(self, fn: Callable, args: tuple, how: dict) -> object:
        """Call ``fn`` between the checks of arguments and result."""
        before = len(self.todo)
        self.todo.append(fn)
        try:
            return self.whole(*args, **how)
        finally:
            del self.todo[before:]

    def of_new(self, fn: Callable, args: tuple, how: dict) -> object:
        """Call ``fn``, with checks where a kind of arguments or result is new."""
        try:
            call = tuple(map(kind, args)), tuple((name, kind(how[name])) for name in how)
        except Unknown:
            return self.of_all(fn, args, how)
        if call in self.passed:
            result = fn(*args, **how)
            with contextlib.suppress(Unknown):
                if (call, kind(result)) in self.passed:
                    return result
            self.of_all(lambda *_, **__: result, args, how)
        else:
            result = self.of_all(fn, args, how)
            self.passed.add(call)
        with contextlib.suppress(Unknown):
            self.passed.add((call, kind(result)))
        return result


def jaxtyped(fn=None, *, typechecker):
    """``jaxtyping.jaxtyped`` for functions, with a memory; what else it decorates is left to it."""
    if fn is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if not isinstance(fn, FunctionType):
        return every_call(fn, typechecker=typechecker)
    at = id(fn.__code__)  # its own as long as the checks keep the function
    if at not in Checks.of:
        Checks.of[at] = Checks(fn, typechecker)

    @functools.wraps(fn)
    def checked(*args, **how):
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **how)
        return Checks.of[at].of_new(fn, args, how)

    return checked


jaxtyping.jaxtyped = _decorator.jaxtyped = jaxtyped
