"""A slice of a borrowed GPU, rehearsed on a CPU with tiny networks and synthetic images, down to the archive."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustood import cli, data, recipes, results
from robustood.recipes import selftest, slices
from robustood.recipes.selftest import TOLERANCES, published_step
from robustood.recipes.slices import BUDGETS, H200, NAMES, Cost, Rates, cost, plan

SIZES = {
    "cifar10_train": 40,
    "cifar10_test": 20,
    "cifar100_train": 120,
    "cifar100_test": 20,
    "tinyimagenet_train": 40,
    "tinyimagenet_val": 8,
    "svhn_train": 6,
    "textures": 6,
    "scenes": 6,
}
TINY = BUDGETS["tiny"].changes


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Small packs of synthetic images under the names of the real sets."""
    folder, noise = tmp_path_factory.mktemp("packs"), torch.Generator().manual_seed(0)
    for name, n in SIZES.items():
        low = torch.rand(n, 3, 8, 8, generator=noise)
        x = (255 * nn.functional.interpolate(low, size=32, mode="bilinear")).byte()
        outliers = name.startswith("tiny")
        y = torch.arange(n) % (100 if "100" in name else 10)
        ids = ("n00000001", "n00000002") if outliers else ()
        y = y % 2 if outliers else y
        data.write_pack(folder / f"{name}.npz", x, y, ids=ids, jpeg=75 if outliers else None)
    return folder


