"""The command ``robustood``: its arguments, and how it ends."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from robustood import __version__, distributed, engine
from robustood.cli import _detectors, _images, _recipes
from robustood.cli._shell import FAILED, INTERRUPTED, Add, Work, place, say

_Raw = argparse.RawDescriptionHelpFormatter
_HELP = """\
examples:
  robustood recipes
  robustood train aloe_cifar10_cpu
  robustood train aloe_cifar10_fast --minutes 9 --set training.seed=1 --folder runs/aloe_1
  robustood evaluate runs/aloe_1 --set evaluation.n_in=200
  robustood slice --minutes 12
  robustood table
  robustood attack mine.py:detector cifar10:test photos/ --eps 8/255 --out mine.json
  robustood judge B moved.npy
  robustood data fetch cifar10 svhn:train
  robustood data pack photos/ --name mine:test
  torchrun --nproc-per-node 4 --max-restarts 3 -m robustood train oe_cifar10_fast
  torchrun --nproc-per-node 4 -m robustood evaluate runs/oe_cifar10_fast

To resume a run that was stopped, repeat its command. Exit codes: 0 done, 2 error (explained in one line),
3 the time given by --minutes ran out, 4 attack is done, but its checks found errors, so that its numbers cannot
be trusted, 130 interrupted. ROBUSTOOD_DATA names the folder that holds the images. ROBUSTOOD_DEBUG=1 shows the
traceback of an error.
"""
_RESUME = "the same command resumes from the last saved state"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: default: those of the process.

    Returns:
        The exit code: 0 done, 2 error, 3 out of time, 4 done with findings that forbid trust, 130 interrupted.
    """
    given = parser().parse_args(arguments)
    engine.keep_memory()
    try:
        with _Terminable():
            if "WORLD_SIZE" in os.environ:
                distributed.join()
            return given.command(given)
    except KeyboardInterrupt:
        say(f"interrupted; {given.resume}")
        return INTERRUPTED
    except Exception as error:  # of the user's detector, anything may come
        if os.environ.get("ROBUSTOOD_DEBUG"):
            raise
        print(f"robustood: {_explained(error)}", file=sys.stderr)
        return FAILED
    finally:
        distributed.leave()


class _Terminable:
    """Context in which SIGTERM, such as from the scheduler of a cluster, stops a run as Ctrl-C does."""

    def __enter__(self) -> None:
        try:
            self.before = signal.signal(signal.SIGTERM, self.stop)
        except ValueError:  # not the main thread, which alone can handle signals
            self.before = None

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    @staticmethod
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt


def _explained(error: Exception) -> str:
    """One line about an error, with advice if it comes from the operating system."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    known = isinstance(error, (ValueError, OSError, RuntimeError, ArithmeticError))
    text = text if known and text else f"{kind}: {text}" if text else kind
    if isinstance(error, OSError) and error.strerror and ";" not in error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return (
            f"{error.strerror}{where}; what was written to a folder before is not lost: fix the cause (or choose "
            "another folder by --folder), then repeat the command"
        )
    return text


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    about = "Train and measure robust out-of-distribution detection."
    top = argparse.ArgumentParser("robustood", None, about, _HELP, formatter_class=_Raw)
    top.add_argument("--version", action="version", version=f"robustood {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    images = commands.add_parser("data", help="fetch, check and pack images")
    actions = images.add_subparsers(required=True, metavar="ACTION")

    def adder(among: argparse._SubParsersAction) -> Add:
        def command(work: Work, name: str, text: str) -> argparse.ArgumentParser:
            added = among.add_parser(
                name, help=text, description=text, epilog=_HELP, formatter_class=_Raw
            )
            added.set_defaults(command=work, resume=_RESUME)
            return added

        return command

    where = "folder that holds the packs (default: ROBUSTOOD_DATA)"
    own = _recipes.add(adder(commands)) + _detectors.add(adder(commands))
    for added in own + _images.add(adder(actions)):
        added.add_argument("--data", type=place, metavar="DIR", help=where)
    return top
