"""The one training loop: what it computes, that it repeats, and that it stops and goes on well."""

import csv
import dataclasses
import math
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from robustood import training
from robustood.data import Augment, Data, Split, compress, digits, draw, pixels
from robustood.detectors import MSP
from robustood.evaluate import scores
from robustood.metrics import auroc
from robustood.models import Classifier, mlp, small_cnn
from robustood.objectives import Adversarial, OutlierExposure, Standard
from robustood.training import Schedule, fit


@pytest.fixture(scope="module")
def data():
    return digits(train=320)


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def noisy():
    """A model with dropout and batch statistics."""
    torch.manual_seed(5)
    layers = [nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)]
    return Classifier([nn.Sequential(*layers)], 16, 10)


def test_plain_gradient_descent_by_hand(data):
    """One full batch a step, no warm-up: w - lr(step) grad(w), and the last rate is zero."""
    model, reference = mlp(64, (), 10), mlp(64, (), 10)
    fit(
        model,
        Standard(),
        data,
        epochs=3,
        batch_size=320,
        lr=0.5,
        warmup=0,
        optimiser=torch.optim.SGD,
    )
    for step in range(3):
        loss = nn.functional.cross_entropy(reference(data.train.x), data.train.y)
        reference.zero_grad()
        loss.backward()
        rate = 0.25 * (1 + math.cos(math.pi * (step + 1) / 3))
        with torch.no_grad():
            for p in reference.parameters():
                p -= rate * p.grad
    assert torch.allclose(vector(model), vector(reference), atol=1e-6)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [Schedule(4, 25, 2.0, 0.2).rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[18] == pytest.approx(1.9)
    assert max(rates) == pytest.approx(2.0) and rates.index(max(rates)) == 19
    assert rates[59] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.0)
    assert all(rates[k] > rates[k + 1] for k in range(20, 99))


def test_milestones_replace_the_cosine():
    rates = [Schedule(4, 25, 2.0, 0.0, (0.5, 0.75, 0.9)).rate(step) for step in range(100)]
    steps = [rates[k] for k in (0, 49, 50, 74, 75, 89, 90, 99)]
    assert steps == pytest.approx([2, 2, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002])


def test_8_bit_images_train_as_their_floats_do(data):
    """Also with an augmentation, which sees the 8-bit images."""
    images = Split((data.train.x * 255).round().byte(), data.train.y)
    bytes_ = dataclasses.replace(data, train=images, outliers=(data.outliers * 255).round().byte())
    floats = dataclasses.replace(
        data, train=Split(images.x.float() / 255, images.y), outliers=bytes_.outliers.float() / 255
    )
    weights = []
    for given in (bytes_, floats):
        fit(model := small_cnn(), OutlierExposure(), given, epochs=2, augment=Augment(1))
        weights.append(vector(model))
    assert torch.allclose(*weights, atol=1e-6)
    assert not torch.allclose(weights[0], vector(small_cnn()), atol=1e-2)


@pytest.fixture(scope="module")
def leaky():
    """Lossless images, and outliers of the very same kind that only differ by JPEG."""
    noise = torch.Generator().manual_seed(0)
    coarse = torch.rand(1200, 3, 8, 8, generator=noise)
    x = nn.functional.interpolate(coarse, size=16, mode="bicubic")
    x = ((x + 0.15 * torch.randn(x.shape, generator=noise)).clamp(0, 1) * 255).byte()
    y = (coarse[:, 0].mean((1, 2)) > coarse[:, 1].mean((1, 2))).long()
    test = Split(x[1000:1100], y[1000:1100])
    outliers = {"same kind": compress(x[1100:], 75)}
    return Data(Split(x[:500], y[:500]), test, test, compress(x[500:1000], 75), outliers)


def test_compression_leaks_and_twins_weaken_the_leak(leaky):
    """With nothing else to learn, outlier exposure learns "JPEG or not".

    With twins half of the inputs are JPEG too, and JPEG says little; what is left of the leak is
    that lossless images are still inputs without exception.
    """
    inputs, twins = leaky.train.x, compress(leaky.train.x, 75)
    ways = {
        "lossless": leaky,
        "twins": dataclasses.replace(leaky, compressed=twins),
        "all JPEG": dataclasses.replace(leaky, train=Split(twins, leaky.train.y)),
    }
    found = {}
    for name, data in ways.items():
        model = small_cnn(2, channels=3, size=16, batch_norm=True)
        fit(model, OutlierExposure(), data, epochs=10, batch_size=50, outlier_batch_size=50)
        score = partial(scores, MSP(model))
        found[name] = auroc(score(pixels(data.test.x)), score(pixels(data.ood["same kind"])))
    assert torch.equal(leaky.train.x, inputs)
    assert found["lossless"] > 0.85, found
    assert found["twins"] < found["lossless"] - 0.1, found
    assert 0.3 < found["all JPEG"] < 0.65, found


