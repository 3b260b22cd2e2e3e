"""Each network against its formula written out, and what a seed, a mode and a batch may change."""

import copy
import dataclasses
import functools
import re
import warnings

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.resnet import BasicBlock
from wrappers import Holder

from robustood import (
    attacks,
    data,
    detectors,
    evaluate,
    mining,
    objectives,
    sanity,
    smoothing,
    training,
)
from robustood.detectors import Mahalanobis
from robustood.identity import identity
from robustood.models import (
    STATISTICS,
    Classifier,
    Normalise,
    adapt,
    declared_outputs,
    densenet_bc,
    mlp,
    preact_resnet18,
    readout,
    resnet,
    small_cnn,
    split,
    wide_resnet,
)
from robustood.perturbations import L2, Latent, Linf

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
    # One feature: all of them sum to a constant behind a LayerNorm.
    (gradient,) = torch.autograd.grad(model.features(probe)[:, 0].sum(), probe)
    assert gradient.abs().max() > 1e-3


def test_adapt_reads_a_torchvision_network():
    inner = torchvision.models.resnet18(weights=None, num_classes=7).eval()
    model = adapt(inner)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        h = model.features(x)
        assert h.shape == (2, 512) and model.classes == 7
        torch.testing.assert_close(model.head(h), inner(x))
        assert torch.equal(model(x), inner(x))


# What adapt finds by itself, and whether what stands behind the layer lets it be the head.
FAMILIES = {
    "resnet18": ("fc", 32), "mobilenet_v3_small": ("classifier.3", 32), "vgg11": ("classifier.6", 32),
    "alexnet": ("classifier.6", 64), "densenet121": ("classifier", 32), "efficientnet_b0": ("classifier.1", 32),
    "convnext_tiny": ("classifier.2", 32), "vit_b_16": ("heads.head", 224), "swin_t": ("head", 64),
    "googlenet": ("fc", 32), "inception_v3": ("fc", 80), "shufflenet_v2_x0_5": ("fc", 32),
    "mnasnet0_5": ("classifier.1", 32), "regnet_y_400mf": ("fc", 32),
}  # fmt: skip
QUICK = ("resnet18", "mobilenet_v3_small")


def torchvision_network(name, **how):
    """A network with random weights; a head that starts at zero gets some, so that its outputs differ."""
    if name in ("googlenet", "inception_v3"):
        how["init_weights"] = False
    inner = torchvision.models.get_model(name, weights=None, **how).eval()
    for p in inner.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    return inner


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in FAMILIES]
)
def test_adapt_finds_the_head_of_each_family(name):
    where, size = FAMILIES[name]
    inner = torchvision_network(name)
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    model = adapt(inner)
    with torch.no_grad():
        h = model.features(x)
        torch.testing.assert_close(model.head(h), inner(x))
        assert torch.equal(model(x), inner(x))
    assert model.where == where and h.shape == (2, model.head.in_features)


def test_an_auxiliary_head_is_not_the_head():
    inner = Elsewhere().eval()
    inner.AuxLogits = nn.Linear(6, 5)
    assert adapt(inner).where == "top.fc"
    only = nn.ModuleDict({"auxiliary": nn.Linear(6, 5)})
    assert adapt(only).where == "auxiliary"


def test_a_head_behind_which_something_follows_is_refused():
    """SqueezeNet has a ReLU behind its last convolution."""
    model = adapt(torchvision_network("squeezenet1_1", num_classes=7))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for call in (model, model.features):
        with pytest.raises(ValueError, match=r"head 'classifier\.1' is not .*activation.*MSP"):
            call(x)


class Pixelwise(nn.Module):
    """A head that is a 1 x 1 convolution, before or behind the mean over the pixels."""

    def __init__(self, pool_first, bias=True):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 4, 1, bias=bias)
        self.pool_first = pool_first

    def forward(self, x):
        h = self.stem(x).relu()
        if self.pool_first:
            return self.last(h.mean((2, 3), keepdim=True)).flatten(1)
        return self.last(h).mean((2, 3))


@pytest.mark.parametrize("pool_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_can_be_the_head(pool_first, bias):
    inner = Pixelwise(pool_first, bias)
    model = adapt(inner, reject=1)
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.head(model.features(x)), inner(x))
    assert isinstance(model.head, nn.Linear) and (model.classes, model.reject) == (3, 1)
    assert model.head.weight.data_ptr() == inner.last.weight.data_ptr()
    model.head.weight.sum().backward()  # a view: gradients reach the convolution
    assert torch.equal(inner.last.weight.grad, torch.ones(4, 6, 1, 1))
    y = torch.arange(60) % 3
    for name, detector in detectors.post_hoc(model, x, y).items():
        assert detector.score(x[:7]).isfinite().all(), name


class Inverted(nn.Module):
    """A network that registers its layers in another order than it runs them."""

    def __init__(self, behind=lambda z: z):
        super().__init__()
        self.classify, self.hidden = nn.Linear(16, 5), nn.Linear(64, 16)
        self.behind = behind

    def forward(self, x):
        return self.behind(self.classify(self.hidden(x.flatten(1)).relu()))


@pytest.mark.parametrize("head", [None, "hidden"])
@pytest.mark.parametrize("first", ["forward", "features"])
def test_an_inner_layer_is_refused_with_the_name_of_the_right_one(head, first):
    model = adapt(Inverted(), head)
    for _ in range(2):  # an error is no confirmation
        with pytest.raises(ValueError, match=r"head 'hidden' is not the output.*head='classify'"):
            getattr(model, first)(torch.rand(3, 1, 8, 8))
    assert adapt(Inverted(), "classify").features(torch.rand(3, 1, 8, 8)).shape == (3, 16)


