"""The steps of a training on the pretended device, and how often the host waits in them."""

from collections import Counter
from collections.abc import Callable
from inspect import signature

from rehearsal import parts
from rehearsal.pretended import Rehearsal
from torch import nn

from robustood.data import Augment, Data
from robustood.objectives import Objective
from robustood.training import fit

HOW = {
    "epochs": 2,
    "batch_size": 32,
    "outlier_batch_size": 16,
    "lr": 0.01,
    "optimiser": parts.plain_sgd,
}


def objective(name: str, device: str = "cpu") -> Objective:
    """An objective by its name; what it holds is on the device."""
    rule = parts.OBJECTIVES[name]
    return rule(device) if "device" in signature(rule).parameters else rule()


def waits(
    make: Callable[[], nn.Module], rule: Callable[[str], Objective], data: Data, batch_size: int
) -> Counter[str]:
    """How often the host waits in one epoch, by reason and line."""
    with Rehearsal() as gpu:
        how = HOW | {"epochs": 1, "batch_size": batch_size, "augment": Augment(2)}
        fit(make(), rule("cuda"), data, device="cuda", **how)
    return gpu.waits


def check_steps(
    make: Callable[[], nn.Module], rule: Callable[[str], Objective], data: Data
) -> None:
    """Refuse a step in which the host waits: an epoch of six steps must have no more waits than one of two."""
    few, many = waits(make, rule, data, 48), waits(make, rule, data, 16)
    assert few and not many - few, f"waits in each step: {many - few}"
