"""What every test starts from: one thread, fixed seeds, and strict property tests."""

import subprocess
import sys
import textwrap
from pathlib import Path
from tempfile import mkdtemp

import hypothesis
import jaxtyping
import matplotlib
import numpy as np
import pytest
import torch
import typecheck  # noqa: F401  (before the package)

torch.set_num_threads(1)
matplotlib.use("agg")  # here, not in the environment: kernels choose their own
hypothesis.settings.register_profile(
    "robustood",
    deadline=None,
    derandomize=True,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("robustood")

# Test files that take minutes. They and the notebooks come first, so that at the end no worker waits for another.
LONG = [
    "test_kept_runs",
    "test_colab",
    "test_cli",
    "test_distributed",
    "test_slices",
    "test_pages",
    "test_evaluate",
    "test_sanity",
    "test_doors",
]


def pytest_configure(config):
    # Left alone, xdist begins with the file that has the most tests.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        if item.path.suffix == ".ipynb":
            return len(LONG)
        return LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG) + 1

    items.sort(key=place)  # the order within a file stays


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """A test that forgets a seed still gives the same result each time."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002


# The package is imported inside the fixtures: on top, it would come before the tests' type checks.


@pytest.fixture(scope="session")
def book():
    """The digits, with everything that is none."""
    from robustood.data import digits

    return digits()


@pytest.fixture(scope="session")
def net(book):
    """A small network that reads the digits; a test leaves it as it was."""
    from robustood.models import small_cnn
    from robustood.objectives import Standard
    from robustood.training import fit

    model = small_cnn()
    fit(model, Standard(), book, epochs=12)
    return model


@pytest.fixture
def untyped(monkeypatch):
    """Readers run without the tests' type checks: a wrong type must meet our own message."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def run_script(tmp_path):
    """Run code without the tests' type checks, which no compiler can trace; gives what it prints."""

    def run(code: str, *arguments: str, processes: int = 1, restarts: int = 0) -> str:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(code))
        command, said = [str(script), *arguments], Path(mkdtemp(dir=tmp_path))
        if processes > 1:  # a file for each: torchrun does not buffer, and words in one pipe mix
            launch = ["-m", "torch.distributed.run", "--standalone", f"--log-dir={said}"]
            launch += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
            command = [*launch, "--redirects=1", *command]
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + "".join(file.read_text() for file in sorted(said.rglob("stdout.log")))

    return run
