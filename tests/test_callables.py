"""What a callable holds: the named parts, the networks inside, the code."""

import functools
import importlib

import pytest
from torch import nn

from robustood.callables import codes, function_state, modules, parts
from robustood.models import frozen, small_cnn

SCALE = 3.0
x = "a global that shares its name with an attribute"
NET = small_cnn()


class Slotted:
    __slots__ = ("__private", "empty", "eps")

    def __init__(self):
        self.eps, self.__private = 0.1, 7


class Further(Slotted):
    __slots__ = ("model",)

    def __init__(self, model):
        super().__init__()
        self.model = model

    def score(self, x):
        return self.model(x)


class Open(Slotted):
    """Slots of the base, and a dictionary."""

    def __init__(self):
        super().__init__()
        self.model = NET


def attack(batch, eps=0.1, *, steps=5):
    return [batch.x + eps * SCALE for _ in range(steps)]


def test_a_function_gives_defaults_closure_globals_and_attributes():
    assert parts(attack) == {"eps": 0.1, "steps": 5, "SCALE": 3.0}  # not the global x

    factor, late = 2.0, lambda: unassigned  # noqa: F821
    rule = lambda y, power=2: late() or (factor * y**power, SCALE)
    rule.power = 9
    assert parts(rule) == {"power": 2, "factor": 2.0, "late": late, "SCALE": 3.0,
                           "attribute power": 9}  # fmt: skip
    assert function_state(rule) == {"power": 2, "factor": 2.0, "late": late, "attribute power": 9}


def test_a_global_is_looked_up_each_time_but_the_code_is_read_once(monkeypatch):
    rule = lambda y: y * LATER  # noqa: F821
    assert parts(rule) == {}
    monkeypatch.setitem(globals(), "LATER", NET)
    monkeypatch.setattr("dis.get_instructions", None)  # reading the code again would fail
    assert parts(rule) == {"LATER": NET}
    assert modules(rule) == [NET]


def test_what_inner_functions_and_classes_read_counts():
    def outer():
        class Inner:
            scale = SCALE

        return lambda: (Inner, NET)

    # A class body reads its module's name.
    assert parts(outer) == {"SCALE": 3.0, "NET": NET, "__name__": __name__}


def test_a_variable_that_is_not_assigned_yet_is_left_out():
    def reader():
        return later

    assert parts(reader) == {}
    later = 1
    assert parts(reader) == {"later": later}


def test_partials_and_methods_give_their_function_and_what_is_bound():
    bound = functools.partial(attack, "batch", steps=7, function=1)  # ty: ignore[unknown-argument]
    assert parts(bound) == {
        "its function": attack,
        "argument 0": "batch",
        "steps": 7,
        "function": 1,
    }
    holder = Further(NET)
    assert parts(holder.score) == {"owner": holder, "function": Further.score}


def test_objects_give_attributes_and_filled_slots():
    assert parts(Further(NET)) == {"eps": 0.1, "_Slotted__private": 7, "model": NET}
    assert parts(Open()) == {"eps": 0.1, "_Slotted__private": 7, "model": NET}
    assert parts(3) == parts("text") == parts(object()) == {}


def test_a_decorated_function_holds_the_one_inside():
    @functools.wraps(attack)
    def counted(*args):
        return attack_once(*args)

    attack_once = functools.lru_cache(attack)
    assert parts(counted) == {"attack_once": attack_once, "attribute __wrapped__": attack}
    assert parts(attack_once)["__wrapped__"] is attack


@pytest.mark.parametrize(
    "holder",
    [
        NET,
        lambda x: NET(x),
        NET.forward,
        functools.partial(NET),
        functools.partial(attack, NET),
        [{"a": (NET, 1)}],
        Further(NET),
        Further(NET).score,
        functools.lru_cache(lambda: NET),
        lambda x, net=NET: net(x),
        lambda x: [NET(x), NET.head],  # the outermost alone
        [NET, NET.head, NET.body],
    ],
    ids=range(12),
)
def test_networks_are_found_wherever_they_hide(holder):
    assert modules(holder) == [NET]


def test_two_networks_are_two_and_none_is_none():
    other = small_cnn(seed=1)
    assert {id(m) for m in modules(lambda x: NET(x) + other(x))} == {id(NET), id(other)}
    assert modules(attack) == modules(3) == modules(nn.Module) == []


def test_circles_end():
    first, second = Open(), Open()
    first.model, second.model, second.net = second, first, NET
    loop = [first]
    loop.append(loop)
    assert modules(loop) == [NET]


def test_codes_are_the_function_s_and_those_inside_it():
    def outer():
        def inner():
            return lambda: 0

        return inner

    assert [code.co_name for code in codes(outer.__code__)] == ["outer", "inner", "<lambda>"]
    assert next(iter(codes(attack.__code__))) is attack.__code__


def test_the_networks_found_can_be_frozen_together():
    net = small_cnn().train()
    (found,) = modules(lambda x: net(x).sum())
    with frozen(found):
        assert not net.training
    assert net.training


def test_networks_of_an_imported_module_are_found(tmp_path, monkeypatch):
    """Also one that is reached through two modules; a module of a library is not opened."""
    (tmp_path / "own_zoo.py").write_text(
        "import own_cages\nfrom robustood.models import small_cnn\nnet = small_cnn()\n"
    )
    (tmp_path / "own_cages.py").write_text(
        "from robustood.models import small_cnn\nnet, other = small_cnn(), small_cnn()\n"
    )
    (tmp_path / "own_scores.py").write_text(
        "import torch, own_zoo\n"
        "def near(x): return own_zoo.net(x)\n"
        "def far(x): return own_zoo.own_cages.other(x)\n"
        "def none(x): return torch.relu(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module("own_scores")
    found = [modules(each) for each in (mine.near, mine.far, mine.none)]
    assert found == [[mine.own_zoo.net], [mine.own_zoo.own_cages.other], []]
    with frozen(mine.near):
        assert not mine.own_zoo.net.training
    assert mine.own_zoo.net.training


class Ensemble(nn.Module):
    """Members in a list, which torch does not see, and one more in a list of a list."""

    def __init__(self, *members):
        super().__init__()
        self.members, self.more = [*members[1:]], {"first": [members[0]]}


def test_networks_in_a_list_of_a_network_are_frozen_and_restored():
    members = [small_cnn(batch_norm=True) for _ in range(3)]
    with frozen(Ensemble(*members)):
        assert not any(m.training for net in members for m in net.modules())
        assert not any(p.requires_grad for net in members for p in net.parameters())
    assert all(net.training for net in members)
    assert all(p.requires_grad for net in members for p in net.parameters())
