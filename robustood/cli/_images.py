"""Commands about images: data fetch, data check, data pack."""

from __future__ import annotations

import argparse

from robustood import data
from robustood.cli._shell import Add, place, say


def add(command: Add) -> list[argparse.ArgumentParser]:
    """Add the actions; returns those that take --data."""
    loads = command(_fetch, "fetch", "download sets of images and store them as packs")
    loads.add_argument("names", nargs="+", metavar="NAME", help="such as cifar10 or svhn:train")
    checks = command(_check, "check", "verify packs and report their content")
    checks.add_argument("names", nargs="*", metavar="NAME", help="default: all in the folder")
    packs = command(_pack, "pack", "make a pack from a folder of your own images")
    packs.add_argument(
        "folder", type=place, metavar="FOLDER", help="folder with one subfolder per class"
    )
    packs.add_argument("--name", required=True, help="its name in recipes, such as mine:test")
    packs.add_argument("--size", type=int, default=32, help="height and width in pixels (32)")
    return [loads, checks, packs]


def _fetch(given: argparse.Namespace) -> int:
    """Download sets of images and store them as packs."""
    for name in given.names:
        made = data.fetch(name, root=given.data)
        say(f"{name}: {', '.join(str(path) for path in made)}")
    return 0


def _check(given: argparse.Namespace) -> int:
    """Read whole sets, verify their checksums, and report their content."""
    there = data.available(given.data)
    for given_name in given.names or there:
        for name in [s for s in there if s.split(":")[0] == given_name] or [given_name]:
            held = data.check(name, root=given.data)
            say(
                f"{name}: {held['n']} images of {' x '.join(map(str, held['shape']))}, "
                f"{held['classes']} classes, {'JPEG ' + str(held['jpeg']) if held['jpeg'] else 'lossless'}"
                f", sha256 {held['sha256']}"
            )
            for note in held["notes"]:
                say(f"  {note}")
    return 0


def _pack(given: argparse.Namespace) -> int:
    """Make a pack from a folder of images."""
    name, _, split = given.name.partition(":")
    made = data.folder(given.folder, name, given.size, given.data, split or None)
    called = f"{name}{given.size if given.size != 32 else ''}{':' if split else ''}{split}"
    say(f"{called}: {len(made)} images of {given.size} x {given.size}")
    for note in made.notes:
        say(f"  {note}")
    return 0
