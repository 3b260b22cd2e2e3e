"""What tells one run from another, so that nothing comes back that belongs to another run.

An object is its class, its attributes, all the way down, and its tensors. A function is its code, its default
values, what it closes over and the globals that it reads. What an installed library defines is known by its
name; a class or a function of one's own by its code. What cannot be told apart by looking, such as an open file
or a generator, is refused until the caller names it.

Three limits. Code is compared as compiled: another Python version asks for a run that has a name, or for a new
folder. What a function imports while it runs, or finds by a name made up on the way, is not seen. In a
dataclass, a field with ``compare=False`` does not count, as its author said.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
import struct
import sys
import sysconfig
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
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
_OF_EVERY_NETWORK = vars(nn.Module()).keys()  # mode, hooks and tables, looked at one by one
_UNKNOWN = " that cannot be told from another by looking"
_TOLD = 200  # characters of a plain value that are told in full
_AS = "as "  # how what was told before is told again


def identity(name: str | None = None, **things: object) -> dict[str, str]:
    """What these things are, down to their last part: the same text in every process, another for another thing.

    Args:
        name: stands for what cannot be identified.
        things: by the names that messages call them.

    Returns:
        Texts by the path of each part, such as ``{"detector.temperature": "1.0"}``. Equal parts are told once.
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
    """Refuse to go on with what other things began, or to begin with what cannot be identified.

    Args:
        state: of the run that was found, with its ``"identity"``; None where there is none.
        wanted: identity of now.
        holder: how the message begins, such as "run_dir 'x' holds a run".
    """
    if state is None:
        for path, text in wanted.items():
            if text.endswith(_UNKNOWN):
                raise ValueError(
                    f"{path} is a {text}, so a later call could not know its run again; pass "
                    'name="...", which stands for it, and another name when it changes'
                )
        return
    if (kept := state.get("identity")) is None:
        raise ValueError(
            f"{holder} of an earlier version, which did not keep all that tells runs apart; choose "
            "another folder or delete this one"
        )
    todo, compared = [*dict.fromkeys([*wanted, *kept])], set()
    for path in todo:
        places = _place(kept, path), _place(wanted, path)
        before, now = (each.get(place, "nothing") for each, place in zip((kept, wanted), places))
        other_python = before != now and _compiler(before) != _compiler(now)
        if before != now and not (other_python and wanted["name"] != "None"):
            hint = " (another Python compiled it: with a name the run would go on)" * other_python
            raise ValueError(
                f"{holder} with {path} = {before}, not {now}{hint}; go on with the former, choose "
                "another folder or delete this one"
            )
        if places[0] != places[1] and places not in compared:  # told elsewhere in one of the two
            compared.add(places)
            for each, place in zip((kept, wanted), places):
                inside = (k for k in each if k.startswith((f"{place}.", f"{place}[")))
                todo += [path + key[len(place) :] for key in inside]


def describe(value: object) -> str:
    """One line about a thing for people: without addresses, and the same in every process.

    Functions are named, dataclasses taken apart; a digest stands for what is longer.
    """
    if is_dataclass(value) and not isinstance(value, type):
        told = [f.name for f in fields(value) if f.compare]
        parts = ", ".join(f"{name}={describe(getattr(value, name))}" for name in told)
        return f"{type(value).__qualname__}({parts})"
    if isinstance(value, functools.partial):
        return describe([value.func, *value.args, *sorted(value.keywords.items())])
    if isinstance(value, dict):
        return describe([*value.items()])
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe, value))}]"
    node = _Look().at(value)
    return f"{node.text} {node.digest[:16]}" if node.inner else node.text


# --- how the parts are told


@dataclass(frozen=True)
class _Node:
    """A part: what it is, and the parts inside it."""

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
    """Where the text of a path stands: there, or at the equal part that was told before; "" for nowhere."""
    while path not in found or found[path].startswith(_AS):
        heads = (h for h in _heads(path) if found.get(h, "").startswith(_AS))
        if (head := next(heads, None)) is None:
            return ""
        path = found[head].removeprefix(_AS) + path[len(head) :]
    return path


