"""Attacks on scores against closed forms and surrogates; reports against the scores behind them."""

import csv
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from wrappers import WRAPPERS

from robustood import evaluate, metrics
from robustood.attacks import APGD, Ascent
from robustood.detectors import (
    KNN,
    MSP,
    ODIN,
    Detector,
    Energy,
    Mahalanobis,
    MaxLogit,
    RejectClass,
    post_hoc,
    score_objectives,
    wrap,
)
from robustood.evaluate import (
    Report,
    StandardReport,
    _standard,
    attack_in_turn,
    attack_score,
    epsilon_curve,
    four_sides,
    mahalanobis_surrogate,
    measure,
    ood_report,
    paper_attack,
    scores,
    standard,
    surrogate,
)
from robustood.losses import to_uniform
from robustood.metrics import auroc
from robustood.models import counting, frozen, read, readout, small_cnn
from robustood.perturbations import L2, Corruption, Linf, Spatial


@pytest.fixture(scope="module")
def zoo(net, book):
    x, y = book.train.x, book.train.y
    layers = Mahalanobis(net, "all").fit(x, y).combine(book.val.x, book.outliers[::10])
    more = {"layers": layers, "step": Mahalanobis(net, step=0.005).fit(x, y)}
    return post_hoc(net, x, y) | more


NAMES = ["MSP", "MaxLogit", "Energy", "Entropy", "ODIN", "Mahalanobis", "KNN", "ViM", "ReAct",
         "GradNorm", "layers", "step"]  # fmt: skip
each_detector = pytest.mark.parametrize("name", NAMES)
both_directions = pytest.mark.parametrize("direction", ["raise", "lower"])


# --- the networks


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_network_is_measured_as_the_network_itself(book, wrap):
    model = small_cnn(reject=1)
    for build in (MSP, Energy, RejectClass):
        own, outer = build(model), build(wrap(model))
        x = book.test.x[:20]
        assert torch.equal(own.score(x), outer.score(x))
        assert torch.equal(own.paper_score(x), outer.paper_score(x))
        how = {"within": Linf(0.1), "direction": "lower"}
        assert torch.equal(
            attack_score(own, x, steps=3, **how), attack_score(outer, x, steps=3, **how)
        )
        for paper in ("aloe", "atom"):
            found = [paper_attack(d, x, paper=paper, **how) for d in (own, outer)]
            assert torch.equal(*found)


# --- the adaptive attack


@pytest.mark.parametrize(("within", "dual"), [(Linf(0.03), 1), (L2(0.1), 2)], ids=["linf", "l2"])
def test_a_linear_score_moves_by_radius_times_dual_norm(within, dual):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 16, generator=generator)
    model, x = readout(weight), 0.5 + 0.1 * torch.rand(20, 1, 4, 4, generator=generator)
    clean = model(x).detach()
    best = (clean + within.radius * weight.norm(dual, dim=1)).amax(1)
    moved = attack_score(MaxLogit(model), x, within, direction="raise", steps=20)
    assert torch.allclose(MaxLogit(model).score(moved), best, atol=1e-4)
    shared = readout(weight[:1].expand(3, -1).contiguous(), torch.tensor([0.0, 1.0, 2.0]))
    moved = attack_score(MaxLogit(shared), x, within, direction="lower", steps=20)
    worst = clean[:, 0] + 2 - within.radius * weight[0].norm(dual)
    assert torch.allclose(MaxLogit(shared).score(moved), worst, atol=1e-4)


def test_a_reject_class_is_pulled_both_ways_in_closed_form():
    weight = torch.tensor([[1.0, -2, 0.5], [1.0, -2, 0.5], [0.0, 1, 1]])
    detector, x = RejectClass(readout(weight, reject=1)), torch.full((4, 3), 0.5)
    gap = 0.1 * (weight[0] - weight[2]).abs().sum()
    for direction, sign in (("raise", 1), ("lower", -1)):
        moved = attack_score(detector, x, Linf(0.1), direction=direction, steps=10)
        wanted = detector.score(x) + sign * gap
        assert torch.allclose(detector.score(moved), wanted, atol=1e-5)


@each_detector
@both_directions
def test_no_attack_leaves_the_set_or_makes_its_own_score_worse(zoo, book, name, direction):
    x = book.ood["letters"][:24] if direction == "raise" else book.test.x[:24]
    sign, detector = (1 if direction == "raise" else -1), zoo[name]
    moved = attack_score(detector, x, Linf(0.1), direction=direction, steps=8, restarts=2)
    assert (moved - x).abs().max() <= 0.1 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    gain = sign * (scores(detector, moved) - scores(detector, x))
    assert (
        gain.min() >= -1e-6 * np.abs(scores(detector, x)).max()
    )  # another batch, another rounding
    assert np.mean(gain > 0) > 0.9


@each_detector
def test_radius_zero_is_the_identity(zoo, book, name):
    x = book.ood["patches"][:5]
    assert torch.equal(attack_score(zoo[name], x, Linf(0.0), direction="raise", steps=3), x)


def mean_gain(detector, x, **how):
    moved = attack_score(detector, x, Linf(0.1), direction="raise", **how)
    return float(np.mean(scores(detector, moved) - scores(detector, x)))


def test_more_steps_restarts_and_targets_are_no_weaker(zoo, book):
    x = book.ood["letters"][:40]
    for name in ("MSP", "KNN", "ODIN"):
        gain = partial(mean_gain, zoo[name], x)
        assert gain(steps=25) >= gain(steps=3) - 0.01
        assert gain(steps=10, restarts=3) >= gain(steps=10, restarts=1) - 1e-6
        some, more = gain(steps=10, targets=0), gain(steps=10, targets=3)
        assert gain(steps=10) >= some - 0.01 and more >= some - 0.01


