"""Published sets, downloaded once and kept as packs.

torchvision supplies the addresses and checksums and reads the files. The download is our own, because it must
resume after an interruption and say what to do without a network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from robustood.data._files import shrunk
from robustood.data._packs import cannot_write, write_pack
from robustood.data._sets import OFFICIAL, advice, named
from robustood.data._sets import root as _root
from robustood.inputs import check_choice

_SHRUNK = ("gtsrb", "textures")


def fetch(name: str, split: str | None = None, root: str | Path | None = None) -> list[Path]:
    """Download a set from torchvision's addresses, check it, and write it as packs.

    The archives are kept in ``root/raw/NAME``; without a network, put them there by other
    means. Images larger than 32x32 (GTSRB, Textures) are resized, the shorter side to 32, and cropped at the
    centre. The three splits of Textures make one set, as in the papers.

    Args:
        name: one of cifar10, cifar100, gtsrb, svhn, mnist, textures; a split may follow a colon.
        split: such as ``"train"``; None for all.
        root: folder of the packs.

    Returns:
        The paths of the packs. A pack that exists is not changed.

    Raises:
        ValueError: for an unknown name, or a file with another checksum.
        ConnectionError: without a network; partial downloads are kept, and the next call resumes them.
        OSError: if the folder cannot be written or is full; partial downloads are kept.
    """
    name, split = named(name, split)
    if name not in OFFICIAL:
        raise ValueError(f"cannot fetch {name!r}, only {', '.join(OFFICIAL)}. {advice(name)}")
    splits = OFFICIAL[name][2]
    if split is not None:
        check_choice(split, "split", tuple(splits))
    stem = f"{name}32" if name in _SHRUNK else name
    paths = {
        part: _root(root) / f"{stem}{'_' if part else ''}{part}.npz"
        for part in (splits if split is None else [split])
    }
    for part, path in paths.items():
        if not path.exists():
            _fetch(name, part, path)
    return list(paths.values())


def _fetch(name: str, split: str, path: Path) -> None:
    from torchvision import datasets  # only a download needs it

    kind, size, splits = OFFICIAL[name]
    raw = path.parent / "raw" / name
    try:
        raw.mkdir(parents=True, exist_ok=True)
        images, labels, classes = [], [], ()
        # The archives stay in raw; what torchvision unpacks is deleted at the end, also after a failure.
        with TemporaryDirectory(dir=raw) as tree, _resuming(raw):
            for arguments in splits[split]:
                dataset = getattr(datasets, kind)(tree, download=True, **arguments)
                classes = getattr(dataset, "classes", ())
                for image, label in tqdm(dataset, desc=f"{name} {split}", disable=None):
                    images.append(np.atleast_3d(shrunk(image, size)))
                    labels.append(int(label))
    except URLError as error:
        raise ConnectionError(str(error.reason)) from error
    except RuntimeError as error:  # what torchvision raises if none of several addresses answers
        said = str(error)
        raise ConnectionError(
            said if _OTHER_WAYS in said else f"{said}. {_other_ways(raw)}"
        ) from error
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        raise cannot_write(raw, error) from error
    write_pack(path, np.stack(images), labels, classes)


_OTHER_WAYS = "or copy the set's pack from a machine with a network, or set ROBUSTOOD_DATA to a folder that has it"


def _other_ways(place: Path) -> str:
    """Advice if no address answers for what belongs at ``place``."""
    return f"Try again later, or get the file by other means and put it at {place}, {_OTHER_WAYS}"


@contextmanager
def _resuming(raw: Path) -> Generator[None]:
    """Within this context torchvision downloads through :func:`download` into ``raw``.

    torchvision knows the files of a set, their addresses and checksums, in part only in the code of its
    methods. Its own download starts from scratch after an interruption.
    """
    from torchvision.datasets import svhn, utils

    def ours(
        url: str,
        root: str | Path,
        filename: str | Path | None = None,
        md5: str | None = None,
        max_redirect_hops: int = 3,
    ) -> None:
        file = Path(filename or os.path.basename(url)).name
        try:
            download(url, raw / file, md5)
        except ConnectionError as error:
            raise URLError(str(error)) from error  # on this, torchvision tries the next address
        Path(root).mkdir(parents=True, exist_ok=True)
        try:
            os.link(raw / file, Path(root, file))
        except OSError:  # a file system without links
            shutil.copyfile(raw / file, Path(root, file))

    modules: list[Any] = [utils, svhn]
    theirs = utils.download_url
    try:
        for module in modules:
            module.download_url = ours
        yield
    finally:
        for module in modules:
            module.download_url = theirs


def download(url: str, target: Path, md5: str | None) -> None:
    """Download a file; an interrupted download is resumed, now or at the next call.

    Args:
        url: address.
        target: path of the file once it is complete and its checksum is right; until then the bytes
            are in ``target.partial``.
        md5: the expected checksum; None for any.

    Raises:
        ValueError: for a wrong checksum.
        ConnectionError: if no more bytes arrive.
    """
    if target.exists():
        _check_md5(target, md5, target.name)
        return
    partial = target.with_name(target.name + ".partial")
    best = _size(partial)
    while True:
        try:
            _receive(url, partial)
            break
        except ConnectionError as error:
            if _size(partial) <= best:
                raise ConnectionError(
                    f"cannot download {url} ({error}; {_size(partial):,} bytes so far). {_other_ways(target)}"
                ) from error
            best = _size(partial)
    try:
        _check_md5(partial, md5, target.name)
    except ValueError:
        partial.unlink()
        raise
    os.replace(partial, target)


def _receive(url: str, partial: Path) -> None:
    start = _size(partial)
    headers = {"User-Agent": "robustood"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urlopen(Request(url, headers=headers), timeout=30)
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError) and error.code == 416:
            return  # no bytes are missing; the checksum decides
        raise ConnectionError(str(error)) from error
    with answer:
        start = start if answer.status == 206 else 0  # a server may send the whole file again
        total = start + int(answer.headers.get("Content-Length") or 0)
        how = {"desc": partial.stem, "unit": "B", "unit_scale": True, "disable": None}
        bar = tqdm(total=total or None, initial=start, **how)
        with bar, partial.open("ab" if start else "wb") as file:
            for chunk in _chunks(answer):
                file.write(chunk)
                bar.update(len(chunk))
    if _size(partial) < total:
        raise ConnectionError(f"cut off at {_size(partial):,} of {total:,} bytes")


def _chunks(answer: HTTPResponse) -> Iterator[bytes]:
    """The body in pieces; an error while reading is one of the network, not of the disk."""
    try:
        while chunk := answer.read1(2**18):
            yield chunk
    except (OSError, HTTPException) as error:
        raise ConnectionError(str(error)) from error


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _check_md5(file: Path, wanted: str | None, name: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if wanted and found != wanted:
        raise ValueError(
            f"{name} has md5 {found}, torchvision expects {wanted}: it is damaged or a different file; "
            f"delete {file} if it still exists, and fetch again"
        )
