"""Several processes that share a training, each with its pretended GPU; gloo stands for nccl."""

from pathlib import Path

import pytest
import torch

TRAINING = """
    import os, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from rehearsal import parts
    from rehearsal.pretended import CUDA, Rehearsal
    from rehearsal.steps import HOW, check_steps
    from robustood import distributed
    from robustood.data import Augment
    from robustood.training import fit

    distributed.join()
    data, rule, model = parts.photos(), parts.OBJECTIVES["MinedALOE"], parts.small()
    with Rehearsal() as gpu:
        fit(model, rule(), data, device="cuda", augment=Augment(2), **HOW)
        assert {p.device for p in model.parameters()} == {CUDA}
    check_steps(parts.small, lambda device: rule(), data)
    if distributed.rank() == 0:
        torch.save(model.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_with_a_gpu_each_are_one_up_to_rounding(run_script, tmp_path):
    """Their steps do not wait either; only sums over the processes cross."""
    tests, found = str(Path(__file__).parents[1]), []
    for processes in (1, 2):
        target = tmp_path / f"{processes}.pt"
        run_script(TRAINING, tests, str(target), processes=processes)
        found.append(torch.load(target, weights_only=True))
    for one, two in zip(found[0].values(), found[1].values(), strict=True):
        assert torch.allclose(one, two, atol=1e-4)
