"""Several processes are one: in what they draw, learn, measure and refuse; and none waits for one that is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from robustood import distributed
from robustood.checkpoints import read_state, write_state
from robustood.models import small_cnn
from robustood.objectives import Standard
from robustood.perturbations import Linf
from robustood.rng import SharedGenerator
from robustood.training import fit


def test_draws_of_several_processes_are_parts_of_one():
    x, whole = torch.rand(48, 3, 16, 16), Linf(0.1)
    alone = torch.Generator().manual_seed(4)
    together = next(iter(whole.initial_points(x, 1, alone)))
    for rank in (0, 1):
        shared = SharedGenerator("cpu")
        shared.place = (rank, 2)
        shared.manual_seed(4)
        own = slice(rank, None, 2)
        assert torch.equal(next(iter(whole.initial_points(x[own], 1, shared))), together[own])


TRAINING = """
    import sys
    import torch
    torch.set_num_threads(1)
    from robustood import distributed, engine
    from robustood.data import Augment, Data, Split
    from robustood.models import small_cnn
    from robustood.objectives import MinedALOE
    from robustood.perturbations import L2
    from robustood.training import fit

    target, minutes, folder = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    distributed.join()
    made = torch.Generator().manual_seed(3)
    y = torch.arange(96) % 3
    x = (torch.rand(96, 3, 16, 16, generator=made) * 255).byte()
    outliers = (torch.rand(96, 3, 16, 16, generator=made) * 255).byte()
    data = Data(Split(x, y), Split(x[:8], y[:8]), Split(x[:8], y[:8]), outliers, compressed=255 - x)
    model = small_cnn(3, 1, channels=3, size=16, batch_norm=True)
    history = fit(model, MinedALOE(L2(0.3), steps=2), data, epochs=2, batch_size=24,
                  outlier_batch_size=16, lr=0.01, augment=Augment(2), minutes=minutes, run_dir=folder,
                  optimiser=torch.optim.SGD, engine=engine.Engine(channels_last=True))
    if distributed.rank() == 0:
        losses = [row["loss"] for row in history.rows]
        torch.save([model.state_dict(), losses, history.finished], target)
"""


def test_two_processes_are_one_up_to_rounding(run_script, tmp_path):
    """Attacked, mined, augmented and batch-normalised, in one go and stopped on the way."""

    def trained(processes: int, *stops: str) -> list:
        """Weights and buffers, losses, and whether the run finished; stopped and resumed at each budget."""
        folder = tmp_path / f"{processes}{len(stops)}"
        target = folder.with_suffix(".pt")
        for minutes in (*stops, "inf"):
            run_script(TRAINING, str(target), minutes, str(folder), processes=processes)
        return torch.load(target, weights_only=True)

    one, losses, finished = trained(1)
    for stops in ((), ("0.01",)):
        two, same, too = trained(2, *stops)
        assert finished and too
        assert losses == pytest.approx(same, abs=1e-4)
        for name, value in one.items():
            assert torch.allclose(value.float(), two[name].float(), atol=2e-4), name


def test_batches_must_divide_among_the_processes(book, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(
        ValueError, match="batch_size must be a multiple of 3 with 3 processes, got 64"
    ):
        fit(small_cnn(), Standard(), book, epochs=1, batch_size=64)


def test_one_process_is_the_trivial_case():
    model, values, told = small_cnn(), torch.ones(2), {"a": 1}
    assert (distributed.join(), distributed.rank(), distributed.world()) == (0, 0, 1)
    assert distributed.mean(values) is values and distributed.from_first(told) is told
    assert distributed.wrapped(model) is model
    distributed.check_divisible(7, "batch_size", 2)
    distributed.check_alike({"x": "anything"})
    done: list[int] = []
    found = distributed.each([lambda k=k: done.append(k) or 2 * k for k in range(3)])
    assert next(found) == 0 and done == [0]  # one at a time, as it is asked for
    assert list(found) == [2, 4]


# --- an evaluation

EVALUATION = """
    import json
    import sys
    from pathlib import Path
    import torch
    from robustood import distributed
    from robustood.detectors import MSP
    from robustood.evaluate import four_sides, standard
    from robustood.models import counting, seeded, small_cnn

    torch.set_num_threads(1)
    target, folder, protocol = sys.argv[1:]
    distributed.join()
    with seeded(0):
        detector = MSP(small_cnn(3).eval())
    made = torch.Generator().manual_seed(3)
    x, u, v = torch.rand(3, 14, 1, 8, 8, generator=made)
    given = detector, x[:9], {"u": u[:5], "v": v}, 0.05
    with counting() as passes:
        reports = four_sides(*given, batch_size=4, steps=3, run_dir=folder)
    if protocol == "standard":
        reports = {"standard": standard(*given, batch_size=4, run_dir=folder + "_standard", say=print)}
    texts = {name: report.to_json() for name, report in reports.items()}
    Path(f"{target}_{distributed.rank()}").write_text(json.dumps([texts, passes.forwards]))
