"""Each check finds its symptom with the right number, stays silent without it, and leaves the model as it was."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from torch import nn

from robustood import sanity
from robustood.attacks import fgsm, pgd
from robustood.detectors import MSP, Detector, Energy, RejectClass, post_hoc, wrap
from robustood.evaluate import attack_score
from robustood.metrics import threshold_at_tpr
from robustood.models import mlp, readout, small_cnn
from robustood.objectives import ALOE, ATOM, Adversarial, Standard
from robustood.perturbations import L2, Corruption, Linf, Spatial
from robustood.sanity import Finding, Findings, check, zoo
from robustood.training import fit

EPS = 0.1
ROWS = torch.Generator().manual_seed(3)
WEIGHT, BIAS = torch.randn(3, 16, generator=ROWS), torch.randn(3, generator=ROWS)
X = 0.3 + 0.4 * torch.rand(20, 1, 4, 4, generator=ROWS)
U = 0.3 + 0.4 * torch.rand(16, 1, 4, 4, generator=ROWS)
LINEAR = readout(WEIGHT, BIAS)
Y = LINEAR(X).argmax(1)
quick = partial(check, steps=5)


def flagged(findings):
    return {each.check for each in findings if each.level != "ok"}


def before(layer, model=LINEAR):
    """A classifier behind a layer."""
    return nn.Sequential(layer, model).eval()


class Layer(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Scored(Detector):
    """A detector with any score and any attack objective."""

    def __init__(self, score, climbed=None, model=LINEAR):
        super().__init__(model)
        self.own, self.climbed = score, climbed

    def score(self, x):
        return self.own(x)

    def attack_objectives(self, x, direction="raise"):
        values = (self.climbed or self.own)(x)
        return (values if direction == "raise" else -values)[:, None]


def top(x):
    return LINEAR(x).amax(1)


# --- the findings


FOUND = Findings(
    (
        Finding("ok", "ties", 0.0, "0% of the inputs tie"),
        Finding("warning", "steps", 0.25, "not converged; use more steps"),
        Finding("error", "gradient", 1.0, "no gradient; remove the rounding"),
    )
)


def test_findings_are_found_by_name_and_by_level():
    assert FOUND["steps"].value == 0.25 and len(FOUND) == 3
    assert [each.check for each in FOUND] == ["ties", "steps", "gradient"]
    assert [each.check for each in FOUND.errors] == ["gradient"]
    assert [each.check for each in FOUND.warnings] == ["steps"]
    assert "ties" in FOUND and "radius" not in FOUND
    with pytest.raises(KeyError, match="no finding named 'radius'; these checks were made: ties"):
        FOUND["radius"]


def test_the_table_begins_with_the_errors():
    lines = str(FOUND).splitlines()
    assert [line.split()[0] for line in lines] == ["level", "error", "warning", "ok"]
    assert lines[1] == "error    gradient  1      no gradient; remove the rounding"
    assert "<td>not converged; use more steps</td>" in FOUND._repr_html_()


def test_findings_survive_json(untyped):
    assert Findings.from_dict(json.loads(json.dumps(FOUND.to_dict()))) == FOUND
    real = quick(LINEAR, X, Y, EPS)
    assert Findings.from_dict(json.loads(json.dumps(real.to_dict()))) == real
    with pytest.raises(ValueError, match="must have the keys level, value and text"):
        Findings.from_dict({"ties": {"level": "ok"}})
    with pytest.raises(ValueError, match="level must be one of 'error', 'warning', 'ok'"):
        Findings.from_dict({"ties": {"level": "bad", "value": 0.0, "text": ""}})


# --- honest models have no findings


def test_a_linear_classifier_has_no_findings_and_all_checks_are_made():
    found = quick(LINEAR, X, Y, EPS)
    assert not flagged(found)
    assert [each.check for each in found] == [
        "inputs", "randomness", "batch", "train_mode", "probabilities", "ties", "normalisation", "saturation",
        "gradient", "ascent", "no_op", "steps", "restarts", "radius", "large_radius", "black_box", "transfer",
        "eight_bits",
    ]  # fmt: skip
    counted = [each for each in found if each.check not in ("large_radius", "normalisation")]
    assert all(each.value == 0 for each in counted)


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 64])
def test_few_samples_raise_no_alarm(samples):
    assert not flagged(quick(LINEAR, X, Y, EPS, samples=samples))
    assert not flagged(quick(Energy(LINEAR), X, U, EPS, samples=samples))


@pytest.mark.parametrize("within", [L2(0.3), Linf(0.3, box=None), Linf(8 / 255), 0.5, 1.0])
def test_other_sets_raise_no_alarm(within):
    assert not flagged(quick(LINEAR, X, Y, within))
    assert not flagged(quick(MSP(LINEAR), X, U, within))


def test_vectors_raise_no_alarm():
    model, source = mlp(6, (32,), 3, seed=1).eval(), torch.Generator().manual_seed(0)
    x, u = torch.randn(60, 6, generator=source), 4 * torch.randn(60, 6, generator=source)
    within = Linf(0.3, box=None)
    assert not flagged(quick(model, x, model(x).argmax(1), within))
    assert not flagged(quick(MSP(model), x, u, within))


def test_large_images_raise_no_alarm():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 16, stride=16), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)
    ).eval()
    x = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert not flagged(quick(model, x, model(x).argmax(1), 8 / 255, samples=4))


def test_a_finite_set_has_no_checks_by_gradient():
    found = check(
        small_cnn(3), torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]), Corruption(["fog"], [1])
    )
    assert not flagged(found)
    assert "gradient" not in found and "no_op" not in found and "ties" in found


def test_a_set_of_warps_is_checked_without_a_ball():
    found = quick(LINEAR, X, Y, Spatial(10.0, 1.0))
    assert "radius" not in found and "large_radius" not in found and found["gradient"].level == "ok"


# --- each symptom


def test_a_constant_model_is_left_as_it_was():
    constant = before(Layer(lambda x: 0 * x))
    found = quick(constant, X, torch.zeros(20, dtype=torch.int64), EPS)
    assert found["no_op"].value == 1 and found["no_op"].level == "error"
    assert found["gradient"].value == 1 and found["gradient"].level == "error"
    assert found["no_op"].text.startswith("the white-box attack leaves 100% of the inputs as they")


@pytest.mark.parametrize("dead", [0, 1, 4, 20])
def test_the_share_of_zero_gradients_is_counted(dead):
    """The gradient of some inputs is cut: those whose first pixel is marked."""
    x = X.clone()
    x[:, 0, 0, 0] = 0.5
    x[:dead, 0, 0, 0] = 0.9
    cut = before(Layer(lambda v: torch.where(v[:, :, :1, :1] > 0.7, 0 * v + 0.5, v)))
    found = quick(cut, x, Y, 0.05)
    assert found["gradient"].value == dead / 20
    assert found["gradient"].level == {0: "ok", 1: "ok", 4: "warning", 20: "error"}[dead]


def test_a_gradient_that_is_not_finite_is_an_error():
    root = Scored(lambda x: top(x) + 0 * (x - x.detach()).abs().sqrt().sum((1, 2, 3)))
    found = quick(root, X, U, EPS)
    assert found["gradient"].level == "error" and "not finite" in found["gradient"].text
    assert found["gradient"].value == 1


@pytest.mark.parametrize(
    "score",
    [
        lambda x: top(x).detach(),
        lambda x: torch.from_numpy(top(x).detach().numpy()),
        lambda x: torch.from_numpy(x.numpy().sum((1, 2, 3))),
    ],
    ids=["detached", "numpy", "numpy only"],
)
def test_a_score_without_gradient_is_named(score):
    found = quick(Scored(score), X, U, EPS)
    assert found["gradient"].level == "warning" and found["gradient"].value == 1
    assert "search without gradients" in found["gradient"].text
    assert flagged(found) == {"gradient"} and "no_op" not in found


def test_a_wrong_gradient_is_found():
    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            return -grads[0]

    found = quick(before(Layer(Turned.apply)), X, Y, EPS)
    assert found["ascent"].value == 1 and found["ascent"].level == "error"
    assert found["black_box"].level == "error"


@pytest.mark.parametrize(("factor", "level"), [(1, "ok"), (1e4, "error")])
def test_saturated_logits_are_found(factor, level):
    found = quick(nn.Sequential(LINEAR, Layer(lambda z: factor * z)).eval(), X, Y, EPS)
    lead = factor * LINEAR(X).topk(2, 1).values.diff(dim=1).abs()[:, 0]
    assert found["saturation"].value == float((lead > 104).double().mean())
    assert found["saturation"].level == level
    assert found["gradient"].level == "ok"  # the margin's


def test_ties_are_counted_where_a_threshold_can_fall():
    scores = lambda marks: Scored(lambda x: top(x) * 1e-3 + marks(x))
    free = quick(scores(lambda x: 0 * x.sum((1, 2, 3))), X, U, EPS)
    assert free["ties"].value == 0
    whole = quick(Scored(lambda x: top(x).clamp(max=-100.0)), X, U, EPS)
    assert whole["ties"].value == 1 and whole["ties"].level == "error"
    few = X.clone()
    few[:2] = 0.4  # the same input twice is no tie
    few[2:5, 0, 0, 0] = 0.95
    clip = Scored(lambda x: torch.where(x[:, 0, 0, 0] > 0.9, 0 * top(x), 1 + top(x).exp()))
    found = quick(clip, few, U, 0.01)
    assert found["ties"].value == 3 / 36 and found["ties"].level == "warning"
    outliers = U.clone()
    outliers[:9, 0, 0, 0] = 0.95  # outliers that tie among themselves shift no threshold
    assert quick(clip, X, outliers, 0.01)["ties"].value == 0


def test_randomness_is_found():
    found = quick(before(Layer(lambda x: x + 0.05 * torch.randn_like(x))), X, Y, EPS)
    assert found["randomness"].value == 1 and found["randomness"].level == "error"
    assert "batch" not in found
    assert quick(before(Layer(lambda x: x + 0.05)), X, Y, EPS)["randomness"].value == 0


def test_noise_that_depends_on_the_place_in_the_batch_is_found():
    def seeded(x):
        return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    found = quick(before(Layer(seeded)), X, Y, EPS)
    assert found["randomness"].value == 0
    assert found["batch"].value == 1 and found["batch"].level == "error"


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(1), nn.Dropout(0.5)], ids=["norm", "dropout"])
def test_train_mode_is_found_and_eval_mode_is_not(layer):
    model = before(layer)
    assert quick(model, X, Y, EPS)["train_mode"].level == "ok"
    found = quick(model.train(), X, Y, EPS)
    assert found["train_mode"].value == 1 and found["train_mode"].level == "error"
    assert f"1 modules are in train mode ({type(layer).__name__})" in found["train_mode"].text
    assert quick(copy.deepcopy(LINEAR).train(), X, Y, EPS)["train_mode"].level == "ok"


def test_a_module_in_train_mode_counts_once():
    """Although the detector reaches it as its model and through its score."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(X[0].numel()), nn.Linear(X[0].numel(), 3))
    detector = wrap(lambda x: model(x).logsumexp(1), higher="in", model=model.train())
    assert quick(detector, X, U, EPS)["train_mode"].text.startswith("1 modules are in train mode")