def _heads(path: str) -> Iterator[str]:
    """The path and the paths above it."""
    ends = [i for i, letter in enumerate(path) if letter in ".["]
    yield from (path[:end] for end in [len(path), *reversed(ends)])


def _compiler(text: str) -> str:
    """Of a function's code, the Python that compiled it; of anything else nothing that counts."""
    return text.split()[1] if text.startswith("code ") else _COMPILER


class _Parts(NamedTuple):
    """What something is in words, and what it holds by name."""

    text: str
    inner: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class _Used:
    """A module of the user's own, of which a function's code can reach these names."""

    module: ModuleType
    names: frozenset[str]


class _Look:
    """One look through an object; what is met twice is opened once."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[_Node, object]] = {}  # with the thing: no id is used twice
        self.above: list[object] = []

    def at(self, value: object) -> _Node:
        """The part and all inside it."""
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
        """What something is, one level deep."""
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
            own = () if _installed(value.__name__) else (n for n in vars(value) if n[:2] != "__")
            return self.open(_Used(value, frozenset(own)))
        if kind in (list, tuple):
            text = f"{kind.__name__} of {len(value)}"
            if all(type(each) in _PLAIN for each in value):
                told = ("[{}]" if kind is list else "({})").format(", ".join(map(_plain, value)))
                return _Parts(told if len(told) < _TOLD else f"{text} {_digest(told)[:16]}")
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
        """A dictionary, whose order counts: whoever goes through it meets the first entry first."""
        keys = {key: self.at(key) for key in value}
        names = [node.digest[:16] if node.inner else node.text for node in keys.values()]
        inner = {f"[{n}]": part for n, part in zip(names, value.values(), strict=True)}
        inner |= {f"[{n}], the key": k for n, k in zip(names, keys) if type(k) not in _PLAIN}
        order = f"{{{', '.join(names)}}}"
        return _Parts(order if len(order) < _TOLD else f"dict {_digest(order)}", inner)

    def network(self, value: nn.Module) -> _Parts:
        """A network: own attributes, children in their order, tensors, hooks, and which tensors are one."""
        kind, tables = type(value), vars(value)
        text = (
            f"{_called(kind)} of {', '.join(value._modules)}" if value._modules else _called(kind)
        )
        if "_orig_mod" in value._modules:  # what torch.compile returns
            return _Parts(text, {"_orig_mod": value._modules["_orig_mod"]})
        own = {k: v for k, v in _attributes(value).items() if k not in _OF_EVERY_NETWORK}
        held = {k: v for t in ("_modules", "_parameters", "_buffers") for k, v in tables[t].items()}
        hooks: dict[str, object] = {
            table: [*hooks.values()]  # by numbers that differ from process to process
            for table, hooks in tables.items()
            if table in _OF_EVERY_NETWORK and table.endswith("_hooks") and hooks
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
        """object other object: by its attributes, or by what it would be made from again (as in ``pickle``)."""
        kind = type(value)
        if isinstance(getattr(value, "__qualname__", None), str) and _of_library(value):
            return _Parts(_called(value))
        made = "__wrapped__" in getattr(value, "__dict__", {})  # a cache around a function
        library = _installed(_module_of(kind))
        again = (
            kind.__reduce_ex__ is not object.__reduce_ex__
            or kind.__reduce__ is not object.__reduce__
        )
        if made or not (_hides(kind) or (library and again)):
            return _Parts(_called(kind), {**_own_class(kind), **_attributes(value)})
        try:
            reduce: Any = copyreg.dispatch_table.get(kind)
            recipe: Any = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception:  # whatever a class raises that does not want to be copied
            return _Parts(_called(kind) + _UNKNOWN)
        if isinstance(recipe, str):
            return _Parts(f"{_called(kind)} {getattr(value, '__module__', '')}.{recipe}")
        make, args, state, items, pairs, *_ = (*recipe, None, None, None)
        inner: dict[str, object] = {"made by": make, "from": args, "state": state}
        listed = {"items": [*(items or ())], "entries": [*(pairs or ())]}
        return _Parts(_called(kind), inner | {k: v for k, v in listed.items() if v})

    def compiled(self, code: CodeType) -> str:
        """Digest of a function's code and of the code inside it; not of where it stands."""
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
    """A number or a text in full, a long one by a digest."""
    long = type(value) is int and value.bit_length() > _TOLD  # too long for repr
    text = f"{value:x} in base 16" if long else repr(value)
    return text if len(text) < _TOLD else f"{text[:40]}… {_digest(text)[:16]}"


