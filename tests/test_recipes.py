"""Recipes: what they say, what they refuse, and which images they name."""

import hashlib
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from robustood import artefacts, data, detectors, evaluate, objectives, recipes, results
from robustood.checkpoints import read_json
from robustood.data import Split
from robustood.losses import to_reject, to_uniform
from robustood.objectives import OutlierTraining
from robustood.recipes import composing, images, read, reports, runs
from robustood.recipes.recipe import METHODS, SECTIONS, Detector, Evaluation, needs_reject, settings

LEARNED_SETS = ["cvae_cifar10c", "cvae_mnist_rts"]
ALL = recipes.names()
CLASSIFIERS = [name for name in ALL if name not in LEARNED_SETS]
OLD = ["standard", "oe", "adv", "aoe", "aloe", "acet", "ntom", "atom"]


# --- what ships


def test_every_method_has_its_recipes():
    wanted = [f"{m}_cifar{n}_paper" for m in OLD for n in (10, 100)]
    wanted += [f"{m}_cifar{n}_fast" for m in [*OLD, "minedaloe"] for n in (10, 100)]
    wanted += [f"{m}_cifar10_cpu" for m in [*OLD, "minedaloe"]]
    wanted += [f"{m}_cifar100_cpu" for m in ("standard", "oe", "aoe", "aloe")]
    wanted += LEARNED_SETS
    assert sorted(wanted) == ALL


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_each_recipe_resolves_and_builds(name):
    recipe = read(name)
    classes = 100 if "cifar100" in name else 10
    assert recipe.about and "\n" not in recipe.about
    assert set(recipe.settings.to_dict()) == set(SECTIONS)
    objective = recipe.objective()
    mines = name.split("_")[0] in ("ntom", "atom", "minedaloe")
    assert needs_reject(objective) == mines
    assert recipe.settings.model["classes"] == classes
    assert recipe.settings.data.known == f"cifar{classes}"
    assert f"cifar{classes}:test" not in recipe.settings.data.ood


@pytest.mark.parametrize("name", ["aloe_cifar10_cpu", "atom_cifar100_fast"])
def test_the_network_has_the_outputs_of_the_task(name):
    model = read(name).model()
    z = model(torch.rand(2, 3, 32, 32))
    assert (model.classes, model.reject) == ((10, 0) if "aloe" in name else (100, 1))
    assert z.shape[1] == model.classes + model.reject


def test_the_papers_networks_have_the_papers_parameters():
    count = lambda name: sum(p.numel() for p in read(name).model().parameters())
    assert count("aloe_cifar10_paper") == 769_162
    assert count("atom_cifar10_paper") == 769_505
    assert count("aloe_cifar10_cpu") == 78_042
    assert count("oe_cifar10_fast") == 691_674


@pytest.mark.parametrize("name", [n for n in ALL if n.endswith("_paper")])
def test_the_papers_optimisation(name):
    recipe = read(name)
    training, model = recipe.settings.training, recipe.settings.model
    assert (model["name"], model["depth"], model["growth"]) == ("densenet_bc", 100, 12)
    assert model["init"] == "papers"
    assert (training.epochs, training.lr, training.weight_decay) == (100, 0.1, 1e-4)
    assert (training.optimiser, training.momentum, training.nesterov) == ("sgd", 0.9, True)
    assert training.seed == 1 and training.warmup == 0
    assert recipe.settings.data.validation == 0
    by_atom = name.split("_")[0] in ("acet", "ntom", "atom")
    assert training.milestones == ([0.5, 0.75, 0.9] if by_atom else [])
    sizes = (128, 128) if name.startswith("acet") else (64, 128)
    assert (training.batch_size, training.outlier_batch_size) == sizes
    told = runs.to_fit(recipe)
    assert told["milestones"] == (training.milestones or None)
    assert told["optimiser"].keywords == {"momentum": 0.9, "nesterov": True}
    assert told["augment"] == data.Augment(crop=4, flip=True)


