"""Every kept table has the function that made it, and the page that shows it; a run can be stopped and goes on."""

import json
import re
from pathlib import Path

import pytest
import refresh
import torch
from photographs import need

from experiments import __main__ as command
from experiments import harness, mnist
from experiments.harness import experiment, grid, plain
from robustood import artefacts
from robustood.checkpoints import load_weights
from robustood.metrics import Estimate

ROOT = Path(__file__).parents[1]
TABLES = command.tables()
each_table = pytest.mark.parametrize("name", TABLES)
# An interval over images of which there are fewer; else something is wrong with the sample.
LEAST = 50


def estimates(value):
    """All estimates in a kept table."""
    if isinstance(value, dict) and value.keys() == {"value", "low", "high", "n"}:
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from estimates(each)


# --- tables, scripts and pages


def test_every_table_has_its_experiment_and_every_experiment_its_table():
    kept = {
        path.stem: json.loads(path.read_text("utf-8")) for path in harness.FOLDER.glob("*.json")
    }
    assert {name for name, table in kept.items() if "rows" in table} == set(TABLES)
    for name, each in TABLES.items():
        assert kept[name]["made_by"] == each.made_by
        script, function = each.made_by.split(": ")
        assert re.search(rf"^def {function}\(", (ROOT / script).read_text("utf-8"), re.MULTILINE)


@each_table
def test_the_kept_tables_are_whole(name):
    kept, each = artefacts.result(name), TABLES[name]
    again = each.table()  # what would be written now
    assert kept == again | {"versions": kept["versions"]}, f"run python -m experiments {name}"
    assert {"python", "torch", "numpy"} <= kept["versions"].keys()
    wanted = [(seed, plain(settings)) for seed in each.seeds for settings in each.wanted(seed)]
    found = [(row["seed"], row["settings"]) for row in kept["rows"]]
    assert sorted(map(str, found)) == sorted(map(str, wanted)), f"run python -m experiments {name}"
    found = list(estimates(kept["rows"]))
    assert len(found) >= len(kept["rows"])
    assert all(e["low"] <= e["value"] <= e["high"] and e["n"] > LEAST for e in found)


def sections(page):
    """The text of a page by its headings; a comment in a code cell is none."""
    found, heading, code = {}, "", False
    for line in page.read_text("utf-8").splitlines():
        code ^= line.startswith("```")
        if line.startswith("#") and not code:
            heading = line.lstrip("# ")
        found[heading] = found.get(heading, "") + line + "\n"
    return found


def places(each):
    """Where an experiment says that its table is shown: pages and headings."""
    doc = " ".join(each.function.__doc__.split())
    if "On no page: " in doc:
        return
    pages = re.findall(r'(book/\w+\.md), ("[^"]+"(?:,? and "[^"]+")*)', doc)
    assert pages, f"{each.made_by}: its docstring names no page"
    for page, headings in pages:
        for heading in re.findall('"([^"]+)"', headings):
            yield page, heading, each.made_by


def test_scripts_and_pages_name_each_other():
    said = {place for each in TABLES.values() for place in places(each)}
    linked = set()
    for page in refresh.twins():
        for heading, text in sections(page).items():
            for made_by, link in re.findall(r"\[`(experiments/[^`]+)`\]\(([^)]+)\)", text):
                assert link == f"{refresh.address()}/blob/main/{made_by.split(':')[0]}"
                linked.add((f"book/{page.name}", heading, made_by))
    assert said == linked


# --- the harness


@pytest.fixture
def squares(tmp_path, monkeypatch):
    """An experiment that writes into an empty folder, and says what it measured."""
    monkeypatch.setattr(harness, "FOLDER", tmp_path / "results")
    calls = []

    def made(settings=None, rows=None):
        def square(first_step: float, seed: int) -> dict:
            """A square.

            On no page.
            """
            calls.append((first_step, seed))
            if first_step == 3:
                raise KeyboardInterrupt
            return {"area": Estimate(first_step**2, 0, 1 / 3, seed), "seconds": 1.23}

        rows = rows or grid(**{"first step": (1, 2)})
        return experiment(rows, settings or {"eps": 0.1}, seeds=(0, 1))(square), calls

    return made


def read(each):
    return json.loads((harness.FOLDER / f"{each.name}.json").read_text("utf-8"))


def test_a_table_holds_what_was_measured(squares):
    each, _ = squares()
    each.measure(0)
    table = read(each)
    assert table["versions"].keys() == {"python", "torch", "numpy", "scikit-learn"}
    assert table == {
        "name": "test_square",
        "what": "A square.",
        "made_by": "tests/test_experiments.py: square",
        "scale": "test",
        "settings": {"eps": 0.1},
        "versions": table["versions"],
        "rows": [
            {
                "settings": {"first step": n},
                "seed": 0,
                "metrics": {"area": {"value": n * n, "low": 0, "high": 0.3333, "n": 0}},
                "seconds": 1.2,
            }
            for n in (1, 2)
        ],
    }


def test_a_run_that_was_stopped_goes_on(squares):
    each, calls = squares(rows=grid(**{"first step": (1, 3, 2)}))
    with pytest.raises(KeyboardInterrupt):
        each.measure(1)
    each, _ = squares()
    each.measure(0)
    each.measure(1)
    assert calls == [(1, 1), (3, 1), (1, 0), (2, 0), (2, 1)]
    assert [row["seed"] for row in read(each)["rows"]] == [0, 0, 1, 1]


def test_again_measures_one_seed_afresh_and_other_settings_everything(squares):
    each, calls = squares()
    each.measure(0)
    each.measure(1)
    each.measure(1, again=True)
    assert calls == [(1, 0), (2, 0), (1, 1), (2, 1), (1, 1), (2, 1)]
    assert len(read(each)["rows"]) == 4
    other, _ = squares({"eps": 0.2})
    other.measure(0)
    assert [row["seed"] for row in read(other)["rows"]] == [0, 0]