@pytest.fixture(scope="module")
def untimely(packs, tmp_path_factory):
    """A slice that has no time but for its self-test, in a process without the tests' type checks; what it says."""
    folder = tmp_path_factory.mktemp("slice")
    command = [
        "slice",
        "--budget",
        "tiny",
        "--minutes",
        "0",
        "--device",
        "cpu",
        "--folder",
        str(folder),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "robustood", *command, "--data", str(packs)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == cli.UNFINISHED, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def tested(untimely):
    """The self-test of this machine."""
    return json.loads((untimely[0] / "selftest.json").read_text())


@pytest.fixture
def prepared(packs, tested, tmp_path, monkeypatch):
    """An empty folder to work in, with those packs; the self-test is not repeated."""
    monkeypatch.setenv("ROBUSTOOD_DATA", str(packs))
    monkeypatch.chdir(tmp_path)
    Path("runs/slice").mkdir(parents=True)
    Path("runs/slice/selftest.json").write_text(json.dumps(tested))
    return tmp_path


# --- the self-test


def test_the_self_test_passes_on_this_machine_and_measures_it(tested):
    checks = {check["name"]: check for check in tested["checks"]}
    assert len(checks) == 9 + len(TOLERANCES) and all(c["passed"] for c in checks.values()), checks
    for name in ("compiled", "published"):  # the same operations in the same order
        assert max(checks[name]["value"]) < 1e-4
    assert checks["bf16"]["value"][1] > 1e-3  # it did compute in bf16
    rates = tested["rates"]
    assert rates["eager"] > 1e7 and rates["evaluation"] > 1e7 and rates["compiled"] is None
    assert tested["speed"]["over_floor"] > 0.3 and tested["published_over_ours"] > 0.5
    json.dumps(tested, allow_nan=False)


def test_the_self_test_finds_planted_faults(monkeypatch):
    """A loop that attacks with another radius, and gradients that are not finite."""
    device, recipe = torch.device("cpu"), recipes.read("aloe_cifar10_fast", TINY)
    model, batch = recipe.model(), selftest._batch(recipe, device)
    paper = recipes.read("aloe_cifar10_paper").objective()
    ours = partial(selftest._ours, model, paper, batch, selftest.Engine())

    def published(eps):
        net = copy.deepcopy(model)
        return float(published_step(net, batch, eps)), selftest._gradient(net)

    for eps, passes in ((1 / 255, True), (2 / 255, False)):
        check = selftest._compared("published", ours, partial(published, eps))
        assert check["passed"] == passes, check
    spoilt = lambda self: lambda model, batch: model(batch.x).sum() * torch.nan
    monkeypatch.setattr(recipes.Recipe, "objective", spoilt)
    assert not selftest._finite(recipe, device)["passed"]


def test_the_self_test_finds_a_compiled_attack_that_replays_old_images(run_script):
    """As a CUDA graph would whose inputs are not copied to the recorded addresses.

    Another layout, whose rounding turns signs in float32, passes.
    """
    said = run_script(
        """
        import sys, torch
        from robustood import engine, recipes
        from robustood.recipes import selftest

        recipe = recipes.read("aloe_cifar10_fast", sys.argv[1:])
        model, batch = recipe.model(), selftest._batch(recipe, torch.device("cpu"))
        attack, held = engine.Running.compiled_ascent, []

        def show(how):
            for check in selftest._comparisons(recipe, model, batch, how)[::2]:
                print(check["name"], check["passed"], max(check["value"]) < 1e-6)

        def replayed(self, *given):
            held.append(attack(self, *given))
            return held[0]

        show(engine.Engine(channels_last=True))
        engine.Running.compiled_ascent = replayed
        show(engine.Engine())
        print(len(held))
        """,
        *TINY,
    )
    passes, fails = ["compiled True True", "published True True"], ["compiled False False"]
    assert said.split("\n")[:5] == [*passes, *fails, passes[1], "3"]


# --- the plan


def test_the_full_slice_fits_into_its_minutes_at_the_measured_speed(untyped):
    costs = {
        name: cost(recipes.read(name, BUDGETS["full"].changes), 49_000, 82_500)
        for name in NAMES[:6]
    }
    step = costs["aloe_cifar10_fast"].epoch / (49_000 // 128)
    assert step == pytest.approx(7 * 384 * 0.202e9, rel=0.02)  # (2 k + 3) F an image, with k = 2
    both = {name: costs[name.replace("cifar100", "cifar10")] for name in NAMES}
    compiling = replace(H200, besides=H200.besides + 25)
    found = plan(both, 11 * 60, compiling)  # a minute for the self-test
    assert tuple(found) == NAMES[:5] and set(found.values()) == {BUDGETS["full"].least}
    assert sum(compiling.seconds(both[name], epochs) for name, epochs in found.items()) < 11 * 60


def test_a_plan_gives_all_the_same_epochs_or_leaves_the_last_ones_out():
    costs, rates = {name: Cost(10.0, 20.0) for name in "abcd"}, Rates(1.0, 2.0, 5.0)
    assert rates.seconds(costs["a"], 3) == 5 + 30 + 10
    spans = lambda seconds: plan(costs, seconds / 0.9, rates, most=30, least=5)
    assert spans(4 * (15 + 70) + 1) == dict.fromkeys("abcd", 7)
    assert spans(1e9) == dict.fromkeys("abcd", 30)
    assert spans(3 * (15 + 50) + 1) == dict.fromkeys("abc", 5)  # four would have 3 each
    assert spans(15 + 49) == spans(1) == {}
    assert plan({}, 100, rates) == {}


# --- the whole way

SOME = (
    NAMES[0],
    NAMES[2],
    NAMES[3],
    NAMES[6],
)  # with and without outliers, with mining, another set


@pytest.fixture(scope="module")
def finished(packs, tested, tmp_path_factory):
    """The folder of a slice that nothing disturbed, and what it said."""
    folder, said = tmp_path_factory.mktemp("finished"), []
    (folder / "selftest.json").write_text(json.dumps(tested))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "NAMES", SOME)
        state = recipes.run_slice(folder, 60, "cpu", "tiny", root=packs, tell=said.append)
    assert tuple(state["jobs"]) == SOME and state["failed"] == {} and state["unfinished"] == []
    return folder, "\n".join(said)


def content(folder, names=SOME):
    """Weights and scores of runs in a folder."""
    files = ("weights.safetensors", "scores.npz")
    return {(name, file): (folder / name / file).read_bytes() for name in names for file in files}


def test_the_order_of_a_slice():
    own = ("aloe", "oe", "standard", "atom", "acet", "ntom")
    assert list(NAMES) == [f"{m}_{s}_fast" for s in ("cifar10", "cifar100") for m in own]
    assert set(NAMES) <= set(recipes.names())


def test_a_dry_run_goes_from_the_self_test_to_a_table(finished):
    folder, said = finished
    places = [said.index(f"{name}: 1 epochs in at most") for name in SOME]
    assert places == sorted(places) and "self-test" not in said  # it was there already
    runs = {run["folder"]: run for run in results.load(folder)}
    assert set(runs) == set(SOME)
    for name, run in runs.items():
        assert run["run"]["finished"] and run["report"]["rows"]
        assert run["run"]["settings"]["model"]["classes"] == (100 if "cifar100" in name else 10)
    assert said.count("accuracy %") == len(SOME) + 1  # a table after each, and at the end
    table = results.table(list(runs.values()))
    assert said.endswith(table) and (folder / "table.txt").read_text() == f"{table}\n"


def test_the_archive_holds_what_the_commands_take(finished, tmp_path):
    folder, _ = finished
    parts = sorted(folder.glob("archive.*.tar"))
    assert len(parts) == 1 and parts[0].stat().st_size <= 16e6
    with tarfile.open(parts[0]) as tar:
        kinds = {Path(member).suffix for member in tar.getnames()}
        tar.extractall(tmp_path, filter="data")
    assert kinds == {".json", ".csv", ".npz", ".safetensors", ".txt"}
    assert content(tmp_path) == content(folder)
    assert results.load(tmp_path) == results.load(folder)
    with np.load(tmp_path / SOME[0] / "scores.npz", allow_pickle=False) as scores:
        assert len(scores["MSP adaptive in"]) == 8


SCRIPT = """
import sys
from robustood import cli
from robustood.recipes import slices
slices.NAMES = tuple(sys.argv[1].split())
sys.exit(cli.main(["slice", "--budget", "tiny", "--device", "cpu", "--minutes", "60"]))
"""


def test_a_slice_that_was_killed_goes_on_with_the_same_result(
    prepared, finished, monkeypatch, capsys
):
    folder, names = prepared / "runs/slice", SOME[:2]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, " ".join(names)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    patience = time.monotonic() + 200
    while not (folder / names[0] / "state.pt").exists() and time.monotonic() < patience:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / names[1] / "report.json").exists()
    monkeypatch.setattr(slices, "NAMES", names)
    command = ["slice", "--budget", "tiny", "--device", "cpu", "--minutes", "60"]
    assert cli.main(command) == 0
    assert content(folder, names) == content(finished[0], names)
    capsys.readouterr()
    assert cli.main(command) == 0  # nothing is left to do
    assert "epochs in at most" not in capsys.readouterr().out


