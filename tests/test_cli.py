"""The command line, from packs on disk to a table, and what happens when a run is disturbed."""

import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from photographs import need

from robustood import artefacts, challenge, checkpoints, cli, data, recipes, results, training
from robustood.cli._shell import radius
from robustood.detectors import wrap
from robustood.evaluate import StandardReport, attack_score, standard
from robustood.perturbations import Linf
from robustood.recipes import reports, runs
from robustood.recipes.recipe import Attack

RECIPE = """
about = "coloured stripes"
[data]
train = "stripes:train"
test = "stripes:test"
outliers = "spots:train"
seen = "spots:val"
ood = ["checks", "clouds"]
validation = 100
crop = 2
flip = false
[model]
name = "resnet"
depth = 8
width = 8
classes = 3
[objective]
name = "ALOE"
within = "1/255"
steps = 1
[training]
epochs = 2
batch_size = 50
outlier_batch_size = 25
lr = 0.05
warmup = 0.3
precision = "float32"
channels_last = false
compile = false
[evaluation]
n_in = 80
n_out = 40
steps = 2
targets = 1
pgd_steps = 2
"""


def stripes(n, seed, kind="stripes"):
    """Coloured waves, one orientation a class; or spots, checks and clouds, which are none."""
    noise = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    row, column = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    draw = lambda *shape: torch.rand(*shape, generator=noise)
    phase, tint = 6.3 * draw(n, 1, 1), 0.5 + 0.5 * draw(n, 3, 1, 1)
    angle = (y * 3.14 / 3)[:, None, None]
    along = angle.cos() * row + angle.sin() * column
    shape = {
        "stripes": (0.8 * along + phase).sin(),
        "spots": (0.7 * row + phase).sin() * (0.7 * column + phase).sin(),
        "checks": ((row + 32 * draw(n, 1, 1)) // 4 + column // 4) % 2 * 2 - 1,
        "clouds": torch.nn.functional.interpolate(
            draw(n, 1, 4, 4) * 2 - 1, size=32, mode="bilinear"
        )[:, 0],
    }[kind]
    x = tint * (0.5 + 0.4 * shape[:, None]) + 0.05 * draw(n, 3, 32, 32)
    return (255 * x.clamp(0, 1)).byte(), y


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """A folder of packs, and in it the recipe."""
    folder = tmp_path_factory.mktemp("packs")
    sizes = {"stripes_train": 600, "stripes_test": 200, "spots_train": 400, "spots_val": 60}
    for seed, (name, n) in enumerate({**sizes, "checks": 60, "clouds": 60}.items()):
        x, y = stripes(n, seed, name.split("_")[0])
        jpeg = 60 if name.startswith("spots") else None
        data.write_pack(folder / f"{name}.npz", data.compress(x, jpeg) if jpeg else x, y, jpeg=jpeg)
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


@pytest.fixture
def tiny(packs, tmp_path, monkeypatch):
    """Runs ``robustood COMMAND tiny ...`` in an empty folder with those packs."""
    monkeypatch.setenv("ROBUSTOOD_DATA", str(packs))
    monkeypatch.chdir(tmp_path)

    def command(name, *more):
        first = str(packs / "tiny.toml") if name == "train" else "runs/tiny"
        return cli.main([name, first, *more])

    return command


@pytest.fixture(scope="module")
def finished(packs, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run = recipes.train(recipes.read(packs / "tiny.toml"), folder, root=packs, device="cpu")
    assert run["finished"]
    return folder


def weights(folder):
    return (Path(folder) / "weights.safetensors").read_bytes()


# --- the whole way


def test_from_packs_to_a_table(tiny, finished, capsys):
    assert tiny("train") == 0
    said = capsys.readouterr().out
    assert "epoch 1 of 2: loss 1." in said and "epoch 2 of 2: loss 0." in said
    assert said.count("held-out accuracy") == 2
    assert weights("runs/tiny") == weights(finished)  # the same in another folder
    run = json.loads(Path("runs/tiny/run.json").read_text())
    assert run["finished"] and run["recipe"] == "tiny" and len(run["history"]) == 2
    assert run["history"][-1]["val_accuracy"] > 0.6  # of three classes
    assert run["speed"]["images_per_second"] > 0
    assert run["data"]["train"]["sha256"] == data.check("stripes:train")["sha256"]
    assert run["data"]["train"]["jpeg_copies"] == run["data"]["outliers"]["jpeg"] == 60
    card = json.loads(Path("runs/tiny/weights.json").read_text())
    assert card["recipe"] == "tiny" and card["data"] == run["data"] and card["seed"] == 0

    assert tiny("train") == 0
    assert "this run is finished" in capsys.readouterr().out

    assert tiny("evaluate") == 0
    report = json.loads(Path("runs/tiny/report.json").read_text())
    assert report["accuracy"]["n"] == 200 and report["attacked_accuracy"]["n"] == 80
    clean, hit = report["accuracy"], report["attacked_accuracy"]
    assert clean["low"] <= clean["value"] <= clean["high"] and clean["value"] > 0.6
    assert hit["value"] <= clean["high"]
    rows, sets = report["rows"], ["spots:val", "checks", "clouds"]
    assert len(rows) == 2 * (1 + 3 + 3) * len(sets)
    assert {r["set"] for r in rows if r["seen"]} == {"spots:val"}
    for mean in report["means"]:
        own = [
            r["auroc"]["value"] for r in rows
            if all(r[k] == mean[k] for k in ("detector", "attack", "side")) and not r["seen"]
        ]  # fmt: skip
        assert len(own) == mean["sets"] == 2 and mean["auroc"] == pytest.approx(np.mean(own))
    check_scores(Path("runs/tiny/scores.npz"), rows)

    capsys.readouterr()
    assert cli.main(["table", "runs"]) == 0
    text = capsys.readouterr().out
    line = next(li for li in text.splitlines() if li.startswith("tiny "))
    assert f"{100 * clean['value']:.1f} [" in line and "ODIN" in line and "2/2" in line
    assert results.table(results.load("runs")) in text


def check_scores(file, rows):
    """The saved scores are small, plain, and give the report's numbers again."""
    from robustood.metrics import auroc

    with np.load(file, allow_pickle=False) as kept:
        scores = {name: kept[name] for name in kept.files}
    assert all(s.dtype == np.float32 for s in scores.values())
    assert len(scores["MSP none in"]) == 80 and len(scores["ODIN adaptive checks"]) == 40
    for row in rows:
        if row["side"] in ("none", "both"):
            start = f"{row['detector']} {row['attack']} "
            again = auroc(scores[start + "in"], scores[start + row["set"]])
            assert again == pytest.approx(row["auroc"]["value"], abs=1e-3)


@pytest.mark.filterwarnings("ignore:without any attack the AUROC is below one half")
def test_an_evaluation_that_was_stopped_goes_on_and_other_settings_do_not_mix(
    finished, packs, monkeypatch
):
    recipe = recipes.read(finished / "recipe.json", ["evaluation.detectors=['MSP']"])
    first = recipes.evaluate(recipe, finished, root=packs)
    monkeypatch.setattr("robustood.evaluate._report.attack_score", None)
    again = recipes.evaluate(recipe, finished, root=packs)  # nothing is attacked twice
    assert [again[k] for k in ("rows", "means", "accuracy")] == [
        first[k] for k in ("rows", "means", "accuracy")
    ]
    monkeypatch.undo()
    notes = lambda: set(finished.glob("evaluation/*/MSP_*"))
    before = notes()
    longer = recipes.read(
        finished / "recipe.json", ["evaluation.detectors=['MSP']", "evaluation.steps=3"]
    )
    recipes.evaluate(longer, finished, root=packs)  # a longer attack, and the others as they were
    (new,) = notes() - before
    assert new.name.startswith("MSP_adaptive_")
    changes = ["evaluation.detectors=['MSP','KNN']", "evaluation.n_in=50",
               "evaluation.attacks=['none']", "evaluation.n_fit=100"]  # fmt: skip
    other = recipes.read(finished / "recipe.json", changes)
    other = recipes.evaluate(other, finished, root=packs)
    assert {(r["detector"], r["n_in"]) for r in other["rows"]} == {("MSP", 50), ("KNN", 50)}


def test_plans_stand_beside_the_report(finished, packs, tiny, tmp_path, monkeypatch, capsys):
    """Strong and curve, on a shipped run that was put back into a folder."""
    kept = Path("data/results")
    kept.mkdir(parents=True)
    measured = {
        "settings": checkpoints.read_json(finished / "recipe.json")["evaluation"],
        "means": [],
    }
    record = {"run": checkpoints.read_json(finished / "run.json"), "report": measured}
    (kept / "tiny.json").write_text(json.dumps(record))
    Path("data/weights").mkdir()
    for ending in (".safetensors", ".json"):
        (Path("data/weights/tiny").with_suffix(ending)).write_bytes(
            (finished / f"weights{ending}").read_bytes()
        )
    monkeypatch.setattr(artefacts, "FOLDERS", (Path("data"),))
    monkeypatch.setattr(reports, "STRONG", {"steps": 4, "restarts": 2, "targets": None})
    budgets = set()

    def spy(*given, **how):
        budgets.add(tuple(how[k] for k in ("steps", "restarts", "targets")))
        return attack_score(*given, **how)

    monkeypatch.setattr(reports, "attack_score", spy)
    few = tmp_path / "packs"  # of the outliers only the set that is asked for
    few.mkdir()
    for pack in ("stripes_train", "stripes_test", "checks"):
        (few / f"{pack}.npz").write_bytes((packs / f"{pack}.npz").read_bytes())
    monkeypatch.setenv("ROBUSTOOD_DATA", str(few))
    flags = ["--set", "evaluation.sets=['checks']", "--set", "evaluation.n_in=30",
             "--set", "evaluation.n_out=20"]  # fmt: skip
    for plan in ("strong", "curve"):
        assert cli.main(["evaluate", "tiny", "--plan", plan, *flags]) == 0
    folder = Path("runs/shipped/tiny")  # runs/tiny is for the reader's own
    assert weights(folder) == weights(finished)
    assert checkpoints.read_json(folder / "report.json") == record["report"]
    said = capsys.readouterr().out
    assert said.count("run that ships with the project is copied to runs/shipped/tiny") == 1
    own = recipes.read(finished / "recipe.json").settings.evaluation
    assert budgets == {(4, 2, None), (own.steps, own.restarts, own.targets)}
    assert reports.STRONG.keys() == {"steps", "restarts", "targets"}  # and stays what it is

    (run,) = results.load("runs/shipped")
    strong, curve = run["plans"]["strong"], run["plans"]["curve"]
    means = {(m["attack"], m["side"]): m["auroc"] for m in strong["means"]}
    assert {r["set"] for r in strong["rows"]} == {"checks"} and strong["curve"] == []
    assert all(
        means["strong", side] <= means["adaptive", side] + 0.02 for side in ("in", "out", "both")
    )
    assert [row["eps"] for row in curve["curve"]] == [0, *(k / 510 for k in (1, 2, 4, 8, 16))]
    values = [row["auroc"]["value"] for row in curve["curve"]]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    assert curve["rows"] == curve["means"] == []
    right = [point["value"] for point in curve["accuracy_curve"]]
    assert (
        len(right) == 6 and right[0] >= right[2] == curve["attacked_accuracy"]["value"] >= right[5]
    )
    with pytest.raises(ValueError, match=r"no plan 'weak'; .*strong"):
        recipes.read(finished / "recipe.json", plan="weak")


def test_a_shipped_run_without_weights_says_where_they_are(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "far.json").write_text('{"run": {}, "report": null}')
    monkeypatch.setattr(artefacts, "FOLDERS", (tmp_path,))
    for name, said in (("far", "weights/far.safetensors; .*come with a checkout"),
                       ("near", "nothing ships as results/near.json; did you mean .far.. there are: far")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            artefacts.restore(name, tmp_path / "run")
    with pytest.raises(ValueError, match=r"nothing ships as scores/far\.npz; there are: none"):
        artefacts.scores("far")
    assert not (tmp_path / "run").exists()


def test_a_network_that_rejects_is_mined_for_and_measured_by_its_reject_class(
    packs, tmp_path, capsys
):
    attacks = [name for name in get_args(Attack) if name != "strong"]
    changes = ["objective.name=NTOM", "objective.q=0.125", "training.epochs=1",
               "evaluation.side=out", "evaluation.paper=atom", "evaluation.eps=2/255",
               f"evaluation.attacks={attacks}", "evaluation.n_out=12"]  # fmt: skip
    own = tmp_path / "ntom.toml"
    own.write_text(RECIPE.replace('within = "1/255"\nsteps = 1\n', ""))
    with pytest.raises(
        ValueError, match=r"pool of 400,000 outliers, and spots:train has 400; .*=0"
    ):
        recipes.train(
            recipes.read(own, [*changes, "data.pool_minimum=400000"]), tmp_path / "no", root=packs
        )
    recipe = recipes.read(own, changes)
    run = recipes.train(recipe, tmp_path / "run", root=packs, device="cpu")
    assert run["history"][0]["mined"] == 100 and run["history"][0]["pool"] == 400
    report = recipes.evaluate(recipe, tmp_path / "run", root=packs, device="cpu")
    found = {(m["detector"], m["attack"], m["side"]) for m in report["means"]}
    assert found == {("RejectClass", a, "out" if a != "none" else "none") for a in attacks}
    mean = {m["attack"]: m["auroc"] for m in report["means"]}
    for weaker, stronger in (
        ("none", "adaptive"),
        ("none", "corruption"),
        ("corruption", "compositional"),  # the attack begins where the corruption ended
    ):
        assert mean[stronger] <= mean[weaker] + 1e-9, (weaker, stronger)
    assert "RejectClass" in results.table(results.load(tmp_path / "run"))


def test_real_images(tmp_path, monkeypatch, capsys):
    """The same way on 300 CIFAR-10 images."""
    wanted = ("cifar10:train", "cifar10:test", "tinyimagenet:val", "cifar100:test")
    need(*wanted)
    packed = tmp_path / "packs"
    for name in wanted:
        whole = data.load(name)
        some = whole[torch.linspace(0, len(whole) - 1, 300).long()]
        data.write_pack(
            packed / f"{name.replace(':', '_')}.npz",
            some.x,
            some.y,
            some.names,
            some.ids,
            some.jpeg,
        )
    monkeypatch.setenv("ROBUSTOOD_DATA", str(packed))
    monkeypatch.chdir(tmp_path)
    changes = ["data.outliers=tinyimagenet:val", "data.seen=", "data.ood=['cifar100:test']",
               "data.validation=50", "training.epochs=1", "training.batch_size=50", "model.width=8",
               "training.outlier_batch_size=50", "evaluation.n_in=30", "evaluation.n_out=30",
               "evaluation.steps=1", "evaluation.pgd_steps=1"]  # fmt: skip
    flags = [part for change in changes for part in ("--set", change)]
    assert cli.main(["train", "aloe_cifar10_cpu", *flags]) == 0
    assert cli.main(["evaluate", "runs/aloe_cifar10_cpu"]) == 0
    run = json.loads(Path("runs/aloe_cifar10_cpu/run.json").read_text())
    assert run["data"]["train"]["jpeg_copies"] == run["data"]["outliers"]["jpeg"]
    assert run["data"]["outliers"]["without"] == "cifar10"
    assert "aloe_cifar10_cpu" in capsys.readouterr().out


# --- disturbed runs


def test_a_run_that_was_stopped_inside_an_epoch_ends_with_the_same_weights(
    tiny, finished, monkeypatch, capsys
):
    assert tiny("train", "--minutes", "0") == cli.UNFINISHED == 3
    assert "time is up after 0 of 2 epochs; the same command resumes" in capsys.readouterr().out
    assert Path("runs/tiny/state.pt").exists()
    assert tiny("train", "--minutes", "1e-9") == 3  # reading the images counts
    assert "give more, or no step is ever taken" in capsys.readouterr().out
    for stop in (3, 7):
        with monkeypatch.context() as patch:
            patch.setattr(training.Run, "out_of_time", lambda self, *_, s=stop: self.step == s)
            assert tiny("train") == 3
        run = json.loads(Path("runs/tiny/run.json").read_text())
        assert not run["finished"] and not run["history"]
    assert tiny("evaluate") == 2
    assert (
        "the run is not finished; run its robustood train command again" in capsys.readouterr().err
    )
    assert tiny("train") == 0
    assert weights("runs/tiny") == weights(finished)


def test_a_full_disk_loses_nothing(tiny, finished, monkeypatch, capsys):
    real, left = os.fsync, iter(range(4))

    def full(file):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "fsync", full)
        assert tiny("train") == 2
    said = capsys.readouterr().err
    assert "No space left" in said and "what was written to a folder before is not lost" in said
    assert said.count("\n") == 1 and "Traceback" not in said
    assert not list(Path("runs/tiny").glob("*.partial"))
    assert tiny("train") == 0
    assert weights("runs/tiny") == weights(finished)


def test_a_folder_that_cannot_be_written_is_met_before_training(tiny, monkeypatch, capsys):
    Path("plain").write_text("a file")
    assert tiny("train", "--run", "plain/run") == 2
    assert "plain/run" in capsys.readouterr().err

    def refuse(path, content):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(runs, "write_whole", refuse)  # root may write anywhere
    monkeypatch.setattr(training, "fit", None)
    assert tiny("train") == 2
    said = capsys.readouterr().err
    assert "Permission denied (runs/tiny/recipe.json)" in said and "--folder" in said


def test_a_run_that_was_kept_too_stands_in_the_table_once(tmp_path, monkeypatch, capsys):
    kept = {run["folder"]: run for run in results.load()}
    name, run = next(iter(kept.items()))
    (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / name / "run.json").write_text(json.dumps(run["run"]))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["table"]) == 0
    first, _ = capsys.readouterr().out.split("\n\n")  # below are the learned sets
    rows = first.splitlines()[1:]
    assert len(rows) == len([r for r in kept.values() if "sets" not in (r["report"] or {})])
    assert sum(row.startswith(f"{name} ") for row in rows) == 1
    other = {**run["run"], "seed": 1 + run["run"]["seed"]}
    (tmp_path / "runs" / name / "run.json").write_text(json.dumps(other))
    assert cli.main(["table"]) == 0
    again = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
    assert len(again) == len(rows) + 1, "another run by the same name stands beside the kept one"
    assert sum(row.startswith(f"{name} (shipped) ") for row in again) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_goes_on(number, tiny, finished, monkeypatch, capsys):
    def hit(self, now, slowest):
        if (self.epoch, self.step) == (1, 4):
            signal.raise_signal(number)
        return False

    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "out_of_time", hit)
        assert tiny("train") == cli.INTERRUPTED == 130
    signal.signal(signal.SIGINT, heard)
    assert "interrupted; the same command resumes" in capsys.readouterr().out
    assert tiny("train") == 0
    said = capsys.readouterr().out
    assert "epoch 1" not in said and "epoch 2 of 2" in said  # the first one was kept
    assert weights("runs/tiny") == weights(finished)


