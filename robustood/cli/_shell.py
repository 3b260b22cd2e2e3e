"""What all commands share: exit codes, lines of output, and types of options."""

from __future__ import annotations

import argparse
import math
import os
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


def chosen(device: str | None) -> torch.device | None:
    """The requested device; of several processes with GPUs, each takes its own."""
    own = os.environ.get("LOCAL_RANK")
    if device is None:
        return torch.device(f"cuda:{own}") if own and torch.cuda.is_available() else None
    found = torch.device(device)
    if own and found.type == "cuda":  # one GPU per process, whatever index was requested
        found = torch.device(f"cuda:{own}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device}: torch finds no CUDA device; leave the option out to use the CPU"
        )
    return found


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
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise argparse.ArgumentTypeError(
            f"must be a number or a fraction such as 8/255, got {text!r}"
        ) from error


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