def test_learns_the_digits():
    data, model = digits(), small_cnn()
    history = fit(model, Standard(), data, epochs=12)
    accuracy = (model(data.test.x).argmax(1) == data.test.y).float().mean().item()
    assert accuracy > 0.93 and history.rows[-1]["loss"] < 0.15 and not model.training
    assert history.finished and history.column("epoch") == list(range(12))


@pytest.mark.parametrize("objective", [Standard(), Adversarial(0.1, steps=2)], ids=repr)
def test_repeats_bit_for_bit_and_leaves_the_global_generator_alone(data, objective):
    runs = []
    for seed in (0, 0, 1):
        model, state = noisy(), torch.get_rng_state()
        fit(model, objective, data, epochs=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(seed + 7)  # whatever happens outside
        runs.append(vector(model))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_an_epoch_draws_each_sample_once_and_outliers_evenly(data):
    x = torch.arange(10.0)[:, None]
    few = Data(Split(x, torch.arange(10)), data.val, data.test, outliers=torch.arange(3.0)[:, None])
    batches = list(draw(few, 4, 5, torch.Generator().manual_seed(0)))
    seen = torch.cat([b.y for b in batches])
    assert len(batches) == 2 and len(seen.unique()) == 8
    assert all(torch.equal(b.x[:, 0].long(), b.y) for b in batches)
    outliers = torch.cat([b.outliers[:, 0] for b in batches])
    assert len(outliers) == 10
    assert sorted(outliers[:3].tolist()) == [0, 1, 2] == sorted(outliers[3:6].tolist())
    without = dataclasses.replace(few, outliers=x[:0])
    assert next(draw(without, 4, 5, torch.Generator())).outliers is None


def test_the_monitor_sees_the_model_as_it_will_be(data, tmp_path):
    seen = []

    def monitor(model):
        seen.append(vector(model))
        torch.rand(3)  # a monitor may be careless
        return {"training": float(model.training), "norm": np.float64(vector(model).norm())}

    model = noisy()
    history = fit(model, Standard(), data, epochs=3, monitor=monitor, run_dir=tmp_path)
    assert history.column("training") == [0, 0, 0] and torch.equal(seen[-1], vector(model))
    silent = noisy()
    fit(silent, Standard(), data, epochs=3)
    assert torch.equal(vector(silent), vector(model))
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["norm"]) for row in rows] == pytest.approx(history.column("norm"))


def test_stops_in_time_and_goes_on_to_the_same_bits(data, tmp_path, monkeypatch):
    """A clock that ticks a minute a look: the run stops inside an epoch, again and again."""
    whole = noisy()
    expected = fit(whole, Adversarial(0.1, steps=1), data, epochs=3, run_dir=tmp_path / "a")
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "monotonic", lambda: 60.0 * next(ticks))
    stops = 0
    while True:
        model = noisy()
        history = fit(
            model, Adversarial(0.1, steps=1), data, epochs=3, run_dir=tmp_path / "b",
            minutes=6,
        )  # fmt: skip
        if history.finished:
            break
        stops += 1
        assert stops < 40
    assert stops > 3
    assert torch.equal(vector(model), vector(whole))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), whole.buffers(), strict=True))
    assert history.column("loss") == expected.column("loss")


def test_keeps_a_real_budget(data):
    model, start = small_cnn(), time.monotonic()
    history = fit(model, Standard(), data, epochs=100_000, minutes=0.02)
    assert not history.finished and time.monotonic() - start < 1.2 + 30 and not model.training


