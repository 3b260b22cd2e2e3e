"""Runs are found wherever they lie, and the table shows what was measured and nothing else."""

import json

import pytest

from robustood import results
from robustood.results import load, table


def run(recipe="aloe_x", seed=0, **more):
    speed = {"images_per_second": 1234.4, "over_floor": 1.096}
    history = [{"epoch": 0}, {"epoch": 1}]
    return {"recipe": recipe, "seed": seed, "minutes": 8.25, "speed": speed, "history": history,
            "settings": {"training": {"epochs": 3}}, **more}  # fmt: skip


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
    return {"settings": {"side": side}, "means": means, "accuracy": rate}


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
        "recipe": "aloe_x", "seed": "1", "epochs": "2/3", "accuracy %": "93.1 [92.0 94.1]",
        "attacked %": "", "detector": "ODIN", "AUROC %": "90.0", "paper's attack": "70.0",
        "adaptive": "65.0", "seen": "95.0", "seen, adaptive": "80.0", "minutes": "8.2",
        "images/s": "1234", "x floor": "1.10",
    }  # fmt: skip
    assert named[0] == {**named[1], "seed": "0"}
    empty = {k for k, v in named[2].items() if not v}
    assert empty == {"accuracy %", "attacked %", "detector", "AUROC %", "paper's attack", "adaptive",
                     "seen", "seen, adaptive"}  # fmt: skip
    plain = table(found).splitlines()
    assert len(plain) == 4 and plain[0].startswith("recipe") and "|" not in plain[0]


def test_the_reject_class_is_the_deployed_detector_where_there_is_one():
    both = report()
    both["means"] += [mean("RejectClass", "none", "none", 0.3, None)]
    row = {"run": run(), "report": both}
    assert results.detector(row) == "RejectClass"
    both["means"] = both["means"][:1]
    assert results.detector(row) == "MSP"
    assert results.detector({"run": run(), "report": None}) == ""


def test_runs_are_found_alone_in_folders_and_among_kept_results(tmp_path):
    write(tmp_path / "one", run(), report())
    assert [r["folder"] for r in load(tmp_path / "one")] == ["one"]
    (tmp_path / "kept.json").write_text(json.dumps({"run": run(seed=5), "report": report()}))
    (tmp_path / "digits.json").write_text(json.dumps({"rows": []}))  # a result of another kind
    (tmp_path / "list.json").write_text("[]")
    assert [r["folder"] for r in load(tmp_path)] == ["one", "kept"]
    assert load(tmp_path)[1]["run"]["seed"] == 5


def test_folders_without_runs(tmp_path):
    assert load(tmp_path) == []
    assert table([]).splitlines()[0].startswith("recipe")
    with pytest.raises(ValueError, match=r"no folder .*nowhere; runs are made by robustood train"):
        load(tmp_path / "nowhere")


def test_the_shipped_results_load():
    assert all(r["run"]["recipe"] for r in load())


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "run.json").write_text('{"recipe": ')
    with pytest.raises(ValueError, match=r"run\.json is damaged .*; delete it"):
        load(tmp_path)
