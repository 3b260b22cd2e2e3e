"""The contract of the repository: what lies where, who may import whom, what must not be there."""

import ast
import graphlib
import importlib
import json
import re
import subprocess
import tomllib
from pathlib import Path

import arithmetic
import pytest
import refresh
import yaml

import robustood

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "robustood"
FOUND = [*PACKAGE.glob("*.py"), *(init.parent for init in PACKAGE.glob("*/__init__.py"))]
MODULES = sorted(p for p in FOUND if not p.stem.startswith("_"))
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]_*.ipynb"))
CHAPTER_OF = {
    "toy": 1,
    "perturbations": 2,
    "attacks": 3,
    "training": 4,
    "detectors": 5,
    "metrics": 6,
    "evaluate": 7,
    "objectives": 8,
    "mining": 9,
    "generative": 10,
    "smoothing": 11,
    "sanity": 12,
    "results": 13,
}
# A module imports only from lower floors. The support modules on floor 0 may use one another.
FLOORS = {
    0: {
        "artefacts",
        "callables",
        "checkpoints",
        "corruptions",
        "data",
        "distributed",
        "identity",
        "inputs",
        "losses",
        "models",
        "rng",
        "tables",
        "streams",
        "widgets",
    },
    1: {"toy", "perturbations", "detectors", "metrics"},
    2: {"attacks", "challenge", "mining", "plotting"},
    3: {"costs", "engine", "generative", "objectives", "sanity", "smoothing"},
    4: {"evaluate", "training"},
    5: {"results"},
    6: {"recipes"},
    7: {"cli"},
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
MAX_LINES = 480
MAX_BYTES = 5 * 2**20
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".cfg", ".cff", ".txt", ".css", ".json", ".bib", ""}


def files() -> list[Path]:
    """Everything that is tracked, or would be by ``git add``."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [p for name in listed.split("\0") if name and (p := ROOT / name).is_file()]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_each_module_has_a_floor_a_test_file_and_a_bounded_length(module):
    assert module.stem in FLOOR, f"{name(module)} stands on no floor: add it to FLOORS"
    test = ROOT / "tests" / f"test_{module.stem}.py"
    assert test.exists(), f"{name(module)} has no test file {name(test)}"
    for path in refresh.sources(module.stem):
        text = path.read_text("utf-8")
        lines = len(text.splitlines())
        assert lines <= MAX_LINES, f"{name(path)} has {lines} lines, at most {MAX_LINES}: split it"
        assert ast.get_docstring(ast.parse(text)), f"{name(path)} has no docstring"
        alone = re.findall(r"^ +[a-z][\w, ]*: [A-Za-z]\.$", text, re.MULTILINE)
        assert not alone, f"{name(path)}: a page shows {alone} as entries of a list: say what it is"


@pytest.mark.parametrize("folder", ["experiments", "book/_tools", "book/_ext"])
def test_each_script_is_short_and_says_what_it_is_for(folder):
    for path in (ROOT / folder).glob("*.py"):
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= MAX_LINES, f"{name(path)}: more than {MAX_LINES} lines"
        assert ast.get_docstring(ast.parse(text)), f"{name(path)} has no docstring"


def test_each_test_file_belongs_to_a_module():
    own = {
        "test_layout",
        "test_book",
        "test_notebooks",
        "test_experiments",
        "test_leaderboard",
        "test_doors",
        "test_examples",
        "test_readme",
        "test_own_model",
        "conftest",
        "typecheck",
        "test_typecheck",
        "wrappers",
        "photographs",
        "doors",
        "test_second_zoo",
        "test_quiz",
        "test_colab",
        "test_slices",
        "test_kept_runs",
    }
    strays = [
        name(path)
        for path in (ROOT / "tests").glob("*.py")
        if path.stem not in own and not refresh.sources(path.stem.removeprefix("test_"))
    ]
    assert not strays, f"test files without a module: {strays}"


@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda p: p.stem)
def test_each_chapter_has_its_home_module(notebook):
    number, slug = notebook.stem.split("_", 1)
    assert CHAPTER_OF.get(slug) == int(number), f"{name(notebook)}: no such chapter in CHAPTER_OF"
    assert refresh.sources(slug), f"{name(notebook)}: no module robustood.{slug}"
    assert (ROOT / "tests" / f"test_{slug}.py").exists(), f"{name(notebook)}: no test_{slug}.py"


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_a_module_imports_only_from_lower_floors(module):
    for other in refresh.imports(module.stem):
        allowed = FLOOR[other] < FLOOR[module.stem] or (FLOOR[other] == FLOOR[module.stem] == 0)
        assert allowed, (
            f"robustood.{module.stem} (floor {FLOOR[module.stem]}) imports {other} ({FLOOR[other]})"
        )


def test_no_module_imports_itself_in_a_circle():
    imports = {m.stem: refresh.imports(m.stem) for m in MODULES}
    for start in imports:
        reached: set[str] = set()
        todo = set(imports[start])
        while todo:
            step = todo.pop()
            reached.add(step)
            todo |= imports[step] - reached
        assert start not in reached, f"robustood.{start} imports itself in a circle"


def public_names(path: Path) -> set[str]:
    """Functions, classes and values that a file defines without an underscore, type aliases apart."""
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_each_module_says_what_it_exports(module):
    """A package by its face: its files begin with an underscore, but for those that say it themselves."""
    face = importlib.import_module(f"robustood.{module.stem}")
    assert len(set(face.__all__)) == len(face.__all__) > 0
    assert not [each for each in face.__all__ if not hasattr(face, each)]
    for path in refresh.sources(module.stem):
        if path.stem.startswith("_") and path.stem != "__init__":
            continue
        inner = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        listed = importlib.import_module(inner).__all__
        assert public_names(path) <= set(listed), f"{name(path)}: list them or add an underscore"


@pytest.mark.parametrize("folder", ["robustood", "experiments", "book/_tools", "book/_ext"])
def test_no_function_is_longer_than_a_screen(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
                lines = node.end_lineno - first.lineno + 1 + (node.body[0].lineno - node.lineno)
                assert lines <= 60, f"{name(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize(
    ("words", "most"), [(r"fmt: (skip|off)", 34), (r"\bnoqa\b", 11), (r"\bAny\b", 122)]
)
def test_exceptions_to_formatter_linter_and_types_stay_few(words, most):
    paths = [
        p for f in ("robustood", "book/_tools", "experiments") for p in (ROOT / f).rglob("*.py")
    ]
    found = sum(len(re.findall(words, path.read_text("utf-8"))) for path in paths)
    assert found <= most, f"{words} stands {found} times, at most {most}: write it without one"


def test_no_file_imports_itself_in_a_circle():
    """Counted with the imports inside functions; a package's face and its files are modules of their own."""
    dotted = lambda p: ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    files = {dotted(path): path for path in PACKAGE.rglob("*.py")}
    imports: dict[str, set[str]] = {}
    for module, path in files.items():
        found = imports[module] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {each if each in files else node.module for each in inner} & {*files}
    try:
        tuple(graphlib.TopologicalSorter(imports).static_order())
    except graphlib.CycleError as circle:
        pytest.fail(f"a circle of imports: {' -> '.join(circle.args[1])}")


