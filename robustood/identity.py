"""Fingerprints of runs, so that a run resumes only from its own state.

The fingerprint of an object covers its class and, recursively, its attributes and tensors. That of a function covers
its code, its default values, its closure and the globals that it reads. Classes and functions of installed
libraries count by name, those of the user by their code. An object whose content cannot be inspected, such as an open
file or a generator, is refused unless the caller passes a name that stands for it.

There are three limits. Code is compared in compiled form, so under another Python version a run resumes only if it
has a name; otherwise it needs a new folder. Modules that a function imports while it runs, and objects whose names
it computes, are not covered. In a dataclass, fields with ``compare=False`` do not count.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
import struct
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import (
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robustood import callables

__all__ = ["check_identity", "describe", "identity"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
_COMPILER = sys.implementation.cache_tag or sys.version.split()[0]
_UNKNOWN = " that cannot be identified"
_TOLD = 200  # a plain value is written in full below this number of characters
_AS = "as "  # begins the text of a part that equals an earlier one


def identity(name: str | None = None, **things: object) -> dict[str, str]:
    """The fingerprint of some objects and all their parts: equal in every process, different for different objects.

    Args:
        name: stands for parts that cannot be identified.
        things: the objects, by the names that messages use.

    Returns:
        A text for the path of each part, such as ``{"detector.temperature": "1.0"}``. Of equal parts, all but the
        first refer to the first.
    """
    found, places = {"name": repr(name)}, {}
    for label, value in things.items():
        try:
            node = _Look().at(value)
        except RecursionError:
            node = _Node(f"{_called(type(value))}, nested too deeply,{_UNKNOWN}", {})
        _tell(label, node, found, places)
    if name is not None:
        found = {k: v.replace(_UNKNOWN, f" named {name!r}") for k, v in found.items()}
    return found


def check_identity(state: dict[str, Any] | None, wanted: dict[str, str], holder: str) -> None:
    """Refuse to resume another run, or to start a run that cannot be identified.

    Args:
        state: the saved state with its ``"identity"``; None if there is none.
        wanted: the fingerprint of the current run.
        holder: the beginning of the message, such as "run_dir 'x' holds a run".
    """
    if state is None:
        for path, text in wanted.items():
            if text.endswith(_UNKNOWN):
                raise ValueError(
                    f"{path} is a {text}, so a later call could not recognise its run; pass "
                    'name="..." (robustood attack: --name) to stand for it, and another name when it changes'
                )
        return
    if (kept := state.get("identity")) is None:
        raise ValueError(
            f"{holder} of an earlier version, whose state has no fingerprint; choose another folder "
            "or delete this one"
        )
    todo, compared = [*dict.fromkeys([*wanted, *kept])], set()
    for path in todo:
        places = _place(kept, path), _place(wanted, path)
        before, now = (each.get(place, "nothing") for each, place in zip((kept, wanted), places))
        other_python = before != now and _compiler(before) != _compiler(now)
        if before != now and not (other_python and wanted["name"] != "None"):
            hint = " (compiled by another Python; a run with a name would resume)" * other_python
            raise ValueError(
                f"{holder} with {path} = {before}, not {now}{hint}; use the former, choose another "
                "folder or delete this one"
            )
        if places[0] != places[1] and places not in compared:  # equal to another part
            compared.add(places)
            for each, place in zip((kept, wanted), places):
                inside = (k for k in each if k.startswith((f"{place}.", f"{place}[")))
                todo += [path + key[len(place) :] for key in inside]


def describe(value: object) -> str:
    """A readable line about an object: without memory addresses, and the same in every process.

    Functions are given by name, dataclasses field by field, larger objects by a digest.
    """
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value) if f.compare]
        parts = ", ".join(f"{name}={describe(getattr(value, name))}" for name in names)
        return f"{type(value).__qualname__}({parts})"
    if isinstance(value, functools.partial):
        return describe([value.func, *value.args, *sorted(value.keywords.items())])
    if isinstance(value, dict):
        return describe([*value.items()])
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe, value))}]"
    node = _Look().at(value)
    return f"{node.text} {node.digest[:16]}" if node.inner else node.text


# --- from objects to texts


@dataclass(frozen=True)
class _Node:
    """A part: its text, and the parts inside it."""

    text: str
    inner: dict[str, _Node]

    @functools.cached_property
    def digest(self) -> str:
        inner = [(label, node.digest) for label, node in sorted(self.inner.items())]
        return hashlib.sha256(repr((self.text, inner)).encode()).hexdigest()


def _tell(label: str, node: _Node, found: dict[str, str], places: dict[str, str]) -> None:
    if node.inner and node.digest in places:
        found[label] = _AS + places[node.digest]
        return
    found[label] = node.text
    places[node.digest] = label
    for key, child in sorted(node.inner.items()):
        _tell(f"{label}{key}" if key[0] == "[" else f"{label}.{key}", child, found, places)


def _place(found: dict[str, str], path: str) -> str:
    """The path under which the text of a part is kept: its own, or that of an equal part; "" if there is none."""
    while path not in found or found[path].startswith(_AS):
        heads = (h for h in _heads(path) if found.get(h, "").startswith(_AS))
        if (head := next(heads, None)) is None:
            return ""
        path = found[head].removeprefix(_AS) + path[len(head) :]
    return path


def _heads(path: str) -> Iterator[str]:
    """A path and all paths above it, the longest first."""
    ends = [i for i, letter in enumerate(path) if letter in ".["]
    yield from (path[:end] for end in [len(path), *reversed(ends)])


def _compiler(text: str) -> str:
    """The Python version that compiled a function's code; the current one for any other text."""
    return text.split()[1] if text.startswith("code ") else _COMPILER


