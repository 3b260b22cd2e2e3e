"""Weight files that are verified when they are loaded, and checkpoints that survive a crash.

Weights are saved as safetensors with a JSON card beside them: recipe, seed, data, versions, metrics and the
sha256 of the file. A :class:`Checkpoint` holds what a stopped computation needs to resume, such as the weights
and the optimiser state of a run, and a fingerprint of the computation. Its state is written completely or not at
all, and read without executing code (``weights_only``). The previous state is kept as a backup.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from robustood.identity import check_identity
from robustood.inputs import check_instance, check_path, check_several, check_text

__all__ = [
    "Checkpoint", "Json", "as_csv", "as_json", "check_same", "from_json", "load_weights", "read_json", "read_state",
    "save_weights", "write_json", "write_state", "write_table", "write_whole",
]  # fmt: skip

Json = dict[str, Any]  # the value in a JSON file
_DIGEST = hashlib.sha256().digest_size


def save_weights(path: str | Path, model: nn.Module, **card: object) -> Path:
    """Write a model's weights and their card.

    Args:
        path: must end in ``.safetensors``; the card is written beside it, with the suffix ``.json``.
        model: all its parameters and persistent buffers are saved.
        card: what a reader should know, as JSON values: recipe, seed, data, metrics.

    Returns:
        The path of the weights.

    Raises:
        ValueError: for another suffix, or a card that JSON cannot represent.
    """
    path = _weights_path(path)
    # Cloned, because a file holds no two tensors that share memory, as those of tied layers do.
    tensors = {n: v.detach().cpu().contiguous().clone() for n, v in _tensors(model).items()}
    content = save(tensors)
    card |= {
        "architecture": _architecture(model),
        "sha256": hashlib.sha256(content).hexdigest(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    text = as_json(card, "card") + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    write_whole(path.with_suffix(".json"), text.encode())
    return path


def load_weights(path: str | Path, model: nn.Module, keys: Sequence[str] = ()) -> Json:
    """Read weights into a model of the same architecture; the model is changed only if everything is valid.

    Args:
        path: file written by :func:`save_weights`.
        model: receives the weights, on its own device.
        keys: further keys that the card must have.

    Returns:
        The card.

    Raises:
        FileNotFoundError: if the weights or their card are missing.
        ValueError: for a pickle, a damaged file or card, or weights of another architecture.
    """
    path = _weights_path(path)
    needed = ("architecture", "sha256", *keys)
    again = "fetch or save it again, together with its weights"
    card = read_json(file := path.with_suffix(".json"), needed, again)
    if not isinstance(card["sha256"], str) or not isinstance(card["architecture"], dict):
        raise ValueError(f"{file} is damaged (sha256: a string, architecture: an object); {again}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != card["sha256"]:
        raise ValueError(
            f"{path.name} has sha256 {found[:12]}…, its card says {card['sha256'][:12]}…; "
            "the file is damaged or belongs to another card; fetch it again"
        )
    wanted, offered = _architecture(model), card["architecture"]
    if wanted != offered:
        different = sorted(
            name for name in wanted | offered if wanted.get(name) != offered.get(name)
        )
        name = different[0]
        raise ValueError(
            f"{path.name} belongs to another architecture: {len(different)} tensors differ, first "
            f"{name}: shape {offered.get(name)} in the file, {wanted.get(name)} in the model"
        )
    with torch.no_grad():
        tensors = load(content)
        for name, value in _tensors(model).items():
            value.copy_(tensors[name])
    return card


def _weights_path(path: str | Path) -> Path:
    check_path(path, "path")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"path must end in .safetensors, got {path.name!r}; pickled weights can run code when "
            "they are loaded, so convert them first"
        )
    return path


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    check_instance(model, "model", nn.Module, "a network, such as small_cnn()")
    return dict(model.state_dict(keep_vars=True))


def _architecture(model: nn.Module) -> dict[str, list[int | str]]:
    return {name: [*value.shape, str(value.dtype)] for name, value in _tensors(model).items()}


def write_whole(path: Path, content: bytes) -> None:
    """Replace the content of a file, or leave the file unchanged after a crash or on a full disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, or leave the file unchanged."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV, with one column for each name that occurs in any row."""
    write_whole(path, as_csv(rows).encode())


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV, with one column for each name that occurs in any row."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    table = csv.DictWriter(text, list(names), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def as_json(value: object, name: str) -> str:
    """A value as standard JSON; NumPy numbers are written as Python numbers.

    Raises:
        ValueError: for what JSON cannot represent, including NaN and infinity.
    """
    try:
        return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, default=_number)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be valid as JSON: {error}; pass finite numbers, strings and lists"
        ) from error


