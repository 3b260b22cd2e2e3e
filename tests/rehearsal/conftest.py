"""Data, networks and training rules that are rehearsed on a pretended GPU."""

import pytest
import torch
from rehearsal.parts import photos

from robustood.data import Data


@pytest.fixture(scope="session")
def data() -> Data:
    """Colour images of three classes with outliers; small, since only the path matters."""
    return photos()


# Tried from this version on. In torch 2.5 the judge passes a mask on the host, and does not know uniform_.
SINCE = (2, 15)


@pytest.fixture(autouse=True)
def _the_judge_is_known():
    """The rehearsal is only as good as torch's fake tensors."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < SINCE:
        tried = ".".join(map(str, SINCE))
        pytest.skip(f"fake tensors of torch {torch.__version__} judge less than those of {tried}")


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """A rehearsal leaves torch as it was."""
    before = torch.cuda.synchronize, torch.autocast
    yield
    assert (torch.cuda.synchronize, torch.autocast) == before