def test_the_likeliest_targets_are_climbed_first(net, book):
    detector, x = MSP(net), book.ood["noise"][:6]
    with torch.no_grad():
        columns = detector.attack_objectives(x)
        order = columns[:, 1:].argsort(1, descending=True)
        found = score_objectives(detector, x, "raise", targets=2)
        assert len(found) == 3
        assert torch.equal(found[0](x)[0], columns[:, 0])
        for j in (0, 1):
            climb, judge = found[1 + j](x)
            assert torch.equal(climb, columns[:, 1:].gather(1, order[:, [j]])[:, 0])
            assert torch.equal(judge, detector.score(x))
        assert len(score_objectives(detector, x, "lower", targets=0)) == 2


@both_directions
def test_batches_do_not_matter_without_random_starts(zoo, book, direction):
    how = {"within": Linf(0.1), "direction": direction, "steps": 6, "restarts": 0}
    x = book.test.x[:10]
    for name in ("Energy", "Mahalanobis", "KNN"):
        whole = attack_score(zoo[name], x, **how)
        parts = attack_score(zoo[name], x, batch_size=3, **how)
        assert torch.allclose(whole, parts, atol=1e-5), name


def test_nothing_else_moves(book):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )
    model.train()
    detector = MSP(model)
    state = {k: v.clone() for k, v in detector.state_dict().items()}
    rng = torch.get_rng_state()
    with torch.inference_mode():
        attack_score(detector, book.test.x[:8], Linf(0.1), direction="lower", steps=3)
    with torch.no_grad():
        paper_attack(detector, book.test.x[:8], Linf(0.1), direction="lower", paper="atom")
        ood_report(detector, book.test.x[:8], {"a": book.ood["noise"][:8]})
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in detector.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_apgd_is_the_default_and_another_rule_may_be_chosen(zoo, book):
    x = book.ood["letters"][:20]
    how = {"within": Linf(0.1), "direction": "raise", "steps": 10}
    own = attack_score(zoo["Energy"], x, **how)
    assert torch.equal(own, attack_score(zoo["Energy"], x, rule=APGD(), **how))
    assert not torch.equal(own, attack_score(zoo["Energy"], x, rule=Ascent(), **how))


def test_of_a_finite_set_every_member_is_judged(zoo, book):
    x, detector = book.ood["letters"][:6], zoo["KNN"]
    names = ("gaussian_noise", "contrast")
    set_ = Corruption(names=names, severities=(1, 3))
    worst = attack_score(detector, x, set_, direction="raise")
    members = [set_.apply(x, z) for z in set_.initial_points(x, 1, None)]
    assert len(members) == 5
    best = np.max([scores(detector, v) for v in members], 0)
    assert np.allclose(scores(detector, worst), best, atol=1e-6)


def test_sets_in_turn_are_no_weaker_than_the_first_and_stay_around_it(zoo, book):
    x, detector = book.ood["letters"][:6], zoo["Energy"]
    noisy, ball = Corruption(names=("gaussian_noise", "fog"), severities=(5,)), Linf(0.05)
    how = {"direction": "raise", "steps": 5}
    first = attack_score(detector, x, noisy, **how)
    both = attack_in_turn(detector, x, [noisy, ball], **how)
    assert (both - first).abs().max() <= 0.05 + 1e-6
    assert (scores(detector, both) >= scores(detector, first) - 1e-6).all()
    assert torch.equal(
        attack_in_turn(detector, x, [ball], **how), attack_score(detector, x, ball, **how)
    )


# --- the papers' attacks


def test_surrogates_are_the_papers_formulas(net, zoo, book):
    x = book.ood["letters"][:9]
    z = net(x).detach()
    p = z.softmax(1)
    assert torch.allclose(surrogate(MSP(net), "raise", "aloe")(x), (p * p.log()).sum(1), atol=1e-5)
    for paper in ("aloe", "atom"):
        assert torch.allclose(surrogate(ODIN(net), "lower", paper)(x), -to_uniform(z), atol=1e-5)
    assert torch.allclose(surrogate(Energy(net), "raise", "atom")(x), to_uniform(z), atol=1e-5)
    reject = small_cnn(reject=1)
    log_f = reject(x).log_softmax(1)[:, -1]
    assert torch.allclose(surrogate(RejectClass(reject), "raise", "atom")(x), -log_f, atol=1e-5)
    assert torch.allclose(surrogate(RejectClass(reject), "lower", "atom")(x), log_f, atol=1e-5)
    t = zoo["layers"].plain(x)
    pi = torch.sigmoid(t)
    for direction, label in (("raise", 1), ("lower", 0)):
        wanted = torch.logsumexp(torch.stack([1 - pi, pi]), 0) - (pi if label else 1 - pi)
        assert torch.allclose(surrogate(zoo["layers"], direction, "aloe")(x), wanted, atol=1e-5)


def test_alOE_starts_at_the_clean_image_and_keeps_the_last_iterate(net, book):  # noqa: N802
    x = book.ood["letters"][:6]
    detector = MSP(net)
    moved = paper_attack(detector, x, Linf(0.1), direction="raise", paper="aloe")
    z = x.clone()
    with frozen(net):
        for _ in range(10):
            z = z.detach().requires_grad_()
            (grad,) = torch.autograd.grad(surrogate(detector, "raise", "aloe")(z).sum(), z)
            z = torch.clamp(x + (z + 0.1 * grad.sign() - x).clamp(-0.1, 0.1), 0, 1)
    assert torch.allclose(moved, z, atol=1e-6)