def test_the_command_line_starts_without_libraries_that_few_commands_need(run_script):
    """They would double the start of each command; what needs one imports it."""
    slow = ("sklearn", "scipy.stats", "scipy.optimize", "matplotlib", "torchvision")
    assert (
        run_script(f"import sys, robustood.cli; print([m for m in {slow} if m in sys.modules])")
        == "[]\n"
    )


def test_no_file_is_large_or_a_pickle():
    found = files()
    large = [f"{name(p)}: {p.stat().st_size} bytes" for p in found if p.stat().st_size > MAX_BYTES]
    assert not large, f"files over 5 MB: {large}"
    pickles = [name(p) for p in found if p.suffix in {".pkl", ".pickle", ".pt", ".pth", ".joblib"}]
    assert not pickles, f"weights are safetensors, data are npz or json: {pickles}"


def test_no_file_names_a_machine_or_a_package_index():
    home = re.compile(r"(?<![\w./~-])/(?:home|Users|root|work|tmp|mnt)/[A-Za-z0-9_.]+")
    index = re.compile("|".join(["extra-" + "index", "index" + "-url", "find" + "-links"]))
    bad = []
    for path in files():
        if path.suffix not in TEXT | {".ipynb"}:
            continue
        text = path.read_text("utf-8")
        found = [match[0] for rule in (home, index) for match in rule.finditer(text)]
        bad += [f"{name(path)}: {hit}" for hit in found[:3]]
    assert not bad, f"paths of a machine or package index options: {bad}"


def test_nothing_is_unfinished():
    mark = re.compile(
        r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "TB" + "D"]) + r")\b"
    )
    bad = [
        f"{name(path)}: {hit[0]}"
        for path in files()
        if path.suffix in TEXT
        for hit in mark.finditer(path.read_text("utf-8"))
    ]
    assert not bad, f"unfinished: {bad}"