def test_the_papers_objectives():
    aloe = read("aloe_cifar10_paper").objective()
    assert isinstance(aloe, OutlierTraining)
    assert aloe.bn == "train" and aloe.weight == 0.5 and aloe.outlier_loss is to_uniform
    for inner in (aloe.inside, aloe.outside):
        assert (inner.within, inner.step_size, inner.steps) == (1 / 255, 1 / 255, 2)
        assert (inner.restarts, inner.mode, inner.keep) == (0, "train", "last")
    aoe, adv = read("aoe_cifar10_paper").objective(), read("adv_cifar10_paper").objective()
    assert aoe == replace(aloe, outside=None)
    assert adv == replace(aoe, weight=0.0)
    assert read("oe_cifar10_paper").objective() == objectives.OutlierExposure(0.5)
    atom = read("atom_cifar10_paper").objective()
    assert atom.inside is None and atom.outlier_loss is to_reject and atom.weight == 1
    assert atom.attacked_share == 0.5
    assert (atom.mine.q, atom.mine.share, atom.mine.sample) == (0.125, 0.25, 400_000)
    inner = atom.outside
    assert (inner.within, inner.step_size, inner.steps) == (8 / 255, 2 / 255, 5)
    assert (inner.restarts, inner.mode, inner.keep) == (1, "eval", "best")
    ntom = read("ntom_cifar10_paper").objective()
    assert ntom == replace(atom, outside=None, attacked_share=1.0)
    assert read("atom_cifar100_paper").objective() == replace(atom, mine=replace(atom.mine, q=0.5))
    acet = read("acet_cifar10_paper").objective()
    assert acet == replace(atom, outlier_loss=to_uniform, mine=None)


def test_the_papers_tests():
    aloe, atom = (read(f"{m}_cifar10_paper").settings.evaluation for m in ("aloe", "atom"))
    assert (aloe.eps, aloe.side, aloe.paper) == (1 / 255, "both", "aloe")
    assert (atom.eps, atom.side, atom.paper) == (8 / 255, "out", "atom")
    assert (aloe.odin_temperature, aloe.odin_step) == (1000, 0.0014)
    assert (atom.odin_temperature, atom.odin_step) == (1000, 0.0016)
    assert read("acet_cifar100_paper").settings.evaluation.odin_step == 0.0012


def test_no_recipe_changes_unnoticed():
    """All settings of all recipes as one digest; where one is changed on purpose, put the new digest here."""
    texts = []
    for name in ALL:
        sections = read(name).settings.to_dict()
        del sections["objective"]["name"]
        texts.append(json.dumps(sections, sort_keys=True))
    found = hashlib.sha256("".join(sorted(texts)).encode()).hexdigest()
    assert found == "53c4804b66890a91110eec1640cd08e90616220ef587de06b0b34355f3e4b1e6"


def test_parts_hold_sections_and_what_holds_beside_other_parts():
    known = {f"{kind}/{name}" for kind in composing.KINDS for name in composing.parts(kind)}

    def check(table, where):
        for key, value in table.items():
            if key in composing.KINDS:
                for name, inner in value.items():
                    assert f"{key}/{name}" in known, f"{where}: no part {key}/{name}"
                    check(inner, f"{where}, {key}.{name}")
            else:
                assert key in SECTIONS or (
                    where.count("/") == 1 and key in ("about", "plan", "without")
                )

    for name in known:
        check(composing.load(name), name)


def test_the_words_of_a_recipe_are_those_of_the_library():
    assert set(get_args(get_type_hints(Evaluation)["paper"])) == set(evaluate.PAPERS)
    assert all(hasattr(detectors, name) for name in get_args(Detector))
    assert all(hasattr(objectives, name) or name == "Variational" for name in METHODS)


# --- what may be written


def write(folder, name, text):
    file = folder / f"{name}.toml"
    file.write_text(text)
    return str(file)