def test_atom_never_returns_less_than_the_clean_image_by_its_own_loss(net, book):
    x, detector = book.ood["patches"][:30], MSP(net)
    loss = surrogate(detector, "raise", "atom")
    moved = paper_attack(detector, x, Linf(0.1), direction="raise", paper="atom")
    assert (loss(moved) >= loss(x) - 1e-6).all() and (loss(moved) > loss(x)).any()


def test_the_released_mahalanobis_loss_has_no_gradient_where_the_detector_is_sure():
    t = torch.tensor([-100.0, -60.0, -17.0, 0.0, 20.0], requires_grad=True)
    (grad,) = torch.autograd.grad(mahalanobis_surrogate(t, up=False).sum(), t)
    assert grad[0].isnan() and grad[1] == 0
    assert (grad[2:] > 0).all()


def test_an_attack_that_the_released_loss_cannot_make():
    """A quadratic score whose regression logit lies near -60: the released attack moves nothing."""
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(400) % 2
    x = (0.35 + 0.3 * y[:, None] + 0.02 * torch.randn(400, 8, generator=generator)).clamp(0, 1)
    detector = Mahalanobis(readout(torch.eye(8)), "all").fit(x, y)
    detector.weight, detector.bias = torch.tensor([-1.0]), torch.tensor(-70.0)
    within = Linf(0.05)
    t = detector.plain(x)
    assert (t < -52).all() and (t > -88).all()
    paper = paper_attack(detector, x, within, direction="lower", paper="aloe")
    assert torch.equal(paper, x)
    own = attack_score(detector, x, within, direction="lower", steps=10)
    assert (detector.score(own) < detector.score(x) - 1).all()


@pytest.mark.parametrize("paper", ["aloe", "atom"])
@pytest.mark.parametrize("name", ["MSP", "Mahalanobis", "KNN", "ViM", "layers"])
@both_directions
def test_the_adaptive_attack_is_at_least_as_strong_as_the_papers(zoo, book, name, paper, direction):
    inside, outside = book.test.x[:60], book.ood["letters"][:60]
    x = outside if direction == "raise" else inside
    how = {"within": Linf(0.05), "direction": direction}
    left = [
        attack_score(zoo[name], x, steps=25, **how),
        paper_attack(zoo[name], x, paper=paper, **how),
    ]
    s = [scores(zoo[name], v) for v in left]
    still = scores(zoo[name], inside if direction == "raise" else outside)
    own, other = [
        metrics.auroc(still, v) if direction == "raise" else metrics.auroc(v, still) for v in s
    ]
    assert own <= other + 0.005


# --- reports


@pytest.fixture(scope="module")
def sets(book):
    return book.test.x[:50], {name: x[:40] for name, x in book.ood.items()}


def test_rows_are_the_metrics_of_the_scores(net, sets):
    x_in, x_out = sets
    report = ood_report(Energy(net), x_in, x_out, Linf(0.05), side="both", steps=5, tpr=0.9)
    clean, came = report.scores["in (clean)"], report.scores["in"]
    assert np.allclose(clean, scores(Energy(net), x_in))
    assert (came <= clean + 1e-6).all()
    for name, x in x_out.items():
        row, out = report[name], report.scores[name]
        assert (out >= scores(Energy(net), x) - 1e-6).all()
        assert float(row["auroc"]) == metrics.auroc(came, out)
        fixed, moved = metrics.threshold_at_tpr(clean, 0.9), metrics.threshold_at_tpr(came, 0.9)
        assert float(row["fpr"]) == np.mean(out >= fixed)
        assert float(row["fpr_attacked"]) == np.mean(out >= moved)
        assert float(row["rejected"]) == pytest.approx(np.mean(came < fixed))
        assert row["rejected"].low <= row["rejected"].value <= row["rejected"].high
        assert (row["n_in"], row["n_out"]) == (50, 40)
        assert row["detection_error"] == metrics.detection_error(came, out)
    assert report.mean("auroc") == np.mean([float(report[name]["auroc"]) for name in x_out])
    with pytest.raises(KeyError, match="letters"):
        report["lettres"]


def test_each_attacked_side_lowers_auroc(zoo, sets):
    x_in, x_out = sets
    for name in ("MSP", "Mahalanobis"):
        sides = four_sides(zoo[name], x_in, x_out, Linf(0.05), steps=8)
        value = {side: report.mean("auroc") for side, report in sides.items()}
        assert value["none"] > value["in"] > value["both"]
        assert value["none"] > value["out"] > value["both"]
        alone = ood_report(zoo[name], x_in, x_out, Linf(0.05), side="both", steps=8)
        assert alone.rows == sides["both"].rows


def test_a_report_goes_through_json_with_every_score(net, sets, tmp_path):
    report = ood_report(MSP(net), *sets, Linf(0.05), side="both", steps=2)
    text = report.to_json(tmp_path / "report.json")
    for source in (
        text,
        "\ufeff\n " + text,
        tmp_path / "report.json",
        str(tmp_path / "report.json"),
    ):
        again = Report.from_json(source)
        assert again == report and again.to_json() == text and str(again) == str(report)
        assert again.scores.keys() == report.scores.keys() == {"in (clean)", "in", *sets[1]}
        for name, values in report.scores.items():
            assert np.array_equal(again.scores[name], values)
            assert again.scores[name].dtype == np.float64
    clean, came, out = (report.scores[name] for name in ("in (clean)", "in", "letters"))
    assert Report.from_json(text)["letters"] == {"set": "letters", **measure(clean, came, out)}
    assert len(text.splitlines()) < 200  # a set of scores is one line
    (tmp_path / "marked.json").write_text(text, "utf-8-sig")
    assert Report.from_json(tmp_path / "marked.json") == report


