"""Training on a pretended GPU: the same weights as on the CPU, and no wait inside a step."""

import time
from functools import partial

import pytest
import torch
from rehearsal import parts
from rehearsal.pretended import CUDA, Rehearsal
from rehearsal.steps import HOW, check_steps, objective

from robustood import models, objectives
from robustood.data import Augment
from robustood.engine import Engine
from robustood.generative import Variational
from robustood.training import fit

every_objective = pytest.mark.parametrize("rule", parts.OBJECTIVES)
every_network = pytest.mark.parametrize("name", parts.NETWORKS)


def same(one, other):
    """Whether two networks hold the same numbers, bit for bit."""
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def both(make, rule, data, **how):
    """The same training on the CPU and on the pretended device; gives both networks and the waits."""
    here, there = make(), make()
    fit(here, rule("cpu"), data, **HOW | how)
    with Rehearsal() as gpu:
        fit(there, rule("cuda"), data, device="cuda", **HOW | how)
        assert {p.device for p in there.parameters()} == {CUDA}
        assert {b.device for b in there.buffers()} <= {CUDA}
    assert not gpu.operations.unjudged
    return here, there, gpu


def test_one_recipe_trains_as_on_the_cpu(data):
    """Mined outliers, both sides attacked, augmented, with batch statistics."""
    here, there, gpu = both(parts.small, partial(objective, "MinedALOE"), data, augment=Augment(2))
    assert same(here, there) and gpu.operations.launches > 1000


@pytest.mark.slow
@every_objective
def test_each_objective_trains_as_on_the_cpu(rule, data):
    make = lambda: parts.network_for(rule)
    here, there, _ = both(make, partial(objective, rule), data, augment=Augment(2))
    assert same(here, there)


@pytest.mark.slow
@every_network
def test_each_network_trains_as_on_the_cpu(name, data):
    rule = "CCU" if name == "ccu_model" else "ATOM"
    make = lambda: parts.NETWORKS[name](1)
    few = {"epochs": 1, "batch_size": 48}
    here, there, _ = both(make, partial(objective, rule), data, **few)
    assert same(here, there)


@pytest.mark.slow
@pytest.mark.parametrize("name", parts.AUTOENCODERS)
def test_each_autoencoder_trains_as_on_the_cpu(name):
    here, there, _ = both(
        parts.AUTOENCODERS[name], lambda device: Variational(), parts.turned(), batch_size=32
    )
    assert same(here, there)


@pytest.mark.parametrize("rule", [
    rule if rule == "ALOE" else pytest.param(rule, marks=pytest.mark.slow) for rule in parts.OBJECTIVES
])  # fmt: skip
def test_no_step_makes_the_host_wait(rule, data):
    check_steps(lambda: parts.network_for(rule), partial(objective, rule), data)


@pytest.mark.slow
def test_the_default_optimiser_is_fused_there_and_trains(data):
    model = parts.small()
    with Rehearsal() as gpu:
        history = fit(
            model, objectives.ALOE(parts.EPS), data, epochs=2, batch_size=32, device="cuda"
        )
    assert "aten._fused_adam_.default" in {str(key[0]) for key in gpu.operations.verdicts}
    assert history.finished and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [Engine(channels_last=True), Engine("bf16")], ids=["layout", "bf16"]
)
def test_an_engine_measures_and_reports(how, data):
    model = parts.small()
    with Rehearsal():
        history = fit(model, objectives.ALOE(parts.EPS), data, device="cuda", engine=how, **HOW)
    assert history.speed["device"] == "a pretended GPU" and history.speed["over_floor"] > 0


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(data, tmp_path, monkeypatch):
    """A clock that ticks a minute a look stops it inside an epoch; layers and attacks then draw as they would have."""
    rule, stops = parts.OBJECTIVES["ATOM"], 0
    whole = parts.foreign()
    with Rehearsal():
        fit(whole, rule(), data, device="cuda", run_dir=tmp_path / "whole", **HOW)
        ticks = iter(range(10**6))
        monkeypatch.setattr(time, "monotonic", lambda: 60.0 * next(ticks))
        how = HOW | {"device": "cuda", "run_dir": tmp_path / "stopped", "minutes": 6}
        while not fit(stopped := parts.foreign(), rule(), data, **how).finished:
            stops += 1
            assert stops < 20
    assert stops > 1 and same(whole, stopped)


def test_everything_public_is_rehearsed():
    """A new objective, network or detector is added to the parts."""
    said = {name.split(",")[0] for name in parts.OBJECTIVES}
    no_rules = {"InnerMax", "Mode", "Objective", "OutlierTraining", "Set"}
    assert {*objectives.__all__} - no_rules <= said
    makers = {
        "densenet_bc",
        "mlp",
        "preact_resnet18",
        "readout",
        "resnet",
        "small_cnn",
        "wide_resnet",
        "adapt",
        "ccu_model",
    }
    assert makers == set(parts.NETWORKS) and makers <= {*models.__all__}
