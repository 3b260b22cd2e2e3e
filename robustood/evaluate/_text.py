"""Reports as JSON and CSV, and back; what a report warns of."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from robustood.checkpoints import Json, as_json, from_json, write_whole
from robustood.inputs import check_path
from robustood.metrics import Estimate

T = TypeVar("T")
# A list of numbers in indented JSON, each on a line of its own. A string holds no line break, so none matches.
_LIST = re.compile(r"\[\n[\s\d.,eE+-]+\]")

# Where the intervals of all sets of outliers lie below one half: more often a mistake than a finding.
REVERSED = (
    "without any attack the AUROC is below one half ({}): the outliers score higher than x_in. Is the score one that "
    "is higher for outliers (then turn it, as by higher= of detectors.wrap), or are the two sides swapped?"
)


def plain(row: Json) -> Json:
    """A row of a report without classes of its own, as JSON has it."""
    return {k: asdict(v) if isinstance(v, Estimate) else v for k, v in row.items()}


def flat(row: Json) -> Json:
    """A row of a report as numbers and names alone, as CSV has it."""
    found: Json = {}
    for name, value in row.items():
        if isinstance(value, Estimate):
            found |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        else:
            found[name] = value
    return found


def as_text(kept: Json) -> str:
    """JSON with each list of numbers on one line."""
    return _LIST.sub(lambda found: "".join(found[0].split()), as_json(kept, "report"))


def written(text: str, path: str | Path | None) -> str:
    """The text, which a file receives if there is a path."""
    if path is not None:
        check_path(path, "path")
        write_whole(Path(path), text.encode())
    return text


def parsed(
    text_or_path: str | Path, keys: Sequence[str], kind: str, build: Callable[[Json], T]
) -> T:
    """What ``build`` makes of JSON, which begins with "{", or of the file that holds it."""
    check_path(text_or_path, "text_or_path")
    is_text = isinstance(text_or_path, str) and text_or_path.lstrip("\ufeff \r\n\t")[:1] == "{"
    if not is_text and not os.path.isfile(text_or_path):
        raise FileNotFoundError(
            f"text_or_path must be JSON, which begins with {{, or the path of a file, got "
            f"{str(text_or_path)!r:.80}; pass what {kind}.to_json wrote, or its path"
        )
    try:
        text = text_or_path if is_text else Path(text_or_path).read_text("utf-8")
        return build(from_json(str(text).lstrip("\ufeff"), keys))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        source = "text_or_path" if is_text else f"text_or_path {text_or_path}"
        raise ValueError(
            f"{source} is not a report ({error}); pass what {kind}.to_json wrote"
        ) from error