@pytest.mark.parametrize(
    "values", [[0.1, 1 / 3, -1e-300, 5e-324, 1.7976931348623157e308, -0.0], [3.0]]
)
def test_scores_keep_all_their_bits_and_a_list_of_numbers_its_text(values):
    names = {"[\n1, 2\n]": np.array(values), "in": np.float32(values[:2])}
    report = Report({"eps": [0.1, 0.2], "note": "[ 1,  2 ]"}, [], names)
    again = Report.from_json(report.to_json())
    assert again.settings == report.settings and list(again.scores) == list(names)
    for name, each in names.items():
        assert again.scores[name].tobytes() == each.astype(np.float64).tobytes()


def test_a_report_without_scores_is_read_as_before(net, sets):
    report = ood_report(MSP(net), *sets)
    text = report.to_json(scores=False)
    assert "scores" not in text and text == Report(report.settings, report.rows).to_json()
    again = Report.from_json(text)
    assert again == report and again.scores == {} and again.to_json() == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting property name"),
        ('{"rows": []}', "it lacks settings"),
        ('{"settings": {}, "rows": [3]}', "no attribute 'items'"),
        ('{"settings": {}, "rows": [{"auroc": {"value": 1}}]}', "missing .* required"),
        ('{"settings": {}, "rows": [{"auroc": NaN}]}', "it contains NaN"),
        (
            '{"settings": {}, "rows": [], "scores": {"in": ["a"]}}',
            r"scores\['in'\] must be numbers",
        ),
        ('{"settings": {}, "rows": [], "scores": {"in": [[1]]}}', r"scores\['in'\] must have 1"),
        ('{"settings": {}, "rows": [], "scores": [1]}', "no attribute 'items'"),
    ],
)
def test_text_or_a_file_that_is_no_report_is_refused(untyped, tmp_path, text, said):
    says = rf" is not a report \(.*{said}.*; pass what Report\.to_json"
    with pytest.raises(ValueError, match="^text_or_path" + says):
        Report.from_json(text)
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"^text_or_path .*other\.json" + says):
        Report.from_json(tmp_path / "other.json")


def test_what_is_neither_text_nor_a_file_is_refused(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "list.json").write_text("[1]")
    for name, said in (("image.png", "can't decode"), ("list.json", "it lacks settings, rows")):
        with pytest.raises(ValueError, match=rf"{name} is not a report \(.*{said}"):
            Report.from_json(tmp_path / name)
    for source in ("", "[1]", tmp_path, tmp_path / "none.json", "a\0b", "x" * 5000):
        with pytest.raises(FileNotFoundError, match=r"begins with \{, or the path .*; pass what"):
            Report.from_json(source)


def test_an_unknown_column_names_the_known_ones(net, sets):
    report = ood_report(MSP(net), *sets)
    rows = epsilon_curve(MSP(net), sets[0][:8], sets[1]["letters"][:8], Linf(0.1), [0.0])
    for row in (report["letters"], Report.from_json(report.to_json()).rows[0], rows[0]):
        with pytest.raises(KeyError, match=r"'aurok' in this row; did you mean 'auroc'.*tie_rate"):
            row["aurok"]
        assert float(row["auroc"]) > 0.5 and "aurok" not in row and row.get("aurok") is None
    with pytest.raises(KeyError, match="no column 3 in this row; there are: "):
        report["letters"][3]


def test_the_table_of_numbers_has_the_ends_of_each_interval(net, sets, tmp_path):
    report = ood_report(MSP(net), *sets, Linf(0.05), side="out", steps=2)
    text = report.to_csv(tmp_path / "report.csv")
    assert (tmp_path / "report.csv").read_text("utf-8") == text
    assert Report.from_json(report.to_json()).to_csv() == text  # columns in the same order
    lines = list(csv.DictReader(text.splitlines()))
    assert [line["set"] for line in lines] == list(sets[1])
    for line, row in zip(lines, report.rows, strict=True):
        for name in ("auroc", "fpr", "fpr_attacked", "rejected"):
            ends = [float(line[name + end]) for end in ("", "_low", "_high")]
            assert ends == [row[name].value, row[name].low, row[name].high]
        for name in ("n_in", "n_out", "aupr_in", "aupr_out", "detection_error", "tie_rate"):
            assert float(line[name]) == row[name]
        assert len(line) == 11 + 2 * 4


def test_settings_of_numpy_go_into_a_report():
    kept = Report({"tpr": np.float32(0.5), "seed": np.int64(3)}, []).to_json()
    assert Report.from_json(kept).settings == {"tpr": 0.5, "seed": 3}
    with pytest.raises(ValueError, match="report must be valid as JSON"):
        Report({"tpr": float("nan")}, []).to_json()


def test_a_report_shows_itself_and_escapes_names(net, sets):
    report = ood_report(MSP(net), sets[0], {"<b>": sets[1]["noise"]})
    assert "&lt;b&gt;" in report._repr_html_() and "<b>" not in report._repr_html_()
    lines = str(report).splitlines()
    assert lines[0].startswith("outliers") and lines[1].startswith("<b>") and len(lines) == 2
    assert f"{float(report['<b>']['auroc']):.3f} [" in lines[1]


class StopError(Exception):
    pass


def through(*args, **how):
    """An attack that a test can count: the library's, by the name that it has now."""
    return evaluate.attack_score(*args, **how)


