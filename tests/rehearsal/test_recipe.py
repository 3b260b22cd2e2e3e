"""A recipe from beginning to end on a pretended GPU: trained, kept, read again and evaluated."""

import math
import shutil

import pytest
import torch
from rehearsal.pretended import Rehearsal

from robustood import data, recipes

SHORT = [
    "training.epochs=1", "training.batch_size=20", "training.outlier_batch_size=20", "training.compile=false",
    "data.validation=10", "model.depth=10", "model.width=1", "evaluation.n_in=12", "evaluation.n_out=6",
    "evaluation.steps=2", "evaluation.restarts=1", "evaluation.targets=1",
]  # fmt: skip


@pytest.fixture
def packs(monkeypatch):
    """Any set that a recipe asks for, small and in memory."""
    noise = torch.Generator().manual_seed(0)
    held = {}

    def load(name, split=None, root=None):
        base = name.split(":")[0]
        more = {"ids": ("n02099601", "n00000001")} if base == "tinyimagenet" else {}
        if name not in held:
            x = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=noise)
            held[name] = data.Loaded(x, torch.arange(60) % 2, name=base, **more)
        return held[name]

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(data, "available", lambda root=None: sorted(held))


@pytest.mark.slow
def test_a_recipe_is_trained_and_evaluated(packs, tmp_path):
    recipe = recipes.read("aloe_cifar10_fast", SHORT)
    with Rehearsal() as gpu:
        run = recipes.train(recipe, tmp_path / "gpu", device="cuda")
        report = recipes.evaluate(recipe, tmp_path / "gpu", "cuda")
    assert run["finished"] and run["device"] == report["device"] == "a pretended GPU"
    assert run["engine"]["channels_last"] and run["speed"]["over_floor"] > 0
    assert math.isfinite(run["history"][0]["loss"]) and gpu.operations.launches > 1000
    (tmp_path / "cpu").mkdir()
    for name in ("run.json", "recipe.json", "weights.safetensors", "weights.json"):
        shutil.copy(tmp_path / "gpu" / name, tmp_path / "cpu" / name)
    expected = recipes.evaluate(recipe, tmp_path / "cpu", "cpu")
    assert expected.keys() == report.keys() and report["rows"] == expected["rows"]