def test_a_finished_run_is_read_not_repeated(data, tmp_path, monkeypatch):
    first = noisy()
    history = fit(first, Standard(), data, epochs=2, run_dir=tmp_path)
    again = noisy()

    def never(*_, **__):
        raise RuntimeError("a step was taken")

    monkeypatch.setattr(training, "draw", never)
    read = fit(again, Standard(), data, epochs=2, run_dir=tmp_path)
    assert torch.equal(vector(first), vector(again)) and read.rows == history.rows


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"epochs": 3}, "epochs = 2, not 3"),
        ({"seed": 1}, "seed = 0, not 1"),
        (
            {"objective": Adversarial(0.1)},
            r"objective = robustood\.objectives\.Standard, not robustood\.objectives\.Adversarial",
        ),
        ({"data": digits(train=256)}, r"data\[0\] = torch.float32 \(320, .*, not .* \(256, "),
        ({"lr": 0.1}, "lr = 0.003, not 0.1"),
        ({"warmup": 0.5}, "warmup = 0.15, not 0.5"),
        (
            {"optimiser": partial(torch.optim.Adam, betas=(0.8, 0.9))},
            r"optimiser\.betas = \(0\.9, 0\.999\), not \(0\.8, 0\.9\)",
        ),
        ({"model": small_cnn()}, r"model\.body = .*ModuleList of 0, not .*ModuleList of 0, 1, 2"),
    ],
)
def test_another_run_in_the_folder_is_refused(data, tmp_path, changed, words):
    settings = {"objective": Standard(), "data": data, "epochs": 2, "seed": 0, "run_dir": tmp_path}
    fit(noisy(), **settings)
    with pytest.raises(ValueError, match=f"run_dir .* holds a run with {words}"):
        fit(**({"model": noisy()} | settings | changed))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_weights(data, tmp_path):
    class Breaking(Standard):
        def __call__(self, model, batch):
            loss = super().__call__(model, batch)
            return loss * torch.nan if batch.progress >= 0.5 else loss

    model, half = small_cnn(), small_cnn()
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 10 \(epoch 2\).*Lower lr"):
        fit(model, Breaking(), data, epochs=4, run_dir=tmp_path)
    assert vector(model).isfinite().all() and not model.training
    # The state on disk is that of the last good epoch too: a second try ends alike.
    with pytest.raises(FloatingPointError):
        fit(half, Breaking(), data, epochs=4, run_dir=tmp_path)
    assert torch.equal(vector(half), vector(model))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"epochs": 0}, "epochs must be .* at least 1, got 0"),
        ({"lr": -1.0}, "lr must be .* got -1"),
        ({"warmup": 1.5}, "warmup must be .* got 1.5"),
        ({"minutes": -1}, "minutes must be .* got -1"),
        ({"batch_size": 0}, "batch_size must be .* got 0"),
    ],
)
def test_bad_settings_are_refused_before_any_step(data, changed, words):
    model = small_cnn()
    before = vector(model)
    with pytest.raises(ValueError, match=words):
        fit(model, Standard(), data, **({"epochs": 1} | changed))
    assert torch.equal(vector(model), before)


def test_bad_data_are_refused(data):
    wrong = dataclasses.replace(data, train=Split(data.train.x, data.train.y + 1))
    with pytest.raises(
        ValueError, match=r"data\.train\.y lies in \[1, 10\]; labels count from 0 to 9"
    ):
        fit(small_cnn(), Standard(), wrong, epochs=1)
    broken = dataclasses.replace(data, train=Split(data.train.x * torch.nan, data.train.y))
    with pytest.raises(ValueError, match=r"data\.train\.x contains NaN"):
        fit(small_cnn(), Standard(), broken, epochs=1)


def test_weights_that_are_not_finite_stop_too(data, tmp_path):
    """A loss can be finite where its gradient is not: the root of zero."""

    class Rooted(Standard):
        def __call__(self, model, batch):
            root = (0 * model.head.weight.sum()).sqrt() if batch.progress >= 0.5 else 0
            return super().__call__(model, batch) + root

    model = small_cnn()
    with pytest.raises(FloatingPointError, match=r"(weights are not finite|loss is nan) at step"):
        fit(model, Rooted(), data, epochs=4, run_dir=tmp_path)
    assert vector(model).isfinite().all()


def test_a_monitor_that_fails_costs_no_step(data, tmp_path):
    """The first run stops at its first monitor; the second one goes on from there to the same bits."""
    whole, model = noisy(), noisy()
    fit(whole, Standard(), data, epochs=2)
    with pytest.raises(ZeroDivisionError):
        fit(model, Standard(), data, epochs=2, monitor=lambda net: 1 / 0, run_dir=tmp_path)
    assert (tmp_path / "state.pt").exists()

    again = noisy()
    history = fit(
        again, Standard(), data, epochs=2, monitor=lambda net: {"a": 1.0}, run_dir=tmp_path
    )
    assert torch.equal(vector(again), vector(whole)) and history.column("a") == [1, 1]