class _Parts(NamedTuple):
    """The text of an object, and the objects inside it by name."""

    text: str
    inner: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class _Used:
    """A module of the user, and the names that a function's code can reach in it."""

    module: ModuleType
    names: frozenset[str]


class _Look:
    """One traversal of an object, which opens each part only once."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[_Node, object]] = {}  # the objects: no id is reused
        self.above: list[object] = []

    def at(self, value: object) -> _Node:
        """The node of an object, with everything inside it."""
        if type(value) in _PLAIN:
            return _Node(_plain(value), {})
        if id(value) in self.seen:
            return self.seen[id(value)][0]
        for up, holder in enumerate(reversed(self.above)):
            if holder is value:
                return _Node(f"the {_called(type(value))} {up + 1} levels above", {})
        self.above.append(value)
        try:
            text, inner = self.open(value)
            node = _Node(text, {key: self.at(part) for key, part in inner.items()})
        finally:
            self.above.pop()
        self.seen[id(value)] = node, value
        return node

    def open(self, value: Any) -> _Parts:
        """The text and the parts of an object, one level deep."""
        kind = type(value)
        if isinstance(value, (Tensor, np.ndarray)):
            return _array(value)
        if isinstance(value, type):
            return _of_class(value)
        if isinstance(value, CodeType):
            return _Parts(f"code {_COMPILER} {self.compiled(value)[:16]}")
        if isinstance(value, FunctionType):
            return _of_function(value)
        if isinstance(value, (MethodType, functools.partial)):
            return _Parts(_called(kind), callables.parts(value))
        if isinstance(value, (staticmethod, classmethod)):
            return _Parts(_called(kind), {"function": value.__func__})
        if isinstance(value, property):
            return _Parts(_called(kind), {n: getattr(value, n) for n in ("fget", "fset", "fdel")})
        if isinstance(value, functools.cached_property):  # which may hold a lock
            return _Parts(_called(kind), {"function": value.func})
        if isinstance(value, weakref.ref):
            return _Parts(_called(kind), {"referent": value()})
        if isinstance(value, _Used):
            reached = {n: vars(value.module)[n] for n in value.names & vars(value.module).keys()}
            return _Parts(f"module {value.module.__name__}", _with_modules(reached, value.names))
        if isinstance(value, ModuleType):
            names = () if callables.installed(value.__name__) else vars(value)
            own = (n for n in names if n[:2] != "__")
            return self.open(_Used(value, frozenset(own)))
        if kind in (list, tuple):
            text = f"{kind.__name__} of {len(value)}"
            if all(type(each) in _PLAIN for each in value):
                plain = ("[{}]" if kind is list else "({})").format(", ".join(map(_plain, value)))
                return _Parts(plain if len(plain) < _TOLD else f"{text} {_digest(plain)[:16]}")
            return _Parts(text, {f"[{i}]": each for i, each in enumerate(value)})
        if kind is dict:
            return self.pairs(value)
        if isinstance(value, nn.Module):
            return self.network(value)
        if isinstance(value, torch.optim.Optimizer):
            groups = [{k: v for k, v in g.items() if k != "params"} for g in value.param_groups]
            return _Parts(_called(kind), {**_own_class(kind), "groups": groups, **value.defaults})
        if isinstance(value, (set, frozenset)):
            members = {f"[{self.at(each).digest[:16]}]": each for each in value}
            return _Parts(_called(kind), {**_own_class(kind), **callables.parts(value), **members})
        return self.thing(value)

    def pairs(self, value: dict[object, object]) -> _Parts:
        """A dictionary; its order counts, because iteration depends on it."""
        keys = {key: self.at(key) for key in value}
        names = [node.digest[:16] if node.inner else node.text for node in keys.values()]
        inner = {f"[{n}]": part for n, part in zip(names, value.values(), strict=True)}
        inner |= {f"[{n}], the key": k for n, k in zip(names, keys) if type(k) not in _PLAIN}
        order = f"{{{', '.join(names)}}}"
        return _Parts(order if len(order) < _TOLD else f"dict {_digest(order)}", inner)

    def network(self, value: nn.Module) -> _Parts:
        """A network: its own attributes, children in order, tensors, hooks and tied tensors."""
        kind, tables = type(value), vars(value)
        if isinstance(value, torch.jit.ScriptModule):  # whose tables are no dicts
            tensors = [*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)]
            inner = dict([*value.named_children(), *tensors])
            return _Parts(_called(kind), {"code": value.code, **inner})
        text = (
            f"{_called(kind)} of {', '.join(value._modules)}" if value._modules else _called(kind)
        )
        if "_orig_mod" in value._modules:  # what torch.compile returns
            return _Parts(text, {"_orig_mod": value._modules["_orig_mod"]})
        own = {k: v for k, v in _attributes(value).items() if k not in callables.OF_EVERY_NETWORK}
        held = {k: v for t in ("_modules", "_parameters", "_buffers") for k, v in tables[t].items()}
        hooks: dict[str, object] = {
            table: [*hooks.values()]  # without their keys, which differ between processes
            for table, hooks in tables.items()
            if table in callables.OF_EVERY_NETWORK and table.endswith("_hooks") and hooks
        }
        if not any(isinstance(holder, nn.Module) for holder in self.above[:-1]):
            every = [
                *value.named_parameters(remove_duplicate=False),
                *value.named_buffers(remove_duplicate=False),
            ]
            first = {id(tensor): name for name, tensor in reversed(every)}
            tied = {name: first[id(t)] for name, t in every if first[id(t)] != name}
            hooks |= {"tied tensors": tied} if tied else {}
        return _Parts(text, {**_own_class(kind), **own, **held, **hooks})

    def thing(self, value: object) -> _Parts:
        """Any other object: by its attributes, or by what ``pickle`` would rebuild it from."""
        kind = type(value)
        if isinstance(getattr(value, "__qualname__", None), str) and _of_library(value):
            return _Parts(_called(value))
        made = "__wrapped__" in getattr(value, "__dict__", {})  # a function with a cache
        library = callables.installed(_module_of(kind))
        again = (
            kind.__reduce_ex__ is not object.__reduce_ex__
            or kind.__reduce__ is not object.__reduce__
        )
        if made or not (_hides(kind) or (library and again)):
            return _Parts(_called(kind), {**_own_class(kind), **_attributes(value)})
        try:
            reduce: Any = copyreg.dispatch_table.get(kind)
            recipe: Any = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception:  # a class may refuse to be copied with any error
            return _Parts(_called(kind) + _UNKNOWN)
        if isinstance(recipe, str):
            return _Parts(f"{_called(kind)} {getattr(value, '__module__', '')}.{recipe}")
        make, args, state, items, pairs, *_ = (*recipe, None, None, None)
        inner: dict[str, object] = {"made by": make, "from": args, "state": state}
        listed = {"items": [*(items or ())], "entries": [*(pairs or ())]}
        return _Parts(_called(kind), inner | {k: v for k, v in listed.items() if v})

    def compiled(self, code: CodeType) -> str:
        """Digest of a function's code and of the code inside it, whatever file and line it comes from."""
        constants = [
            self.compiled(each) if isinstance(each, CodeType) else self.at(each).digest
            for each in code.co_consts
        ]
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return _digest(repr((code.co_code, code.co_exceptiontable, constants, names, counts)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: object) -> str:
    """A plain value in full, or shortened with a digest if it is long."""
    long = type(value) is int and value.bit_length() > _TOLD  # too long for repr
    text = f"{value:x} in base 16" if long else repr(value)
    return text if len(text) < _TOLD else f"{text[:40]}… {_digest(text)[:16]}"


def _array(value: Tensor | np.ndarray) -> _Parts:
    """A tensor or an array: type, shape and a digest of the numbers, whatever its device."""
    own = dict(getattr(value, "__dict__", {}))
    try:
        if isinstance(value, Tensor):
            kind, plain = value.dtype, value.detach().cpu().resolve_conj().resolve_neg()
            numbers = plain.contiguous().flatten().view(torch.uint8).numpy()
        elif value.dtype.hasobject:
            return _Parts(f"array {value.shape}", {"items": value.tolist(), **own})
        else:
            kind, numbers = value.dtype.str, np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    except (RuntimeError, TypeError, ValueError):  # sparse, without numbers, or without a shape yet
        return _Parts(_called(type(value)) + _UNKNOWN)
    seen = hashlib.sha256(numbers.data).hexdigest()[:16]
    return _Parts(f"{kind} {tuple(value.shape)} {seen}", own)


def _attributes(value: object) -> dict[str, object]:
    """An object's own attributes, without cached properties and fields with ``compare=False``."""
    kind, idle = type(value), set()
    if is_dataclass(value):
        idle = {f.name for f in fields(value) if not f.compare}
    return {
        name: part
        for name, part in callables.parts(value).items()
        if name not in idle
        and not isinstance(inspect.getattr_static(kind, name, None), functools.cached_property)
    }


# --- functions and classes


def _called(value: Any) -> str:
    """The full name of a class or of a function in a module."""
    return f"{_module_of(value)}.{value.__qualname__}"


def _module_of(value: object) -> str:
    """The module that defines an object; "builtins" for objects written in C that do not say."""
    module = getattr(value, "__module__", None)
    return module if isinstance(module, str) else "builtins"


def _of_library(value: Any) -> bool:
    """Whether an installed library holds this object under its own name."""
    found: object = sys.modules.get(_module_of(value))
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value and callables.installed(_module_of(value))


def _of_function(value: FunctionType) -> _Parts:
    """A library's function by its name and its state; a function of the user by its code too."""
    if _of_library(value):
        return _Parts(_called(value))
    where, code = value.__globals__.get("__name__"), value.__code__
    name = f"{where}.{code.co_qualname}"
    if callables.installed(where):
        return _Parts(name, callables.function_state(value))
    names = frozenset(name for each in callables.codes(code) for name in each.co_names)
    return _Parts(name, {"__code__": code, **_with_modules(callables.parts(value), names)})


def _with_modules(found: dict[str, object], names: frozenset[str]) -> dict[str, object]:
    """The same objects, with the user's own modules reduced to these names."""
    return {
        name: _Used(part, names)
        if isinstance(part, ModuleType) and not callables.installed(part.__name__)
        else part
        for name, part in found.items()
    }


def _of_class(value: type) -> _Parts:
    """A library's class by its name; a class of the user by its bases, methods and attributes."""
    if _in_c(value) or _of_library(value):
        return _Parts(_called(value))
    inner: dict[str, object] = {"__bases__": [*value.__bases__]}
    if type(value) is not type:
        inner["__class__"] = type(value)
    for name, part in vars(value).items():
        special = name.startswith("__") and name.endswith("__")
        behaves = callable(part) or isinstance(part, (staticmethod, classmethod, property))
        slot = isinstance(part, (MemberDescriptorType, GetSetDescriptorType))
        if name != "_abc_impl" and not slot and (behaves or not special):
            inner[name] = part
    return _Parts(_called(value), inner)


def _own_class(kind: type) -> dict[str, type]:
    """The class as a part, if its name alone does not identify it."""
    return {"__class__": kind} if _of_class(kind).inner else {}


def _in_c(kind: type) -> bool:
    """Whether a class is written in C."""
    heap, fixed = 1 << 9, 1 << 8  # HEAPTYPE: all classes made in Python; IMMUTABLETYPE: none
    return not kind.__flags__ & heap or bool(kind.__flags__ & fixed)


def _hides(kind: type) -> bool:
    """Whether objects are larger than their attributes and slots, hence hold data in C (as in ``copyreg``)."""
    slots = (vars(base) for base in kind.__mro__ if "__slots__" in vars(base))
    filled = sum(isinstance(each, MemberDescriptorType) for own in slots for each in own.values())
    filled += (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    known = object.__basicsize__ + filled * struct.calcsize("P")
    return bool(kind.__itemsize__) or kind.__basicsize__ > known
