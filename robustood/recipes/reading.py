"""Values from a file, checked against the annotations of the dataclass or function that takes them.

Files hold TOML values: for ``Annotated[int, Bounds(1)]`` a whole number of at least 1, for ``float`` a number or a
fraction as a string such as "8/255", for ``Literal["auto"] | bool`` the string "auto", true or false. ``None`` stands
for a key that is left out.
"""

from __future__ import annotations

import builtins
import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from robustood.inputs import (
    MOST,
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_several,
    check_text,
    suggest,
)

__all__ = ["AtLeastZero", "Bounds", "Count", "Positive", "Share", "Table", "Value", "checked"]

Value = Any  # a TOML value
Table = dict[str, Value]
_FRACTION = 'a fraction is a string such as "8/255"'


@dataclass(frozen=True)
class Bounds:
    """The smallest and the largest number allowed."""

    low: float = -MOST
    high: float = MOST


Count = Annotated[int, Bounds(0)]
Positive = Annotated[int, Bounds(1)]
AtLeastZero = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]


def checked(
    build: Callable[..., object],
    given: Mapping[str, Value],
    section: str,
    keys: Collection[str] | None = None,
) -> Table:
    """The values of a section as keyword arguments of a dataclass or function, in its order.

    Args:
        build: the dataclass or function.
        given: the values.
        section: name of the section, for messages.
        keys: the allowed keys; default: all arguments.

    Raises:
        ValueError: for an unknown or missing key or an invalid value; the message names key, value and fix.
    """
    hints = get_type_hints(build, include_extras=True)
    parameters = inspect.signature(build).parameters
    known = [key for key in parameters if keys is None or key in keys]
    for key in given:
        if key not in known:
            raise ValueError(f"no key {section}.{key}; {suggest(key, known)}")
    for key in known:
        if key not in given and parameters[key].default is inspect.Parameter.empty:
            raise ValueError(
                f"{section}.{key} is missing; set it in the file, or with --set {section}.{key}=..."
            )
    return {k: _converted(hints[k], given[k], f"{section}.{k}") for k in known if k in given}


def _converted(kind: object, value: Value, name: str, bounds: Bounds | None = None) -> Value:
    """A value converted to its annotated type; ValueError with its name if that is impossible."""
    arguments = get_args(kind)
    match get_origin(kind):
        case typing.Annotated:
            return _converted(arguments[0], value, name, arguments[1])
        case typing.Literal:
            check_choice(value, name, arguments)
            return value
        case typing.Union | types.UnionType:
            return _one_of(arguments, value, name)
        case builtins.list | collections.abc.Sequence:
            check_several(value, name, "values", 0)
            return [_converted(arguments[0], each, f"{name}: each") for each in value]
    if kind is int:
        low, high = (bounds.low, bounds.high) if bounds else (0, MOST)
        return check_count(value, name, int(low), high)
    if kind is float:
        low, high = (bounds.low, bounds.high) if bounds else (-MOST, MOST)
        check_number(found := _decimal(value), name, low, high, _FRACTION)
        return float(found)
    if kind is bool:
        check_flag(value, name)
        return bool(value)
    check_text(value, name)
    return value


def _one_of(kinds: Iterable[object], value: Value, name: str) -> Value:
    """One of the literal words, or a value of the last type; a file can hold no other type."""
    *words, last = [k for k in kinds if k in (int, float, bool, str) or get_origin(k)]
    allowed = [word for each in words for word in get_args(each)]
    if isinstance(value, str) and value in allowed:
        return value
    try:
        return _converted(last, value, name)
    except ValueError as error:
        if not allowed:
            raise
        raise ValueError(f'{error}; or write "{", ".join(allowed)}"') from error


def _decimal(value: Value) -> Value:
    """The number for a string such as "8/255"; any other value unchanged."""
    if isinstance(value, str):
        try:
            found = float(Fraction(value))
        except (ValueError, ZeroDivisionError, OverflowError):
            return value
        return found if math.isfinite(found) else value
    return value