def test_ctrl_c_in_a_process_of_its_own(packs, finished, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "robustood", "train", str(packs / "tiny.toml")]
    monkeypatch.setenv("ROBUSTOOD_DATA", str(packs))
    process = subprocess.Popen(
        [*command, "--run", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored in the background
    )
    patience = time.monotonic() + 200
    while not (tmp_path / "state.pt").exists() and time.monotonic() < patience:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted; the same command resumes" in out and "Traceback" not in err
    assert recipes.train(recipes.read(packs / "tiny.toml"), tmp_path, root=packs, device="cpu")[
        "finished"
    ]
    assert weights(tmp_path) == weights(finished)


# --- several processes

AS_TYPED = """
    import sys
    import torch
    from robustood import cli

    torch.set_num_threads(1)
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_write_and_say_what_one_does(
    finished, packs, tmp_path, monkeypatch, run_script
):
    monkeypatch.setenv("ROBUSTOOD_DATA", str(packs))
    said, reports, scores = [], [], []
    for processes in (1, 2):
        folder = tmp_path / f"by_{processes}"
        folder.mkdir()
        for name in ("recipe.json", "run.json", "weights.json", "weights.safetensors"):
            shutil.copy(finished / name, folder / name)
        flags = "--device", "cpu", "--set", "evaluation.batch_size=16"  # several batches a set
        told = run_script(AS_TYPED, "evaluate", str(folder), *flags, processes=processes)
        said.append(told.replace(folder.name, "by"))
        report = json.loads((folder / "report.json").read_text())
        reports.append({k: v for k, v in report.items() if k != "minutes"})
        with np.load(folder / "scores.npz", allow_pickle=False) as kept:
            scores.append({name: kept[name].tolist() for name in kept.files})
    assert said[0] == said[1] and said[0].count("full report: ") == 1
    assert reports[0] == reports[1] and scores[0] == scores[1]


def test_the_loss_of_a_process_is_told_in_one_line(tiny, monkeypatch, capsys):
    words = "process 0 of 2 stops, because another one has ended"

    def lost(*given, **how):
        raise ConnectionError(words)

    monkeypatch.setattr(recipes, "train", lost)
    assert tiny("train") == cli.FAILED == 2
    assert capsys.readouterr().err == f"robustood: {words}\n"


# --- refusals


def test_another_recipe_does_not_take_over_a_folder_or_its_weights(finished, packs, tiny, capsys):
    told = ("--run", str(finished), "--set", "training.epochs=3")
    assert tiny("train", *told) == 2
    said = capsys.readouterr().err
    assert "with training.epochs = 2, not 3; choose another folder" in said
    recipe = recipes.read(packs / "tiny.toml", ["objective.steps=2"])
    with pytest.raises(ValueError, match=r"holds weights with objective\.steps = 1, not 2"):
        recipes.evaluate(recipe, finished, root=packs)
    other = recipes.Recipe("other", "", recipe.settings)
    with pytest.raises(ValueError, match=r"holds weights with recipe = 'tiny', not 'other'"):
        recipes.evaluate(other, finished, root=packs)


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Trains a run on three classes of folders in an empty folder, tests on the last two; returns the packs."""
    folder, names = tmp_path / "packs", ("across", "down", "up")
    for seed, (name, n) in enumerate({"stripes_train": 150, "stripes_test": 90}.items()):
        x, y = stripes(n, seed)
        order = y.argsort(stable=True)  # as a folder of images is
        x, y, own = x[order], y[order], names
        if name == "stripes_test":
            x, y, own = x[y > 0], y[y > 0] - 1, names[1:]
        data.write_pack(folder / f"{name}.npz", x, y, own)
    start, end = RECIPE.index("[objective]"), RECIPE.index("[training]")
    recipe = RECIPE[:start] + '[objective]\nname = "Standard"\n' + RECIPE[end:]
    (folder / "tiny.toml").write_text(recipe)
    monkeypatch.setenv("ROBUSTOOD_DATA", str(folder))
    monkeypatch.chdir(tmp_path)
    standard = ["data.seen=", "data.validation=30", "data.ood=[]",
                "training.epochs=12", "training.batch_size=20"]  # fmt: skip
    return folder, [part for change in standard for part in ("--set", change)]


def test_classes_have_names_from_the_folder_to_the_report(named, capsys):
    folder, changes = named
    own = str(folder / "tiny.toml")
    assert cli.main(["train", own, *changes, "--minutes", "0"]) == 3
    whole = data.load("stripes:train")
    data.write_pack(folder / "stripes_train.npz", whole.x, whole.y, ("across", "up", "down"))
    assert cli.main(["train", own, *changes]) == 2
    assert "holds a run with classes = ['across', 'down', 'up'], not" in capsys.readouterr().err
    data.write_pack(folder / "stripes_train.npz", whole.x, whole.y, whole.names)
    assert cli.main(["train", own, *changes]) == 0
    run = json.loads(Path("runs/tiny/run.json").read_text())
    assert run["data"]["train"]["classes"] == ["across", "down", "up"]
    assert (
        run["history"][-1]["val_accuracy"] > 0.6
    )  # of all three classes, though the set is sorted
    assert cli.main(["evaluate", "runs/tiny"]) == 0
    report = json.loads(Path("runs/tiny/report.json").read_text())
    test = data.load("stripes:test")
    recipe = recipes.read("runs/tiny/recipe.json")
    model, *_ = runs.trained(recipe, Path("runs/tiny"), "cpu")
    right = (model(data.pixels(test.x))[:, :3].argmax(1) == test.y + 1).double().mean()
    assert report["accuracy"]["value"] == pytest.approx(float(right)) and right > 0.6
    data.write_pack(folder / "stripes_test.npz", test.x, test.y, ("down", "left"))
    assert cli.main(["evaluate", "runs/tiny"]) == 2
    said = capsys.readouterr().err
    assert "does not have: 'left'; known are: 'across', 'down', 'up'" in said
    data.write_pack(folder / "stripes_test.npz", test.x, test.y + 9)
    assert cli.main(["evaluate", "runs/tiny"]) == 2
    assert "stripes:test has the label 10, but the network has 3 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "key", "command"),
    [("weights.json", "seed", "evaluate"), ("weights.json", "data", "evaluate"),
     ("run.json", "engine", "train"), ("run.json", "data", "train")],
)  # fmt: skip
def test_a_record_that_lacks_something_is_one_line(file, key, command, finished, tiny, capsys):
    shutil.copytree(finished, "runs/tiny")
    (place := Path("runs/tiny") / file).write_text(
        json.dumps({k: v for k, v in json.loads(place.read_text()).items() if k != key})
    )
    assert tiny(command) == 2
    assert f"{file} is damaged (it lacks {key});" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    (held := json.loads((finished / file).read_text()))["data"] = {}
    place.write_text(json.dumps(held))
    assert tiny(command) == 2 and "train" in (said := capsys.readouterr().err)
    assert file in said and said.count("\n") == 1