def test_a_choice_of_data_by_other_data_is_part_of_the_run(data, tmp_path):
    """An objective that prepares may read the held-out images; one that does not is not asked about them."""

    class Choosing(Standard):
        def prepare(self, model, data, epoch, generator):
            return dataclasses.replace(data, notes={"mean": float(data.val.x.mean())})

    other = dataclasses.replace(data, val=Split(1 - data.val.x, data.val.y))
    for objective in (Standard(), Choosing()):
        folder = tmp_path / type(objective).__name__
        fit(noisy(), objective, data, epochs=1, run_dir=folder)
        if isinstance(objective, Choosing):
            with pytest.raises(ValueError, match=r"holds a run with chosen_from\[.*val.*\]\.x = "):
                fit(noisy(), objective, other, epochs=1, run_dir=folder)
        else:
            fit(noisy(), objective, other, epochs=1, run_dir=folder)


@pytest.mark.parametrize(
    ("loss", "seen"),
    [(lambda m, b: m(b.x).square().sum(1), "tensor"), (lambda m, b: 0.5, "0.5")],
)
def test_a_loss_that_is_no_scalar_is_refused(data, loss, seen):
    with pytest.raises(ValueError, match=rf"objective must return a scalar tensor, got {seen}"):
        fit(small_cnn(), loss, data, epochs=1)


def test_a_monitor_may_not_take_the_loops_names(data):
    with pytest.raises(ValueError, match=r"other names than \['loss'\]"):
        fit(small_cnn(), Standard(), data, epochs=1, monitor=lambda model: {"loss": 1.0})


def test_images_outside_the_box_and_strange_outliers_are_refused(data):
    bright = dataclasses.replace(data, train=Split(data.train.x * 255, data.train.y))
    with pytest.raises(ValueError, match=r"data\.train\.x lies in \[0, 255\]"):
        fit(small_cnn(), Standard(), bright, epochs=1)
    with pytest.raises(ValueError, match=r"data\.outliers contains NaN"):
        fit(
            small_cnn(),
            Standard(),
            dataclasses.replace(data, outliers=data.outliers * torch.nan),
            epochs=1,
        )
    wide = torch.rand(10, 1, 9, 9)
    with pytest.raises(
        ValueError, match=r"data\.outliers must have samples shaped like those of data\.train\.x"
    ):
        fit(small_cnn(), Standard(), dataclasses.replace(data, outliers=wide), epochs=1)


def test_a_split_of_unequal_lengths_is_refused(data):
    with pytest.raises(ValueError, match="x and y must have the same length, got 320 and 3"):
        Split(data.train.x, data.train.y[:3])


def test_a_network_whose_outputs_have_no_gradient_is_not_trained(book):
    net = small_cnn()
    hidden = net.forward
    net.forward = lambda x: hidden(x).detach()
    with pytest.raises(RuntimeError, match=r"loss has no gradient.*no_grad.*detached"):
        fit(net, Standard(), book, epochs=1)


def test_a_network_that_returns_a_tuple_is_not_trained(book):
    net = small_cnn()
    hidden = net.forward
    net.forward = lambda x: (hidden(x), x)
    with pytest.raises(TypeError, match=r"tuple; extract it with models\.adapt.*output=0"):
        fit(net, Standard(), book, epochs=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": lambda x: x}, "model must be a torch.nn.Module"),
        ({"model": nn.Identity()}, r"no parameter that requires a gradient.*requires_grad_\(True\)"),
        ({"model": small_cnn().requires_grad_(False)}, "nothing to learn"),
        ({"objective": Standard}, r"an instance such as Standard\(\.\.\.\), got <class"),
        ({"objective": None}, r"objective must be an instance.*got None"),
        ({"data": [(0, 1)]}, r"data.Data, such as Data\(train=Split.*got list"),
        ({"data": torch.utils.data.DataLoader([0, 1])}, r"data.Data, such as .* got DataLoader"),
        ({"optimiser": torch.optim.SGD(small_cnn().parameters(), 0.1)}, r"partial.*got SGD"),
        ({"optimiser": "adam"}, "optimiser must be a callable.*got str"),
        ({"monitor": lambda model: None}, r"monitor must return a dict of numbers.*got None"),
        ({"monitor": lambda model: 0.9}, r"a dict of numbers.*got 0\.9"),
        ({"monitor": lambda model: {"a": "high"}}, r"a dict of numbers.*got \{'a': 'high'\}"),
    ],
)  # fmt: skip
def test_parts_of_the_wrong_kind_are_refused_with_what_to_pass(untyped, book, changed, message):
    how = {"model": small_cnn(), "objective": Standard(), "data": book, "epochs": 1} | changed
    with pytest.raises(ValueError, match=message):
        fit(**how)
