"""Kept weights, measured again on the real images, give the kept scores and rates.

A file of its own: with the photographs its tests take minutes, and a worker of pytest-xdist gets whole files.
"""

import functools

import numpy as np
import pytest
import torch
from photographs import need

from robustood import artefacts, recipes, results
from robustood.data import Split
from robustood.metrics import auroc
from robustood.recipes import images, reports, runs
from robustood.recipes.reports import pick

SHIPPED = {run["folder"]: run for run in results.load() if run["report"]}
MEASURED = {name: run for name, run in SHIPPED.items() if run["report"]["rows"]}
LEARNED = {name: run for name, run in SHIPPED.items() if "sets" in run["report"]}
# Without a shipped report there would be nothing to measure again, and pytest would pass over it in silence.
assert MEASURED, "data/results holds no report of a classifier"
assert LEARNED, "data/results holds no report of a learned set"
each_measured = pytest.mark.parametrize("name", MEASURED)
each_learned = pytest.mark.parametrize("name", LEARNED)


@pytest.fixture(scope="module", autouse=True)
def each_set_is_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images.sets, "load", functools.cache(images.sets.load))
        yield


def again(name, folder, *changes):
    """Measure a shipped run anew on the real images; returns its report and the new one."""
    report = SHIPPED[name]["report"]
    cards = [*SHIPPED[name]["run"]["data"].values(), *report["data"].values()]
    need(*(card["name"] for card in cards))
    artefacts.restore(name, folder)
    return report, recipes.evaluate(recipes.read(folder / "recipe.json", changes), folder, "cpu")


def same_aurocs(report, new):
    """All AUROCs of the new report are within half a point of the kept ones."""
    key = lambda row: [row[k] for k in ("detector", "attack", "side", "set")]
    for row in new["rows"]:
        (old,) = [r for r in report["rows"] if key(r) == key(row)]
        assert abs(row["auroc"]["value"] - old["auroc"]["value"]) <= 0.005, key(row)


def places(size, many, few):
    """Where the first images of a smaller pick stand in a larger one; both are picked from ``size`` images."""
    order = torch.arange(size)
    larger, smaller = (pick(Split(order, order), n).y for n in (many, few))
    return torch.searchsorted(larger, smaller).numpy()


@each_measured
def test_kept_scores_give_the_kept_rates(name):
    report, scores = MEASURED[name]["report"], artefacts.scores(name)
    rows = [row for row in report["rows"] if row["attack"] == "none"]
    assert rows
    for row in rows:
        given = (scores[f"{row['detector']} none {where}"] for where in ("in", row["set"]))
        assert float(auroc(*given)) == pytest.approx(row["auroc"]["value"], abs=5e-6)


@each_measured
def test_kept_weights_give_the_kept_scores(name, tmp_path, monkeypatch):
    # A quarter of the images for the scores, 1,000 for the accuracy; the slow test measures all, and under attack.
    some = lambda model, split, attack, size: runs.accuracy(model, pick(split, 1000), None, size)
    monkeypatch.setattr(reports, "accuracy", some)
    scores = artefacts.scores(name)
    inside, outside = (
        {len(values) for key, values in scores.items() if (" in" in key) == within}
        for within in (True, False)
    )
    few = {f"n_{side}": max(sizes) // 4 for side, sizes in (("in", inside), ("out", outside))}
    changes = [f"evaluation.{key}={value}" for key, value in few.items()]
    report, new = again(name, tmp_path / name, "evaluation.attacks=['none']", *changes)
    with np.load(tmp_path / name / "scores.npz", allow_pickle=False) as measured:
        assert measured.files == [key for key in scores if " none " in key]
        for key, values in measured.items():
            where = key.split(" ", 2)[2]
            card = report["data"]["test" if where.startswith("in") else where]
            apart = np.abs(values - scores[key][places(card["n"], len(scores[key]), len(values))])
            # ODIN steps by the sign of a gradient, which another arithmetic turns where it is nearly zero.
            most, share = (0.02, 0.98) if key.startswith("ODIN") else (1e-3, 1.0)
            assert apart.max() <= most and (apart <= 1e-3).mean() >= share, key
    assert len(new["rows"]) == len([r for r in report["rows"] if r["attack"] == "none"])
    rate = report["accuracy"]["value"]
    assert abs(new["accuracy"]["value"] - rate) <= 4 * (rate * (1 - rate) / 1000) ** 0.5


@pytest.mark.slow
@each_measured
def test_kept_weights_give_the_kept_attacked_rates(name, tmp_path):
    sides = {r["set"] for r in MEASURED[name]["report"]["rows"]}
    report, new = again(
        name, tmp_path / name, "evaluation.attacks=['paper', 'adaptive']",
        f"evaluation.sets={sorted(sides)[:1]}", "evaluation.detectors=['auto']",
    )  # fmt: skip
    same_aurocs(report, new)
    for kind, apart in {"accuracy": 3e-4, "attacked_accuracy": 0.01}.items():
        assert abs(new[kind]["value"] - report[kind]["value"]) <= apart, kind


@pytest.mark.slow
@each_learned
def test_kept_sets_have_the_kept_radii_and_metrics(name, tmp_path):
    report, new = again(name, tmp_path / name)
    assert new["radii"] == pytest.approx(report["radii"], rel=1e-3)
    for where, metrics in report["sets"].items():
        assert new["sets"][where] == pytest.approx(metrics, rel=0.02), where
        assert metrics["ordered"]
