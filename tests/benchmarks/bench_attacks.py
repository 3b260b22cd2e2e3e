"""How fast is PGD? Against torchattacks, and against the least that ten steps can cost.

Run ``python tests/benchmarks/bench_attacks.py``. The floor is one forward and one gradient with
respect to the input for each step, nothing else. The three are timed in turn, 15 rounds in one
process on one thread, and compared round by round: on a shared machine only the median of paired
ratios means anything. The numbers are printed and never judged.
"""

import importlib.util
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from robustood.attacks import pgd
from robustood.perturbations import Linf

ROUNDS, STEPS, BATCH, EPS = 15, 10, 64, 8 / 255


def network() -> nn.Module:
    """Two convolutions with batch normalisation for 3x16x16 images."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 64, 10),
    ).eval()  # fmt: skip


def floor(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Ten forwards and ten input gradients with frozen parameters."""
    for p in model.parameters():
        p.requires_grad_(False)
    for _ in range(STEPS):
        z = x.detach().requires_grad_()
        torch.autograd.grad(cross_entropy(model(z), y, reduction="sum"), z)
    for p in model.parameters():
        p.requires_grad_(True)


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report(name: str, times: np.ndarray, against: str, other: np.ndarray) -> None:
    low, middle, high = np.quantile(times / other, [0.25, 0.5, 0.75])
    print(f"{name} / {against}: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


def main() -> None:
    torch.set_num_threads(1)
    model = network()
    x, y = torch.rand(BATCH, 3, 16, 16), torch.randint(0, 10, (BATCH,))
    calls = {
        "robustood": lambda: pgd(
            model, x, y, Linf(EPS), steps=STEPS, step_size=EPS / 4, keep="last"
        ),
        "floor": lambda: floor(model, x, y),
    }
    if importlib.util.find_spec("torchattacks"):
        import torchattacks

        peer = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=STEPS)
        calls["torchattacks"] = lambda: peer(x, y)
    else:
        print("torchattacks is not installed (pip install --no-deps torchattacks): floor only")
    for call in calls.values():
        call()  # warm up
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS):
        names = list(calls)
        for name in (
            names[turn % len(names) :] + names[: turn % len(names)]
        ):  # nobody is always first
            times[name].append(seconds(calls[name]))
    measured = {name: np.array(values) for name, values in times.items()}
    print(f"PGD, {STEPS} steps, batch {BATCH}, {ROUNDS} rounds, one thread")
    for name, values in measured.items():
        print(f"{name}: median {1e3 * np.median(values):.1f} ms")
    if "torchattacks" in measured:
        report("robustood", measured["robustood"], "torchattacks", measured["torchattacks"])
        report("torchattacks", measured["torchattacks"], "floor", measured["floor"])
    report("robustood", measured["robustood"], "floor", measured["floor"])


if __name__ == "__main__":
    main()