def test_later_bases_win_and_the_file_itself_last(tmp_path):
    write(
        tmp_path,
        "a",
        '[training]\nlr = 1.0\nepochs = 1\nseed = 1\n[objective]\nname = "Standard"\n',
    )
    write(tmp_path, "b", "[training]\nlr = 2.0\nepochs = 2\n")
    own = write(
        tmp_path, "own",
        'extends = ["sets/cifar10", "scales/cpu", "a.toml", "b.toml"]\nabout = "mine"\n[training]\nlr = "3/2"\n',
    )  # fmt: skip
    recipe = read(own)
    training = recipe.settings.training
    assert (training.lr, training.epochs, training.seed) == (1.5, 2, 1)
    assert training.batch_size == 128
    assert (recipe.name, recipe.about) == ("own", "mine")
    changed = read(own, ["training.lr=0.25", "training.lr=0.5", "data.ood=['textures']"])
    assert changed.settings.training.lr == 0.5
    assert changed.settings.data.ood == ["textures"]


def test_a_file_may_extend_parts_and_what_holds_among_them(tmp_path):
    """The example of the page on recipes; and ATOM's rate, which falls in steps at the scale of the papers."""
    page = Path(__file__).parents[1] / "book" / "recipes.md"
    example = page.read_text("utf-8").split("```toml\n")[1].split("```")[0]
    wider = read(write(tmp_path, "wider", example)).settings
    assert wider == read("aloe_cifar10_fast", ["objective.within=2/255"]).settings
    bases = ["sets/cifar100", "plans/atom", "scales/paper", "methods/atom"]
    atom = read(write(tmp_path, "own", f"extends = {bases}")).settings
    assert atom == read("atom_cifar100_paper").settings and atom.training.milestones
    alone = read(write(tmp_path, "alone", f"extends = {[bases[0], *bases[2:]]}")).settings
    assert alone.training.milestones == [] and alone.objective.q == 0.5


def test_a_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = read("minedaloe_cifar100_fast", ["training.seed=7"])
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert read(tmp_path / "recipe.json") == recipe


