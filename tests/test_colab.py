"""Notebooks as Colab opens them: a file without the repository around it, and the package installed from a wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import refresh

ROOT = Path(__file__).parents[1]
# One that trains, and one that reads the runs and tables in the wheel.
QUICK = ("break_and_repair", "atom_variants")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WHERE = """
import robustood, sys
assert robustood.__file__.startswith({site!r}), robustood.__file__
import torch, numpy
print(torch.__version__, numpy.__version__)
"""


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """A folder of packages that holds what the wheel holds, and nothing else of the project."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (wheel,) = folder.glob("*.whl")
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def opened(stem: str, site: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook, executed in an empty folder, where no photographs are found."""
    notebook = nbformat.read(ROOT / "book" / f"{stem}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(WHERE.format(site=str(site))))
    own = {"PYTHONPATH": str(site), "ROBUSTOOD_DATA": str(folder / "none")}
    refresh.execute(notebook, folder, **own, **dict.fromkeys(THREADS, "1"))
    return notebook


def check(stem: str, site: Path, folder: Path) -> None:
    import numpy
    import torch

    done = opened(stem, site, folder)
    said = done.cells[-1].outputs[0].text.split()
    assert said == [torch.__version__, numpy.__version__], "a cell changed Colab's own packages"
    assert not [p for p in folder.iterdir() if p.suffix in (".pt", ".npz", ".json")], (
        "it left files"
    )


@pytest.mark.parametrize("stem", QUICK)
def test_a_notebook_runs_with_nothing_but_a_wheel(stem, site, tmp_path):
    check(stem, site, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stem", [t.stem for t in refresh.twins() if t.stem not in QUICK])
def test_every_notebook_runs_with_nothing_but_a_wheel(stem, site, tmp_path):
    check(stem, site, tmp_path)