def test_statistics_of_the_batch_are_found_in_eval_mode():
    model = before(nn.BatchNorm2d(1, track_running_stats=False))
    found = quick(model, X, Y, EPS)
    assert found["batch"].value == 1 and found["train_mode"].level == "ok"


def test_probabilities_are_found_and_their_logarithms_are_not():
    assert quick(nn.Sequential(LINEAR, nn.Softmax(1)).eval(), X, Y, EPS)["probabilities"].value == 1
    assert (
        quick(MSP(nn.Sequential(LINEAR, nn.Softmax(1)).eval()), X, U, EPS)["probabilities"].level
        == "error"
    )
    assert (
        quick(nn.Sequential(LINEAR, nn.LogSoftmax(1)).eval(), X, Y, EPS)["probabilities"].value == 0
    )


def test_inputs_that_are_no_pixels_are_found_before_any_attack():
    for wrong in (2 * X - 1, 255 * X):
        found = quick(LINEAR, wrong, Y, EPS)
        assert flagged(found) >= {"inputs"} and "gradient" not in found
    low, high = (float(v) for v in (2 * X - 1).aminmax())
    assert quick(LINEAR, 2 * X - 1, Y, EPS)["inputs"].value == pytest.approx(max(-low, high - 1))
    vectors = quick(readout(WEIGHT), (4 * X).flatten(1), Y, Linf(EPS, box=None))
    assert vectors["inputs"].level == "ok"


