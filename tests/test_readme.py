"""The README: its example prints what stands below it, and its picture is the opening page's."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
import refresh

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
NUMBER = re.compile(r"\d+\.\d+")
MAY_MOVE = 0.05  # a trained network rounds differently on every processor


def test_the_example_prints_what_the_readme_says(capsys):
    code, printed = re.findall(
        r"```(?:python)?\n(from robustood.+?)```\n\n```\n(.+?)```", README, re.S
    )[0]
    exec(code, {})
    found = capsys.readouterr().out
    assert NUMBER.sub("", found) == NUMBER.sub("", printed)
    wanted = [float(number) for number in NUMBER.findall(printed)]
    assert [float(number) for number in NUMBER.findall(found)] == pytest.approx(
        wanted, abs=MAY_MOVE
    )


def test_the_picture_is_the_one_that_the_opening_page_ends_with():
    assert refresh.PICTURE.stat().st_size < 200_000
    assert f"({refresh.PICTURE.relative_to(ROOT).as_posix()})" in README
    stored = nbformat.read(ROOT / "book" / "break_and_repair.ipynb", as_version=4)
    picture = base64.b64decode(refresh.last_output(stored, "image/png"))
    assert refresh.PICTURE.read_bytes() == picture, "run make notebooks"
    figure = refresh.last_output(stored, "text/html") + "\n"
    assert refresh.WELCOME.read_text("utf-8") == figure, "run make notebooks"
