"""Weights and run states: what comes back, what is refused, what survives a crash at any point."""

import json
import multiprocessing
import os
import signal
import sys
import traceback
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from robustood import checkpoints
from robustood.checkpoints import load_weights, read_state, save_weights, write_state, write_whole
from robustood.data import digits
from robustood.models import Classifier, mlp, small_cnn
from robustood.objectives import Adversarial
from robustood.training import fit

# A child is forked, not started: it has torch already, and a run takes half a second. It is the fork of a process
# without threads, because autograd refuses to work in the fork of one that has used its own.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "torch._dynamo"])


def test_weights_come_back_with_their_card(tmp_path):
    path = save_weights(tmp_path / "a" / "net.safetensors", small_cnn(seed=1), recipe="x", seed=1)
    other = small_cnn(seed=2)
    card = load_weights(path, other)
    assert card["recipe"] == "x" and card["seed"] == 1
    assert card["versions"]["torch"] == torch.__version__
    for a, b in zip(
        other.state_dict().values(), small_cnn(seed=1).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_layers_that_share_weights_are_saved_and_read(tmp_path):
    def tied():
        net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        net[2].weight = net[0].weight
        return net

    first, other = tied(), tied()
    load_weights(save_weights(tmp_path / "net.safetensors", first), other)
    assert other[2].weight is other[0].weight and torch.equal(other[0].weight, first[0].weight)


def test_the_same_weights_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        save_weights(tmp_path / f"{name}.safetensors", small_cnn())
    for ending in (".safetensors", ".json"):
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def refused(path, model, words):
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        load_weights(path, model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_another_architecture_is_refused_with_the_first_difference(tmp_path):
    path = save_weights(tmp_path / "net.safetensors", small_cnn())
    refused(path, small_cnn(reject=1), r"another architecture: 2 tensors differ, first head\.bias")
    refused(path, mlp(64), "another architecture")


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = save_weights(tmp_path / "net.safetensors", small_cnn(seed=1))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    elif damage == "cut":
        content = content[:-100]
    else:
        content = bytearray(save_weights(tmp_path / "x.safetensors", small_cnn()).read_bytes())
    path.write_bytes(content)
    refused(path, small_cnn(), "sha256 .* its card says .* fetch it again")


def test_pickles_and_strange_cards_are_refused(tmp_path):
    torch.save(small_cnn().state_dict(), tmp_path / "net.pt")
    refused(tmp_path / "net.pt", small_cnn(), r"must end in \.safetensors, got 'net\.pt'.*run code")
    with pytest.raises(ValueError, match="must end in"):
        save_weights(tmp_path / "net.pkl", small_cnn())
    with pytest.raises(ValueError, match="must be valid as JSON"):
        save_weights(tmp_path / "net.safetensors", small_cnn(), metric=torch.ones(1))
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none.safetensors", small_cnn())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ('{"sha256": ', "Expecting value"),
        ("[]", "it lacks architecture, sha256"),
        ("3", "it lacks architecture, sha256"),
        ('{"sha256": "a"}', "it lacks architecture"),
        ('{"architecture": {}}', "it lacks sha256"),
        ('{"architecture": {}, "sha256": 3}', "sha256: a string, architecture: an object"),
        ('{"architecture": [], "sha256": "a"}', "sha256: a string, architecture: an object"),
        (
            '{"architecture": {}, "sha256": "a", "lr": NaN}',
            "it contains NaN, which is not a finite number",
        ),
        ('{"architecture": {}, "sha256": "a", "lr": -Infinity}', "it contains -Infinity"),
        ('{"architecture": {}, "sha256": "a", "lr": 1e999}', "it contains 1e999"),
        ("\xff", "invalid start byte"),
        ("[" * 100_000, "maximum recursion depth"),
    ],
)
def test_a_card_that_is_none_is_named_with_the_fix(tmp_path, text, said):
    path = save_weights(tmp_path / "net.safetensors", small_cnn())
    path.with_suffix(".json").write_bytes(text.encode("latin-1"))
    refused(path, small_cnn(), rf"net\.json is damaged \(.*{said}.*\); fetch or save it again")


def test_a_card_with_a_byte_order_mark_and_windows_lines_is_read(tmp_path):
    path = save_weights(tmp_path / "net.safetensors", small_cnn(), recipe="é")
    card = path.with_suffix(".json")
    card.write_bytes(b"\xef\xbb\xbf" + card.read_bytes().replace(b"\n", b"\r\n"))
    assert load_weights(path, small_cnn())["recipe"] == "é"
    with pytest.raises(ValueError, match=r"net\.json is damaged \(it lacks seed\)"):
        load_weights(path, small_cnn(), ("recipe", "seed"))


