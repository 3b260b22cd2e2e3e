"""Each network against its formula written out, and what a seed, a mode and a batch may change."""

import re

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from robustood.models import Classifier, Normalise, adapt, mlp, readout, small_cnn

BUILDS = {
    "cnn": lambda seed=0: small_cnn(seed=seed),
    "cnn, reject": lambda seed=0: small_cnn(classes=4, reject=3, seed=seed),
    "cnn, colour": lambda seed=0: small_cnn(channels=3, size=13, seed=seed),
    "mlp": lambda seed=0: mlp(64, seed=seed),
    "mlp, reject": lambda seed=0: mlp(64, hidden=(16,), classes=4, reject=1, seed=seed),
    "linear": lambda seed=0: mlp(64, hidden=(), classes=3, seed=seed),
}


@pytest.fixture(params=BUILDS)
def build(request):
    return BUILDS[request.param]


def images(model: nn.Module, n: int = 6) -> torch.Tensor:
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 1)
    size = 13 if channels == 3 else 8
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(2))


# ---- the functions themselves -----------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size", "reject"), [(1, 8, 0), (1, 7, 1), (3, 32, 2)])
def test_the_small_cnn_is_the_formula_of_its_docstring(channels, size, reject):
    model = small_cnn(channels=channels, size=size, reject=reject, seed=5)
    w = dict(model.named_parameters())
    x = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    z = (x - 0.5) / 0.5
    z = functional.conv2d(z, w["body.0.0.weight"], w["body.0.0.bias"], padding=1).clamp_min(0)
    assert z.shape[1:] == (16, size, size)
    z = functional.conv2d(z, w["body.1.0.weight"], w["body.1.0.bias"], stride=2, padding=1)
    z = z.clamp_min(0)
    assert z.shape[1:] == (32, -(-size // 2), -(-size // 2))
    z = (z.flatten(1) @ w["body.2.1.weight"].T + w["body.2.1.bias"]).clamp_min(0)
    assert z.shape[1] == 64
    torch.testing.assert_close(model.features(x), z, atol=1e-6, rtol=1e-5)
    z = z @ w["head.weight"].T + w["head.bias"]
    torch.testing.assert_close(model(x), z, atol=1e-6, rtol=1e-5)


def test_the_small_cnn_has_the_stated_number_of_parameters():
    assert sum(p.numel() for p in small_cnn().parameters()) == 38_282
    assert sum(p.numel() for p in small_cnn(reject=1).parameters()) == 38_282 + 65


def test_the_mlp_is_the_formula_of_its_docstring():
    model = mlp(12, hidden=(7, 5), classes=3, reject=1, seed=2)
    x = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    z = x.flatten(1)
    for layer in (1, 2):
        inner = model.body[layer][0]
        z = (z @ inner.weight.T + inner.bias).clamp_min(0)
    torch.testing.assert_close(model.features(x), z, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model(x), z @ model.head.weight.T + model.head.bias)
    assert [inner[0].out_features for inner in list(model.body)[1:]] == [7, 5]


def test_without_hidden_layers_the_gradient_of_a_logit_is_its_row_of_weights():
    model = mlp(64, hidden=(), classes=3, seed=1)
    x = images(model).requires_grad_()
    for label in range(3):
        (gradient,) = torch.autograd.grad(model(x)[:, label].sum(), x)
        torch.testing.assert_close(
            gradient.flatten(1), model.head.weight[label].expand(6, -1), atol=1e-6, rtol=0
        )


@given(
    mean=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_normalise_subtracts_the_mean_and_divides_by_the_deviation(mean, seed, data):
    std = data.draw(st.lists(st.floats(0.05, 2), min_size=len(mean), max_size=len(mean)))
    x = torch.rand(2, len(mean), 3, 5, generator=torch.Generator().manual_seed(seed))
    got = Normalise(mean, std)(x).double()
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        wanted = (x[:, channel].double() - m) / s
        torch.testing.assert_close(got[:, channel], wanted, atol=1e-5, rtol=1e-5)


def test_the_normalisation_is_inside_and_follows_the_model():
    model = small_cnn()
    assert not [key for key in model.state_dict() if "normalise" in key]
    double = small_cnn().double()
    x = images(model)
    assert double(x.double()).dtype == torch.float64
    torch.testing.assert_close(double(x.double()).float(), model(x), atol=1e-5, rtol=1e-5)
    middle = torch.full((1, 1, 8, 8), 0.5)
    assert model.normalise(middle).abs().max() == 0  # 0.5 is the centre of the pixel range


# ---- the parts agree --------------------------------------------------------------------------


def test_features_head_and_stages_fit_together(build):
    model = build()
    x = images(model)
    with torch.no_grad():
        logits, features, stages = model(x), model.features(x), model.stages(x)
    torch.testing.assert_close(model.head(features), logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(stages[-1].flatten(1), features, atol=1e-6, rtol=0)
    assert len(stages) == len(model.body)
    for before, stage, after in zip([model.normalise(x), *stages], model.body, stages):
        torch.testing.assert_close(stage(before), after, atol=1e-6, rtol=0)
    assert features.shape[1] == model.head.in_features


@pytest.mark.parametrize("reject", [0, 1, 5])
@pytest.mark.parametrize("classes", [2, 10])
def test_the_outputs_are_classes_and_rejects(classes, reject):
    for model in (small_cnn(classes, reject), mlp(64, classes=classes, reject=reject)):
        assert (model.classes, model.reject) == (classes, reject)
        assert model(images(model)).shape == (6, classes + reject)
        assert model.head.out_features == classes + reject


def test_each_sample_is_computed_alone_and_alike_in_both_modes(build):
    model = build()
    x = images(model)
    with torch.no_grad():
        together, trained = model.eval()(x), model.train()(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(together, trained)


def test_a_classifier_needs_no_normalisation():
    model = Classifier([nn.Flatten()], width=4, classes=2)
    x = torch.rand(3, 1, 2, 2)
    assert torch.equal(model.features(x), x.flatten(1))


# ---- seeds ------------------------------------------------------------------------------------


def test_the_seed_decides_the_weights_and_nothing_else_moves(build):
    torch.manual_seed(123)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    one = build(seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy[1])  # noqa: NPY002
    torch.manual_seed(456)
    again, other = build(seed=7).state_dict(), build(seed=8).state_dict()
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert all(not torch.equal(one[key], other[key]) for key in one)


def test_the_weights_have_the_scale_that_pytorch_gives_them():
    weight = mlp(400, hidden=(300,), seed=3).body[1][0].weight
    bound = 1 / 400**0.5  # uniform in +- 1 / sqrt(inputs)
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: small_cnn(classes=1), ("classes", "at least 2", "1")),
        (lambda: small_cnn(reject=-1), ("reject", "at least 0", "-1")),
        (lambda: small_cnn(channels=0), ("channels", "at least 1", "0")),
        (lambda: small_cnn(size=1), ("size", "at least 2", "1")),
        (lambda: mlp(0), ("inputs", "at least 1", "0")),
        (lambda: mlp(-4), ("inputs", "-4")),
        (lambda: mlp(4, classes=0), ("classes", "0")),
        (lambda: mlp(4, reject=-2), ("reject", "-2")),
        (lambda: Classifier([nn.Flatten()], 4, 1), ("classes", "1")),
    ],
)
def test_bad_numbers_are_refused_with_name_and_value(call, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), caught.value


# ---- heads alone, and networks from elsewhere ---------------------------------------------------


def test_a_readout_is_its_matrix():
    weight, bias = torch.randn(5, 3).double(), torch.randn(5).double()
    x = torch.randn(4, 3).double()
    model = readout(weight, bias, reject=2)
    assert torch.allclose(model(x), x @ weight.T + bias)
    assert torch.equal(model.features(x), x) and torch.equal(model.stages(x)[0], x)
    assert (model.classes, model.reject) == (3, 2) and not model.training
    assert torch.equal(readout(weight)(x), x @ weight.T)
    assert readout(weight.float()).head.weight.dtype == torch.float32
    weight.zero_()
    assert model.head.weight.abs().sum() > 0  # a copy


class Elsewhere(nn.Module):
    """A network that is not built like ours: a nested head, and a residual connection."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.top = nn.ModuleDict({"norm": nn.LayerNorm(6), "fc": nn.Linear(6, 5)})

    def forward(self, x):
        maps = self.stem(x)
        h = (maps + x).mean((2, 3))
        return self.top["fc"](self.top["norm"](h))


def test_adapt_finds_what_the_head_receives():
    inner = Elsewhere().eval()
    shift = Normalise([0.5], [0.25])
    model = adapt(inner, "top.fc", reject=1, normalise=shift)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z, h = model(x), model.features(x)
        assert torch.equal(z, inner((x - 0.5) / 0.25))
        by_hand = inner.top["norm"]((inner.stem(shift(x)) + shift(x)).mean((2, 3)))
    assert torch.allclose(h, by_hand, atol=1e-6) and torch.equal(model.stages(x)[0], h)
    assert torch.allclose(model.head(h), z, atol=1e-6)
    assert model.head is inner.top["fc"] and (model.classes, model.reject) == (4, 1)
    assert not inner.top["fc"]._forward_pre_hooks  # nothing is left behind
    probe = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.features(probe).sum(), probe)
    assert gradient.abs().max() > 0


def test_adapt_reads_a_torchvision_network():
    inner = torchvision.models.resnet18(weights=None, num_classes=7).eval()
    model = adapt(inner)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        h = model.features(x)
        assert h.shape == (2, 512) and model.classes == 7
        torch.testing.assert_close(model.head(h), inner(x))
        assert torch.equal(model(x), inner(x))


def test_adapt_leaves_no_hook_after_an_error():
    model = adapt(Elsewhere().eval(), "top.fc")
    with pytest.raises(RuntimeError):
        model.features(torch.rand(2, 3, 8, 8))
    assert not model.head._forward_pre_hooks


@pytest.mark.parametrize("name", ["head", "stem.0", "top"])
def test_a_wrong_head_is_refused_with_the_right_ones(name):
    with pytest.raises(ValueError, match=rf"head must name .*'top\.fc'.*got '{name}'"):
        adapt(Elsewhere(), name)
