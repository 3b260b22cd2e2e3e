"""The boxes are what their maker says, and the judge lets nothing pass that lies outside the set."""

import pytest
import torch

from robustood import challenge, metrics
from robustood.attacks import Square
from robustood.challenge import WITHIN, judge
from robustood.data import digits
from robustood.detectors import wrap
from robustood.evaluate import attack_score

MASKED, MISCALIBRATED, HONEST = "A", "B", "C"
each_box = pytest.mark.parametrize("name", challenge.names())


@pytest.fixture(scope="module")
def clean():
    return challenge.clean_images()


def attacked(box, x):
    """The images after random search on the scores."""
    score, how = wrap(box.score, higher="in"), {"steps": 300, "restarts": 0, "rule": Square()}
    noise = torch.Generator().manual_seed(0)
    sides = zip(x.split(challenge.DIGITS), ("lower", "raise"), strict=True)
    return torch.cat(
        [
            attack_score(score, part, WITHIN, direction=direction, generator=noise, **how)
            for part, direction in sides
        ]
    )


@pytest.fixture(scope="module")
def verdicts(clean):
    return {
        name: judge(box, attacked(box, clean))
        for name, box in ((name, challenge.box(name)) for name in challenge.names())
    }


@each_box
def test_clean_images_have_the_clean_auroc(name, clean):
    box = challenge.box(name)
    verdict = judge(box, clean)
    assert verdict.before == verdict.after and verdict.moved == 0
    s = box.score(clean)
    assert verdict.after.auroc.value == metrics.auroc(s[:100].numpy(), s[100:].numpy()) > 0.8
    low, high = verdict.after.auroc.low, verdict.after.auroc.high
    assert low <= verdict.after.auroc.value <= high


def test_the_images_are_digits_and_letters_that_nobody_can_change(clean):
    data = digits()
    assert clean[:100].equal(data.test.x[:100]) and clean[100:].equal(data.ood["letters"][:100])
    challenge.clean_images().zero_()
    assert challenge.clean_images().equal(clean)


@each_box
def test_a_box_shows_no_gradient(name, clean):
    x = clean[:3].clone().requires_grad_()
    assert not challenge.box(name).score(x).requires_grad


def test_the_honest_box_falls_a_little_and_the_masked_one_far(verdicts):
    honest, masked = verdicts[HONEST], verdicts[MASKED]
    assert honest.after.auroc.value > 0.8 and masked.after.auroc.value < 0.6
    fall = {v.name: v.before.auroc.value - v.after.auroc.value for v in (honest, masked)}
    assert fall[HONEST] < 0.15 and fall[MASKED] > 0.3
    assert verdicts[MISCALIBRATED].after.auroc.value > 0.8  # its ranking is good
    assert masked.moved == pytest.approx(0.1, abs=1e-6)


def test_differences_of_scores_hide_the_direction_in_the_masked_box_alone(clean):
    """What an attacker would measure who moves one pixel a little."""
    near = clean.clone()
    near[:, :, 4, 4] = (near[:, :, 4, 4] + 0.01).clamp(max=1)
    for name in challenge.names():
        box = challenge.box(name)
        unmoved = (box.score(near) == box.score(clean))[clean[:, 0, 4, 4] < 1].float().mean()
        assert (unmoved > 0.9) == (name == MASKED)


def test_the_threshold_of_one_box_does_not_keep_its_promise():
    x = digits().test.x
    accepted = {
        name: metrics.acceptance((box := challenge.box(name)).score(x), box.threshold)
        for name in challenge.names()
    }
    assert accepted[MISCALIBRATED].high < challenge.TPR - 0.03
    for name in (MASKED, HONEST):
        assert accepted[name].high > challenge.TPR


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[7].add_(0.15).clamp_(0, 1), r"in the set, but image 7 is moved by 0\.15, at most"),
        (lambda x: x[150].sub_(0.05), r"image 150 has values in \[-0\.05, .*\], outside \[0, 1\]"),
        (lambda x: x.copy_(1 - x), r"image 9 is moved by 1, at .*; and 190 more; project"),
        (lambda x: x[0].mul_(torch.nan), "images contains NaN or infinity"),
    ],
)  # fmt: skip
def test_images_outside_the_set_are_refused_with_their_places(change, said, clean):
    x = clean.clone()
    change(x)
    with pytest.raises(ValueError, match=said):
        judge(challenge.box(HONEST), x)


def test_what_is_just_inside_passes(clean):
    x = (clean + 0.1).clamp(0, 1)
    assert judge(challenge.box(HONEST), x).moved == pytest.approx(0.1, abs=1e-6)
    rounded = (x * 255).floor() / 255
    assert judge(challenge.box(HONEST), rounded).moved <= 0.1 + 1e-6


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (lambda x: x[:100], r"images must be all 200, 100 digits and then 100 letters, got 100"),
        (lambda x: x[:, 0], r"images must be images of shape \(n, 1, 8, 8\), got \(200, 8, 8\)"),
        (lambda x: (255 * x).byte(), "images must be floating point, got torch.uint8"),
        (lambda x: x.numpy(), "images must be a torch.Tensor, got ndarray"),
    ],
)
def test_images_of_another_form_are_refused(images, said, clean, untyped):
    with pytest.raises(ValueError, match=said):
        judge(challenge.box(HONEST), images(clean))


def test_unknown_boxes_and_other_things_are_refused(clean, untyped):
    with pytest.raises(ValueError, match="name must be one of 'A', 'B', 'C', got 'D'"):
        challenge.box("D")
    with pytest.raises(ValueError, match=r"box must be a box, such as challenge\.box\(.A.\)"):
        judge("A", clean)


def test_a_verdict_shows_all_rates(clean):
    text = str(judge(challenge.box(HONEST), clean))
    assert "AUROC" in text and "digits accepted (promised: 0.95)" in text
    assert text.count("[") == 6 and text.endswith("moved by at most 0.0000")
    assert judge(challenge.box(HONEST), clean)._repr_html_().startswith("<table>")