def test_a_slice_without_time_trains_nothing_and_says_what_is_left(untimely):
    folder, said = untimely
    assert "self-test, compiled: passed (losses apart by " in said
    assert f"left for the same command: {NAMES[0]}, {NAMES[1]}, " in said and "epochs" not in said
    assert not list(folder.glob("*/run.json"))


def test_time_that_is_up_ends_an_evaluation_between_its_parts(prepared, finished, monkeypatch):
    folder, name = prepared / "runs/slice", SOME[1]
    for file in ("recipe.json", "run.json", "weights.safetensors", "weights.json"):
        (folder / name).mkdir(exist_ok=True)
        shutil.copy(finished[0] / name / file, folder / name)
    monkeypatch.setattr(slices, "NAMES", (name,))
    go, real, told = (
        partial(recipes.run_slice, folder, 60, "cpu", "tiny"),
        slices._Slice.in_time,
        [],
    )

    def late(self, name, line):
        told.append(line)
        if len(told) == 2:
            self.deadline = time.monotonic()
        real(self, name, line)

    with monkeypatch.context() as patch:
        patch.setattr(slices._Slice, "in_time", late)
        assert go()["unfinished"] == [name]
    assert told == ["accuracy", "MSP, attack: none"]
    assert go()["unfinished"] == [] and content(folder, [name]) == content(finished[0], [name])


