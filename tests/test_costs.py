"""What a step costs is known before it is taken: bytes and operations, against real steps and by hand."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from robustood import training
from robustood.costs import check_memory, free_memory, step_cost
from robustood.data import Batch, Data, Split
from robustood.engine import flops
from robustood.models import resnet, small_cnn
from robustood.objectives import ALOE, ATOM, TRADES, Standard

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def batch(n=16, outliers=32, size=16):
    noise = torch.Generator().manual_seed(0)
    x, u = (torch.rand(k, 3, size, size, generator=noise) for k in (n, outliers))
    return Batch(x, torch.arange(n) % 3, u, noise)


def network(reject=0):
    return small_cnn(3, reject, channels=3, size=16, batch_norm=True)


def total(model, batch):
    return model(batch.x).sum()


def test_the_memory_of_a_deep_network_by_hand():
    """Each of 20 layers keeps its output for the backward pass; at most a few more are alive beside them."""
    depth, width, n = 20, 64, 512
    layers = [nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU()) for _ in range(depth)]
    found = step_cost(nn.Sequential(*layers), total, Batch(torch.zeros(n, width), torch.zeros(n)))
    assert found.weights == found.gradients == 4 * depth * width**2 and found.optimiser == 0
    assert depth <= found.activations / (4 * n * width) <= depth + 3
    # Forward, and backward to inputs and weights, of which the first layer needs no gradient of its input.
    assert found.flops == (3 * depth - 1) * 2 * n * width**2
    assert found.memory == found.weights + found.gradients + found.activations


def test_the_memory_of_real_steps():
    """Against what the allocator of the CPU gave out, as the profiler noted it."""
    model, one = resnet(8, 16), batch(size=32)
    for rule in (ALOE(1 / 255), TRADES(8 / 255, steps=2)):
        expected = step_cost(model, rule, one).activations
        rule(model.train(), one).backward()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as noted:
            rule(model, one).backward()  # as in training, the last gradients are still there
        events = noted.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        now = most = 0
        for _, change in sorted(changes):
            now += change
            most = max(most, now)
        assert expected == pytest.approx(most, rel=0.2), (expected, most)


@pytest.mark.parametrize(
    "rule", [Standard(), ALOE(1 / 255), ATOM(1 / 255)], ids=lambda r: type(r).__name__
)
def test_operations_are_those_of_a_real_step(rule):
    model, one = network(reject=1), batch()
    assert step_cost(model, rule, one).flops == flops(lambda: rule(model.train(), one).backward())


def test_bf16_halves_the_activations_and_half_a_batch_too():
    model, rule = network(), ALOE(1 / 255)
    whole = step_cost(model, rule, batch(64, 128))
    assert (
        0.4
        < step_cost(model, rule, batch(64, 128), None, "bf16").activations / whole.activations
        < 0.65
    )
    assert step_cost(model, rule, batch(32, 64)).activations == pytest.approx(
        whole.activations / 2, rel=0.05
    )


def test_the_state_of_an_optimiser_is_counted():
    found = {}
    for name, make in {
        "plain": partial(torch.optim.SGD, lr=0.1),
        "momentum": SGD,
        "adam": partial(torch.optim.Adam, lr=0.1),
    }.items():
        cost = step_cost(network(), Standard(), batch(), make)
        found[name] = cost.optimiser / cost.weights
    assert found["plain"] == 0
    assert (
        found["adam"] == 2 * found["momentum"] and 0.95 < found["momentum"] < 1
    )  # of buffers none


def test_nothing_is_computed_or_changed():
    model, one = network().eval(), batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step_cost(model, ALOE(1 / 255), one, SGD)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(one.generator.get_state(), batch().generator.get_state())


def test_the_advice_is_the_largest_batch_that_fits():
    model, rule, one = network(), ALOE(1 / 255), batch(64, 128)
    free = 0.4 * step_cost(model, rule, one, SGD).memory
    with pytest.raises(
        ValueError, match=r"batch_size = 64 needs .* MiB in a step .*has only"
    ) as refused:
        check_memory(model, rule, one, free, SGD)
    advice = re.search(r"use batch_size=(\d+) and outlier_batch_size=(\d+)", str(refused.value))
    n, outliers = map(int, advice.groups())
    assert 2 < n < 32 and outliers == 2 * n
    assert check_memory(model, rule, batch(n, outliers), free, SGD) is None
    with pytest.raises(ValueError, match=r"free"):
        check_memory(model, rule, batch(n + 1, outliers + 2), free, SGD)
    with pytest.raises(ValueError, match=r"no batch fits: take a smaller network"):
        check_memory(model, rule, one, 1000.0, SGD)


def test_a_run_that_does_not_fit_is_refused_before_any_work(tmp_path, monkeypatch):
    one, model = batch(64, 128), network()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    split = Split(one.x, one.y)
    data = Data(split, split[:8], split[:8], one.outliers)
    monkeypatch.setattr(training, "free_memory", lambda device: 1e7)  # a pretended device of 10 MB
    fit = partial(training.fit, model, ALOE(1 / 255), data, epochs=1, run_dir=tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"batch_size = 64 needs .* 9.537 MiB free.*use batch_size=\d+ and"
    ):
        fit(batch_size=64, outlier_batch_size=128)
    assert not (tmp_path / "run").exists()
    assert torch.equal(before, nn.utils.parameters_to_vector(model.parameters()))
    monkeypatch.setattr(training, "free_memory", lambda device: 1e9)
    assert fit(batch_size=64, outlier_batch_size=128).finished


def test_a_step_that_depends_on_values_is_not_judged():
    def clipped(model, batch):
        loss = model(batch.x).square().mean()
        return loss if loss.item() < 9 else 0 * loss

    with pytest.raises(RuntimeError):
        step_cost(network(), clipped, batch())
    assert check_memory(network(), clipped, batch(), 1.0) is None


def test_a_cpu_has_no_limit():
    assert free_memory(torch.device("cpu")) == float("inf")