def test_a_report_that_was_interrupted_goes_on(net, sets, tmp_path, monkeypatch):
    calls = []

    def counted(*args, **how):
        if len(calls) == 4:
            raise StopError
        calls.append(len(args[1]))
        return attack_score(*args, **how)

    how = {"within": Linf(0.1), "side": "both", "batch_size": 16, "steps": 3}
    whole = ood_report(MSP(net), *sets, **how)
    monkeypatch.setattr(evaluate, "attack_score", counted)
    run = partial(ood_report, MSP(net), *sets, attack=through, run_dir=tmp_path, **how)
    with pytest.raises(StopError):
        run()
    calls[:] = [0, 0, 0, 0, 0]  # lets every further call through
    resumed = run()
    assert len(calls) == 5 + 4 + 3 * 3 - 4  # four of 13 batches were kept
    assert all(np.array_equal(resumed.scores[k], whole.scores[k]) for k in whole.scores)
    done = len(calls)
    run()
    assert len(calls) == done
    with pytest.raises(ValueError, match=r"run_dir .* holds a report with seed = 0, not 1"):
        run(seed=1)
    other = MSP(small_cnn(seed=5))
    with pytest.raises(ValueError, match=r"with detector\.model\.body\.0\.0\.bias = torch"):
        ood_report(other, *sets, attack=through, run_dir=tmp_path, **how)


