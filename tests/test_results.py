"""Runs are found wherever they lie, and the table shows what was measured and nothing else."""

import json

import numpy as np
import pytest

from robustood import artefacts, metrics, results
from robustood.results import load, table


def run(recipe="aloe_x", seed=0, **more):
    speed = {"images_per_second": 1234.4, "over_floor": 1.096}
    history = [{"epoch": 0}, {"epoch": 1}]
    return {"recipe": recipe, "seed": seed, "minutes": 8.25, "speed": speed, "history": history,
            "settings": {"training": {"epochs": 3}}, "data": {}, "finished": True, **more}  # fmt: skip


def mean(detector, attack, side, auroc, seen):
    return {
        "detector": detector,
        "attack": attack,
        "side": side,
        "auroc": auroc,
        "seen_auroc": seen,
    }


def report(side="both"):
    means = [mean("MSP", "none", "none", 0.5, 0.6), mean("ODIN", "none", "none", 0.9, 0.95)]
    means += [mean("ODIN", "paper", "in", 0.1, 0.1), mean("ODIN", "paper", side, 0.7, None)]
    means += [mean("ODIN", "adaptive", side, 0.65, 0.8)]
    rate = {"value": 0.9312, "low": 0.92, "high": 0.941, "n": 1000}
    eps = {"both": 1 / 255, "out": 8 / 255}[side]
    return {"settings": {"side": side, "eps": eps}, "means": means, "accuracy": rate}


def write(folder, run, report=None):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    if report:
        (folder / "report.json").write_text(json.dumps(report))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_holds_the_numbers(tmp_path):
    write(tmp_path / "b", run(seed=1), report())
    write(tmp_path / "a", run("oe_x"))
    write(tmp_path / "c", run(seed=0), report("out"))
    found = load(tmp_path)
    assert [(r["run"]["recipe"], r["run"]["seed"]) for r in found] == [
        ("aloe_x", 0), ("aloe_x", 1), ("oe_x", 0),
    ]  # fmt: skip
    head, rule, *lines = table(found, markdown=True).splitlines()
    assert set(rule) <= set("|- ") and len({len(line) for line in (head, rule, *lines)}) == 1
    named = [dict(zip(cells(head), cells(line), strict=True)) for line in lines]
    assert named[1] == {
        "run": "b", "seed": "1", "epochs": "2/3", "attack": "1/255 both", "accuracy %": "93.1 [92.0, 94.1]",
        "attacked %": "", "detector": "ODIN", "AUROC %": "90.0", "paper's attack": "70.0",
        "adaptive": "65.0", "seen": "95.0", "seen, adaptive": "80.0", "minutes": "8.2",
        "images/s": "1234", "x floor": "1.10",
    }  # fmt: skip
    assert named[0] == {
        **named[1],
        "run": "c",
        "seed": "0",
        "attack": "8/255 out",
    }  # another protocol
    empty = {k for k, v in named[2].items() if not v}
    assert empty == {"attack", "accuracy %", "attacked %", "detector", "AUROC %", "paper's attack", "adaptive",
                     "seen", "seen, adaptive"}  # fmt: skip
    plain = table(found).splitlines()
    assert len(plain) == 4 and plain[0].startswith("run") and "|" not in plain[0]


def test_learned_sets_have_a_table_of_their_own():
    found = dict.fromkeys([key for key, _ in results.METRICS.values()], 0.00401)
    measured = {"radii": {"maximum": 5.432}, "sets": {"learned": found, "fog": found}, "rows": []}
    learned = {"folder": "turned", "run": run("cvae_x", seed=3), "report": measured}
    other = {"folder": "mine", "run": run("oe_x"), "report": None}
    first, second = table([learned, other]).split("\n\n")
    assert "mine" in first and "turned" not in first
    head, *lines = second.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["turned", "3", "learned", "5.43"], ["turned", "3", "fog", "5.43"],
    ]  # fmt: skip
    assert lines[0].split()[4:] == ["4.01"] * 6 + ["0.00"] and head.endswith("KL, nats")
    assert table([learned]) == second and table([other]) == first


def test_the_reject_class_is_the_deployed_detector_where_there_is_one():
    both = report()
    both["means"] += [mean("RejectClass", "none", "none", 0.3, None)]
    row = {"run": run(), "report": both}
    assert results.detector(row) == "RejectClass"
    both["means"] = both["means"][:1]
    assert results.detector(row) == "MSP"
    assert results.detector({"run": run(), "report": None}) == ""


def test_runs_are_found_alone_in_folders_and_among_saved_results(tmp_path):
    write(tmp_path / "one", run(), report())
    assert [r["folder"] for r in load(tmp_path / "one")] == ["one"]
    (tmp_path / "kept.json").write_text(json.dumps({"run": run(seed=5), "report": report()}))
    (tmp_path / "digits.json").write_text(json.dumps({"rows": []}))  # a result of another kind
    (tmp_path / "list.json").write_text("[]")
    assert [r["folder"] for r in load(tmp_path)] == ["one", "kept"]
    assert load(tmp_path)[1]["run"]["seed"] == 5


def test_folders_without_runs(tmp_path):
    assert load(tmp_path) == []
    assert table([]).splitlines()[0].startswith("run")
    with pytest.raises(ValueError, match=r"no folder .*nowhere; runs are made by robustood train"):
        load(tmp_path / "nowhere")


def test_the_shipped_results_load():
    assert (found := load()) and all(r["run"]["recipe"] for r in found)
    assert {r["folder"] for r in found} < set(artefacts.names("results"))


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "run.json").write_text('{"recipe": ')
    with pytest.raises(ValueError, match=r"run\.json is damaged .*; delete it"):
        load(tmp_path)
    (tmp_path / "one" / "run.json").write_text('{"recipe": "x", "seed": 0, "history": []}')
    with pytest.raises(
        ValueError, match=r"run\.json is damaged \(it lacks settings, data, finished"
    ):
        load(tmp_path)


