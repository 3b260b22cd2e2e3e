"""Evaluation, certificates and checks on a pretended GPU: the same numbers as on the CPU."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from rehearsal import parts
from rehearsal.pretended import Rehearsal
from torch import Tensor

from robustood import attacks, evaluate, generative, rng, sanity, smoothing
from robustood.attacks import _portfolio as portfolio
from robustood.detectors import MSP
from robustood.evaluate import _standard as protocol
from robustood.losses import cross_entropy
from robustood.models import read, small_cnn
from robustood.objectives import NTOM
from robustood.perturbations import L2, Compose, Corruption, FiniteSubset, Linf, Random, Spatial
from robustood.training import fit

DETECTORS = (
    "MSP", "MaxLogit", "Energy", "Entropy", "ODIN", "Mahalanobis", "KNN", "ViM", "ReAct", "GradNorm",
    "RejectClass", "PRO", "wrap",
)  # fmt: skip


@pytest.fixture(scope="module")
def net(data):
    """A network with a reject output that has learned a little."""
    model = parts.small()
    fit(model, NTOM(), data, epochs=4, batch_size=32)
    return model


def both(measure, *held):
    """What a measurement gives on the CPU and on the pretended device, with a copy of the networks and images held."""
    here = measure(*held)
    with Rehearsal() as gpu:
        there = measure(*[copy.deepcopy(each).to("cuda") for each in held])
        there = [v.cpu() if isinstance(v, Tensor) else v for v in there]
    assert gpu.operations.launches > 20
    return list(here), there


def agree(here, there):
    """Whether two lists of numbers, texts and tensors are equal, bit for bit."""
    assert here and len(here) == len(there)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_each_detector_is_evaluated_as_on_the_cpu(name, net, data):
    def sides(net, x, outliers, train_x, train_y):
        detector = parts.fitted(net, train_x, train_y)[name]
        how = {"steps": 2, "restarts": 1, "batch_size": 16}
        found = evaluate.four_sides(detector, x, {"grey": outliers}, Linf(parts.EPS), **how)
        return [json.loads(report.to_json()) for report in found.values()]

    train = data.train
    agree(*both(sides, net, data.test.x, data.ood["grey"], train.x, train.y))


def test_every_detector_is_rehearsed(net, data):
    assert set(parts.fitted(net, data.train.x, data.train.y)) == set(DETECTORS)


@pytest.mark.slow
@pytest.mark.parametrize("paper", evaluate.PAPERS)
def test_each_paper_attacks_as_on_the_cpu(paper, net, data):
    def attacked(net, x):
        how = {"paper": paper, "direction": "raise"}
        return [evaluate.paper_attack(MSP(net), x, Linf(parts.EPS), **how)]

    agree(*both(attacked, net, data.ood["grey"]))


@pytest.mark.slow
def test_the_standard_protocol_measures_as_on_the_cpu(net, data, monkeypatch):
    """Each of its attacks, in two steps."""
    whole = protocol.stages

    def short(*given):
        own = [stage for stage in whole(*given) if stage.attack.func is evaluate.attack_score]
        assert len(own) == 5
        return [replace(stage, attack=partial(stage.attack, steps=2)) for stage in own]

    monkeypatch.setattr(protocol, "stages", short)

    def report(net, x, u):
        found = evaluate.standard(MSP(net), x, {"u": u}, Linf(parts.EPS))
        return [json.loads(found.to_json())]

    agree(*both(report, net, data.test.x[:6], data.ood["grey"][:6]))


@pytest.mark.slow
@pytest.mark.parametrize("rule", parts.RULES)
def test_each_rule_climbs_as_on_the_cpu(rule, net, data):
    def climbed(net, x, y):
        loss = lambda v: cross_entropy(read(net, v), y)
        how = {"steps": 8, "restarts": 2, "rule": parts.RULES[rule]()}
        return [attacks.maximise(loss, x, Linf(parts.EPS), **how)]

    agree(*both(climbed, net.eval(), data.test.x[:8], data.test.y[:8]))


@pytest.mark.slow
def test_accuracy_under_the_strongest_attack_is_that_of_the_cpu(data, monkeypatch):
    """Each of its four attacks, in two steps."""
    whole = portfolio._attacks
    monkeypatch.setattr(
        portfolio, "_attacks", lambda *given: [partial(a, steps=2) for a in whole(*given)]
    )

    def accuracy(net, x, y):
        strongest = partial(attacks.worst_case, within=Linf(parts.EPS))
        return [attacks.robust_accuracy(net, x, y, strongest)]

    plain = small_cnn(3, channels=3, size=parts.SIDE)
    agree(*both(accuracy, plain, data.test.x[:6], data.test.y[:6]))


SETS = {
    "L2": lambda: L2(0.3),
    "Spatial": lambda: Spatial(10, 1),
    "Corruption": lambda: Corruption(("fog", "contrast"), (1, 3)),
    "Compose": lambda: Compose(Spatial(10, 1), Linf(parts.EPS)),
    "FiniteSubset": lambda: FiniteSubset(
        Linf(parts.EPS), 0.01 * torch.ones(2, 3, parts.SIDE, parts.SIDE)
    ),
    "Latent": parts.learned,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_each_set_is_searched_as_on_the_cpu(name, net, data):
    def searched(net, x, y):
        within = SETS[name]()
        if name == "Latent":
            within.generator.to(x.device)
        loss = lambda v: cross_entropy(read(net, v), y)
        return [
            attacks.maximise(loss, x, within, steps=2, restarts=2),
            Random(within)(x, rng.generator(x.device, 3)),
        ]

    agree(*both(searched, net.eval(), data.test.x[:6], data.test.y[:6]))


@pytest.mark.slow
def test_certificates_are_those_of_the_cpu(net, data):
    plain = small_cnn(3, 1, channels=3, size=parts.SIDE).eval()

    def certified(net, plain, x):
        how = {"sigma": 0.25, "n": 40, "batch_size": 64}
        vote = smoothing.certify(net, x, L2(0.5), n0=20, **how)
        score = lambda v: net(v).softmax(1)[:, 0]
        bound = smoothing.certified_score(score, x, L2(0.5), **how)
        return [
            vote.label, vote.radius, bound.low, bound.high,
            smoothing.predict(net, x, L2(0.5), **how), *smoothing.interval_score(plain, x, 0.01),
        ]  # fmt: skip

    agree(*both(certified, net.eval(), plain, data.test.x[:6]))


@pytest.mark.slow
def test_a_check_finds_what_it_finds_on_the_cpu(net, data):
    def findings(net, x, y):
        found = sanity.check(net, x, y, Linf(parts.EPS), samples=8, steps=4)
        return [(each.check, each.level, each.value) for each in found]

    agree(
        *both(findings, small_cnn(3, channels=3, size=parts.SIDE).eval(), data.test.x, data.test.y)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", parts.AUTOENCODERS)
def test_each_autoencoder_is_measured_as_on_the_cpu(name):
    def measured(model, x, y):
        radius = generative.radii(model, x, y).maximum
        metrics = generative.set_metrics(model, x, y, radius, steps=2)
        return [radius, metrics.means(), generative.guarantee(model, x, y, draws=10).violations()]

    pairs = parts.turned().test
    agree(*both(measured, parts.cvae(name).eval(), pairs.x[:8], pairs.y[:8]))