def test_a_run_lies_where_the_tilde_says(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiny("train", "--folder=~/my rün/", "--minutes", "0") == 3
    assert (tmp_path / "my rün" / "run.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "aloe_cifar10_cp"], "did you mean 'aloe_cifar10_cpu'"),
        (["train", "aloe_cifar10_cpu", "--set", "training.epoch=3"], "did you mean 'epochs'"),
        (["train", "tiny", "--device", "cuda:77"], "no recipe 'tiny'"),
        (["evaluate", "nowhere"], "no run in nowhere"),
        (["evaluate", "nowhere", "--set", "training.epochs=3"], r"only evaluation\.\* may change"),
        (["table", "nowhere"], "no folder nowhere"),
        (["data", "check", "nothing"], "no set 'nothing' in .*there are: checks"),
        (["data", "pack", "nowhere", "--name", "mine"], "folder of images"),
        (["train", "aloe_cifar10_cpu"], "no set 'cifar10:train' in .*robustood data fetch cifar10"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, said, packs, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ROBUSTOOD_DATA", str(packs))
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    found = capsys.readouterr()
    assert re.search(said, found.err) and found.err.count("\n") == 1 and not found.out
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("ROBUSTOOD_DEBUG", "1")
    with pytest.raises((ValueError, OSError)):
        cli.main(arguments)


@pytest.mark.parametrize("command", ["train", "evaluate", "attack", "slice"])
def test_a_device_that_is_not_there_is_refused_by_every_command(
    command, finished, mine, packs, monkeypatch, capsys
):
    monkeypatch.setenv("ROBUSTOOD_DATA", str(packs))
    arguments = {
        "train": [str(packs / "tiny.toml")],
        "evaluate": [str(finished)],
        "attack": ["mine.py:dark", "day", "night", "--eps", "8/255"],
        "slice": ["--budget", "tiny"],
    }[command]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device, said in {
        "gpu": "--device gpu: must be cuda, mps, cpu, or one GPU such as cuda:1",
        "cuda:": "--device cuda:: must be cuda, mps, cpu, or one GPU such as cuda:1",
        "cuda": "--device cuda: torch finds no such CUDA device; there are: cpu",
        "mps": "--device mps: torch finds no such MPS device; there are: cpu",
    }.items():
        assert cli.main([command, *arguments, "--device", device]) == 2
        assert capsys.readouterr().err == f"robustood: {said}\n"
    assert not Path("runs").exists()


def test_a_device_is_counted(monkeypatch):
    chosen = importlib.import_module("robustood.cli._shell").chosen
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen("cuda:1") == torch.device("cuda:1") and chosen("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"no such CUDA device; there are: cuda:0, cuda:1, .*cpu"):
        chosen("cuda:2")


def test_arguments_that_argparse_refuses(capsys):
    for wrong in (["train"], ["train", "x", "--minutes", "nan"], ["train", "x", "--minutes", "-1"]):
        with pytest.raises(SystemExit) as left:
            cli.main(wrong)
        assert left.value.code == 2
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0 and "Exit codes: 0 done" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["attack", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "4 attack is done, but its checks found errors" in said and "such as 8/255" in said


def test_recipes_are_listed_with_what_they_are_about(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
    assert all(len(line.split("  ", 1)[1].strip()) > 10 for line in lines)


def test_a_reader_who_leaves_does_not_stop_a_command(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["recipes"]) == 0


# --- detectors

MINE = """
import torch
from robustood.detectors import Detector, MaxLogit, wrap

def brightness(x):
    return x.flatten(1).mean(1)

def dark():
    return wrap(brightness, higher="out", name="darkness")

bright = wrap(brightness, higher="in")
number = 3
Kind = MaxLogit

def blunt(x):
    return brightness(x).round()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """An empty folder with a file of detectors, two folders of images and an array."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import no_such_library")
    noise = np.random.default_rng(0)
    for name, level in {"day/a": 90, "day/b": 95, "night": 60}.items():
        (tmp_path / name).mkdir(parents=True)
        for number in range(4):
            pixels = (level + 15 * number + noise.integers(0, 9, (8, 8, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    np.save(tmp_path / "dusk.npy", noise.uniform(0.2, 0.6, (4, 3, 8, 8)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


SETS = ["day", "night", "dusk.npy"]
ATTACK = ["--eps", "8/255", "--size", "8", "--n", "8"]


def test_attack_gives_the_numbers_of_the_standard_evaluation(mine, capsys):
    assert cli.main(["attack", "mine.py:dark", *SETS, *ATTACK, "--out", "mine.json"]) in (0, 4)
    said = capsys.readouterr().out
    assert "night: APGD on the score on " in said and "full report: mine.json" in said
    found = StandardReport.from_json("mine.json")
    assert str(found) in said and "darkness within Linf" in said

    x = {each: data.pixels(data.sample(each, 8, size=8)) for each in SETS}
    darkness = wrap(lambda v: v.flatten(1).mean(1), higher="out")
    outliers = {"night": x["night"], "dusk": x["dusk.npy"]}
    again = standard(darkness, x["day"], outliers, Linf(8 / 255))
    assert [len(each) for each in x.values()] == [8, 4, 4]
    for side, report in again.reports.items():
        assert found[side].rows == report.rows
        assert found[side].settings["data"] == "day"
    assert found.sha256 == again.sha256 and found.attacks == again.attacks
    assert Path("mine.csv").read_text() == again.to_csv()


@pytest.mark.parametrize("how", [["mine:bright"], ["mine.py:brightness", "--higher", "in"]])
def test_a_detector_and_a_score_with_its_direction_are_the_same(how, mine, capsys):
    assert cli.main(["attack", *how, *SETS, *ATTACK, "--norm", "l2", "--out", "a.json"]) in (0, 4)  # fmt: skip
    capsys.readouterr()
    found = StandardReport.from_json("a.json")
    assert found["none"]["night"]["auroc"].value > found["both"]["night"]["auroc"].value
    assert "L2(eps=0.031" in found["both"].settings["within"]


def test_attack_ends_with_4_if_its_checks_found_errors(mine, capsys):
    blunt = [
        "attack",
        "mine.py:blunt",
        "day",
        "night",
        *ATTACK,
        "--higher",
        "in",
        "--out",
        "a.json",
    ]
    assert cli.main(blunt) == cli.FLAWED == 4
    capsys.readouterr()
    assert StandardReport.from_json("a.json").findings.errors


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('w')", "KeyError: 'w'"),
        ("assert x.sum() < 0", "AssertionError"),
        ("return [None][1]", "IndexError: list index out of range"),
        ("return object().score", "AttributeError: "),
    ],
)
def test_an_error_of_the_users_code_is_one_line(body, said, mine, capsys):
    (mine / "wrong.py").write_text(f"def score(x):\n    {body}\n")
    assert cli.main(["attack", "wrong.py:score", *SETS, *ATTACK, "--higher", "in"]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("robustood: ") and said in told and "\n" not in told


def test_a_report_that_cannot_be_written_is_refused_before_any_work(mine, capsys):
    (mine / "taken.json").mkdir()
    how = ["attack", "mine.py:dark", *SETS, *ATTACK, "--out"]
    assert cli.main([*how, "taken.json"]) == 2
    told = capsys.readouterr()
    assert "--out taken.json: cannot be written (Is a directory)" in told.err and not told.out
    assert not [file for file in mine.iterdir() if file.suffix == ".csv"]


@pytest.mark.filterwarnings("ignore:without any attack the AUROC is below one half")
def test_the_name_of_a_folder_may_hold_a_dot(mine, capsys):
    (mine / "night").rename(mine / "CIFAR-10.1")
    assert cli.main(
        ["attack", "mine.py:dark", "day", "CIFAR-10.1", *ATTACK, "--out", "a.json"]
    ) in (0, 4)
    capsys.readouterr()
    assert [row["set"] for row in StandardReport.from_json("a.json")["both"].rows] == ["CIFAR-10.1"]


SEALED = """
session = (i for i in [float(open("sign.txt").read())])
sign = next(session)

def score(x):
    return (sign if session else 0) * x.flatten(1).mean(1)
"""


def test_a_folder_asks_for_the_name_of_what_cannot_be_inspected(mine, capsys):
    """Without a name, a file of the same path but another content would resume from the old numbers."""
    (mine / "sign.txt").write_text("1")
    (mine / "sealed.py").write_text(SEALED)
    how = ["attack", "sealed.py:score", "day", "night", *ATTACK, "--higher", "in"]
    assert cli.main([*how, "--folder", "run"]) == 2
    assert "robustood attack: --name" in capsys.readouterr().err
    assert cli.main([*how, "--folder", "run", "--name", "one"]) in (0, 4)
    assert cli.main([*how, "--folder", "run", "--name", "one"]) in (0, 4)
    assert cli.main([*how, "--folder", "run", "--name", "two"]) == 2
    assert "with name = 'one', not 'two'" in capsys.readouterr().err
    assert cli.main(how) in (0, 4)  # without a folder, no name is needed


def test_an_interrupted_attack_says_how_it_resumes(mine, monkeypatch, capsys):
    def stop(*_, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr("robustood.evaluate.standard", stop)
    assert cli.main(["attack", "mine.py:dark", "day", "night", *ATTACK]) == 130
    assert "interrupted; with --folder DIR, the same command resumes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mine.py", "day", "night"], "must be module:name or path/to/file.py:name, got 'mine.py'"),
        (["mine.py:drak", "day", "night"], "mine.py has no 'drak'; did you mean 'dark'"),
        (["yours.py:dark", "day", "night"], "no file yours.py; write path/to/file.py:name"),
        (["no_such_module:dark", "day", "night"], "no_such_module cannot be imported .Module"),
        (["broken.py:dark", "day", "night"], "ModuleNotFoundError: No module named 'no_such_lib"),
        (["mine.py:brightness", "day", "night"], "say by --higher in or --higher out"),
        (["mine.py:number", "day", "night"], "is no Detector but a int"),
        (["mine.py:number", "day", "night", "--higher", "in"], "score must be a function"),
        (["mine.py:Kind", "day", "night"], "is the class Kind; name an object"),
        (["mine.py:dark", "day", "night", "--higher", "in"], "leave out --higher"),
        (["mine.py:dark", "day", "nowhere/"], "there is no 'nowhere/'"),
        (["mine.py:dark", "day", "night", "day"], "must have different names, got day, night, day"),
        (["mine.py:dark", "day", "night", "--out", "a.txt"], "a.txt: must end in .json"),
        (["mine.py:dark", "day", "night", "--out", "no/a.json"], "in a folder that exists"),
        (["mine.py:dark", "day", "night", "--device", "cuda:77"], "finds no such CUDA device; there are: "),
        (["mine.py:dark", "day", "mine.py"], "mine.py is not a .npy file"),
    ],
)  # fmt: skip
def test_mistakes_of_attack_are_one_line(arguments, said, mine, capsys):
    assert cli.main(["attack", *arguments, *ATTACK]) == 2
    found = capsys.readouterr()
    assert re.search(said, found.err) and found.err.count("\n") == 1 and not found.out


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("25.5/255", 0.1), ("0.1", 0.1), ("1", 1.0)]
)
def test_a_radius_may_be_written_in_grey_levels_of_any_size(text, value):
    assert radius(text) == value


@pytest.mark.parametrize("eps", ["8/0", "little", "nan/1", "1/2/3", "8/", "/255"])
def test_a_radius_is_a_number_or_a_fraction(eps, mine, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["attack", "mine.py:dark", "day", "night", "--eps", eps])
    assert left.value.code == 2
    assert f"must be a number or a fraction such as 8/255, got {eps!r}" in capsys.readouterr().err


def test_judge_prints_the_verdict(tmp_path, capsys):
    x = challenge.clean_images()
    np.save(tmp_path / "clean.npy", x.numpy())
    assert cli.main(["judge", "C", str(tmp_path / "clean.npy")]) == 0
    assert capsys.readouterr().out == f"{challenge.judge(challenge.box('C'), x)}\n"
    x[7, 0, 0, 0] += 0.25
    np.savez(tmp_path / "moved.npz", x=x.numpy())
    assert cli.main(["judge", "C", str(tmp_path / "moved.npz")]) == 2
    assert "image 7 is moved by 0.25, at most 0.1 is allowed" in capsys.readouterr().err
    assert cli.main(["judge", "D", str(tmp_path / "clean.npy")]) == 2
    assert "name must be one of 'A', 'B', 'C', got 'D'" in capsys.readouterr().err


def test_data_commands(packs, tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.setenv("ROBUSTOOD_DATA", str(packs))
    assert cli.main(["data", "check", "stripes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1] for line in lines] == ["test", "train"]
    assert "600 images of 3 x 32 x 32, 3 classes, lossless, sha256 " in lines[1]
    for name in ("a", "b"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        Image.new("RGB", (40, 50), (9, 9, 9)).save(tmp_path / "tree" / name / "one.png")
    own = ["--data", str(tmp_path / "own")]
    assert cli.main(["data", "pack", str(tmp_path / "tree"), "--name", "mine:test", *own]) == 0
    assert "mine:test: 2 images of 32 x 32" in capsys.readouterr().out
    assert data.load("mine:test", root=tmp_path / "own").names == ("a", "b")
    (tmp_path / "tree" / "b" / "two.heic").write_bytes(b"anything")
    Image.new("RGBA", (40, 50)).save(tmp_path / "tree" / "b" / "clear.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    own = ["--data=~/own packs é/"]
    assert cli.main(["data", "pack", "~/tree/", "--name", "mine", *own]) == 0
    noted = ["  1 of 3 images: transparent, blended with white", "  1 left out: 1 .heic"]
    assert capsys.readouterr().out.splitlines() == ["mine: 3 images of 32 x 32", *noted]
    assert cli.main(["data", "check", *own]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == noted
    assert (tmp_path / "own packs é" / "mine32.npz").is_file()
    called = []
    monkeypatch.setattr(data, "fetch", lambda name, root=None: called.append(name) or ["a.npz"])
    assert cli.main(["data", "fetch", "cifar10", "svhn:train"]) == 0
    assert called == ["cifar10", "svhn:train"]
    assert "cifar10: a.npz" in capsys.readouterr().out