def test_recipes_that_extend_each_other_are_refused(tmp_path):
    write(tmp_path, "a", 'extends = ["b.toml"]')
    write(tmp_path, "b", f'extends = ["{tmp_path / "a.toml"}"]')
    with pytest.raises(ValueError, match=r"extends itself: .*a\.toml -> b\.toml -> .*a\.toml"):
        read(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("trains.epochs=3", r"no section \[trains\]; did you mean 'training'"),
        ("training.epoch=3", r"no key training\.epoch; did you mean 'epochs'"),
        ("objective.withn=0.1", r"no key objective\.withn; did you mean 'within'"),
        ("model.dept=8", r"no key model\.dept; did you mean 'depth'"),
        ("objective.name=ALOEE", r"no objective 'ALOEE'.* did you mean 'ALOE'"),
        ("model.name=resnt", r"no model 'resnt'.* did you mean 'resnet'"),
        ("training.epochs=0", r"training\.epochs must be a whole number of at least 1, got 0"),
        ("training.epochs=many", r"training\.epochs must be a whole number.* got 'many'"),
        ("training.epochs=true", r"training\.epochs must be a whole number.* got True"),
        ("training.lr=nan", r"training\.lr must be a finite number.* got nan"),
        ("training.precision=fp8", r"training\.precision must be one of 'auto', 'float32', 'bf16'"),
        ("training.channels_last=maybe", r'channels_last must be True or False, got \'maybe\'; or write "auto"'),
        ("objective.within=8/0", r"objective\.within must be a number in \[0, 1\], got '8/0'; a fraction is"),
        ("objective.within=2", r"objective\.within must be a number in \[0, 1\].* got 2"),
        ("model.depth=8.5", r"model\.depth must be a whole number.* got 8\.5"),
        ("data.jpeg=high", r'data\.jpeg must be a whole number.* got \'high\'; or write "auto"'),
        ("data.jpeg=200", r"data\.jpeg must be .*a whole number of at least 0, at most 100, got 200"),
        ("training.lr='1e400'", r"training\.lr must be a finite number"),
        ("data.ood=svhn", r"data\.ood must be a list of values, got 'svhn'; use \[\.\.\] for one"),
        ("data.ood=['svhn','svhn']", r"name each set once"),
        ("data.outliers=''", r"ALOE learns from outliers, but data.outliers is empty; name a set"),
        ("evaluation.detectors=['MPS']", r"evaluation\.detectors: each must be one of 'MSP', .*got 'MPS'; or write"),
        ("evaluation.detectors=['RejectClass']", r"needs a reject output"),
        ("evaluation.sets=['svn:train']", r"no set 'svn:train'.* did you mean 'svhn:train'"),
        ("evaluation.curve=[0.1, 0.05]", r"evaluation\.curve must increase, got \[0\.1, 0\.05\]"),
        ("training.momentum=0", r"nesterov needs a momentum above 0"),
        ("epochs=3", r"write training\.epochs="),
        ("training.epochs", r"--set needs section\.key=value"),
        ("data=3", r"--set needs section\.key=value, got 'data=3'; write training\.epochs=3"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_any_data_are_read(change, said, monkeypatch):
    monkeypatch.setattr(data, "load", None, raising=False)
    with pytest.raises(ValueError, match=said) as caught:
        read("aloe_cifar10_cpu", [change])
    whole_change = "=" in change and "." in change  # else there is no recipe to name yet
    assert ("aloe_cifar10_cpu" in str(caught.value)) == whole_change


def test_files_of_windows_editors_and_paths_of_all_kinds(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "my räcipes"
    folder.mkdir()
    text = (
        'extends = ["sets/cifar10", "scales/cpu"]\nabout = "mine"\n[objective]\nname = "Standard"\n'
    )
    plain = read(write(folder, "own", text))
    (folder / "own.toml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read("~/my räcipes/own.toml") == read(folder / "own.toml") == plain
    (folder / "recipe.json").write_bytes(b"\xef\xbb\xbf" + plain.to_json().encode())
    assert read("~/my räcipes/recipe.json").settings == plain.settings
    for damaged in ("", "[]", "3", '{"about": NaN}', "{"):
        (folder / "recipe.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"recipe\.json is damaged"):
            read(folder / "recipe.json")


def test_numbers_of_numpy_are_settings_and_truth_values_are_none():
    given = read("aloe_cifar10_cpu").settings.to_dict()
    training = given["training"] | {"epochs": np.int64(3), "lr": np.float32(0.5)}
    mine = {**given, "training": training, "evaluation": {"curve": (0, np.float64(0.5))}}
    found = settings(mine)
    kinds = [(v, type(v)) for v in (found.training.epochs, found.training.lr)]
    assert kinds == [(3, int), (0.5, float)] and found.evaluation.curve == [0, 0.5]
    json.dumps(found.to_dict())
    for key in ("epochs", "lr"):
        for wrong in (np.bool_(True), True):
            with pytest.raises(ValueError, match=rf"training\.{key} must be a .*number"):
                settings({**given, "training": training | {key: wrong}})


def test_unknown_recipes_and_missing_keys(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'aloe_cifar10_cpu'"):
        read("aloe_cifar10_cp")
    with pytest.raises(ValueError, match=r"no recipe file nowhere\.toml"):
        read("nowhere.toml")
    with pytest.raises(ValueError, match="is not valid TOML"):
        read(write(tmp_path, "broken", "[training\n"))
    (tmp_path / "latin.toml").write_bytes('about = "café"'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe .*latin\.toml is not valid TOML: .*utf-8"):
        read(tmp_path / "latin.toml")
    with pytest.raises(ValueError, match="cvae_cifar10c learns a perturbation set; plans are for"):
        read("cvae_cifar10c", plan="atom")
    for section, said in [
        ('[objective]\nname = "ADV"', r"objective\.within is missing: the radius of ADV's attack"),
        (
            '[objective]\nname = "Standard"',
            r"training\.epochs is missing; set it in the file, or with",
        ),
        ("[objective]\nname = 3", r"no objective '3' \(objective\.name\); there are: ACET, ADV"),
    ]:
        with pytest.raises(ValueError, match=said):
            read(
                write(
                    tmp_path,
                    "short",
                    f'extends = ["sets/cifar10"]\n[model]\nname = "resnet"\n{section}',
                )
            )
    with pytest.raises(ValueError, match=r"no recipe 'scales/cp'; did you mean 'scales/cpu'"):
        read(write(tmp_path, "wrong", 'extends = ["scales/cp"]'))
    with pytest.raises(ValueError, match=r"objective\.name is missing"):
        read(write(tmp_path, "empty", 'extends = ["sets/cifar10", "scales/cpu"]'))
    with pytest.raises(ValueError, match=r"needs model\.reject of at least 1"):
        read("ntom_cifar10_cpu", ["model.reject=0"])
    with pytest.raises(ValueError, match=r"set data\.validation"):
        read("ntom_cifar10_cpu", ['objective.q="auto"', "data.validation=0"])
    with pytest.raises(ValueError, match=r"objective: q \+ share must be at most 1"):
        read("ntom_cifar10_cpu", ["objective.q=0.9"])


def test_a_bad_network_is_named_with_its_recipe():
    with pytest.raises(ValueError, match=r"recipe oe_cifar10_cpu: model: depth must be 6 n \+ 2"):
        read("oe_cifar10_cpu", ["model.depth=9"]).model()


def test_the_initial_weights_follow_the_seed():
    one, same, other = (
        read("oe_cifar10_cpu", [f"training.seed={s}"]).model().head.weight for s in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_attack_settings_reach_both_inner_maxima_and_nothing_else():
    said = ["objective.step_size=1/255", "objective.keep=best"]
    plain, told = read("aloe_cifar10_cpu").objective(), read("aloe_cifar10_cpu", said).objective()
    for side in ("inside", "outside"):
        before, after = plain.inner(getattr(plain, side)), getattr(told, side)
        assert after == replace(before, step_size=1 / 255, keep="best")
    assert replace(told, inside=None, outside=None) == replace(plain, inside=None, outside=None)


# --- images


@pytest.fixture
def sets(monkeypatch):
    """Small sets in memory; what is loaded is noted."""
    noise = torch.Generator().manual_seed(0)
    sizes = {"cifar10:train": 60, "cifar10:test": 30, "tinyimagenet:train": 40, "tinyimagenet:val": 9,
             "svhn:train": 8, "textures": 7, "scenes": 6, "cifar100:test": 5}  # fmt: skip
    held, loaded = {}, []
    for name, n in sizes.items():
        x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=noise)
        base = name.split(":")[0]
        more = {"ids": ("n02099601", "n00000001"), "jpeg": 75} if base == "tinyimagenet" else {}
        held[name] = data.Loaded(x, torch.arange(n) % 2, name=base, **more)

    def load(name, split=None, root=None):
        loaded.append(name)
        if name not in held:
            raise ValueError(f"no set {name!r} in the folder")
        return held[name]

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(data, "available", lambda root=None: sorted(held))
    return held, loaded


def test_the_images_of_a_recipe(sets):
    held, _ = sets
    found = recipes.data(read("aloe_cifar10_cpu", ["data.validation=10", "data.hold_out=last"]))
    train = held["cifar10:train"]
    assert torch.equal(found.train.x, train.x[:50]) and torch.equal(found.val.y, train.y[50:])
    assert torch.equal(found.test.x, held["cifar10:test"].x)
    assert list(found.ood) == [
        "tinyimagenet:val",
        "svhn:train",
        "textures",
        "scenes",
        "cifar100:test",
    ]
    # The golden retriever is a dog: half of the outliers, and of the seen distribution, is dropped.
    assert torch.equal(found.outliers, held["tinyimagenet:train"].x[1::2])
    assert len(found.ood["tinyimagenet:val"]) == 4
    assert torch.equal(found.compressed, data.compress(train.x[:50], 75))


def by_class(name, x, y):
    """A set that is sorted by class, as a folder of images is."""
    order = y.argsort(stable=True)
    return data.Loaded(x[order], y[order], name=name, names=("cat", "dog", "eel"))


def test_each_class_is_held_out_by_its_share(sets):
    """The last images of a sorted set are one class alone: nothing of it would be left to train on."""
    held, _ = sets
    y = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    held["cifar10:train"] = by_class("cifar10", held["cifar10:train"].x, y)
    found, cards = images.to_train(read("standard_cifar10_cpu", ["data.validation=12"]), None)
    assert found.train.y.bincount().tolist() == [24, 16, 8] and cards["train"]["held out"] == 12
    assert found.val.y.bincount().tolist() == [6, 4, 2]
    assert cards["train"]["classes"] == ["cat", "dog", "eel"]
    stored = [image.numpy().tobytes() for image in held["cifar10:train"].x]
    places = [[stored.index(i.numpy().tobytes()) for i in x] for x in (found.train.x, found.val.x)]
    assert all(each == sorted(each) for each in places) and sorted([*places[0], *places[1]]) == [
        *range(60)
    ]
    again = recipes.data(read("standard_cifar10_cpu", ["data.validation=12", "training.seed=7"]))
    assert torch.equal(again.val.x, found.val.x)  # seeds of training compare on the same images
    learned = ["data.images=12", "data.validation=6", "model.width=4"]
    inside, last, _ = images.paired_images(read("cvae_cifar10c", learned), None)
    assert inside.y.bincount().tolist() == [6, 4, 2] and last.y.bincount().tolist() == [3, 2, 1]


def test_a_run_goes_on_with_its_own_rule_of_holding_out():
    last = read("standard_cifar10_cpu", ["data.hold_out=last"])
    theirs = last.settings.to_dict()
    runs.check_recipe(last, "standard_cifar10_cpu", theirs, "it has")
    with pytest.raises(ValueError, match=r"it has with data\.hold_out = 'last', not 'by class'"):
        runs.check_recipe(read("standard_cifar10_cpu"), "standard_cifar10_cpu", theirs, "it has")


@pytest.mark.parametrize("run", results.load(), ids=lambda run: run["folder"])
def test_the_settings_of_every_shipped_run_are_read_as_they_were_recorded(run):
    recorded, report = run["run"], run["report"]
    whole = {**recorded["settings"], "evaluation": report["settings"]}
    assert settings(whole).to_dict() == whole
    assert recorded["recipe"] in ALL
    card = artefacts.find("weights", run["folder"]).with_suffix(".json")
    assert read_json(card)["settings"] == recorded["settings"]


@pytest.mark.parametrize("run", results.load(), ids=lambda run: run["folder"])
def test_the_commands_of_a_shipped_run_lead_to_its_settings(run):
    """But for a recipe's step size that was the library's own at the time: then the flag spells it out."""
    train, evaluate = (shlex.split(line) for line in recipes.commands(run))
    recipe, folder = run["run"]["recipe"], f"runs/{run['folder']}"
    assert train[:3] == ["robustood", "train", recipe] and train[-2:] == ["--folder", folder]
    assert evaluate[:3] == ["robustood", "evaluate", folder]
    flags = [flag for words in (train, evaluate) for flag in words if "=" in flag]
    again = read(recipe, flags).settings.to_dict()
    wanted = {**run["run"]["settings"], "evaluation": run["report"]["settings"]}
    step = again["objective"].pop("step_size", None)
    if step != wanted["objective"].pop("step_size", None):
        eps, steps = (wanted["objective"][key] for key in ("within", "steps"))
        assert step == pytest.approx(2.5 * eps / steps)
    assert again == wanted


def test_classes_are_found_by_name(sets):
    """A test set that lacks a class counts the later ones from its own start; the names say which is meant."""
    held, _ = sets
    x = held["cifar10:test"].x
    held["cifar10:train"] = replace(by_class("cifar10", x, torch.arange(30) % 3), name="cifar10")
    held["cifar10:test"] = data.Loaded(
        x, torch.arange(30) % 2, name="cifar10", names=("dog", "eel")
    )
    recipe = read("standard_cifar10_cpu", ["data.validation=0"])
    assert recipes.data(recipe).test.y.tolist() == [1, 2] * 15
    unnamed, *_ = images.to_test(recipe, None)  # of a run that kept no names
    assert unnamed.y.tolist() == [0, 1] * 15
    held["cifar10:test"] = replace(held["cifar10:test"], names=("dog", "Eel"))
    with pytest.raises(
        ValueError, match=r"cifar10:train does not have: 'Eel'; known are: 'cat', 'dog', 'eel'"
    ):
        recipes.data(recipe)
    held["cifar10:test"] = replace(held["cifar10:test"], names=())
    assert recipes.data(recipe).test.y.tolist() == [0, 1] * 15


@pytest.mark.parametrize(
    ("jpeg", "quality"), [("auto", 75), ("0", None), ("40", 40)], ids=["auto", "off", "given"]
)
def test_the_twins_of_the_training_images(sets, jpeg, quality):
    found = recipes.data(read("oe_cifar10_cpu", ["data.validation=0", f"data.jpeg={jpeg}"]))
    if quality is None:
        assert found.compressed is None
    else:
        assert torch.equal(found.compressed, data.compress(found.train.x, quality))


def test_every_image_passes_through_jpeg_once_where_the_recipe_says_so(sets):
    held, _ = sets
    wanted = [
        "data.jpeg=75",
        "data.jpeg_everywhere=true",
        "data.validation=10",
        "data.hold_out=last",
    ]
    recipe = read("oe_cifar10_cpu", wanted)
    found, cards = images.to_train(recipe, None)
    train = data.compress(held["cifar10:train"].x, 75)
    assert torch.equal(torch.cat([found.train.x, found.val.x]), train)
    assert found.compressed is None and cards["train"]["jpeg_copies"] == 0
    assert torch.equal(
        found.outliers, held["tinyimagenet:train"].x[1::2]
    )  # JPEG before, so left alone
    test, outside, cards = images.to_test(recipe, None)
    assert torch.equal(test.x, data.compress(held["cifar10:test"].x, 75))
    for name, x in outside.items():
        before = held[name].x
        assert (
            len(x) == 4 if name == "tinyimagenet:val" else torch.equal(x, data.compress(before, 75))
        )
        assert cards[name].get("passed through JPEG") == (None if held[name].jpeg else 75)


def test_jpeg_everywhere_needs_a_quality():
    with pytest.raises(ValueError, match=r"jpeg_everywhere needs a quality.*jpeg=75"):
        read("oe_cifar10_cpu", ["data.jpeg_everywhere=true"])
    with pytest.raises(ValueError, match=r"jpeg_everywhere has no effect on data.pairs; leave it"):
        read("cvae_cifar10c", ["data.jpeg_everywhere=true"])


def test_without_outliers_none_are_read_and_the_augmentation_is_that_of_the_other_rows(sets):
    _, loaded = sets
    for name in ("standard_cifar10_cpu", "adv_cifar10_cpu"):
        found, cards = images.to_train(read(name, ["data.validation=5"]), None)
        assert len(found.outliers) == 0 and set(cards) == {"train"}
        assert torch.equal(found.compressed, data.compress(found.train.x, 75))
        few = ["data.validation=5", "data.jpeg=auto"]
        assert images.to_train(read(name, few), None)[0].compressed is None
    assert set(loaded) == {"cifar10:train"}


def test_atoms_recipe_demands_the_papers_pool(sets):
    with pytest.raises(ValueError, match=r"pool of 400,000 outliers.* has 20; take the recipe "
                                         r"atom_cifar10_fast, or .*data\.pool_minimum=0"):  # fmt: skip
        recipes.data(read("atom_cifar10_paper"))
    assert len(recipes.data(read("atom_cifar10_paper", ["data.pool_minimum=0"])).outliers) == 20
    assert len(recipes.data(read("acet_cifar10_paper")).outliers) == 20  # does not mine


def test_images_that_do_not_fit_are_refused(sets):
    held, loaded = sets
    with pytest.raises(ValueError, match=r"data\.validation = 60 leaves nothing of cifar10:train"):
        recipes.data(read("standard_cifar10_cpu", ["data.validation=60"]))
    del held["scenes"]
    loaded.clear()
    with pytest.raises(ValueError, match="no set 'scenes'"):
        images.to_test(read("oe_cifar10_cpu"), None)
    assert loaded == ["scenes"]  # nothing else was read first


def test_the_record_says_where_it_was_made():
    found = runs.commit()
    assert found is None or len(found.removesuffix("+changes")) == 40
    assert set(runs.versions()) == {"python", "torch", "robustood"}


def test_the_same_images_are_picked_each_time_and_all_where_there_are_few():
    split = data.Split(torch.arange(100.0)[:, None], torch.arange(100))
    some = reports.pick(split, 10)
    assert torch.equal(some.y, reports.pick(split, 10).y) and len(set(some.y.tolist())) == 10
    assert torch.equal(some.x[:, 0].long(), some.y) and some.y.diff().min() > 0
    assert len(reports.pick(split, 500)) == 100


def test_images_are_tested_with_the_compression_of_the_training_images_on_both_sides(sets):
    held, _ = sets
    recipe = read("oe_cifar10_cpu")
    test, outside, cards = images.to_test(recipe, None, trained={"jpeg": 90})
    assert torch.equal(test.x, data.compress(held["cifar10:test"].x, 90))
    assert {len(outside), len(cards)} == {5, 6}
    for name, x in outside.items():
        before = held[name].x
        if held[name].jpeg:  # the seen distribution, less what overlaps
            assert name == "tinyimagenet:val" and not set(map(bytes, x.numpy())) - set(
                map(bytes, before.numpy())
            )
        else:
            assert torch.equal(x, data.compress(before, 90))
            assert cards[name]["passed through JPEG"] == 90
    plain, outside, cards = images.to_test(recipe, None, trained={"jpeg": None})
    assert torch.equal(plain.x, held["cifar10:test"].x)
    assert not any("passed through JPEG" in card for card in cards.values())


def test_images_pass_through_jpeg_once():
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    test, card = Split(x, torch.arange(4)), {"jpeg": None}
    same = images.passed(test, None, card)
    assert same is test and "passed through JPEG" not in card
    assert images.passed(test, 90, {"jpeg": 90}) is test
    passed = images.passed(test, 90, card)
    assert torch.equal(passed.x, data.compress(x, 90)) and torch.equal(passed.y, test.y)
    assert card["passed through JPEG"] == 90
    assert images.passed(passed, 90, card) is passed  # once is enough


# --- learned sets


def test_a_recipe_learns_and_measures_a_set(sets, tmp_path):
    """Pairs from the first images, radii from the last; the same call goes on, other settings are refused."""
    few = [
        "data.images=32",
        "data.validation=8",
        "data.hold_out=last",
        "training.epochs=1",
        "training.batch_size=16",
    ]
    small = ["model.width=4", "model.blocks=1", "model.latent=4", "evaluation.n_in=6"]
    recipe = read("cvae_cifar10c", few + small)
    found, cards = images.to_train(recipe, None)
    train = sets[0]["cifar10:train"]
    assert torch.equal(found.train.x, train.x[:32]) and torch.equal(found.val.x, train.x[52:])
    assert found.train.views.shape[1] == 13 and cards["train"]["held out"] == 8
    assert recipes.train(recipe, tmp_path)["finished"]
    assert recipes.train(recipe, tmp_path)["finished"]
    report = recipes.evaluate(recipe, tmp_path)
    assert set(report["sets"]) == {"learned", *data.HELD_OUT}
    assert all(measured["ordered"] for measured in report["sets"].values())
    assert 0 < report["radii"]["median"] <= report["radii"]["maximum"]
    with pytest.raises(ValueError, match="holds weights"):
        recipes.evaluate(read("cvae_cifar10c", [*few, *small, "objective.beta=2"]), tmp_path)
    with pytest.raises(ValueError, match=r"data.images = 60 and data.validation = 8 must fit"):
        images.to_train(read("cvae_cifar10c", ["data.images=60", "data.validation=8"]), None)


def test_a_learned_set_needs_all_its_parts():
    for change in ("objective.name=Standard", "model.name=small_cnn"):
        with pytest.raises(ValueError, match=r"need one another|no key"):
            read("cvae_mnist_rts", [change])
    with pytest.raises(ValueError, match=r"need one another, got OutlierExposure"):
        read("oe_cifar10_cpu", ["data.pairs=rts"])