def test_rows_may_depend_on_the_seed(squares):
    each, calls = squares(rows=lambda seed: grid(**{"first step": (1, 2)[: 2 - seed]}))
    each.measure(0)
    each.measure(1)
    assert calls == [(1, 0), (2, 0), (1, 1)]


def test_numbers_have_four_digits():
    value = {"a": (1, 0.123456), "b": [Estimate(2 / 3, 0.5, 0.75, 9), None, "1.23456"], "c": True}
    e = {"value": 0.6667, "low": 0.5, "high": 0.75, "n": 9}
    assert plain(value) == {"a": [1, 0.1235], "b": [e, None, "1.23456"], "c": True}


def test_a_grid_changes_the_last_value_fastest():
    assert grid(a=(1, 2), b="xy") == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}
    ]  # fmt: skip


def test_the_command_measures_what_starts_with_a_name(squares, monkeypatch, capsys):
    each, calls = squares()
    monkeypatch.setattr(command, "tables", lambda: {"test_square": each, "other": None})

    def run(*words):
        monkeypatch.setattr("sys.argv", ["experiments", *words])
        command.main()

    run("test", "--seeds", "1", "5")
    assert calls == [(1, 1), (2, 1)]
    run("test_square")
    assert calls[2:] == [(1, 0), (2, 0)]
    run("test", "--again")
    assert calls[4:] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    with pytest.raises(SystemExit):
        run("squares")
    assert (
        "no table starts with 'squares'; there are: test_square, other" in capsys.readouterr().err
    )
    monkeypatch.setattr(command, "tables", lambda: {"test_square": each})
    run()
    assert capsys.readouterr().out.split()[:2] == ["test_square", "tests/test_experiments.py:"]
    assert len(calls) == 8


# --- what was measured


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("digits_fiveseven", 1),
        pytest.param("digits_gradients", 0, marks=pytest.mark.slow),
        pytest.param("digits_sequence", 0, marks=pytest.mark.slow),
        pytest.param("digits_doubled", 10, marks=pytest.mark.slow),
        ("cifar10_faint", 28),  # ATOM under noise of eight grey levels, which the page rests on
        ("cifar10_training_attack", 1),
        pytest.param("cifar10_transfer", 2, marks=pytest.mark.slow),  # five minutes
        ("cifar10_budgets", 0),
        ("cifar10_compressed", 1),
        ("cifar10_larger_compressed", 2),
        ("cifar100_compressed", 1),
    ],
)
def test_a_kept_row_comes_back(name, row):
    """Measured again, for CIFAR on the real images."""
    if name.startswith("cifar10"):
        sets = ("tinyimagenet:val", "svhn:train", "textures", "scenes", "cifar100:test")
        need("cifar10:test", *sets)
    settings = TABLES[name].wanted(0)[row]
    kept = next(r for r in artefacts.result(name)["rows"] if r["settings"] == settings)
    measured = TABLES[name].row(0, settings)
    for new, old in zip(estimates(measured), estimates(kept), strict=True):
        assert abs(new["value"] - old["value"]) <= 0.01


@pytest.mark.parametrize("name", [name for name in TABLES if name.startswith("cifar10")])
def test_the_kept_cifar_tables_have_the_images_that_they_say(name):
    both = 200 + 200  # images of CIFAR-10 and of SVHN
    wanted = {
        "cifar10_transfer": {},
        "cifar10_budgets": {},
        "cifar10_compressed": {
            "new": 3000,
            "new, change": 3000,
            "seen": 1500,
            "seen, change": 1500,
        },
        "cifar10_larger_compressed": {
            "new": 800,
            "new, change": 800,
            "seen": 500,
            "seen, change": 500,
        },
        "cifar10_larger_inputs_alone": {"clean": 500, "attacked": 500},
        "cifar100_compressed": {"all": 3000, "CIFAR-100 alone": 3000, "none": 3000},
        "cifar10_inputs_alone": {"clean": 2300, "attacked": 2300},
        "cifar10_repeated": {"beaten": 300, "kept": 1300, "again": 1300, "worse of both": 1300},
    }.get(name, {"new": 4 * 500, "inputs": 500, "seen": 500, "accepted": 500})
    for row in artefacts.result(name)["rows"]:
        sizes = {key: e["n"] for key, e in row["metrics"].items() if isinstance(e, dict)}
        assert sizes == {key: wanted.get(key, both) for key in sizes}


def test_the_kept_mnist_accuracies_fall_with_the_test_radius():
    rows = [row["metrics"] for row in artefacts.result("mnist_tradeoff")["rows"]]
    rows += [
        {"pgd": row["metrics"]["exact"]} for row in artefacts.result("mnist_fiveseven")["rows"]
    ]
    for row in rows:
        for curve in (row["pgd"], list(row.get("targets", {}).values())):
            values = [e["value"] for e in curve]
            assert values == sorted(values, reverse=True)


def test_the_kept_mnist_networks_load():
    torch.manual_seed(0)
    x = torch.rand(4, 1, 28, 28)
    for row in artefacts.result("mnist_tradeoff")["rows"]:
        eps, clean = row["settings"]["train_eps"], row["metrics"]["clean"]
        path, model = mnist.file_of(eps), mnist.network(seed=1)
        before = model(x)
        card = load_weights(path, model)
        assert path.stat().st_size < 2**20
        assert (card["train_eps"], card["clean"]) == (eps, clean)
        assert card["recipe"] == plain(mnist.RECIPE)
        assert model(x).isfinite().all() and not torch.equal(model(x), before)