@pytest.mark.parametrize(
    "behind",
    [
        lambda z: z.relu_(), lambda z: z.softmax(1), lambda z: 2 * z, lambda z: z[:, :4],
        lambda z: z.view(-1, 3, 5).mean(1),
    ],
    ids=["ReLU in place", "softmax", "scale", "fewer outputs", "mean of views"],
)  # fmt: skip
def test_what_follows_the_head_is_noticed(behind):
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"head 'classify' is not .*\['classify'\]|\[\].*output="):
        adapt(Inverted(behind), "classify")(x)


def test_a_head_that_runs_twice_or_never_is_refused():
    class Shared(Inverted):
        def forward(self, x):
            return super().forward(x) + super().forward(x.flip(3))

    class Bypassed(Inverted):
        def forward(self, x):
            h = self.hidden(x.flatten(1)).relu()
            return functional.linear(h, self.classify.weight, self.classify.bias)

    for kind, runs in ((Shared, 2), (Bypassed, 0)):
        with pytest.raises(ValueError, match=rf"it ran {runs} times"):
            adapt(kind(), "classify").features(torch.rand(3, 1, 8, 8))


def test_the_head_is_confirmed_by_values_once_and_by_shapes_always():
    inner = Inverted()
    model, x = adapt(inner, "classify"), torch.rand(3, 1, 8, 8)
    model(x * torch.nan)  # whatever is not finite confirms nothing, and is refused by what reads it
    assert not model.confirmed.done
    model(x)
    assert model.confirmed.done and not inner.classify._forward_hooks
    inner.behind = lambda z: z[:, :4]
    with pytest.raises(ValueError, match=r"of shape \(3, 4\)"):
        model.features(x)


def test_a_compiled_network_that_has_run_is_adapted(run_script):
    """Compiled code ignores the hooks that observe layers."""
    printed = run_script("""
        import torch
        from torch import nn
        from robustood.models import adapt

        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3))
        x = torch.rand(2, 1, 8, 8)
        compiled = torch.compile(net, backend="eager")
        compiled(x)
        print(torch.equal(adapt(compiled).features(x), net[:3](x)))
    """)
    assert printed.split() == ["True"]


def test_an_adapted_network_compiles_and_is_traced(run_script):
    """Where there are no values, nothing is compared."""
    printed = run_script("""
        import torch
        from torch import nn
        from robustood.models import adapt

        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3))
        x = torch.rand(2, 1, 8, 8)
        for model in (adapt(net), adapt(net)):
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            print(torch.equal(compiled(x), net(x)), model.confirmed.done)
        print(torch.equal(torch.jit.trace(adapt(net), x)(x), net(x)))
    """)
    assert printed.split() == ["True", "False", "True", "False", "True"]


def test_the_confirmation_is_no_part_of_the_identity_of_a_network():
    model = adapt(Inverted(), "classify")
    before = identity(model=model)
    model(torch.rand(3, 1, 8, 8))
    assert model.confirmed.done and identity(model=model) == before


def test_adapt_leaves_no_hook_after_an_error():
    model = adapt(Elsewhere().eval(), "top.fc")
    with pytest.raises(RuntimeError):
        model.features(torch.rand(2, 3, 8, 8))
    assert not model.head._forward_pre_hooks


@pytest.mark.parametrize("name", ["head", "stem.0", "top"])
def test_a_wrong_head_is_refused_with_the_right_ones(name):
    with pytest.raises(ValueError, match=rf"head must name .*'top\.fc'.*got '{name}'"):
        adapt(Elsewhere(), name)


# ---- networks of published size: numbers --------------------------------------------------------

DEEP = {
    "dense": lambda **more: densenet_bc(16, 4, **more),
    "dense, papers": lambda **more: densenet_bc(16, 4, init="papers", **more),
    "resnet": lambda **more: resnet(8, 8, **more),
    "wide": lambda **more: wide_resnet(16, 1, **more),
    "wide, reject": lambda **more: wide_resnet(10, 2, classes=4, reject=1, **more),
}


@pytest.fixture(params=DEEP)
def deep(request):
    return DEEP[request.param]


def stirred(model: nn.Module) -> nn.Module:
    """In eval mode with batch normalisations that do something."""
    generator = torch.Generator().manual_seed(11)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for value in (norm.weight.data, norm.running_var):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            for value in (norm.bias.data, norm.running_mean):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return model.eval()


def colour(n: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: densenet_bc(), 769_162),
        (lambda: densenet_bc(classes=100), 800_032),
        (lambda: densenet_bc(classes=43, normalise="gtsrb"), 780_481),
        (lambda: densenet_bc(reject=1, init="papers"), 769_505),
        (lambda: densenet_bc(classes=100, reject=1), 800_375),
        (lambda: densenet_bc(40, 12), 176_122),
        (lambda: wide_resnet(16, 2), 691_674),
        (lambda: wide_resnet(16, 4), 2_748_890),
        (lambda: wide_resnet(40, 4), 8_949_210),
        (lambda: wide_resnet(40, 4, reject=1), 8_949_467),
        (lambda: wide_resnet(40, 4, classes=100, reject=1), 8_972_597),
        (lambda: preact_resnet18(), 11_172_170),
        (lambda: resnet(), 272_474),
        (lambda: resnet(8), 78_042),
        (lambda: resnet(8, 32), 308_650),
    ],
)
def test_the_networks_have_the_published_numbers_of_parameters(build, count):
    assert sum(p.numel() for p in build().parameters()) == count


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (densenet_bc, [(24, 32, 32), (108, 16, 16), (150, 8, 8), (342, 8, 8)]),
        (lambda: wide_resnet(10, 2), [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]),
        (lambda: resnet(8), [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        (
            preact_resnet18,
            [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)],
        ),
    ],
)
def test_the_stages_are_the_maps_that_the_docstrings_name(build, shapes):
    model = build().to("meta")
    maps = model.stages(torch.empty(2, 3, 32, 32, device="meta"))
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    assert model.head.in_features == shapes[-1][0]


