"""What does the loop add to its bare work? One step of PGD training against its forwards and backwards.

Run ``python tests/benchmarks/bench_training.py``. The bare work of PGD-k training is k forwards
with k input gradients, one forward and one backward with weights. Both are timed in turn on one
thread, in one process; the median of paired ratios of
CPU time (wall time of a quiet machine) is printed and never judged.
"""

import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from robustood.data import Data, Split, digits
from robustood.models import small_cnn
from robustood.objectives import Adversarial
from robustood.training import fit

PAIRS, STEPS, UPDATES = 15, 7, 10


def bare(model: torch.nn.Module, train: Split) -> None:
    """The bare forwards and backwards of as many updates, without attack, optimiser or books."""
    for part in range(UPDATES):
        batch = train[64 * part : 64 * (part + 1)]
        for p in model.parameters():
            p.requires_grad_(False)
        for _ in range(STEPS):
            x = batch.x.detach().requires_grad_()
            torch.autograd.grad(cross_entropy(model(x), batch.y, reduction="sum"), x)
        for p in model.parameters():
            p.requires_grad_(True)
        cross_entropy(model(batch.x), batch.y).backward()
        model.zero_grad()


def main() -> None:
    torch.set_num_threads(1)
    for size, width in ((8, 1), (32, 3)):
        book = digits(train=64 * UPDATES)
        x = torch.rand(64 * UPDATES, width, size, size)
        data = Data(Split(x, book.train.y), book.val, book.test, book.outliers[:0])
        model = small_cnn(channels=width, size=size)
        ratios = []
        for pair in range(PAIRS + 1):
            took = {}
            for name in ("bare", "fit") if pair % 2 else ("fit", "bare"):
                start = time.process_time()
                if name == "bare":
                    bare(model, data.train)
                else:
                    fit(model, Adversarial(8 / 255, steps=STEPS), data, epochs=1)
                took[name] = time.process_time() - start
            ratios.append(took["fit"] / took["bare"])
        low, middle, high = np.quantile(ratios[1:], [0.25, 0.5, 0.75])
        print(
            f"PGD-{STEPS} training step, {width}x{size}x{size}, batch 64, {PAIRS} pairs: "
            f"{middle:.3f} of its bare forwards and backwards, quartiles {low:.3f} to {high:.3f}"
        )


if __name__ == "__main__":
    main()