def _array(value: Tensor | np.ndarray) -> _Parts:
    """A tensor or an array by its type, its shape and a digest of its numbers, on any device."""
    own = dict(getattr(value, "__dict__", {}))
    try:
        if isinstance(value, Tensor):
            kind, plain = value.dtype, value.detach().cpu().resolve_conj().resolve_neg()
            numbers = plain.contiguous().flatten().view(torch.uint8).numpy()
        elif value.dtype.hasobject:
            return _Parts(f"array {value.shape}", {"items": value.tolist(), **own})
        else:
            kind, numbers = value.dtype.str, np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    except (RuntimeError, TypeError, ValueError):  # sparse, without numbers, not yet shaped
        return _Parts(_called(type(value)) + _UNKNOWN)
    seen = hashlib.sha256(numbers.data).hexdigest()[:16]
    return _Parts(f"{kind} {tuple(value.shape)} {seen}", own)


def _attributes(value: object) -> dict[str, object]:
    """An object's own attributes, without those that are worked out from the others and kept."""
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
    """The full name of a class or of a module's function."""
    return f"{_module_of(value)}.{value.__qualname__}"


def _module_of(value: object) -> str:
    """Name of the module that defines it; what is written in C does not always say."""
    module = getattr(value, "__module__", None)
    return module if isinstance(module, str) else "builtins"


def _of_library(value: Any) -> bool:
    """Whether an installed library has it under its name."""
    found: object = sys.modules.get(_module_of(value))
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value and _installed(_module_of(value))


def _of_function(value: FunctionType) -> _Parts:
    """A library's function by its name, with what it closes over; one's own by its code too."""
    if _of_library(value):
        return _Parts(_called(value))
    where, code = value.__globals__.get("__name__"), value.__code__
    name = f"{where}.{code.co_qualname}"
    if _installed(where):
        return _Parts(name, callables.function_state(value))
    names = frozenset(name for each in callables.codes(code) for name in each.co_names)
    return _Parts(name, {"__code__": code, **_with_modules(callables.parts(value), names)})


def _with_modules(found: dict[str, object], names: frozenset[str]) -> dict[str, object]:
    """The same, with the user's own modules cut down to these names."""
    return {
        name: _Used(part, names)
        if isinstance(part, ModuleType) and not _installed(part.__name__)
        else part
        for name, part in found.items()
    }


def _of_class(value: type) -> _Parts:
    """A library's class by its name; one's own by its bases, its methods and its attributes."""
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
    """The class where its name does not say it all."""
    return {"__class__": kind} if _of_class(kind).inner else {}


def _in_c(kind: type) -> bool:
    """Whether a class is written in C."""
    heap, fixed = 1 << 9, 1 << 8  # Py_TPFLAGS_HEAPTYPE, as Python makes them; _IMMUTABLETYPE, never
    return not kind.__flags__ & heap or bool(kind.__flags__ & fixed)


def _hides(kind: type) -> bool:
    """Whether objects are larger than what their attributes and slots take: the rest is C's (as in ``copyreg``)."""
    slots = (vars(base) for base in kind.__mro__ if "__slots__" in vars(base))
    filled = sum(isinstance(each, MemberDescriptorType) for own in slots for each in own.values())
    filled += (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    known = object.__basicsize__ + filled * struct.calcsize("P")
    return bool(kind.__itemsize__) or kind.__basicsize__ > known


@functools.cache
def _installed(module: str | None) -> bool:
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
