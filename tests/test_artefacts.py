"""What ships with the project is found wherever it lies, and a run is saved whole or not at all."""

import json
import tarfile

import numpy as np
import pytest

from robustood import artefacts, checkpoints, cli, results

RUN = {"recipe": "x", "about": "", "seed": 0, "settings": {}, "data": {}, "history": [], "finished": True}  # fmt: skip
REPORT = {"settings": {"steps": 9}, "means": [], "rows": [{}], "weights": "abc"}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store, in a checkout and in an installed package."""
    places = (tmp_path / "data", tmp_path / "package")
    places[0].mkdir()
    monkeypatch.setattr(artefacts, "FOLDERS", places)
    return places


@pytest.fixture
def folder(tmp_path):
    """The folder of a finished run, measured by its own plan and two more."""
    folder = tmp_path / "mine"
    folder.mkdir()
    strong = {"MSP strong in": np.arange(3, dtype=np.float32)}
    for name, scores in {"": {}, "_strong": strong, "_curve": {}}.items():
        np.savez_compressed(folder / f"scores{name}.npz", **scores)
        report = {**REPORT, "rows": []} if name == "_curve" else REPORT
        (folder / f"report{name}.json").write_text(json.dumps(report))
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "weights.json").write_text('{"sha256": "abc"}')
    (folder / "weights.safetensors").write_bytes(b"w")
    return folder


def write(place, kind, name, text="{}"):
    (place / kind).mkdir(parents=True, exist_ok=True)
    (place / kind / name).write_text(text)
    return place / kind / name


def test_a_checkout_comes_before_the_installed_package(store):
    checkout, package = store
    write(package, "results", "a.json", '{"rows": [1]}')
    write(package, "results", "b.json", '{"rows": [2]}')
    mine = write(checkout, "results", "b.json", '{"rows": [3]}')
    assert artefacts.names("results") == ["a", "b"] and artefacts.names("scores") == []
    assert artefacts.find("results", "b") == mine
    assert [artefacts.result(name) for name in "ab"] == [{"rows": [1]}, {"rows": [3]}]


def test_the_project_ships_what_its_chapters_read():
    assert artefacts.result("digits_fall")["name"] == "digits_fall"
    assert "aloe_cifar10_cpu.strong" in artefacts.names("scores")
    runs = {run["folder"] for run in results.load()}
    assert runs <= set(artefacts.names("weights")) & set(artefacts.names("results"))


def test_what_does_not_ship_is_named_with_what_does(store):
    write(store[0], "results", "digits_fall.json")
    with pytest.raises(
        ValueError,
        match=r"nothing ships as results/digit_fall\.json; did you mean 'digits_fall'\? there are: digits_fall",
    ):
        artefacts.result("digit_fall")
    with pytest.raises(ValueError, match=r"scores/mine\.strong\.npz; there are: none"):
        artefacts.scores("mine", "strong")
    with pytest.raises(ValueError, match=r"weights/mine\.safetensors; .*come with a checkout"):
        artefacts.find("weights", "mine")
    with pytest.raises(ValueError, match="kind must be one of 'results', 'scores', 'weights', got"):
        artefacts.names("runs")
    write(store[0], "results", "cut.json", '{"rows": [')
    with pytest.raises(ValueError, match=r"cut\.json is damaged .*; fetch it again"):
        artefacts.result("cut")


def test_a_run_is_saved_whole_or_not_at_all(store, folder, monkeypatch, capsys):
    (folder / "run.json").write_text(json.dumps({**RUN, "finished": False}))
    with pytest.raises(ValueError, match="mine is not finished; run its robustood train command"):
        artefacts.save(folder)
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "report_strong.json").write_text(json.dumps({**REPORT, "weights": "other"}))
    with pytest.raises(ValueError, match="mine: report_strong measured other weights; evaluate"):
        artefacts.save(folder)
    assert not list(store[0].glob("*/*"))
    (folder / "report_strong.json").write_text(json.dumps(REPORT))
    monkeypatch.chdir(folder)
    assert cli.main(["save", "."]) == 0  # called "mine" all the same
    assert capsys.readouterr().out.split() == [str(store[0] / "results" / "mine.json")]
    (saved,) = results.load(store[0] / "results")
    assert saved == results.load(folder)[0] and saved["folder"] == "mine"
    assert {str(file.relative_to(store[0])) for file in store[0].glob("*/*")} == {
        "results/mine.json",
        "scores/mine.npz",
        "scores/mine.strong.npz",
        "weights/mine.json",
        "weights/mine.safetensors",
    }
    assert artefacts.scores("mine") == {}
    assert artefacts.scores("mine", "strong")["MSP strong in"].tolist() == [0, 1, 2]


def test_only_a_checkout_is_saved_into(store, folder):
    store[0].rmdir()
    with pytest.raises(ValueError, match=r"no folder .*data; runs are saved into a checkout"):
        artefacts.save(folder)


def test_a_saved_run_comes_back(store, folder, tmp_path):
    artefacts.save(folder)
    again = artefacts.restore("mine", tmp_path / "again")
    for name in ("run", "report", "report_strong", "report_curve", "weights"):
        file = f"{name}.json"
        assert checkpoints.read_json(again / file) == checkpoints.read_json(folder / file)
    assert (again / "weights.safetensors").read_bytes() == b"w"
    recipe = checkpoints.read_json(again / "recipe.json")
    assert recipe == {"name": "x", "about": "", "evaluation": {"steps": 9}}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"run": 3, "report": None}, "its run lacks recipe, about, settings"),
        ({"run": RUN, "report": {"means": []}}, "its report lacks settings"),
    ],
)
def test_a_damaged_record_is_not_restored(record, said, store, tmp_path):
    write(store[0], "results", "mine.json", json.dumps(record))
    write(store[0], "weights", "mine.safetensors")
    with pytest.raises(ValueError, match=rf"mine\.json is damaged \({said}"):
        artefacts.restore("mine", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def runs_to_pack(folder, sizes):
    """Folders of runs with weights of these sizes, and files that an archive leaves out."""
    for name, size in sizes.items():
        (folder / name / "evaluation").mkdir(parents=True)
        (folder / name / "run.json").write_text(f'{{"run": "{name}"}}')
        (folder / name / "weights.safetensors").write_bytes(bytes([len(name)]) * size)
        for left_out in ("state.pt", "evaluation/notes.json"):
            (folder / name / left_out).write_text("no")
    (folder / "notes").mkdir()  # no run
    (folder / "notes" / "weights.json").write_text("{}")
    (folder / "table.txt").write_text("a table")


def test_an_archive_has_small_parts_that_open_alone(tmp_path):
    runs_to_pack(tmp_path, {"a": 30_000, "bb": 30_000, "ccc": 70_000})
    (tmp_path / "archive.7.tar").write_text("of an earlier call")
    parts = artefacts.pack(tmp_path, limit=90_000)
    assert [part.name for part in parts] == ["archive.1.tar", "archive.2.tar"]
    assert sorted(tmp_path.glob("archive.*")) == parts
    assert all(part.stat().st_size <= 90_000 for part in parts)
    held = {}
    for part in parts:
        with tarfile.open(part) as tar:
            held |= {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    inside = [
        f"{run}/{file}"
        for run in ("a", "bb", "ccc")
        for file in ("run.json", "weights.safetensors")
    ]
    assert sorted(held) == [*inside, "table.txt"]
    assert all(content == (tmp_path / name).read_bytes() for name, content in held.items())
    before = [part.read_bytes() for part in parts]
    assert [part.read_bytes() for part in artefacts.pack(tmp_path, limit=90_000)] == before


def test_what_does_not_fit_into_an_archive_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds 0 files for 0 parts, but there must be 1 to 8"):
        artefacts.pack(tmp_path)
    runs_to_pack(tmp_path, {"a": 30_000, "bb": 30_000})
    with pytest.raises(
        ValueError, match=r"weights\.safetensors has 30000 bytes, more than a part; raise limit"
    ):
        artefacts.pack(tmp_path, limit=30_000)
    with pytest.raises(
        ValueError, match=r"for 2 parts, but there must be 1 to 1; raise limit or most"
    ):
        artefacts.pack(tmp_path, limit=50_000, most=1)
    assert not list(tmp_path.glob("*.tar"))