def requirement(line: str) -> tuple[str, frozenset[str]]:
    """Name and bounds of a requirement, in any order: ``a>=1,<2``."""
    match = re.match(r"([A-Za-z0-9_.-]+)\s*(.*)", line.strip())
    assert match, f"no requirement: {line!r}"
    return match[1].lower(), frozenset(b.strip() for b in match[2].split(",") if b.strip())


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_environment_yml_has_the_bounds_of_pyproject():
    lines = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    by_pip = [line for part in lines if isinstance(part, dict) for line in part["pip"]]
    plain = [line for line in lines if isinstance(line, str) and line != "pip"]
    conda = dict(requirement(line) for line in plain + by_pip)
    assert conda.pop("python") == {project()["requires-python"]}
    conda["torch"] = conda.pop("pytorch")  # conda's name for it
    wanted = project()["dependencies"] + project()["optional-dependencies"]["book"]
    assert conda == dict(requirement(line) for line in wanted)


def pins(file: str) -> dict[str, str]:
    """The versions that a constraints file names."""
    found = {}
    for line in (ROOT / file).read_text("utf-8").splitlines():
        assert re.fullmatch(r"[\w.-]+==[\w.!+]+", line), f"{file}: not a pin: {line!r}"
        package, version = line.split("==")
        found[re.sub(r"[-_.]+", "-", package).lower()] = version
    return found


def requirements() -> list[str]:
    """What the project asks for, with the book and the tests."""
    extras = project()["optional-dependencies"]
    return [*project()["dependencies"], *extras["book"], *extras["test"]]


def test_constraints_pin_each_requirement_inside_its_bounds():
    pinned = pins("constraints.txt")
    for line in requirements():
        assert requirement(line)[0] in pinned, f"constraints.txt does not pin {line!r}"


def test_the_lowest_versions_are_those_of_the_bounds():
    bounds = {requirement(line)[0]: re.search(r">=([\w.]+)", line) for line in requirements()}
    lowest = {package: bound[1] for package, bound in bounds.items() if bound}
    assert pins("constraints-lowest.txt") == lowest


def test_continuous_integration_runs_what_the_project_promises():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]["run"]
    matrix = job["strategy"]["matrix"]
    said = [c.rpartition(" ")[2] for c in project()["classifiers"] if "Python :: 3." in c]
    assert matrix["python"] == said and project()["requires-python"] == f">={said[0]}"
    assert {*matrix["isa"], *(row["isa"] for row in matrix["include"])} == set(arithmetic.PINNED)
    tried = {*matrix["constraints"], *(row["constraints"] for row in matrix["include"])}
    assert tried == {"constraints.txt", "constraints-lowest.txt"}
    systems = {*matrix["os"], *(row["os"] for row in matrix["include"])}
    assert systems == {"ubuntu-latest", "macos-latest"}


def test_what_calls_make_names_a_target():
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    called = re.compile(r"(?:`|run: |entry: |command: |ISA=\w+ )make ([a-z][a-z0-9-]*)")
    for path in files():
        if path.suffix in {".md", ".yml", ".yaml"}:
            unknown = set(called.findall(path.read_text("utf-8"))) - targets
            assert not unknown, f"{name(path)}: no target in Makefile: {unknown}"


def test_the_repository_has_one_address():
    address = refresh.address()
    assert project()["urls"]["Repository"] == address
    assert project()["urls"]["Issues"].startswith(address + "/")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["repository-code"] == address
    host = address.removeprefix("https://github.com/").split("/")[1]
    for path in files():
        if path.suffix not in {".md", ".ipynb", ".py", ".yml", ".toml", ".cff"}:
            continue
        for found in re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+)", path.read_text("utf-8")):
            repo = found.removesuffix(".git").rstrip(".")
            if repo.split("/")[1] == host:
                assert address.endswith("/" + repo), f"{name(path)}: {repo} is not {address}"


def test_the_version_has_one_source():
    """``robustood/__init__.py``: packaging reads it there, and the citation and the change log follow."""
    assert project()["dynamic"] == ["version"] and "version" not in project()
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]
    assert hatch["version"]["path"] == "robustood/__init__.py"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == robustood.__version__
    versions = re.findall(r"^## ([\d.]+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert versions[0] == robustood.__version__


def test_shipped_results_are_readable_and_small():
    shipped = [p for p in files() if name(p).startswith(("data/results/", "data/scores/"))]
    for path in shipped:
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
    total = sum(p.stat().st_size for p in shipped)
    assert total <= 15 * 2**20, f"data/results and data/scores hold {total} bytes, at most 15 MB"