def _number(value: object) -> int | float:
    """A NumPy number as a Python number."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def from_json(text: str, keys: Sequence[str] = ()) -> Any:
    """The value of a JSON text. NaN and infinity are refused: Python's parser takes them, but JSON does not.

    Raises:
        ValueError: for text that is not JSON, or lacks one of the keys.
    """

    def number(word: str) -> float:
        if not math.isfinite(found := float(word)):
            raise ValueError(f"it contains {word}, which is not a finite number")
        return found

    if not text.strip():
        raise ValueError("it is empty")
    held = json.loads(text, parse_float=number, parse_constant=number)
    if keys and not isinstance(held, dict):
        raise ValueError(f"it lacks {', '.join(keys)}")
    if missing := [key for key in keys if key not in held]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return held


def read_json(
    path: Path, keys: Sequence[str] = (), fix: str = "delete it or choose another folder"
) -> Any:
    """The value in a JSON file.

    Args:
        path: the file.
        keys: those that it must have.
        fix: advice that ends the error message.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a damaged file, or one that lacks one of the keys; the message names the file.
    """
    check_path(path, "path")
    check_text(fix, "fix")
    check_several(keys, "keys", "names", 0)
    for key in keys:
        check_text(key, "keys: each")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"path {path} is not a file; pass a JSON file of a run, such as run.json"
        )
    try:
        return from_json(path.read_text("utf-8-sig"), keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {fix}") from error


class Checkpoint:
    """The state of a computation, from which only the same computation can resume.

    Args:
        path: the file; its folder is created.
        kind: what messages call the computation, such as "run".
        identity: fingerprint of everything that it depends on (:func:`robustood.identity.identity`).

    Attributes:
        state: the saved state; None if there is none.

    Raises:
        ValueError: if the folder holds another computation or only damaged states, or if a new computation
            cannot be identified and has no name.
    """

    def __init__(self, path: Path, kind: str, identity: dict[str, str]):
        self.path, self.identity, self.state = path, identity, read_state(path)
        check_identity(self.state, identity, f"run_dir {path.parent.name!r} holds a {kind}")
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, state: Json) -> None:
        """Replace the state, or leave the old one unchanged."""
        write_state(self.path, {"identity": self.identity, **state})


def write_state(path: Path, state: Json) -> None:
    """Write a run's state; the previous one is kept beside it as ``NAME.previous``."""
    buffer = io.BytesIO()
    torch.save(_plain(state), buffer)
    payload = buffer.getvalue()
    newest = path.with_name(path.name + ".newest")
    write_whole(newest, hashlib.sha256(payload).digest() + payload)
    if path.exists():
        os.replace(path, _previous(path))
    os.replace(newest, path)


def _plain(value: Any) -> object:
    """A state with NumPy numbers as Python numbers, because only those can be read back."""
    if type(value) is dict:
        return {key: _plain(held) for key, held in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    own = type(value) in (bool, int, float) or not isinstance(value, Real)
    return value if own else _number(value)


def read_state(path: Path) -> Json | None:
    """The last undamaged state, or None if there is none yet.

    For a damaged file a warning is issued and the previous one is used.

    Raises:
        ValueError: if states exist and all are damaged.
    """
    damaged = []
    for candidate in (path, _previous(path)):
        if not candidate.exists():
            continue
        content = candidate.read_bytes()
        payload = content[_DIGEST:]
        if hashlib.sha256(payload).digest() == content[:_DIGEST]:
            return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        damaged.append(candidate.name)
        warnings.warn(
            f"{candidate} is damaged ({len(content)} bytes, wrong sha256) and was skipped",
            stacklevel=2,
        )
    if damaged:
        raise ValueError(
            f"no intact checkpoint in {path.parent}; damaged: {', '.join(damaged)}; "
            "delete them to start the run again"
        )
    return None


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def check_same(kept: Json, wanted: Json, holder: str) -> None:
    """Refuse to resume what was started with other settings.

    Args:
        kept: the saved settings.
        wanted: the current settings.
        holder: the beginning of the message, such as "run_dir 'x' holds a run".
    """
    for name, value in wanted.items():
        if kept.get(name) != value:
            raise ValueError(
                f"{holder} with {name} = {kept.get(name)!r}, not {value!r}; choose another folder or "
                "delete this one"
            )
