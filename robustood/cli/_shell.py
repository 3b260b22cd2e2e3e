"""What all commands share: exit codes, lines of output, and types of options."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

from robustood import distributed

FAILED, UNFINISHED, FLAWED, INTERRUPTED = 2, 3, 4, 130
Work = Callable[[argparse.Namespace], int]
Add = Callable[[Work, str, str], argparse.ArgumentParser]  # a command, its name, a line about it


def say(line: str) -> None:
    """Print a line at once, in the first process only."""
    if distributed.rank() != 0:
        return
    try:
        tqdm.write(line)  # above the progress bar, if there is one
        sys.stdout.flush()
    except BrokenPipeError:  # the reader is gone, as after "| head": continue without output
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


DEVICE = "cuda, mps or cpu, or one of several GPUs, such as cuda:1 (default: {})"


def chosen(device: str | None) -> torch.device | None:
    """The requested device; of several processes with GPUs, each takes its own.

    Raises:
        ValueError: for another name than those of :data:`DEVICE`, or a device that is not there.
    """
    own, cuda = os.environ.get("LOCAL_RANK"), torch.cuda.is_available()
    if device is None:
        return torch.device(f"cuda:{own}") if own and cuda else None
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: must be cuda, mps, cpu, or one GPU such as cuda:1")
    found = torch.device(device)
    if own and found.type == "cuda":  # one GPU per process, whatever index was requested
        found = torch.device(f"cuda:{own}")
    if found.type == "cuda" and (found.index or 0) >= (torch.cuda.device_count() if cuda else 0):
        raise ValueError(f"--device {device}: {_absent('CUDA')}")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {device}: {_absent('MPS')}")
    return found


def _absent(kind: str) -> str:
    """What to do if torch does not find the requested device."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = [*cuda, *["mps"] * torch.backends.mps.is_available(), "cpu"]
    return f"torch finds no such {kind} device; there are: {', '.join(there)}"


def place(text: str) -> Path:
    """A file or a folder; shells do not expand the ``~`` in ``--data=~/packs``."""
    return Path(text).expanduser()


def minutes(text: str) -> float:
    """A number of minutes."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def radius(text: str) -> float:
    """A radius in pixels, as a fraction such as 8/255 or as a decimal."""
    try:
        above, *below = (Fraction(part) for part in text.split("/"))
        if len(below) > 1:
            raise ValueError(text)
        return float(above / (below or [1])[0])
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise argparse.ArgumentTypeError(
            f"must be a number or a fraction such as 8/255, got {text!r}"
        ) from error


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
