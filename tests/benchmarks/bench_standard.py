"""How much time does the standard evaluation spend outside of the network?

Run ``python tests/benchmarks/bench_standard.py``. Every pass through the network is noted with the size of its batch,
whether its gradient was asked for, and its time, those of the checks included. The first ratio is that of the whole
evaluation to the passes in it; it should be at most 1.1. The second is that to as many bare passes of the same sizes,
timed afterwards, from the median of each kind; it drifts with whatever else the machine does. All is processor time
of one process on one thread. The numbers are printed and never judged. Arguments name what to measure (default: A B C).

A: ResNet-18 with 1,000 outputs, 40 + 20 images of 32x32; B: the same, 4 + 4 images of 224x224; C: the small residual
network of the recipes for CIFAR, 40 + 40 images of 32x32; D: the same, 1,000 + 1,000 images, an hour. Weights are
random, so that most inputs fall to the first attacks; that keeps the first three together below a quarter of an hour.
"""

import os
import sys
import time
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from robustood.detectors import MSP
from robustood.engine import keep_memory
from robustood.evaluate import StandardReport, standard
from robustood.models import frozen, resnet

EPS, TIMES = 1 / 255, 5
Pass = tuple[
    int, str
]  # batch size, and how far: "forward", "graph" (a forward for a gradient), "backward"


class Counted(nn.Module):
    """A network that notes its passes, and the time in them."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.passes: list[Pass] = []
        self.seconds = self.entered = 0.0

    def enter(self, *_: object) -> None:
        self.entered = time.process_time()

    def leave(self) -> None:
        self.seconds += time.process_time() - self.entered

    def forward(self, x: Tensor) -> Tensor:
        place, graph = len(self.passes), torch.is_grad_enabled() and x.requires_grad
        self.passes.append((len(x), "graph" if graph else "forward"))
        if graph:

            def meet(grad: Tensor) -> None:
                self.leave()
                self.passes[place] = (self.passes[place][0], "backward")

            x.register_hook(meet)
        self.enter()
        found = self.inner(x)
        self.leave()
        if graph:
            found.register_hook(self.enter)
        return found


def images(n: int, size: int, seed: int) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def bare(net: nn.Module, x: Tensor, how: str) -> float:
    """Processor time of one pass."""
    start = time.process_time()
    if how == "forward":
        with torch.no_grad():
            net(x)
    else:
        x = x.clone().requires_grad_()
        z = net(x)
        if how == "backward":
            torch.autograd.grad(z.sum(), x)
    return time.process_time() - start


def floor(net: nn.Module, passes: Counter[Pass], size: int) -> float:
    """The time of the passes alone."""
    total = 0.0
    with frozen(net):
        for (n, how), count in passes.items():
            x = images(n, size, 2)
            bare(net, x, how)  # warm up
            times = [bare(net, x, how) for _ in range(min(TIMES, count))]
            total += count * float(np.median(times))
    return total


def measured(name: str, inner: nn.Module, n_in: int, n_out: int, size: int) -> None:
    net = Counted(inner.eval())
    x_in, x_out = images(n_in, size, 0), 0.25 + 0.5 * images(n_out, size, 1)
    before = floor(inner, Counter({(n_in, "backward"): 3}), size)  # warm up
    start = time.process_time()
    report = standard(MSP(net), x_in, {"outliers": x_out}, EPS)
    spent = time.process_time() - start
    assert before > 0
    bound = floor(inner, Counter(net.passes), size)
    show(name, report, net, spent, bound)


def show(name: str, report: StandardReport, net: Counted, spent: float, bound: float) -> None:
    passes = net.passes
    all_forwards = sum(n for n, _ in passes)
    all_backwards = sum(n for n, how in passes if how == "backward")
    forwards = sum(row["forwards"] for row in report.attacks)
    backwards = sum(row["backwards"] for row in report.attacks)
    print(
        f"{name}: {spent:.1f} s, passes in it {net.seconds:.1f} s, ratio {spent / net.seconds:.3f}; bare passes "
        f"{bound:.1f} s, ratio {spent / bound:.2f}; {all_forwards:,} forward and "
        f"{all_backwards:,} backward passes of images, of which the report counts {forwards:,} and {backwards:,} (the "
        f"checks make the others); {len(passes):,} batches, median {np.median([n for n, _ in passes]):.0f} images",
        flush=True,
    )


def main() -> None:
    torch.set_num_threads(1)
    keep_memory()  # as the command does
    torch.manual_seed(0)
    large, small = torchvision.models.resnet18(weights=None), resnet(8)
    sizes = {"A": (large, 40, 20, 32), "B": (large, 4, 4, 224), "C": (small, 40, 40, 32)}
    sizes["D"] = (small, 1000, 1000, 32)
    for name in sys.argv[1:] or "ABC":
        measured(name, *sizes[name])


if __name__ == "__main__":
    main()