"""


@pytest.fixture
def evaluated(run_script, tmp_path):
    """Reports of the first process, after a look at the others'; passes of each; what was said."""

    def run(processes, folder, protocol="four sides"):
        target = tmp_path / f"{folder}_{processes}"
        arguments = str(target), str(tmp_path / folder), protocol
        said = run_script(EVALUATION, *arguments, processes=processes)
        each = [json.loads(Path(f"{target}_{k}").read_text()) for k in range(processes)]
        assert all(reports == each[0][0] for reports, _ in each)
        return each[0][0], [passes for _, passes in each], said

    return run


def test_two_processes_measure_the_scores_of_one_and_share_the_work(evaluated):
    """To the last bit."""
    (one, (whole,), _), (two, passes, _) = evaluated(1, "one"), evaluated(2, "two")
    assert one == two and sum(passes) == whole
    assert min(passes) > whole / 3, "one process did most of the work"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_what_one_number_of_processes_has_measured_another_goes_on_from(
    before, after, evaluated, tmp_path
):
    reports, passes, _ = evaluated(before, "run")
    file = tmp_path / "run" / "scores.state"
    state = read_state(file)
    whole, some = state["parts"], 9  # batches: the clean ones, and half of the attacked ones
    write_state(file, {**state, "parts": dict(list(whole.items())[:some])})
    resumed, fewer, _ = evaluated(after, "run")
    assert resumed == reports and 0 < sum(fewer) < sum(passes)
    assert read_state(file)["parts"].keys() == whole.keys()


@pytest.mark.slow
def test_two_processes_make_the_standard_evaluation_of_one(evaluated):
    """With the same cost, in passes; only the first says what it does."""
    (one, _, said), (two, _, heard) = (evaluated(k, f"run{k}", "standard") for k in (1, 2))
    assert one == two
    lines = lambda text: [line.split(",")[0] for line in text.splitlines()]  # without the time left
    assert lines(said) == lines(heard) and len(lines(said)) > 9


def test_an_error_in_one_process_ends_all(run_script):
    said = run_script(
        """
        from robustood import distributed

        def job(number):
            if number == 1:
                raise ValueError("the second job is impossible")
            return number

        rank, jobs = distributed.join(), [lambda k=k: job(k) for k in (0, 2, 3, 1, 5)]
        found = distributed.each(jobs)
        seen = [next(found), next(found)]
        try:
            next(found)
        except Exception as error:
            print(rank, seen, repr(error))
        try:
            distributed.check_alike({"x": "the same", "y": str(rank)})
        except ValueError as error:
            print(error)
        """,
        processes=2,
    )
    assert (
        "0 [0, 2] RuntimeError('process 1 of 2 failed: ValueError: the second job is impos" in said
    )
    assert "1 [0, 2] ValueError('the second job is impossible')" in said
    alike = "y must be the same in all processes, but is 0 in process 0 and 1 in process 1; read it"
    assert said.count("must be the same") == said.count(alike) == 1


# --- a process that is lost

