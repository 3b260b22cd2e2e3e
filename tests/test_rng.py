"""Draws: of the right law, and the same for each sample however many processes share them."""

import re
from pathlib import Path

import pytest
import torch
from scipy.stats import kstest

from robustood import rng


def shared(rank: int, world: int, seed: int = 3) -> rng.SharedGenerator:
    generator = rng.SharedGenerator("cpu")
    generator.place = (rank, world)
    generator.manual_seed(seed)
    return generator


DRAWS = {
    "uniform": lambda like, generator: rng.uniform(like, generator, -2.0, 3.0),
    "normal": rng.normal,
    "integers": lambda like, generator: rng.integers(4, 9, like, generator),
}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_several_processes_draw_the_parts_of_one(draw, world):
    like = torch.zeros(12, 2, 3)
    whole = draw(like, torch.Generator().manual_seed(3))
    parts = [draw(like[rank::world], shared(rank, world)) for rank in range(world)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_a_generator_without_a_place_stands_alone():
    assert rng.place(None) == rng.place(torch.Generator()) == (0, 1)
    assert rng.place(shared(2, 5)) == (2, 5)


def test_laws():
    like = torch.zeros(20_000, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    assert kstest((rng.uniform(like, generator, -2.0, 3.0) + 2) / 5, "uniform").pvalue > 0.01
    assert kstest(rng.normal(like, generator), "norm").pvalue > 0.01
    counts = rng.integers(4, 9, like, generator).bincount()
    assert counts[:4].sum() == 0 and len(counts) == 9
    assert (counts[4:] - 4000).abs().max() < 4 * (20_000 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_like_their_model(dtype):
    like = torch.zeros(5, 1, 2, dtype=dtype)
    for draw in (rng.uniform, rng.normal):
        found = draw(like, None)
        assert found.shape == like.shape and found.dtype == dtype
    assert rng.integers(0, 3, like, None).shape == (5,)


def test_a_generator_starts_at_its_seed_and_stands_alone():
    made, plain = rng.generator("cpu", 7), torch.Generator().manual_seed(7)
    assert torch.equal(torch.rand(5, generator=made), torch.rand(5, generator=plain))
    assert made.device.type == "cpu" and rng.place(made) == (0, 1)


def test_each_generator_on_a_chosen_device_is_made_in_one_place():
    """A rehearsal without a GPU replaces that place, and would miss another one."""
    package = Path(rng.__file__).parent
    elsewhere = re.compile(r"Generator\((?!\)|Protocol|Enum)[^)]*device")
    found = [p.name for p in package.rglob("*.py") if elsewhere.search(p.read_text("utf-8"))]
    assert found == ["rng.py"]
