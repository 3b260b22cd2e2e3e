"""The second zoo: its broken defences are broken, and its honest ones are not."""

import pytest

from experiments.second_zoo import second_zoo, verify
from robustood.models import small_cnn
from robustood.objectives import Adversarial, Standard
from robustood.training import fit

BROKEN = [
    "flickering confidence",
    "thermometer code",
    "sharpened half-precision probability",
    "energy guarded by a detached distance",
]
HONEST = [
    "adversarial training",
    "pooling and batch normalisation",
    "reject class, both sides attacked in training",
    "Mahalanobis on pooled features",
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def zoo(book):
    standard, robust = small_cnn(), small_cnn()
    fit(standard, Standard(), book, epochs=40)
    fit(robust, Adversarial(0.15, steps=4), book, epochs=20)
    return {entry.name: entry for entry in second_zoo(standard, robust, book)}


def test_four_are_broken_and_four_are_not(zoo):
    assert [*zoo] == [*BROKEN, *HONEST]
    assert all(entry.broken == (name in BROKEN) for name, entry in zoo.items())
    assert {entry.kind for entry in zoo.values()} == {"classifier", "detector"}
    assert not any(entry.model_or_detector.training for entry in zoo.values())


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_defence_looks_robust_and_is_not(zoo, book, name):
    """Another attack takes at least half of what both plain attacks left."""
    found = verify(zoo[name], book, samples=100)
    assert found.clean > 0.9
    assert found.plain > 0.6, found
    assert found.worst < 0.5 * found.plain, found


@pytest.mark.parametrize("name", HONEST)
def test_nothing_beats_apgd_on_an_honest_defence(zoo, book, name):
    """Not even the worst case of all other attacks, beyond five samples of a hundred."""
    found = verify(zoo[name], book, samples=100)
    assert found.clean > 0.9
    assert found.worst > found.apgd - 0.06, found