def test_numbers_of_numpy_go_into_cards_and_states_and_nan_does_not(tmp_path):
    own = {
        "n": np.int64(3),
        "lr": np.float32(0.5),
        "several": [np.uint8(2), (1.5, np.float64(2.5))],
    }
    plain = {"n": 3, "lr": 0.5, "several": [2, [1.5, 2.5]]}
    path = save_weights(tmp_path / "net.safetensors", small_cnn(), **own)
    card = load_weights(path, small_cnn())
    assert {key: card[key] for key in plain} == plain
    for wrong in (float("nan"), np.float32("inf"), {"deep": [float("-inf")]}, np.bool_(True)):
        with pytest.raises(ValueError, match=r"card must be valid as JSON: .* pass finite numbers"):
            save_weights(tmp_path / "net.safetensors", small_cnn(), metric=wrong)
    write_state(tmp_path / "state.pt", own | {"x": torch.ones(2), "flag": True})
    state = read_state(tmp_path / "state.pt")
    assert state["several"] == [2, (1.5, 2.5)] and (state["n"], state["lr"]) == (3, 0.5)
    assert state["flag"] is True and torch.equal(state["x"], torch.ones(2))


def test_a_state_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("echo evil",)

    write_state(tmp_path / "state.pt", {"a": Evil()})
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        read_state(tmp_path / "state.pt")


def test_the_last_whole_state_is_used_and_the_damage_reported(tmp_path):
    path = tmp_path / "state.pt"
    assert read_state(path) is None
    for step in (1, 2, 3):
        write_state(path, {"step": step, "x": torch.full((3,), float(step))})
    assert read_state(path)["step"] == 3
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.warns(UserWarning, match=r"state\.pt is damaged \(\d+ bytes"):
        assert read_state(path)["step"] == 2
    path.unlink()  # as after a crash between the two renames
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_state(path)["step"] == 2
    (tmp_path / "state.pt.previous").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="no intact checkpoint"),
    ):
        read_state(path)


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    write_whole(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["log.csv"]


DATA = digits(train=640)

# The points at which a process may die: the call that is next, and how often it was made before.
POINTS = {
    "before the write": ("write_state", 2),
    "during the write": ("fsync", 4),
    "after the write, before its rename": ("replace", 4),
    "between the renames": ("replace", 6),
    "after the renames": ("write_state, after", 2),
    "mid-epoch": ("step", 25),
}


def dying(original, count, after=False):
    """The same call, before or after whose count-th use the process kills itself."""
    left = iter(range(count - 1))

    def wrapped(*args, **kwargs):
        last = next(left, None) is None
        if last and after:
            original(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    return wrapped


def train(folder, call, count):
    """A small run with everything that has a state: buffers, dropout, random starts."""
    if call in ("fsync", "replace"):
        setattr(os, call, dying(getattr(os, call), count))
    elif call.startswith("write_state"):
        checkpoints.write_state = dying(write_state, count, after=call.endswith("after"))
    elif call == "step":
        torch.optim.Adam.step = dying(torch.optim.Adam.step, count)
    torch.manual_seed(5)
    layers = [nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)]
    model = Classifier([nn.Sequential(*layers)], 16, 10)
    rule = Adversarial(0.1, steps=2)
    history = fit(model, rule, DATA, epochs=4, batch_size=64, seed=3, run_dir=folder)
    assert history.finished and len(history.rows) == 4
    save_weights(folder / "end.safetensors", model)


def child(folder, call, count):
    """Train, and end with code 1 after an error, which stands in the file ``said``."""
    with (folder / "said").open("w") as sys.stderr:
        warnings.resetwarnings()
        warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)
        try:
            train(folder, call, count)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def run(folder, call="none", count=0, kill_after=None):
    """Train in another process; its exit code (negative: the signal) and what it said."""
    (folder / "said").touch()
    process = SERVER.Process(target=child, args=(folder, call, count))
    process.start()
    process.join(kill_after)
    if kill_after is not None:
        process.kill()
        process.join()
    return process.exitcode, (folder / "said").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, errors = run(folder)
    assert code == 0, errors
    return folder


def assert_same(folder, uninterrupted):
    """Bit for bit: final weights, history but for its clock, and the state's tensors."""
    for name in ("end.safetensors", "end.json"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()
    ours, theirs = (read_state(f / "state.pt") for f in (folder, uninterrupted))
    for state in (ours, theirs):
        state.pop("seconds"), state.pop("paces")
        for row in state["rows"]:
            row.pop("seconds")
    assert json.dumps(ours["rows"]) == json.dumps(theirs["rows"])
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, uninterrupted, point):
    call, count = POINTS[point]
    code, errors = run(tmp_path, call, count)
    assert code == -signal.SIGKILL, f"{point} was never reached: {errors}"
    code, errors = run(tmp_path)
    assert code == 0, errors
    assert_same(tmp_path, uninterrupted)


def test_a_truncated_checkpoint_is_reported_and_the_run_goes_on(tmp_path, uninterrupted):
    code, _ = run(tmp_path, "step", 35)
    assert code == -signal.SIGKILL
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    code, errors = run(tmp_path)
    assert code == 0 and "is damaged (1000 bytes, wrong sha256)" in errors
    assert_same(tmp_path, uninterrupted)


def test_kills_at_random_times_change_nothing(tmp_path, uninterrupted):
    """Three random SIGKILLs in one run, each later than the one before."""
    clock = np.random.default_rng(0)
    for latest in (0.15, 0.4, 0.8):
        run(tmp_path, kill_after=float(clock.uniform(0.05, latest)))
    code, errors = run(tmp_path)
    assert code == 0, errors
    assert_same(tmp_path, uninterrupted)