def test_one_recipe_that_fails_does_not_stop_the_others(prepared, finished, monkeypatch, capsys):
    fails, works = names = SOME[:2]
    monkeypatch.setattr(slices, "NAMES", names)

    def train(recipe, place, *given, **how):
        if recipe.name == fails:
            raise FloatingPointError("the loss is nan at step 3")
        shutil.copytree(finished[0] / works, place)
        return {"finished": True}

    monkeypatch.setattr(slices, "train", train)
    monkeypatch.setattr(slices.reports, "measure", lambda *given: None)
    command = ["slice", "--budget", "tiny", "--minutes", "60", "--device", "cpu"]
    assert cli.main(command) == cli.FAILED
    said = capsys.readouterr().out
    assert f"{fails} failed: FloatingPointError: the loss is nan" in said
    assert said.index(f"{works}: 1 epochs in at most") > said.index(f"{fails}: failed")
    state = json.loads(Path("runs/slice/slice.json").read_text())
    assert (
        list(state["failed"]) == [fails] and (Path("runs/slice") / works / "report.json").is_file()
    )


def test_time_is_shared_as_planned_and_passed_on(prepared, finished, monkeypatch):
    """A recipe gets its part of what is left; one that did not finish is taken up again."""
    monkeypatch.setattr(slices, "NAMES", SOME[:2])
    asked = []

    def train(recipe, place, minutes, *given, **how):
        asked.append((recipe.name, 60 * minutes))
        return {"finished": False}

    monkeypatch.setattr(slices, "train", train)
    state = recipes.run_slice("runs/slice", 10, "cpu", "tiny")
    parts = [state["jobs"][name]["seconds"] for name in SOME[:2]]
    share = parts[0] / sum(parts)
    assert [name for name, _ in asked] == 3 * list(SOME[:2])
    assert asked[0][1] == pytest.approx(595 * share, rel=0.1)
    assert asked[1][1] == pytest.approx(595, rel=0.1)  # the first one took no time
    assert state["unfinished"] == list(SOME[:2])


def test_too_little_time_for_a_recipe_is_said_and_none_begins(prepared, monkeypatch):
    monkeypatch.setattr(slices, "NAMES", SOME[1:2])
    said = []
    state = recipes.run_slice("runs/slice", 0.15, "cpu", "tiny", tell=said.append)
    assert state["jobs"] == {} and state["unfinished"] == [SOME[1]]
    told = [line for line in said if "with 1 epochs needs about " in line]
    assert len(told) == 1 and "more --minutes" in told[0]


def test_what_a_failed_check_and_slow_compilation_change(tested):
    deadline = time.monotonic() + 1200
    work = slices._Slice(Path("runs/slice"), torch.device("cpu"), "full", None, print, deadline)
    costs = dict.fromkeys(NAMES, Cost(2e14, 2e14))
    rates = {"eager": 4e13, "compiled": 9e13, "evaluation": 2e13}
    gpu = {**tested, "compile_seconds": 5.0, "rates": rates}
    fails = lambda name: {**gpu, "checks": [{"name": name, "passed": False}]}
    assert work.rates(gpu, costs) == (Rates(9e13, 2e13, H200.besides + 5), [])
    eager = Rates(4e13, 2e13, H200.besides), ["training.compile=false"]
    assert work.rates({**gpu, "compile_seconds": 600.0}, costs) == eager
    assert work.rates(fails("compiled"), costs) == eager
    assert work.rates(fails("bf16"), costs)[1] == ["training.precision=float32"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"folder": 3}, r"folder must be"),
        ({"minutes": -1}, r"minutes must be a"),
        ({"minutes": float("inf")}, r"minutes must be a finite"),
        ({"device": "gpu7"}, r"device must be a device such as"),
        ({"budget": "huge"}, r"budget must be one of 'full', 'tiny', got 'huge'"),
        ({"root": "nowhere"}, r"no set 'cifar10:train' in nowhere"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(given, said, prepared, untyped):
    with pytest.raises(ValueError, match=said):
        recipes.run_slice(**{"folder": "new", "minutes": 60, "budget": "tiny", **given})
    assert not Path("new").exists()


def test_a_folder_holds_one_kind_of_slice(prepared):
    Path("runs/slice/slice.json").write_text('{"budget": "full", "jobs": {}, "minutes": 3.0}')
    with pytest.raises(ValueError, match=r"holds a slice with budget = 'full', not 'tiny'"):
        recipes.run_slice("runs/slice", 60, "cpu", "tiny")