def test_a_model_that_wants_standardised_inputs_is_found():
    std, mean = torch.std_mean(X)
    model = readout(WEIGHT)
    y = model((X - mean) / std).argmax(1)
    found = quick(model, X, y, EPS)["normalisation"]
    wrong = int((model(X).argmax(1) != y).sum())
    assert found.level == "warning" and found.value == wrong / 20
    inside = before(Layer(lambda x: (x - mean) / std), model)
    assert quick(inside, X, y, EPS)["normalisation"].level == "ok"


def test_an_attack_on_another_score_is_found():
    right = quick(Scored(top), X, U, EPS)
    assert right["objective"].value == 0 and right["transfer"].level == "ok"
    rising = quick(Scored(top, lambda x: top(x).exp()), X, U, EPS)
    assert rising["objective"].value == 0  # another scale, the same order
    wrong = quick(Scored(top, lambda x: -top(x)), X, U, EPS)
    assert wrong["objective"].value > 0.9 and wrong["objective"].level == "error"
    assert wrong["black_box"].level != "ok" and wrong["transfer"].level != "ok"
    assert "objective" not in quick(LINEAR, X, Y, EPS)


def test_gradients_that_hide_behind_steps_lose_to_a_random_search():
    stairs = before(Layer(lambda x: (20 * x).round() / 20 + 0.02 * (40 * math.pi * x).sin()))
    found = quick(stairs, X, Y, EPS)
    assert found["black_box"].level != "ok" and found["gradient"].level == "ok"


