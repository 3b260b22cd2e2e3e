"""Commands about single detectors: attack one of your own, judge what you found against a shipped one."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

from robustood import challenge, data, distributed, evaluate
from robustood.cli._shell import DEVICE, FLAWED, Add, chosen, count, place, radius, say
from robustood.detectors import Detector, wrap
from robustood.engine import arithmetic
from robustood.inputs import suggest
from robustood.models import networks
from robustood.perturbations import L2, Linf

_BALLS = {"linf": Linf, "l2": L2}


def add(command: Add) -> list[argparse.ArgumentParser]:
    """Add the commands; returns those that take --data."""
    attacks = command(_attack, "attack", "measure what is left of your detector after all attacks")
    attacks.set_defaults(resume="with --folder DIR, the same command resumes from the last batch")
    _add_detector(attacks)
    _add_measurement(attacks)
    judges = command(_judge, "judge", "judge images against one of the detectors to attack")
    judges.add_argument("box", metavar="BOX", help=f"one of: {', '.join(challenge.names())}")
    judges.add_argument("file", type=place, metavar="FILE", help="your images, .npy or .npz")
    return [attacks]


def _add_detector(attacks: argparse.ArgumentParser) -> None:
    """Add the options of attack that say what is attacked, and on which images."""
    what = (
        "module:name or path/to/file.py:name of a detector, of a score (with --higher), or of a function without "
        "parameters that returns one of these"
    )
    attacks.add_argument("detector", metavar="DETECTOR", help=what)
    images = "a folder of images, a .npy or .npz file, or a set such as cifar10:test"
    attacks.add_argument("inside", metavar="IN", help=f"in-distribution test images: {images}")
    attacks.add_argument("outside", nargs="+", metavar="OUT", help="test outliers, likewise")
    higher = "which inputs a plain score ranks higher: in or out of the distribution"
    attacks.add_argument("--higher", choices=("in", "out"), help=higher)
    size = "height and width in pixels of folders and sets (32); arrays stay as they are"
    attacks.add_argument("--size", type=count, default=32, help=size)
    n = "images of each set, drawn at random (200)"
    attacks.add_argument("--n", type=count, default=200, help=n)


def _add_measurement(attacks: argparse.ArgumentParser) -> None:
    """Add the options of attack that say how it is measured, and where the result goes."""
    eps = "radius in pixels, such as 8/255"
    attacks.add_argument("--eps", type=radius, required=True, help=eps)
    attacks.add_argument("--norm", choices=list(_BALLS), default="linf", help="(linf)")
    attacks.add_argument("--seed", type=int, default=0, help="of all draws (0)")
    attacks.add_argument("--device", help=DEVICE.format("where the detector is"))
    attacks.add_argument("--batch-size", type=count, default=512, help="images at a time (512)")
    attacks.add_argument("--network", default="", help="name of the network in the report")
    out = "JSON file for the report; a CSV file of the same name is written beside it"
    attacks.add_argument("--out", type=place, metavar="FILE.json", help=out)
    folder = "keeps finished batches, from which the same command resumes"
    attacks.add_argument("--folder", type=place, metavar="DIR", help=folder)
    opaque = "with --folder: stands for a part that cannot be inspected, such as an ONNX session"
    attacks.add_argument("--name", help=f"{opaque}; choose another when that part changes")


def _attack(given: argparse.Namespace) -> int:
    """Run the standard evaluation on a detector."""
    out = given.out
    if out is not None:
        _try(out)
    within = _BALLS[given.norm](given.eps)
    detector = _detector(given.detector, given.higher)
    if (device := chosen(given.device)) is not None:
        for network in [detector, *networks(detector)]:
            network.to(device)
    names = [_name(source) for source in (given.inside, *given.outside)]
    if len({*names}) < len(names):
        raise ValueError(f"the sets must have different names, got {', '.join(names)}; rename one")
    inside, *outside = (
        data.pixels(data.sample(each, given.n, size=given.size, seed=given.seed, root=given.data))
        for each in (given.inside, *given.outside)
    )
    with arithmetic():
        report = evaluate.standard(
            detector,
            inside,
            dict(zip(names[1:], outside, strict=True)),
            within,
            batch_size=given.batch_size,
            seed=given.seed,
            run_dir=given.folder,
            name=given.name,
            say=say,
        )
    own = getattr(detector, "name", type(detector).__name__)
    labels = {"network": given.network} if given.network else {}
    report = report.labelled(detector=str(own), data=names[0], **labels)
    say(f"\n{report}")
    if out is not None and distributed.rank() == 0:
        report.to_json(out)
        report.to_csv(out.with_suffix(".csv"))
        say(f"\nfull report: {out}, its rows: {out.with_suffix('.csv')}")
    return FLAWED if report.findings.errors else 0


def _try(out: Path) -> None:
    """Refuse a file that cannot be written, before any work."""
    if out.suffix != ".json" or not out.parent.is_dir():
        raise ValueError(f"--out {out}: must end in .json, in a folder that exists")
    there = out.exists()
    try:
        out.open("a").close()
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror})") from error
    if not there:
        out.unlink()


def _judge(given: argparse.Namespace) -> int:
    """Judge images against a box."""
    box = challenge.box(given.box)
    say(str(challenge.judge(box, data.pixels(data.sample(given.file)))))
    return 0


def _name(source: str) -> str:
    """What a report calls a set: its name, or that of its folder or file."""
    place = Path(source).expanduser()
    if not place.exists():
        return source
    return place.resolve().name.removesuffix(place.suffix if place.is_file() else "")


def _detector(where: str, higher: Literal["in", "out"] | None) -> Detector:
    """The detector that an argument names; a score becomes one if its direction is stated."""
    module, _, name = where.rpartition(":")
    if not module or not name:
        raise ValueError(
            f"DETECTOR must be module:name or path/to/file.py:name, got {where!r}; name the variable or function "
            "behind the colon"
        )
    held = _module(module)
    if not hasattr(held, name):
        known = [each for each in vars(held) if not each.startswith("_")]
        raise ValueError(f"{module} has no {name!r}; {suggest(name, known)}")
    found = getattr(held, name)
    if inspect.isfunction(found) and not inspect.signature(found).parameters:
        found = found()
    if isinstance(found, Detector):
        if higher is not None:
            raise ValueError(
                f"{where} is a Detector, which scores in-distribution inputs higher; leave out --higher"
            )
        return found
    if isinstance(found, type):
        raise ValueError(
            f"{where} is the class {name}; name an object, or a function without parameters that makes one"
        )
    if higher is None:
        raise ValueError(
            f"{where} is no Detector but a {type(found).__name__}; if it is a score, say by --higher in or --higher "
            "out which inputs it ranks higher"
        )
    return wrap(found, higher=higher, name=name)


def _module(module: str) -> ModuleType:
    """The module of a name, or of a Python file."""
    file = Path(module).expanduser()
    if file.suffix == ".py" and not file.is_file():
        raise ValueError(f"no file {module}; write path/to/file.py:name")
    beside = str(file.resolve().parent) if file.suffix == ".py" else os.getcwd()
    if beside not in sys.path:  # for what the module imports, also later
        sys.path.insert(0, beside)
    try:
        if file.suffix != ".py":
            return importlib.import_module(module)
        name = f"attacked_{file.stem}"  # not the file's own, which may be that of a library
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec and spec.loader
        held = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(held)
        return held
    except Exception as error:  # whatever the file does
        raise ValueError(
            f"{module} cannot be imported ({type(error).__name__}: {error}); write path/to/file.py:name or an "
            "importable module:name, and try it in Python"
        ) from error
