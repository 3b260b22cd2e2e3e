"""Data, networks and training rules that are rehearsed on a pretended GPU."""

import pytest
import torch
from rehearsal.parts import photos

from robustood.data import Data


@pytest.fixture(scope="session")
def data() -> Data:
    """Colour images of three classes with outliers; small, since only the path matters."""
    return photos()


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """A rehearsal leaves torch as it was."""
    before = torch.cuda.synchronize, torch.autocast
    yield
    assert (torch.cuda.synchronize, torch.autocast) == before