def test_a_larger_set_must_help():
    clipped = Scored(lambda x: top(x.clamp(0.299, 0.701)).round())
    assert quick(clipped, X, U, 0.01)["radius"].level != "ok"
    assert quick(Scored(top), X, U, 0.01)["radius"].value == 0


def test_a_radius_that_reaches_everything_must_leave_nothing():
    """Bright and dark images: noise tells nothing about their mean, and the gradient is cut."""
    bright = torch.cat([X[:10] + 0.3, X[10:] - 0.3])
    mean = readout([[1.0] * 16, [0.0] * 16], torch.tensor([0.0, 8.0]))
    y = (torch.arange(20) >= 10).long()
    found = quick(before(Layer(lambda x: x.detach() + 0 * x), mean), bright, y, EPS)["large_radius"]
    assert found.value == 1 and found.level == "error"
    assert "at most 0.50 is possible" in found.text
    assert quick(mean, bright, y, EPS)["large_radius"].value == 0


def test_a_rise_below_one_grey_level_is_lost_in_8_bits():
    grey = (255 * X).round() / 255
    y = LINEAR(grey).argmax(1)
    assert quick(LINEAR, grey, y, 0.4 / 255)["eight_bits"].value == 1
    assert quick(LINEAR, grey, y, 0.4 / 255)["eight_bits"].level == "warning"
    assert quick(LINEAR, grey, y, 8 / 255)["eight_bits"].value == 0


