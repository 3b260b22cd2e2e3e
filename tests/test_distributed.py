"""Several processes are one: in what they draw, in what they learn, and in what they refuse."""

import pytest
import torch

from robustood import distributed
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