@pytest.mark.parametrize(
    ("build", "multiplications"),
    [
        (densenet_bc, 0.288e9),
        (lambda: wide_resnet(40, 4), 1.30e9),
        (preact_resnet18, 0.555e9),
        (lambda: densenet_bc(40), 0.072e9),
    ],
)
def test_a_forward_costs_what_is_published(build, multiplications):
    model = build().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(multiplications, rel=0.02)


@pytest.mark.parametrize(
    ("build", "papers"),
    [
        (lambda: densenet_bc(40, 12), None),
        (lambda: densenet_bc(40, 12, init="papers"), (2 / 6) ** 0.5),
        (lambda: densenet_bc(init="papers"), (2 / 16) ** 0.5),
        (lambda: wide_resnet(16, 2), None),
        (lambda: resnet(14), None),
    ],
)
def test_every_convolution_is_drawn_with_the_stated_deviation(build, papers):
    model = build()
    squares, n = 0.0, 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            wanted = papers or (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            # A sample deviation of m normals spreads by 1 / sqrt(2 m), a mean by 1 / sqrt(m).
            assert weight.std().item() == pytest.approx(wanted, rel=5 / (2 * weight.numel()) ** 0.5)
            assert abs(weight.mean().item()) < 5 * wanted / weight.numel() ** 0.5
            squares += (weight / wanted).square().sum().item()
            n += weight.numel()
            assert module.bias is None
    assert squares / n == pytest.approx(1, rel=5 * (2 / n) ** 0.5)
    assert model.head.bias.abs().max() == 0
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)


# ---- networks of published size: the functions themselves ---------------------------------------


