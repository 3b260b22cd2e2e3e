"""The rehearsal itself: what would fail or wait on a GPU fails here, and what would not passes."""

import pytest
import torch
from rehearsal import parts
from rehearsal.pretended import CUDA, Rehearsal
from rehearsal.steps import check_steps

from robustood import perturbations, rng
from robustood.models import mlp, read
from robustood.objectives import Adversarial

RULE = Adversarial(parts.EPS, steps=1)


def network():
    return mlp(3 * parts.SIDE * parts.SIDE, (8,), parts.CLASSES)


FAULTS = {
    "an input on the host": lambda model, batch: read(model, batch.x.cpu()).sum(),
    "a loss that goes by the host": lambda model, batch: RULE(model, batch).cpu(),
    "there and back": lambda model, batch: read(model, batch.x.cpu().to(batch.x)).sum(),
    "a generator of the host": lambda model, batch: (
        RULE(model, batch) + rng.uniform(batch.x, torch.Generator()).mean()
    ),
    "a tensor of the host": lambda model, batch: (
        RULE(model, batch) * torch.tensor([1.0, 2.0]).mean(0, keepdim=True)
    ),
    "a number as a tensor of the host": lambda model, batch: (
        RULE(model, batch) * torch.tensor(2.0)
    ),
    "a tensor sent to the device": lambda model, batch: (
        RULE(model, batch) * torch.tensor(2.0, device=batch.x.device)
    ),
    "a number read": lambda model, batch: RULE(model, batch) * float(batch.x.mean()),
    "a decision": lambda model, batch: RULE(model, batch) * (2.0 if batch.x.mean() > 0 else 1.0),
    "a mask": lambda model, batch: RULE(model, batch) + batch.x[batch.x > 0.5].mean(),
    "the places of a mask": lambda model, batch: RULE(model, batch) * len(batch.y.nonzero()),
    "a mask that is written": lambda model, batch: (
        RULE(model, batch) + batch.x.clone().index_put_((batch.x > 0.5,), batch.x.new_zeros(())).mean()
    ),
    "an index of the host": lambda model, batch: (
        RULE(model, batch) + batch.x[torch.arange(len(batch.x))].mean()
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_step_fails(fault, data):
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=r"device|cpu|waits"):
        check_steps(network, lambda device: FAULTS[fault], data)


def test_a_step_without_a_fault_passes(data):
    check_steps(network, lambda device: RULE, data)


@pytest.mark.parametrize(
    "slip",
    [
        lambda z: z.cpu().to(z),
        lambda z: z + torch.zeros(len(z), 1, 1, 1),
        lambda z: z + torch.zeros_like(z).uniform_(generator=torch.Generator()),
        lambda z: z.clamp(torch.tensor(-1.0), torch.tensor(1.0)),
    ],
    ids=[".cpu()", "host tensor", "host generator", "torch.tensor"],
)
def test_a_fault_deep_in_the_library_fails(slip, data, monkeypatch):
    shrink = perturbations.Linf.shrink
    monkeypatch.setattr(perturbations.Linf, "shrink", lambda self, z: slip(shrink(self, z)))
    with pytest.raises((RuntimeError, AssertionError), match=r"device|waits"):
        check_steps(network, lambda device: RULE, data)


def test_a_pretended_tensor_says_where_it_lies():
    with Rehearsal() as gpu:
        x = torch.ones(3, device="cuda")
        assert x.device == CUDA and x.is_cuda and not x.is_cpu and x.get_device() == 0
        for near in (
            x + 1,
            x[1:],
            x.clone(),
            torch.zeros_like(x),
            x.new_zeros(2),
            torch.where(x > 0, x, 0.0),
        ):
            assert near.device == CUDA
        assert x.cpu().device.type == torch.zeros(2).device.type == "cpu"
        assert torch.zeros_like(x, device="cpu").device.type == "cpu"
        assert torch.nn.Linear(3, 2).to(x.device).weight.device == CUDA
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        waits = sum(gpu.waits.values())
        x += x.cpu().to("cuda")
        assert sum(gpu.waits.values()) == waits + 2 and x.tolist() == [2.0, 2.0, 2.0]
    assert x.device.type == "cpu"


def test_a_gradient_crosses_as_its_tensor_did():
    with Rehearsal():
        x = torch.ones(3, requires_grad=True)
        (x.to("cuda") ** 2).sum().cpu().backward()
        assert x.grad.device.type == "cpu" and x.grad.tolist() == [2.0, 2.0, 2.0]