# Ends the process of a rank in the middle of the second epoch; not again in a second life.
MORTAL = """
    import os
    import signal
    from robustood.training import Run

    in_time = Run.out_of_time
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def mortal(run, now, slowest):
        if run.done == 6 and first_life and os.environ["RANK"] == os.environ["VICTIM"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if not first_life:
            print(run.done)
        return in_time(run, now, slowest)

    Run.out_of_time = mortal
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_if_a_process_is_killed_the_other_one_ends_soon_and_says_why(victim, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(MORTAL + TRAINING))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(script), str(tmp_path / "w.pt"), "inf", str(tmp_path / "run")]
    processes = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **found, "RANK": str(rank), "LOCAL_RANK": "0", "VICTIM": str(victim)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    killed, other = processes[victim], processes[1 - victim]
    try:
        killed.communicate(timeout=300)
        said = other.communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
    assert killed.returncode == -signal.SIGKILL and other.returncode == 1
    last = said.strip().splitlines()[-1]
    assert f"ConnectionError: process {1 - victim} of 2 stops, because another one" in last
    assert read_state(tmp_path / "run" / "state.pt")["epoch"] == 1  # from where it can go on


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_goes_on_after_a_kill_and_ends_with_the_same_weights(
    victim, run_script, tmp_path, monkeypatch
):
    monkeypatch.setenv("VICTIM", str(victim))
    ends, said = [], ""
    for code, folder in ((TRAINING, "quiet"), (MORTAL + TRAINING, "disturbed")):
        target = tmp_path / f"{folder}.pt"
        said = run_script(code, str(target), "inf", str(tmp_path / folder), processes=2, restarts=1)
        ends.append(torch.load(target, weights_only=True))
    assert sorted(said.split()) == sorted("4567" * 2), "the second life takes the second epoch"
    (quiet, losses, _), (disturbed, same, finished) = ends
    assert finished and losses == same
    assert all(torch.equal(value, disturbed[name]) for name, value in quiet.items())


def test_a_second_life_reads_nothing_of_the_first(run_script):
    """PyTorch keeps the store over a restart: a process may then call the address of one that is gone."""
    said = run_script(
        """
        import os
        import sys
        import torch
        from torch.distributed.distributed_c10d import _get_default_store
        from robustood import distributed

        rank, life = distributed.join(), os.environ["TORCHELASTIC_RESTART_COUNT"]
        left = f"left by {rank}"
        if life == "1":
            print(rank, "finds", _get_default_store().check([left]))
        _get_default_store().set(left, life)
        distributed.mean(torch.ones(1))
        sys.exit(life == "0")
        """,
        processes=2,
        restarts=1,
    )
    assert sorted(said.splitlines()) == ["0 finds False", "1 finds False"]


def test_the_processes_part_in_order(run_script):
    said = run_script(
        """
        from robustood import distributed

        rank, _ = distributed.join(), list(distributed.each([lambda: 1]))
        assert distributed.world() == 2
        distributed.leave()
        distributed.leave()
        assert (distributed.world(), list(distributed.each([lambda: 2]))) == (1, [2])
        print("process", rank, "ends")
        """,
        processes=2,
    )
    assert sorted(said.splitlines()) == ["process 0 ends", "process 1 ends"]


@pytest.fixture
def asked(monkeypatch):
    """What a join asks of PyTorch; the processes meet in a store in memory."""
    found, meeting = {}, distributed.dist.HashStore()
    begin = lambda backend, **how: found.update(how, backend=backend)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *_, **__: iter([(meeting, 1, 2)]))
    monkeypatch.setattr(distributed.dist, "init_process_group", begin)
    found["at exit"] = at_exit = []
    monkeypatch.setattr(distributed.atexit, "register", at_exit.append)
    return found


def test_a_process_that_is_silent_for_ten_minutes_is_given_up(asked):
    distributed.join()
    assert (asked["backend"], asked["rank"], asked["world_size"]) == ("gloo", 1, 2)
    assert asked["timeout"] == timedelta(minutes=10)
    assert asked["at exit"] == [
        distributed.leave
    ]  # or an open connection would abort the interpreter


@pytest.mark.parametrize(("machines", "shared"), [("1", False), ("2", True)])
def test_the_restarts_of_one_machine_have_a_store_of_their_own(
    machines, shared, asked, monkeypatch
):
    """Several machines count their restarts apart, so there a name of its own would part the processes."""
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    stores = []
    for restarts in ("0", "0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        distributed.join()
        stores.append(asked["store"])
    stores[0].set("address", "127.0.0.1")
    assert [store.check(["address"]) for store in stores] == [True, True, shared]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms"),
        distributed.dist.DistBackendError("NCCL communicator was aborted on rank 1"),
    ],
    ids=["closed", "silent", "aborted"],
)
def test_the_loss_of_a_process_is_told_from_other_errors(error, monkeypatch):
    def fails(error):
        with distributed.together():
            raise error

    with pytest.raises(RuntimeError, match=re.escape(str(error))):
        fails(error)  # there is no other process
    monkeypatch.setattr(distributed, "world", lambda: 2)
    words = r"process 0 of 2 stops, because another one has ended .*repeat the command to resume"
    with pytest.raises(ConnectionError, match=words) as found:
        fails(error)
    assert found.value.__cause__ is error
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fails(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