def alike(ours: torch.Tensor, wanted: torch.Tensor, share: float = 1e-5) -> None:
    """Differences are measured against the largest value: the papers' weights make large outputs."""
    assert ours.shape == wanted.shape and wanted.abs().max() > 0
    apart = (ours.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert apart <= share, apart.item()


def convolved(x: torch.Tensor, conv: nn.Conv2d, stride: int = 1) -> torch.Tensor:
    return functional.conv2d(x, conv.weight, stride=stride, padding=conv.weight.shape[-1] // 2)


def shifted(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    return x * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]


def activated(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return shifted(x, norm).clamp_min(0)


def centred(x: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor([125.3, 123.0, 113.9]).to(x)[:, None, None]
    return (255 * x - mean) / torch.tensor([63.0, 62.1, 66.7]).to(x)[:, None, None]


def finished(model: Classifier, last: torch.Tensor) -> torch.Tensor:
    return last.mean((2, 3)) @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("init", ["he", "papers"])
def test_a_densenet_layer_sees_all_maps_before_it(init):
    single = stirred(densenet_bc(22, 5, classes=4, reject=1, init=init, seed=3))
    model, x = copy.deepcopy(single).double(), colour().double()
    z = convolved(centred(x), model.body[0])
    alike(model.stages(x)[0], z, 1e-6)  # the normalisation's own numbers are single
    for stage, rest in ((1, 4), (2, 4), (3, 2)):
        parts = list(model.body[stage])
        layers, end = parts[:-rest], parts[-rest:]
        assert len(layers) == (22 - 4) // 6
        maps = [z]
        for norm, _, narrow, norm2, _, wide in layers:
            assert narrow.out_channels == 4 * 5
            h = convolved(activated(torch.cat(maps, 1), norm), narrow)
            maps.append(convolved(activated(h, norm2), wide))
            assert maps[-1].shape[1] == 5
        z = activated(torch.cat(maps, 1), end[0])
        if rest == 4:
            assert end[2].weight.shape == (z.shape[1] // 2, z.shape[1], 1, 1)
            z = convolved(z, end[2])
            z = z.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
        alike(model.stages(x)[stage], z, 1e-6)
    alike(model(x), finished(model, z), 1e-6)
    alike(single(x.float()), finished(model, z))


def copied(oracle: nn.Module, *parts: nn.Module) -> nn.Module:
    """An oracle with our weights; both keep them in the order of use."""
    ours = [value for part in parts for value in part.state_dict().values()]
    oracle.load_state_dict(dict(zip(oracle.state_dict(), ours, strict=True)))
    return oracle.eval()


def test_densenet_is_made_of_torchvisions_blocks():
    model = stirred(densenet_bc(16, 4, seed=4))
    x = model.normalise(colour())
    with torch.no_grad():
        z, width = model.body[0](x), 8
        for stage in model.body[1:3]:
            block = copied(_DenseBlock(2, width, 4, 4, 0.0), *stage[:2])
            width += 8
            z = copied(_Transition(width, width // 2), *stage[2:])(block(z))
            width //= 2
        z = copied(_DenseBlock(2, width, 4, 4, 0.0), *model.body[3][:2])(z)
        z = activated(z, model.body[3][2])
        alike(model(colour()), finished(model, z))


def test_resnet_is_made_of_torchvisions_blocks():
    model = stirred(resnet(14, 9, classes=4, reject=1, seed=4))
    with torch.no_grad():
        z = activated(convolved(centred(colour()), model.body[0][0]), model.body[0][1])
        width = 9
        for stage in list(model.body)[1:]:
            outputs = stage[0].residual[0].out_channels
            stride = 1 if outputs == 9 else 2
            assert len(stage) == 2 and outputs == 9 * 2 ** (list(model.body).index(stage) - 1)
            for block in stage:
                fit = None
                if width != outputs:
                    conv = nn.Conv2d(width, outputs, 1, stride, bias=False)
                    fit = nn.Sequential(conv, nn.BatchNorm2d(outputs))
                z = copied(BasicBlock(width, outputs, stride, fit), block)(z)
                width, stride = outputs, 1
        alike(model(colour()), finished(model, z))


@pytest.mark.parametrize(
    ("build", "widths", "n"),
    [
        (lambda: wide_resnet(10, 3, seed=4), (48, 96, 192), 1),
        (lambda: wide_resnet(16, 1, seed=4), (16, 32, 64), 2),
        (lambda: preact_resnet18(classes=4, reject=1, seed=4), (64, 128, 256, 512), 2),
    ],
)
def test_a_preactivated_block_adds_to_what_it_was_given(build, widths, n):
    model = stirred(build())
    x = colour(2)
    with torch.no_grad():
        z = convolved(centred(x), model.body[0])
        for i, (width, stage) in enumerate(zip(widths, model.body[1:], strict=True)):
            for j, block in enumerate(list(stage)[:n]):
                stride = 2 if i and not j else 1
                norm, _ = block.activate
                first, norm2, _, second = block.residual
                a = activated(z, norm)
                if z.shape[1] != width:
                    z = functional.conv2d(a, block.shortcut.weight, stride=stride)
                else:
                    assert block.shortcut is None
                z = z + convolved(activated(convolved(a, first, stride), norm2), second)
            if width != widths[-1]:
                assert len(stage) == n
                alike(model.stages(x)[i + 1], z)
        z = activated(z, model.body[-1][n])
        alike(model.stages(x)[-1], z)
        alike(model(x), finished(model, z))


# ---- networks of published size: gradients, modes, memory ---------------------------------------


def test_the_parts_of_a_deep_network_agree(deep):
    model, x = stirred(deep()), colour()
    with torch.no_grad():
        maps, features = model.stages(x), model.features(x)
        alike(maps[-1].mean((2, 3)), features)
        alike(model.head(features), model(x))
    assert maps[-1].min() == 0 and maps[-1].max() > 0  # the last map is activated


def test_every_parameter_of_a_deep_network_learns(deep):
    model = deep().train()
    labels = torch.arange(3) % model.classes
    functional.cross_entropy(model(colour()), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("training", [False, True])
def test_no_activation_overwrites_what_a_gradient_needs(deep, training):
    model = stirred(deep()).train(training)
    apart = copy.deepcopy(model)
    for module in apart.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    found = []
    for net in (model, apart):
        x = colour().requires_grad_()
        maps = net.stages(
            x
        )  # read after the whole forward: a stage may not spoil the last one's map
        loss = sum(m.square().mean() for m in maps) + net.head(maps[-1].mean((2, 3))).square().sum()
        found.append(torch.autograd.grad(loss, [x, *net.parameters()]))
    for ours, wanted in zip(*found, strict=True):
        alike(ours, wanted)
    assert found[0][0].abs().max() > 0


def test_the_input_gradient_is_the_slope(deep):
    model = stirred(deep()).double()
    x = colour().double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ends = [model(x + t * way)[:, 1].sum() for t in (1e-7, -1e-7)]
    slope = (ends[0] - ends[1]) / 2e-7
    alike((gradient * way).sum(), slope, 1e-4)


def test_a_deep_network_in_eval_mode_computes_each_image_alone(deep):
    model, x = stirred(deep()), colour(5)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(x[:2]), model(x[2:3]), model(x[3:])])
        alike(alone, together)
        trained = model.train()(x[:2])
    assert (trained - together[:2]).abs().max() > 0.01 * trained.abs().max()


def test_channels_last_is_kept_and_changes_nothing(deep):
    model = stirred(deep())
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = colour()
    turned = x.to(memory_format=torch.channels_last)
    for net, batch in ((model, x), (last, turned)):
        batch.requires_grad_()
        net(batch).square().sum().backward()
    alike(turned.grad, x.grad, 1e-4)
    with torch.no_grad():
        alike(last(turned), model(x), 1e-4)
        for a, b in zip(last.stages(turned), model.stages(x), strict=True):
            assert a.is_contiguous(memory_format=torch.channels_last)
            alike(a, b, 1e-4)


@pytest.mark.parametrize(
    "build", [lambda: densenet_bc(10, 4), lambda: resnet(8, 8), lambda: wide_resnet(10, 1)]
)
def test_a_deep_network_is_one_graph(untyped, build):
    model = stirred(build())
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        alike(whole(colour()), model(colour()))


def test_mahalanobis_sees_the_pixel_means_of_every_stage():
    model = stirred(densenet_bc(10, 6, classes=2))
    x, y = colour(120), torch.arange(120) % 2
    detector = Mahalanobis(model, layers="all").fit(x, y)
    with torch.no_grad():
        pooled = [functional.adaptive_avg_pool2d(m, 1).flatten(1) for m in model.stages(x)]
        assert [h.shape[1] for h in pooled] == [12, 9, 7, 13]
        for ours, h in zip(detector.layer_scores(x).T, pooled, strict=True):
            h = h.double()
            means = torch.stack([h[y == c].mean(0) for c in (0, 1)])
            spread = h - means[y]
            precision = torch.linalg.pinv(spread.T @ spread / len(h), rtol=1e-5, hermitian=True)
            apart = h[:, None] - means
            alike(ours, -0.5 * (apart @ precision * apart).sum(2).amin(1), 1e-3)


# ---- networks of published size: seeds, normalisation, bad input --------------------------------


def test_the_seed_of_a_deep_network_decides_its_weights_and_nothing_else_moves(deep):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = deep(seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(456)
    again, other = deep(seed=7).state_dict(), deep(seed=8).state_dict()
    assert all(torch.equal(one[key], again[key]) for key in one)
    drawn = [key for key in one if one[key].ndim > 1]
    assert all(not torch.equal(one[key], other[key]) for key in drawn)
    assert not [key for key in one if "normalise" in key]


@pytest.mark.parametrize("name", STATISTICS)
def test_a_deep_network_normalises_by_the_named_statistics(name):
    mean, std = (torch.tensor(values)[:, None, None] for values in STATISTICS[name])
    model = stirred(resnet(8, 8, normalise=name))
    plain = stirred(resnet(8, 8, normalise=None))
    with torch.no_grad():
        torch.testing.assert_close(model(colour()), plain((colour() - mean) / std))
    by_module = resnet(8, 8, normalise=Normalise(*STATISTICS[name]))
    torch.testing.assert_close(by_module.normalise(colour()), model.normalise(colour()))


def test_the_statistics_are_those_of_the_papers():
    assert STATISTICS["cifar"][0] == pytest.approx((0.4914, 0.4824, 0.4467), abs=1e-4)
    assert STATISTICS["cifar"][1] == pytest.approx((0.2471, 0.2435, 0.2616), abs=1e-4)
    assert STATISTICS["gtsrb"] == ((0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629))


def test_grey_images_need_their_own_normalisation():
    grey = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    for normalise in (None, Normalise([0.13], [0.31])):
        for model in (
            resnet(8, 8, channels=1, normalise=normalise),
            densenet_bc(10, 2, channels=1, normalise=normalise),
        ):
            assert model.eval()(grey).isfinite().all()


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: densenet_bc(99), ("depth", "6 n + 4", "got 99", "94 and 100")),
        (lambda: densenet_bc(4), ("depth", "at least 10", "got 4")),
        (lambda: densenet_bc(40, 0), ("growth", "at least 1", "got 0")),
        (lambda: densenet_bc(10, init="xavier"), ("init", "'he', 'papers'", "'xavier'")),
        (lambda: densenet_bc(10, classes=1), ("classes", "at least 2", "got 1")),
        (lambda: wide_resnet(20), ("depth", "6 n + 4", "got 20", "16 and 22")),
        (lambda: wide_resnet(16, 0), ("width", "at least 1", "got 0")),
        (lambda: wide_resnet(16.0), ("depth", "whole number", "16.0")),
        (lambda: resnet(18), ("depth", "6 n + 2", "got 18", "14 and 20")),
        (lambda: resnet(2), ("depth", "at least 8", "got 2")),
        (lambda: resnet(8, 7), ("width", "at least 8", "got 7")),
        (lambda: resnet(8, -1), ("width", "at least 8", "-1")),
        (lambda: preact_resnet18(reject=-1), ("reject", "at least 0", "-1")),
        (lambda: resnet(8, channels=0), ("channels", "at least 1", "got 0")),
        (lambda: resnet(8, channels=1), ("normalise", "'cifar'", "3 channels", "channels = 1")),
        (lambda: resnet(8, normalise="svhn"), ("normalise", "'cifar', 'gtsrb'", "'svhn'")),
    ],
)
def test_networks_that_do_not_exist_are_refused(untyped, call, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), caught.value


# ---- what a network says of its outputs --------------------------------------------------------


class Twins(nn.Module):
    """The mean of two networks."""

    def __init__(self, first, second):
        super().__init__()
        self.both = nn.ModuleList([first, second])

    def forward(self, x):
        return (self.both[0](x) + self.both[1](x)) / 2


WRAPPERS = {
    "itself": lambda net: net,
    "DataParallel": nn.DataParallel,
    "Sequential": lambda net: nn.Sequential(nn.Identity(), net),
    "Holder": Holder,
    "nested": lambda net: nn.Sequential(nn.DataParallel(Holder(net))),
    "ensemble": lambda net: Twins(net, copy.deepcopy(net)),
    "function": lambda net: lambda x: net(x),
    "method": lambda net: Holder(net).forward,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_a_network_says_of_its_outputs_is_found_through_wrappers(wrap):
    assert declared_outputs(wrap(small_cnn(classes=4, reject=2))) == (4, 2)
    assert declared_outputs(wrap(small_cnn(classes=7))) == (7, 0)
    z = torch.arange(12.0).view(2, 6)
    classes, reject = split(wrap(small_cnn(classes=4, reject=2)), z)
    assert torch.equal(classes, z[:, :4]) and torch.equal(reject, z[:, 4:])


def test_a_network_that_says_nothing_has_classes_alone():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    assert declared_outputs(plain) == (None, 0)
    z = torch.arange(10.0).view(2, 5)
    assert torch.equal(split(plain, z)[0], z) and split(plain, z)[1].shape == (2, 0)
    plain.reject = 1  # without the number of classes it follows from the width
    assert torch.equal(split(plain, z)[0], z[:, :4])


def test_what_a_wrapper_says_itself_comes_first():
    outer = Holder(small_cnn(classes=4, reject=1))
    outer.classes, outer.reject = 4, 0
    assert declared_outputs(outer) == (4, 0)
    named = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    named.classes, named.reject = ["cat", "dog", "eel"], True  # names and a switch are no numbers
    assert declared_outputs(named) == (None, 0)


def test_outputs_that_contradict_what_is_said_are_refused():
    class First(Holder):
        def forward(self, x):
            return self.net(x)[:, :10]

    for model, z in ((First(small_cnn(reject=1)), 10), (nn.Sequential(small_cnn()), 11)):
        with pytest.raises(ValueError, match=rf"returns {z} outputs.*classes = 10.*models.adapt"):
            split(model, torch.zeros(2, z))
    with pytest.raises(ValueError, match=r"disagree about reject \(\[0, 1\]\).*Twins"):
        declared_outputs(Twins(small_cnn(), small_cnn(reject=1)))


# ---- what a network returns --------------------------------------------------------------------


class Returns(nn.Module):
    """A small network whose outputs are changed on their way out."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = small_cnn(), change

    def forward(self, x):
        return self.change(self.net(x))


Named = type("Named", (), {"__init__": lambda self, z: setattr(self, "logits", z)})
SHAPES = {
    "a dict": (lambda z: {"loss": 0.0, "scores": z}, TypeError, r"dict.*output='scores'"),
    "a tuple": (lambda z: (z, z.mean()), TypeError, "tuple.*output=0"),
    "an object": (Named, TypeError, 'Named.*output="logits"'),
    "nothing": (lambda z: None, TypeError, "NoneType.*models.adapt"),
    "labels": (lambda z: z.argmax(1), ValueError, r"torch.int64 of shape \(\d+,\).*argmax"),
    "a map": (lambda z: z[..., None, None], ValueError, r"\(\d+, 10, 1, 1\).*pool or flatten"),
    "one logit": (lambda z: z[:, :1], ValueError, r"one output.*torch.cat"),
    "one row": (lambda z: z[:1], ValueError, r"shape \((\d+), outputs\) for \1 inputs.*\(1, 10\)"),
    "NaN": (lambda z: z * torch.nan, ValueError, "NaN or infinity for .* inputs"),
    "infinity": (lambda z: z + torch.inf, ValueError, "NaN or infinity for .* inputs"),
}
X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(6))
Y = torch.arange(4)
DOORS = {
    "pgd": lambda m: attacks.pgd(m, X, Y, Linf(0.1), steps=2),
    "fgsm": lambda m: attacks.fgsm(m, X, Y, Linf(0.1)),
    "targets": lambda m: attacks.pgd(m, X, Y, Linf(0.1), steps=1, loss="targets"),
    "robust_accuracy": lambda m: attacks.robust_accuracy(m, X, Y),
    "scores": lambda m: evaluate.scores(detectors.MSP(m), X),
    "attack_score": lambda m: evaluate.attack_score(
        detectors.MSP(m), X, Linf(0.1), direction="raise", steps=2
    ),
    "paper_attack": lambda m: evaluate.paper_attack(
        detectors.MSP(m), X, Linf(0.1), direction="raise", paper="atom"
    ),
    "ood_report": lambda m: evaluate.ood_report(detectors.Energy(m), X, {"a": X}),
    "certify": lambda m: smoothing.certify(m, X, L2(0.1), sigma=0.1, n0=5, n=20, alpha=0.1),
    "predict": lambda m: smoothing.predict(m, X, L2(0.1), sigma=0.1, n=20),
    "mine": lambda m: mining.mine(m, X, 2, 0.0),
}
each_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
FEW = data.Data(data.Split(X, Y), data.Split(X, Y), data.Split(X, Y), X, {"a": X})
TRAINED = {
    "Standard": objectives.Standard(),
    "Adversarial": objectives.Adversarial(0.1, steps=1),
    "TRADES": objectives.TRADES(0.1, steps=1),
    "OutlierExposure": objectives.OutlierExposure(),
    "ALOE": objectives.ALOE(0.1, steps=1),
}
TRAINING = {
    f"fit {name}": lambda m, rule=rule: training.fit(
        m, rule, FEW, epochs=1, batch_size=4, outlier_batch_size=4
    )
    for name, rule in TRAINED.items()
}
MEASURING = {
    "standard": lambda m: evaluate.standard(detectors.MSP(m), X, {"a": X}, 0.1),
    "check": lambda m: sanity.check(detectors.MSP(m), X, X, 0.1),
}


@pytest.mark.parametrize("door", [*DOORS, *MEASURING, *TRAINING])
@pytest.mark.parametrize("name", SHAPES)
def test_every_door_refuses_what_is_no_output(untyped, door, name):
    door = (DOORS | MEASURING | TRAINING)[door]
    if door in TRAINING.values() and name in ("NaN", "infinity"):
        with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
            door(Returns(SHAPES[name][0]))
        return
    change, kind, message = SHAPES[name]
    with pytest.raises(kind, match=message):
        door(Returns(change))


@pytest.mark.parametrize("door", [*DOORS, *TRAINING])
def test_every_door_says_which_number_format_the_weights_have(monkeypatch, door):
    door = (DOORS | TRAINING)[door]
    with pytest.raises(ValueError, match=r"torch.float32 .*weights are torch.float64.*x.to\("):
        door(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double())
    doubled = data.Data(*[data.Split(X.double(), Y)] * 3, X.double(), {"a": X.double()})
    monkeypatch.setitem(globals(), "X", X.double())
    monkeypatch.setitem(globals(), "FEW", doubled)
    with pytest.raises(ValueError, match=r"torch.float64 .*weights are torch.float32.*x.to\("):
        door(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


@pytest.mark.parametrize("name", ["pgd", "fgsm", "targets", "attack_score", "paper_attack"])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "detach"])
def test_an_attack_that_meets_no_gradient_says_so(name, mode):
    net = small_cnn()
    hidden = {"no_grad": torch.no_grad()(net), "inference_mode": torch.inference_mode()(net)}
    model = Returns(lambda z: z)
    model.forward = hidden.get(mode, lambda x: net(x).detach())
    with pytest.raises(RuntimeError, match=r"no gradient.*no_grad.*detached"):
        DOORS[name](model)


class Rounding(nn.Module):
    """A network that hides its gradient from every attack."""

    def __init__(self):
        super().__init__()
        self.net = small_cnn()

    def forward(self, x):
        return self.net((x * 255).round() / 255)


HIDDEN = {name: DOORS[name] for name in ("pgd", "fgsm", "targets", "attack_score", "paper_attack")}
HIDDEN |= {f"fit {name}": TRAINING[f"fit {name}"] for name in ("Adversarial", "TRADES")} | {
    "attacked accuracy": lambda m: attacks.robust_accuracy(
        m, X, Y, lambda m, x, y: attacks.pgd(m, x, y, Linf(0.1), steps=2)
    ),
    "attacked report": lambda m: evaluate.ood_report(
        detectors.MSP(m), X, {"a": X}, Linf(0.1), side="both", steps=2
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_an_attack_on_a_network_that_rounds_warns_of_its_zero_gradients(name):
    with pytest.warns(UserWarning, match="exactly zero for 100 % of 4 inputs"):
        HIDDEN[name](Rounding())


def test_training_looks_for_hidden_gradients_once(book):
    small = dataclasses.replace(book, train=book.train[:128], outliers=book.outliers[:128])
    for objective in (objectives.Adversarial(0.1, steps=2), objectives.ALOE(0.1, steps=2)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            training.fit(Rounding(), objective, small, epochs=3, batch_size=32)
        assert len([each for each in said if "exactly zero" in str(each.message)]) == 1
    # A head that begins with zeros is flat at the first step, and no word is said about it.
    began = small_cnn()
    nn.init.zeros_(began.head.weight)
    training.fit(began, objectives.Adversarial(0.1, steps=2), small, epochs=1, batch_size=32)


def test_one_sample_with_a_gradient_is_enough():
    with pytest.warns(UserWarning, match="exactly zero"):  # one sample that has a gradient: no word
        attacks.pgd(Rounding(), X[:1], Y[:1], Linf(0.1), steps=2)
    sure = small_cnn()
    with torch.no_grad():
        sure.head.bias[3] += 300.0
    assert attacks.pgd(sure, X, Y, Linf(0.1), steps=2).shape == X.shape  # flat for the fourth alone


def test_a_network_that_returns_more_is_adapted():
    net = small_cnn(reject=1)
    expected = net(X)
    where = [
        (lambda z: {"loss": 0.0, "logits": z}, "logits"), (Named, "logits"), (lambda z: (z, 0), 0),
        (lambda z: [None, z], 1), (lambda z: {"a": (z,)}, lambda found: found["a"][0]),
    ]  # fmt: skip
    for change, output in where:
        outer = Returns(change)
        outer.net = net
        model = adapt(outer, head="net.head", reject=1, output=output)
        assert torch.equal(model(X), expected)
        assert torch.equal(model.features(X), net.features(X))
        assert declared_outputs(model) == (10, 1)


@pytest.mark.parametrize("kind", ["Mahalanobis", "KNN", "ViM", "ReAct", "GradNorm"])
def test_a_detector_says_which_part_a_network_does_not_show(kind):
    how = {"k": 1} if kind == "KNN" else {}
    detector = getattr(detectors, kind)(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), **how)
    with pytest.raises(TypeError, match=rf"{kind} needs model\..*Sequential lacks.*models.adapt"):
        detector.fit(X, Y).score(X)


@pytest.mark.parametrize("name", ["KNN", "Mahalanobis", "ViM", "ReAct"])
def test_a_detector_is_not_fitted_to_nan(name):
    net = small_cnn()
    with torch.no_grad():
        net.body[2][1].weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity for 4 of 4 inputs"):
        getattr(detectors, name)(net, **{"k": 1} if name == "KNN" else {}).fit(X, Y)


def test_layers_are_not_combined_over_nan():
    net = small_cnn()
    fitted = detectors.Mahalanobis(net, "all").fit(X, Y // 2)
    with torch.no_grad():
        net.body[2][1].weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity for 8 of 8 inputs"):
        fitted.combine(X, X)


# ---- what a network may do to its input, and what a door may do to a network -------------------


class Shift(nn.Module):
    """x - 1/2, in a new tensor or over the old one."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.sub_(0.5) if self.inplace else x - 0.5


def overwriting(inplace):
    model = small_cnn(reject=1)
    model.normalise = Shift(inplace)
    return model


MORE_DOORS = DOORS | {
    "maximise": lambda m: attacks.maximise(
        lambda v: m(v).logsumexp(1), X, Linf(0.1), steps=3, restarts=0
    ),
    "l2": lambda m: attacks.pgd(m, X, Y, L2(0.5), steps=3, keep="last"),
    "attacked accuracy": HIDDEN["attacked accuracy"],
    "report": lambda m: evaluate.ood_report(
        detectors.RejectClass(m), X, {"a": X}, Linf(0.1), side="both", steps=2
    ).scores["a"],
    "post hoc": lambda m: [
        d.score(X) for d in (
            detectors.Mahalanobis(m, "all", 0.01).fit(X, Y // 2), detectors.KNN(m, 1).fit(X, Y),
            detectors.ViM(m, 2).fit(X), detectors.ReAct(m).fit(X), detectors.GradNorm(m),
            detectors.ODIN(m, step=0.01), detectors.RejectClass(m), detectors.Entropy(m),
        )
    ],
    "certified_score": lambda m: smoothing.certified_score(
        lambda v: 1 + detectors.RejectClass(m).paper_score(v), X, L2(0.1), sigma=0.1, n=10
    ).mean,
}  # fmt: skip


def numbers(found):
    """What a door returns, as one row of numbers."""
    if isinstance(found, list):
        return torch.cat([numbers(each) for each in found])
    if dataclasses.is_dataclass(found):
        return numbers([v for v in vars(found).values() if isinstance(v, (torch.Tensor, float))])
    return torch.as_tensor(found).detach().flatten().double()


@pytest.mark.parametrize("name", [n for n in MORE_DOORS if n != "ood_report"])
def test_a_network_that_works_in_place_gives_the_same_numbers_and_leaves_the_images(name):
    before = X.clone()
    expected = numbers(MORE_DOORS[name](overwriting(inplace=False)))
    assert torch.equal(numbers(MORE_DOORS[name](overwriting(inplace=True))), expected)
    assert torch.equal(X, before)


@each_door
def test_a_transform_of_torchvision_may_work_in_place(door):
    before, net = X.clone(), small_cnn()
    scaling = functools.partial(torchvision.transforms.Normalize, [0.5], [0.25])
    networks = [nn.Sequential(scaling(inplace=inplace), net) for inplace in (False, True)]
    found = [door(network) for network in networks]
    if isinstance(found[0], evaluate.Report):
        found = [torch.cat([torch.as_tensor(v) for v in each.scores.values()]) for each in found]
    assert torch.equal(*map(numbers, found)) and torch.equal(X, before)


@pytest.mark.parametrize("name", ["Standard", "Adversarial", "TRADES", "OutlierExposure", "ALOE", "ATOM", "SOFL",
                                  "ROWL"])  # fmt: skip
def test_a_network_that_works_in_place_is_trained_as_another(book, name):
    rule = getattr(objectives, name)
    objective = rule(0.1) if name in ("Adversarial", "TRADES", "ALOE", "ATOM", "ROWL") else rule()
    data = dataclasses.replace(book, train=book.train[:128], outliers=book.outliers[:128])
    before = data.train.x.clone(), data.outliers.clone()
    trained = [overwriting(inplace) for inplace in (False, True)]
    for model in trained:
        training.fit(model, objective, data, epochs=1)
    assert all(map(torch.equal, *(m.state_dict().values() for m in trained)))
    assert torch.equal(data.train.x, before[0]) and torch.equal(data.outliers, before[1])


def test_the_images_of_a_condition_are_not_overwritten():
    class Greedy:
        latent = 64

        def generate(self, x, u):
            return x.add_(u.mul_(0.1).view_as(x))

    x = 0.2 + 0.6 * X
    before = x.clone()
    within = Latent(Greedy(), 1.0)
    moved = attacks.maximise(lambda v: v.sum((1, 2, 3)), x, within, steps=3, restarts=0)
    assert torch.equal(x, before)
    assert torch.allclose((moved - x).flatten(1).norm(dim=1), torch.full((4,), 0.1), atol=1e-5)


class Plain:
    """A classifier that is no torch module."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)

    def answer(self, x):
        return self.net(x)


CALLED = {
    "function": lambda net: lambda x: net(x),
    "method": lambda net: Plain(net).answer,
    "object": Plain,
    "partial": lambda net: functools.partial(Plain.answer, Plain(net)),
}
CALLED_DOORS = [n for n in DOORS if n != "mine"]


@pytest.mark.parametrize("wrap", CALLED.values(), ids=CALLED)
@pytest.mark.parametrize("name", CALLED_DOORS)
def test_a_network_inside_a_callable_is_frozen_in_eval_mode_and_restored(untyped, wrap, name):
    net = small_cnn(batch_norm=True)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    seen = []
    handle = net.register_forward_hook(
        lambda m, i, o: seen.append((m.training, any(p.requires_grad for p in m.parameters())))
    )
    found = DOORS[name](wrap(net))
    handle.remove()
    assert seen and not any(training or learns for training, learns in seen)
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, DOORS[name](net))


def test_a_padded_convolution_is_no_head():
    """Its border holds the bias alone, so the mean of its outputs is not its value at the mean of its inputs."""
    net = lambda padding: nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1, padding=padding),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for padding in (0, "valid", "same"):
        model = adapt(net(padding))
        assert torch.allclose(model.head(model.features(x)), model(x), atol=1e-6)
    with pytest.raises(ValueError, match="must have a linear layer or a 1 x 1 convolution"):
        adapt(net(1))


def test_a_head_may_be_called_by_keyword_beside_a_layer_of_single_numbers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.head = nn.Linear(3, 64), nn.Linear(64, 5)

        def forward(self, x):
            return self.head(input=x.flatten(1) * self.gate(torch.ones(3)))

    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = adapt(Net())
    assert torch.allclose(model.head(model.features(x)), model(x), atol=1e-6)


def test_a_head_of_its_own_kind_may_take_more_than_its_input():
    class Scaled(nn.Linear):
        def forward(self, input, scale=1.0):
            return scale * super().forward(input)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Scaled(64, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.inner(x.flatten(1), 2.0).relu())

    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = adapt(Net(), head="head")
    assert torch.allclose(model.head(model.features(x)), model(x), atol=1e-6)


@pytest.mark.parametrize(
    ("returned", "output"),
    [(lambda z: z, "logits"), (lambda z: {"a": z}, "logits"), (lambda z: (z,), 3)],
)
def test_an_output_that_is_not_there_is_named(returned, output):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 5)

        def forward(self, x):
            return returned(self.head(x.flatten(1)))

    model = adapt(Net(), head="head", output=output)
    with pytest.raises(ValueError, match=f"output={output!r} is not in what the network returns"):
        model(torch.rand(2, 1, 8, 8))
