"""The real images that some tests run on, where they are at hand."""

import pytest

from robustood import data


def need(*names: str) -> None:
    """Skip the test, and say how to get them, unless all these sets are in the data folder."""
    if missing := sorted(set(names) - set(data.available())):
        pytest.skip(
            f"no {', '.join(missing)} in {data.root()}: robustood data fetch gets CIFAR, SVHN and textures, "
            "robustood data pack FOLDER --name NAME makes the others; or name a folder in ROBUSTOOD_DATA"
        )