class OnePixel(torch.autograd.Function):
    """The identity; its gradient is that of one pixel of each image, drawn anew each time."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        seen = torch.rand_like(grads[0]).flatten(1)
        return grads[0] * (seen == seen.amax(1, keepdim=True)).view_as(grads[0])


def test_too_few_steps_are_found():
    slow = before(Layer(OnePixel.apply))
    assert check(slow, X, Y, 0.01, steps=2)["steps"].level != "ok"
    assert check(LINEAR, X, Y, 0.01, steps=2)["steps"].value == 0


def test_a_result_that_depends_on_the_initial_point_is_found():
    """From grey, darker leads five times higher than brighter; the initial point decides."""

    def two_hills(x):
        bright = x.mean((1, 2, 3)) - 0.5
        return torch.stack([0 * bright, bright.relu() + 5 * (-bright).relu() - 1], 1)

    x, y = torch.full((64, 1, 4, 4), 0.5), torch.zeros(64, dtype=torch.int64)
    found = quick(Layer(two_hills), x, y, EPS)
    assert found["restarts"].level == "warning" and 0.15 < found["restarts"].value < 0.7
    assert quick(LINEAR, X, Y, 0.01)["restarts"].value == 0


# --- the user's own attack


def test_an_attack_that_does_nothing_is_found():
    found = quick(LINEAR, X, Y, EPS, attack=lambda model, x, y, within: x)
    assert found["no_op"].value == 1 and found["no_op"].text.startswith("the attack leaves 100%")
    assert found["own_attack"].level == "error"
    strong = quick(LINEAR, X, Y, EPS, attack=partial(pgd, loss="targets"))
    assert strong["no_op"].value == 0 and strong["own_attack"].level == "ok"


def test_the_attack_of_a_detector_gets_its_direction():
    seen = []

    def attack(detector, x, within, direction):
        seen.append((len(x), direction))
        return attack_score(detector, x, within, direction=direction, steps=5)

    found = quick(MSP(LINEAR), X, U, EPS, attack=attack)
    assert seen == [(20, "lower"), (16, "raise")] and found["own_attack"].level == "ok"

    def one_sided(detector, x, within, direction):
        return x if direction == "raise" else attack(detector, x, within, direction)

    assert quick(MSP(LINEAR), X, U, EPS, attack=one_sided)["no_op"].value == 16 / 36


def test_what_an_attack_returns_is_checked(untyped):
    with pytest.raises(ValueError, match="attack must return inputs shaped like x"):
        quick(LINEAR, X, Y, EPS, attack=lambda model, x, y, within: x[:1])
    with pytest.raises(ValueError, match="what attack returns lies in"):
        quick(LINEAR, X, Y, EPS, attack=lambda model, x, y, within: 2 * x)
    with pytest.raises(ValueError, match=r"attack must return inputs within Linf.*project them"):
        quick(LINEAR, X, Y, EPS, attack=lambda model, x, y, within: fgsm(model, x, y, 1.5 * EPS))
    assert quick(LINEAR, X, Y, EPS, attack=fgsm)["no_op"].value == 0


# --- thresholds


def test_a_threshold_must_accept_what_it_promises(net, book):
    detector, x = MSP(net), book.test.x
    with torch.no_grad():
        scores = detector.score(x)
    judged = partial(quick, detector, x, book.ood["letters"], EPS, samples=4)
    right = judged(threshold=threshold_at_tpr(scores, 0.95), tpr=0.95)["threshold"]
    assert right.value == 0.95 and right.level == "ok"
    low = attack_score(detector, x, EPS, direction="lower", steps=5)
    with torch.no_grad():
        attacked = threshold_at_tpr(detector.score(low), 0.95)
    wrong = judged(threshold=attacked, tpr=0.95)["threshold"]
    assert wrong.value > 0.99 and wrong.level == "error" and "threshold_at_tpr" in wrong.text
    assert "threshold" not in judged()
    with pytest.raises(ValueError, match="threshold must be None for a classifier"):
        quick(net, x, book.test.y, EPS, threshold=0.0)


# --- arguments, and what is left unchanged


def test_a_detector_needs_outliers_and_a_classifier_labels(untyped):
    with pytest.raises(ValueError, match="y must be outliers shaped like x for a detector"):
        quick(MSP(LINEAR), X, torch.rand(5, 3, 4, 4), EPS)
    with pytest.raises(ValueError, match="y must be outliers for a detector"):
        quick(MSP(LINEAR), X, Y, EPS)
    with pytest.raises(ValueError, match="y must be an int64 tensor of class labels"):
        quick(LINEAR, X, U, EPS)
    with pytest.raises(ValueError, match="one score per sample"):
        quick(Scored(lambda x: LINEAR(x)), X, U, EPS)


def test_the_same_seed_gives_the_same_findings():
    noisy = before(Layer(lambda x: x + 0.05 * torch.randn_like(x)))
    assert quick(noisy, X, Y, EPS, seed=1) == quick(noisy, X, Y, EPS, seed=1)


class Restless(nn.Module):
    """A layer with every kind of state that a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(1), nn.Dropout(0.1)
        self.generator = torch.Generator().manual_seed(5)
        self.register_buffer("count", torch.zeros(1))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        self.count = self.count + 1
        with torch.no_grad():
            self.shift.add_(0.01)
        return self.drop(self.norm(x)) + torch.randn(1, generator=self.generator) + self.shift


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: partial(m), lambda m: MSP(m)])
def test_the_model_is_left_as_it_was(training, wrap):
    model = nn.Sequential(Restless(), copy.deepcopy(LINEAR)).train(training)
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state, drawn = torch.get_rng_state(), model[0].generator.get_state()
    quick(wrap(model), X, U if isinstance(wrap(model), MSP) else Y, EPS)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert modes == [m.training for m in model.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(drawn, model[0].generator.get_state())


def test_a_failed_check_restores_the_model_too():
    model = nn.Sequential(Restless(), Layer(lambda x: x / 0)).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError):
        quick(model, X, Y, EPS)
    assert model.training and torch.equal(before["0.count"], model.state_dict()["0.count"])