def ascend(detector, x, within, *, direction, generator, step=0.1):
    """A user's own attack: one sign step, without a word about the mode of the network."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(detector(x).sum(), x)
    sign = 1 if direction == "raise" else -1
    return (x + sign * step * grad.sign()).detach().clamp(0, 1)


def test_an_attack_of_the_user_meets_the_network_in_eval_mode(sets):
    """In train mode a batch's own statistics would be attacked, and the running ones would move."""
    model = small_cnn(batch_norm=True)  # never set to eval mode
    detector, kept = MSP(model), {k: v.clone() for k, v in model.state_dict().items()}
    how = {"side": "both", "attack": ascend, "batch_size": 16}
    found = ood_report(detector, *sets, Linf(0.1), **how)
    assert model.training and all(torch.equal(kept[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    again = ood_report(detector, *sets, Linf(0.1), **how)
    assert all(np.array_equal(found.scores[k], again.scores[k]) for k in found.scores)


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (lambda x: 255 * x, "what attack returns lies in"),
        (lambda x: x[:5], r"shaped like x, \(16, 1, 8, 8\), got \(5, 1, 8, 8\)"),
        (lambda x: x.numpy(), "what attack returns must be a torch.Tensor"),
        (lambda x: x * torch.nan, "what attack returns contains NaN"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_an_attack_returns_is_checked(net, sets, attack, words):
    own = lambda detector, x, within, **how: attack(x)
    with pytest.raises(ValueError, match=words):
        ood_report(MSP(net), *sets, Linf(0.1), side="both", attack=own, batch_size=16)


def test_what_a_side_decides_cannot_be_chosen_again(net, sets):
    for name, value in (("direction", "raise"), ("generator", torch.Generator())):
        with pytest.raises(ValueError, match=f"{name} follows from (side|seed); leave it out"):
            ood_report(MSP(net), *sets, Linf(0.1), side="both", steps=1, **{name: value})
        with pytest.raises(ValueError, match=f"{name} follows from"):
            four_sides(MSP(net), *sets, Linf(0.1), steps=1, **{name: value})


@pytest.mark.parametrize(
    ("score", "seen"),
    [
        (lambda z: z.amax(1)[:5], r"\(5,\)"),
        (lambda z: z.amax(1, keepdim=True), r"\(16, 1\)"),
        (lambda z: z.amax(), r"\(\)"),
        (lambda z: z.amax(1).numpy(), "ndarray"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_a_score_is_one_number_per_input(net, sets, score, seen):
    class Own(Detector):
        def score(self, x):
            return score(self.logits(x))

    with pytest.raises(ValueError, match=rf"one score per sample, \(16,\), got {seen}"):
        scores(Own(net), sets[0], batch_size=16)


def test_a_radius_that_is_too_wide_is_refused_before_any_work(net, sets):
    class Untouched(MSP):
        def score(self, x):
            raise AssertionError("nothing is scored")

    x_in, x_out = sets
    with pytest.raises(ValueError, match="eps is 2, wider than the box"):
        epsilon_curve(Untouched(net), x_in, x_out["letters"], Linf(0.1), [0, 0.1, 2.0])


def test_attacked_inputs_carry_no_gradient(net, sets):
    x = sets[0][:3].clone().requires_grad_()
    how = {"within": Linf(0.1), "direction": "lower"}
    assert not attack_score(MSP(net), x, steps=2, **how).requires_grad
    assert not paper_attack(MSP(net), x, paper="atom", **how).requires_grad
    moved = attack_score(MSP(net), x, steps=2, **how)
    assert torch.equal(moved, attack_score(MSP(net), x.detach(), steps=2, **how))


@pytest.mark.filterwarnings("ignore:without any attack the AUROC is below one half")
def test_a_detector_around_an_autoencoder_is_attacked_by_its_score_alone(sets):
    class Reconstruction(Detector):
        def score(self, x):
            return -(self.model(x) - x).square().flatten(1).sum(1)

    torch.manual_seed(0)
    detector = Reconstruction(nn.Conv2d(1, 1, 3, padding=1))
    x_in, x_out = (sets[0][:6], {"letters": sets[1]["letters"][:6]})
    found = standard(detector, x_in, x_out, Linf(0.05))
    assert found["both"].mean("auroc") <= found["none"].mean("auroc")
    used = {row["attack"] for row in found.attacks}
    assert "APGD on the score" in used and not {"as in ALOE", "as in ATOM"} & used


def test_a_curve_starts_clean_and_never_rises(net, sets):
    x_in, x_out = sets
    radii = [0.0, 0.02, 0.05, 0.1, 0.2]
    rows = epsilon_curve(MSP(net), x_in, x_out["letters"], Linf(0.1), radii, steps=4, targets=1)
    values = [float(row["auroc"]) for row in rows]
    assert [row["eps"] for row in rows] == radii
    assert values[0] == float(ood_report(MSP(net), x_in, x_out)["letters"]["auroc"])
    assert all(a >= b for a, b in zip(values, values[1:])) and values[-1] < 0.1
    assert float(rows[-1]["fpr"]) > 0.9 and float(rows[-1]["rejected"]) > 0.9


@pytest.mark.parametrize("measured", [ood_report, four_sides, standard])
def test_a_score_of_the_wrong_direction_is_warned_of_once(net, sets, measured):
    x_in, x_out = sets[0][:20], {"letters": sets[1]["letters"][:20]}
    within = () if measured is ood_report else (Linf(0.0),)
    turned = wrap(lambda x: MSP(net).score(x), higher="out")
    with pytest.warns(
        UserWarning, match="below one half .+ on 'letters'.+higher=.+swapped"
    ) as said:
        measured(turned, x_in, x_out, *within)
    assert len(said) == 1


def test_one_set_that_is_accepted_is_a_finding_and_no_slip(net, sets):
    x_in, letters = sets[0][:20], sets[1]["letters"][:20]
    report = ood_report(MSP(net), letters, {"digits": x_in, "noise": torch.full_like(x_in, 0.5)})
    assert report["digits"]["auroc"].high < 0.5 < report["noise"]["auroc"].high


def test_measure_with_closed_form_thresholds():
    clean, came, out = np.arange(100.0), np.arange(100.0) - 50, np.arange(100.0) - 30
    row = measure(clean, came, out)
    assert float(row["fpr"]) == np.mean(out >= 5)
    assert float(row["fpr_attacked"]) == np.mean(out >= -45)
    assert float(row["rejected"]) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, x: attack_score(MSP(n), x + 1, Linf(0.1), direction="raise"), "outside"),
        (
            lambda n, x: attack_score(MSP(n), x, Linf(0.1), direction="up"),
            "direction must be one of",
        ),
        (lambda n, x: attack_score(MSP(n), x, Linf(0.1), direction="raise", targets=-1), "targets"),
        (
            lambda n, x: attack_score(MSP(n), x, Linf(0.1), direction="raise", batch_size=0),
            "batch_size",
        ),
        (
            lambda n, x: paper_attack(MSP(n), x, Linf(0.1), direction="raise", paper="pgd"),
            "paper must",
        ),
        (lambda n, x: ood_report(MSP(n), x, {}), "x_out is empty"),
        (lambda n, x: ood_report(MSP(n), x, {"a": x}, side="both"), "within is None"),
        (lambda n, x: ood_report(MSP(n), x, {"a": x * torch.nan}), r"x_out\['a'\] contains NaN"),
        (lambda n, x: ood_report(MSP(n), x, {"a": x}, side="ood"), "side must be one of"),
        (lambda n, x: ood_report(MSP(n), x, {"a": x}, tpr=1.5), "tpr must be"),
        (lambda n, x: epsilon_curve(MSP(n), x, x, Linf(0.1), [0.1, 0.0]), "radii must be"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_bad_input_is_refused(net, book, call, message):
    with pytest.raises(ValueError, match=message):
        call(net, book.test.x[:8])


def test_a_detector_that_is_not_fitted_is_refused(net, book):
    with pytest.raises(RuntimeError, match="KNN is not fitted"):
        attack_score(KNN(net), book.test.x[:4], Linf(0.1), direction="raise")


# --- the standard evaluation --------------------------------------------------------------------


class Linear(Detector):
    """A score w . x: every attack's optimum is known."""

    has_classes = False

    def __init__(self, w):
        super().__init__(nn.Identity())
        self.register_buffer("w", w)

    def score(self, x):
        return read(self.model, x.flatten(1)) @ self.w


@pytest.fixture(scope="module")
def lines():
    """Vectors around 1/2 that a linear score ranks well, and its weights."""
    source = torch.Generator().manual_seed(3)
    w = torch.randn(16, generator=source)
    x = 0.5 + 0.05 * torch.randn(80, 16, generator=source)
    return Linear(w), x[:40] + 0.05 * w, x[40:] - 0.05 * w


def test_the_standard_evaluation_reaches_the_optimum_of_a_linear_score(lines):
    detector, x, u = lines
    eps = 0.02
    found = standard(detector, x, {"u": u}, Linf(eps, box=None))
    clean = scores(detector, x), scores(detector, u)
    reach = eps * float(detector.w.abs().sum())
    expected = auroc(clean[0] - reach, clean[1] + reach)
    assert found["none"].mean("auroc") == auroc(*clean)
    assert found["both"].mean("auroc") == pytest.approx(expected, abs=1e-9)
    assert found.attacks[0]["attack"] == "clean" and found.attacks[-1]["attack"] == "Square"
    areas = [row["auroc"] for row in found.attacks]
    assert areas == sorted(areas, reverse=True) and areas[-1] == found["both"].mean("auroc")


def test_an_input_that_can_do_no_more_harm_is_left_alone_and_no_rate_changes(lines, monkeypatch):
    detector, x, u = lines
    within = Linf(0.12, box=None)
    spared = standard(detector, x, {"u": u}, within)
    monkeypatch.setattr(_standard._Bench, "bar", lambda self, direction: float("inf"))
    whole = standard(detector, x, {"u": u}, within)
    assert spared.attacks[-1]["inputs"] < 80 == whole.attacks[-1]["inputs"]
    for side in ("in", "out", "both"):
        for column in ("auroc", "aupr_in", "aupr_out", "fpr", "fpr_attacked", "rejected"):
            ours, theirs = spared[side]["u"][column], whole[side]["u"][column]
            assert float(ours) == pytest.approx(float(theirs), abs=1e-12), (side, column)


def test_the_standard_evaluation_counts_the_passes_of_the_network(lines):
    _, x, u = lines
    model = readout(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
    seen = {"forwards": 0, "backwards": 0}

    def meet(module, given):
        seen["forwards"] += len(given[0])
        if given[0].requires_grad:
            given[0].register_hook(
                lambda grad: seen.update(backwards=seen["backwards"] + len(grad))
            )

    class Counted(MSP):
        pass

    detector = Counted(model)
    before = standard(detector, x[:6], {"u": u[:6]}, Linf(0.02, box=None))
    assert list(before) == ["none", "in", "out", "both"]
    model.register_forward_pre_hook(meet)
    with counting() as passes:
        attack_score(detector, x[:6], Linf(0.02, box=None), direction="lower", steps=5)
    assert (passes.forwards, passes.backwards) == (seen["forwards"], seen["backwards"])
    assert passes.backwards == 2 * 5 * 6  # two objectives, five steps, six inputs
    by_name = {row["attack"]: row for row in before.attacks}
    own = by_name["APGD on the score"]
    # A step forwards and backwards, then the last point, the best and the clean one twice, and the score.
    assert own["backwards"] == 100 * own["inputs"]
    assert own["forwards"] == 104 * own["inputs"]


def test_a_score_without_gradient_is_attacked_by_values(lines):
    plain, x, u = lines
    weights = plain.w.numpy()
    blind = wrap(lambda v: v.flatten(1).numpy() @ weights, higher="in")
    found = standard(blind, x[:20], {"u": u[:20]}, Linf(0.02, box=None))
    assert found["both"].settings["gradient"] == "none"
    assert [row["attack"] for row in found.attacks] == ["clean", "Square"]
    assert found.attacks[-1]["backwards"] == 0
    open_one = standard(plain, x[:20], {"u": u[:20]}, Linf(0.02, box=None))
    assert found["both"].mean("auroc") <= open_one["both"].mean("auroc") + 0.01


def test_a_detector_whose_objectives_are_another_score_is_attacked_by_its_own(lines):
    plain, x, u = lines

    class Elsewhere(Linear):
        def attack_objectives(self, x, direction="raise"):
            return -super().attack_objectives(x, direction)  # runs away from the goal

    within = Linf(0.02, box=None)
    right = standard(plain, x, {"u": u}, within)["both"].mean("auroc")
    assert standard(Elsewhere(plain.w), x, {"u": u}, within)["both"].mean("auroc") == right


@pytest.mark.parametrize("within", [L2(0.1, box=None), Linf(0.02, box=None).scaled(0.5)], ids=str)
def test_the_standard_evaluation_is_at_least_as_strong_as_each_attack(lines, within):
    _, x, u = lines
    detector = MSP(readout(torch.randn(4, 16, generator=torch.Generator().manual_seed(2))))
    found = standard(detector, x, {"u": u}, within)["both"].mean("auroc")
    for attack in (
        partial(attack_score, steps=60, restarts=2), partial(paper_attack, paper="aloe"),
        partial(paper_attack, paper="atom"), plain_pgd,
    ):  # fmt: skip
        worst = four_sides(detector, x, {"u": u}, within, attack=attack)["both"]
        assert found <= worst.mean("auroc") + 1e-6


def plain_pgd(detector, x, within, *, direction, generator=None, steps=200):
    """Ascent on the score as most libraries write it: random start, fixed step, last iterate."""
    sign = 1 if direction == "raise" else -1
    z = within.draw(x, generator)
    for _ in range(steps):
        z.requires_grad_()
        grad = torch.autograd.grad((sign * detector.score(x + z)).sum(), z)[0]
        z = within.ascend(x, z.detach(), grad, within.radius / 4)
    return (x + z).detach()


def test_the_standard_evaluation_resumes_and_goes_through_json(lines, tmp_path):
    detector, x, u = lines
    call = partial(standard, detector, x[:8], {"u": u[:8]}, Linf(0.02, box=None), run_dir=tmp_path)
    lines_said: list[str] = []
    first = call(say=lines_said.append)
    with counting() as passes:
        again = call()
    assert again == first
    assert passes.forwards < first.attacks[-1]["forwards"]  # only the checks are made again
    assert lines_said[0].startswith("in: APGD on the score on 8 of 8") and "left" in lines_said[1]
    path = tmp_path / "report.json"
    first.to_json(path)
    kept = StandardReport.from_json(path)
    assert kept == first and str(kept) == str(first)
    assert (kept["both"].scores["in"] == first["both"].scores["in"]).all()
    assert StandardReport.from_json(first.to_json(scores=False)) == first
    header, *rows = first.to_csv().splitlines()
    assert header.startswith("side,set,n_in,n_out,auroc,auroc_low") and len(rows) == 4
    with pytest.raises(KeyError, match="no side 'neither'; choose one of: none, in, out, both"):
        first["neither"]
    with pytest.raises(ValueError, match=r"text_or_path is not a report .*StandardReport.to_json"):
        StandardReport.from_json('{"version": 1}')


def test_a_finite_set_is_searched_whole_by_the_standard_evaluation():
    x, u = torch.rand(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    detector = MSP(small_cnn(3).eval())
    grid = Spatial(20, 1).grid(3)
    found = standard(detector, x, {"u": u}, grid)
    assert [row["attack"] for row in found.attacks] == ["clean", "every member"]
    exact = four_sides(detector, x, {"u": u}, grid)
    assert found["both"].mean("auroc") == exact["both"].mean("auroc")


def test_a_set_that_is_no_ball_gets_random_draws():
    x, u = torch.rand(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    found = standard(MSP(small_cnn(3).eval()), x, {"u": u}, Spatial(20, 1))
    assert found.attacks[-1]["attack"] == "random draws"


def hashes(detector, x, u):
    """Those that a standard evaluation reports, without its attacks."""
    return _standard._Bench(detector, x, {"u": u}, Linf(0.02, box=None)).sha256


def test_hashes_tell_weights_and_inputs_apart(lines):
    detector, x, u = lines
    call = lambda d, v: hashes(d, v[:3], u[:3])
    first = call(detector, x)
    assert first == call(Linear(detector.w.clone()), x.clone()) and set(first) == {
        "weights",
        "in",
        "out u",
    }
    other, moved = call(Linear(detector.w + 1), x), call(detector, x + 1)
    assert other["weights"] != first["weights"] and other["in"] == first["in"]
    assert moved["weights"] == first["weights"] and moved["in"] != first["in"]


@pytest.mark.slow
@each_detector
def test_the_standard_evaluation_leaves_at_most_what_any_other_attack_leaves(zoo, book, name):
    """On every detector: the adaptive attack at twice its default steps, the papers' own, and plain ascent."""
    x, u, within = book.test.x[:40], {"letters": book.ood["letters"][:40]}, Linf(0.05)
    left = standard(zoo[name], x, u, within)["both"].mean("auroc")
    others = {
        "attack_score": partial(attack_score, steps=80, restarts=2),
        "ALOE": partial(paper_attack, paper="aloe"),
        "ATOM": partial(paper_attack, paper="atom"),
        "plain ascent": plain_pgd,
    }
    for label, attack in others.items():
        rest = four_sides(zoo[name], x, u, within, attack=attack)["both"].mean("auroc")
        print(f"{name}: standard {left:.4f}, {label} {rest:.4f}")
        assert left <= rest, label


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"detector": small_cnn(3)}, r"detector must be a detector, such as MSP\(model\)"),
        ({"detector": MSP}, "detector must be .*the class MSP"),
        ({"x_in": torch.full((2, 1, 8, 8), 2.0)}, r"x_in lies in \[2, 2\], outside \[0, 1\]"),
        ({"x_in": torch.zeros(0, 1, 8, 8)}, "x_in is empty"),
        ({"x_out": {}}, "x_out is empty; pass at least one set"),
        ({"x_out": torch.zeros(2, 1, 8, 8)}, r"x_out must be a dict such as \{name: images\}"),
        ({"x_out": {"u": torch.full((2, 1, 8, 8), torch.nan)}}, r"x_out\['u'\] contains NaN"),
        ({"within": None}, "within must be a number or a perturbation set"),
        ({"within": "big"}, "within must be a number or a perturbation set"),
        ({"within": -0.1}, "eps must be a finite number|eps must be a number"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"tpr": 1.5}, "tpr must be a number in"),
        ({"confidence": 1.0}, "confidence must be a number in"),
        ({"say": "yes"}, r"say must be a function, called as say\(line\)"),
        ({"run_dir": 3}, "run_dir must be the path"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_the_standard_evaluation_refuses_bad_arguments_before_it_begins(changed, words):
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    given = {"detector": MSP(small_cnn(3).eval()), "x_in": x, "x_out": {"u": x}, "within": 0.1}
    with counting() as passes, pytest.raises((ValueError, TypeError), match=words):
        standard(**(given | changed))
    assert passes.forwards == 0


class Kept(nn.Module):
    """A linear network that keeps more than tensors with its weights."""

    def __init__(self, note):
        super().__init__()
        self.layer, self.note = nn.Linear(16, 3), note
        with torch.no_grad():
            for value in self.layer.parameters():
                value.copy_(torch.linspace(-1, 1, value.numel()).view_as(value))

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]

    def forward(self, x):
        return self.layer(x)


def test_what_a_network_keeps_beside_its_weights_counts_in_the_hash(lines):
    _, x, u = lines
    first, same, other = (hashes(MSP(Kept(note)), x, u)["weights"] for note in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda u: {"in": u}, "x_out must not name a set 'in', as a report calls"),
        (lambda u: {"in (clean)": u}, r"must not name a set 'in \(clean\)'"),
        (lambda u: {0: u}, "each name in x_out must be a str"),
        (lambda u: {"a": u, "b": u[:, :4]}, r"x_out\['b'\] must hold inputs like x_in.* got \(4,\)"),
        (lambda u: {"b": u.double()}, r"x_out\['b'\] must hold inputs like x_in.*float64.*x\.float\(\)"),
    ],
)  # fmt: skip
def test_sets_that_a_report_could_not_tell_apart_or_attack_are_refused(
    lines, untyped, change, said
):
    detector, x, u = lines
    with pytest.raises(ValueError, match=said):
        standard(detector, x, change(u), Linf(0.02, box=None))


def test_a_verdict_as_csv_keeps_its_columns_through_json(lines):
    detector, x, u = lines
    found = standard(detector, x[:6], {"u": u[:6]}, Linf(0.02, box=None))
    assert type(found).from_json(found.to_json()).to_csv() == found.to_csv()
    assert found.sha256 == hashes(detector, x[:6], u[:6])


def test_a_score_that_leaves_torch_is_attacked_by_values(lines):
    class Array(type(lines[0])):
        def score(self, x):
            return torch.from_numpy(x.numpy() @ self.w.numpy())

    detector, x, u = lines
    found = standard(Array(detector.w), x[:8], {"u": u[:8]}, Linf(0.02, box=None))
    assert found["both"].settings["gradient"] == "none"
    assert found["both"].mean("auroc") <= found["none"].mean("auroc")