def test_saved_results_and_reports_that_lack_something_are_named(tmp_path, monkeypatch):
    write(tmp_path / "one", run())
    for text, said in [
        ("", "it is empty"), ("[]", "it lacks settings, means"), ('{"means": []}', "it lacks settings"),
        ('{"settings": {}, "means": [Infinity]}', "it contains Infinity"),
    ]:  # fmt: skip
        for name in ("report.json", "report_strong.json"):
            (tmp_path / "one" / name).write_text(text)
            with pytest.raises(ValueError, match=rf"{name} is damaged \({said}"):
                load(tmp_path)
            (tmp_path / "one" / name).unlink()
    kept = tmp_path / "data" / "results" / "mine.json"
    kept.parent.mkdir(parents=True)
    monkeypatch.setattr(artefacts, "FOLDERS", (tmp_path / "data",))
    listed = "its run lacks recipe, seed, settings, data, history, finished"
    for wrong, said in [
        ({"run": 3, "report": None}, listed),
        ({"run": run(), "report": {"means": []}}, "its report lacks settings"),
    ]:
        kept.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=rf"mine\.json is damaged \({said}"):
            load()
    kept.write_bytes(b"\xef\xbb\xbf" + json.dumps({"run": run(), "report": None}).encode())
    assert [r["folder"] for r in load()] == ["mine"]


def test_the_mean_over_sets_is_the_rate_of_their_mixture():
    noise = np.random.default_rng(0)
    draw = {name: noise.normal(size=n).astype(np.float32) for name, n in
            {"in": 300, "a": 50, "b": 50, "c": 50}.items()}  # fmt: skip
    scores = {f"MSP none {name}": values for name, values in draw.items()}
    inside, outside = results.pooled(scores, "MSP", "none", ["a", "b", "c"])
    each = [metrics.auroc(draw["in"], draw[name]) for name in "abc"]
    assert metrics.auroc(inside, outside) == pytest.approx(np.mean(each), abs=1e-12)
    threshold = metrics.threshold_at_tpr(draw["in"])
    each = [metrics.acceptance(draw[name], threshold).value for name in "abc"]
    assert metrics.acceptance(outside, threshold).value == pytest.approx(np.mean(each), abs=1e-12)

    scores["MSP none d"] = draw["a"][:20]  # a smaller set weighs as much as a larger one
    assert len(results.pooled(scores, "MSP", "none", ["a", "d"])[1]) == 40
    scores["MSP none e"] = np.arange(
        200, dtype=np.float32
    )  # sorted by class: all of them must stay
    _, both = results.pooled(scores, "MSP", "none", ["d", "e"])
    assert both[20] == 0 and both[-1] == 199 and len(both) == 40
    with pytest.raises(
        ValueError, match=r"no scores of .* \['MSP paper in', 'MSP paper a'\]; there are: MSP"
    ):
        results.pooled(scores, "MSP", "paper", ["a"])


# --- a kept run in one of its tests


@pytest.mark.parametrize(
    ("name", "plan", "side", "detector", "attack"),
    [
        ("aloe_cifar10_cpu", None, "both", "MSP", "adaptive"),
        ("oe_cifar10_cpu", "atom", "out", "MSP", "compositional"),
        ("atom_cifar10_cpu", None, "out", "RejectClass", "paper"),
    ],
)
def test_a_kept_run_gives_the_means_of_its_report(name, plan, side, detector, attack):
    run = results.kept(name, plan)
    assert run.report["settings"]["side"] == side and run.detector == detector
    assert run.unseen == ["svhn:train", "textures", "scenes", "cifar100:test"]
    (mean,) = [
        m
        for m in run.report["means"]
        if (m["detector"], m["attack"], m["side"]) == (detector, attack, side)
    ]
    assert run.auroc(attack).value == pytest.approx(mean["auroc"], abs=1e-6)
    assert run.fpr(attack).value == pytest.approx(mean["fpr_attacked"], abs=1e-6)
    assert run.rate("accuracy").value == run.report["accuracy"]["value"]
    seen = run.auroc(attack, ["tinyimagenet:val"])
    assert seen.value == pytest.approx(mean["seen_auroc"], abs=1e-6)
    assert run.auroc(attack).n == 3000 and seen.n == 1500
    assert seen.low < seen.value < seen.high


def test_a_kept_run_is_read_by_another_detector_and_refuses_what_was_not_measured():
    run = results.kept("oe_cifar10_cpu")
    assert run.auroc("adaptive", detector="ODIN").value > run.auroc("adaptive").value + 0.1
    with pytest.raises(ValueError, match=r"no scores of this .*'KNN none in'"):
        run.auroc(detector="KNN")
    with pytest.raises(ValueError, match=r"plan must be one of 'detectors', 'strong', got 'atom'"):
        results.kept("aloe_cifar10_cpu", "atom")
    with pytest.raises(ValueError, match=r"nothing ships as scores/digits_trades\.npz"):
        results.kept("digits_trades")


def test_a_table_of_a_page_shows_estimates_in_per_cent():
    found = results.shown(["run", "AUROC"], [["a", metrics.Estimate(0.5, 0.4, 0.61, 9)], ["b", 7]])
    assert repr(found).splitlines() == ["run  AUROC", "a    50.0 [40.0, 61.0]", "b    7"]
    assert found._repr_markdown_().splitlines()[2] == "| a   | 50.0 [40.0,\N{NO-BREAK SPACE}61.0] |"
    with pytest.raises(ValueError, match=r"rows must have 2 cells like head, got \['c'\]"):
        results.shown(["run", "AUROC"], [["c"]])