# --- the zoo


def trained(book, seed, epochs):
    """The networks that the zoo is built around, and other honest ones."""
    whole = {
        "network": (small_cnn(seed=seed), Standard()),
        "robust": (small_cnn(seed=seed), Adversarial(EPS)),
        "exposed": (small_cnn(seed=seed), ALOE(EPS)),
        "rejecting": (small_cnn(reject=1, seed=seed), ATOM(EPS)),
        "linear": (mlp(64, (), seed=seed), Standard()),
    }
    for model, objective in whole.values():
        fit(model, objective, book, epochs=epochs, seed=seed)
    return {name: model for name, (model, _) in whole.items()}


def verdicts(book, networks, seed):
    """Defences that the checks judge wrongly, with what was found."""
    others = {key: networks.pop(key) for key in ("rejecting", "linear")}
    defences = zoo(**networks)
    defences["linear"] = sanity.Defence(others["linear"], "A linear model.")
    defences["reject"] = sanity.Defence(RejectClass(others["rejecting"]), "A reject class.")
    wrong = {}
    for name, each in defences.items():
        found = each.check(book.test.x, book.test.y, book.ood["letters"], EPS, seed=seed)
        names = flagged(found)
        if (each.expected not in names) if each.expected else names:
            wrong[name] = names
    return wrong


def test_every_broken_defence_is_flagged_by_name_and_no_honest_one(book):
    assert verdicts(book, trained(book, 0, 4), 0) == {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_zoo_is_told_apart_on_every_seed(book, seed):
    assert verdicts(book, trained(book, seed, 12), seed) == {}


@pytest.mark.parametrize(("turn", "alarm"), [(1 / 8, False), (1 / 32, True)])
def test_where_lengths_are_divided_the_shortest_step_decides(turn, alarm):
    """The score climbs along its gradient for steps below ``turn`` radii, and falls for longer ones."""

    def rough(x):
        t = (x - 0.5) / EPS
        return (t * (turn**2 - t**2)).flatten(1).sum(1)

    x = torch.full((40, 1, 2, 2), 0.5)
    assert ("ascent" in flagged(quick(Scored(rough), x, x.clone(), EPS))) == alarm


@pytest.mark.slow
@pytest.mark.parametrize("outliers", ["letters", "patches", "noise"])
def test_no_shipped_detector_raises_an_alarm(book, net, outliers):
    for name, detector in post_hoc(net, book.train.x, book.train.y).items():
        found = check(detector, book.test.x, book.ood[outliers], EPS)
        assert not flagged(found), f"{name}: {flagged(found)}"


def test_the_zoo_has_broken_and_honest_defences_and_copies_its_networks(untyped, net):
    mode = net.training
    defences = zoo(net, net, small_cnn(reject=1))
    broken = [each for each in defences.values() if each.expected]
    assert len(broken) >= 8 and len(defences) - len(broken) >= 4
    assert all(each.why.endswith(".") for each in defences.values())
    assert "attacked outliers with a reject class" in defences
    assert net.training == mode
    with pytest.raises(ValueError, match="robust must be a trained network"):
        zoo(net, None, net)
    with pytest.raises(ValueError, match="outliers must be shaped like x"):
        broken[0].check(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), torch.rand(2, 3, 8, 8), EPS)


def test_labels_for_a_detector_are_told_from_outliers(net, book):
    with pytest.raises(
        ValueError, match=r"y must be outliers for a detector.* got labels of shape \(4,\)"
    ):
        check(MSP(net), book.test.x[:4], book.test.y[:4], Linf(0.1))
