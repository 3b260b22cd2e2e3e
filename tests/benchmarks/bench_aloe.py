"""One ALOE step beside a plain re-statement of the published loop, at equal network, batch and attack steps.

Run ``python tests/benchmarks/bench_aloe.py``, on a CPU and, where there is one, on a GPU. What the published
loop adds is said in :mod:`robustood.recipes.selftest`, whose re-statement is timed here with one more cost, a
normaliser that goes through the batch image by image. Both are timed in turn in one process;
the median of 15 paired ratios is printed, and beside it how many times the floor's time our step takes
(robustood.engine). On a CPU ours runs in the engine that a short measurement chooses, on a GPU compiled in bf16.
"""

import argparse
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from robustood import engine, models
from robustood.data import Batch
from robustood.objectives import ALOE
from robustood.recipes.selftest import published_step

PAIRS, EPS, STEPS = 15, 1 / 255, 2


class ImageByImage(nn.Module):
    """The published normaliser: a loop over the images of a batch."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.inside(image) for image in x])


def published(model, batch, optimiser) -> None:
    """One step of the published loop."""
    loss = published_step(model, batch, EPS, STEPS)
    optimiser.step()
    float(loss)


def lean(running, objective, batch, optimiser) -> None:
    """One step as ``training.fit`` takes it."""
    running.train()
    loss = objective(running, replace(batch, climb=getattr(running, "climb", None)))
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def compare(device: torch.device, name: str) -> None:
    """Print both lines for one device."""
    noise = torch.Generator(device).manual_seed(0)
    x = torch.rand(64, 3, 32, 32, device=device, generator=noise)
    u = torch.rand(128, 3, 32, 32, device=device, generator=noise)
    batch = Batch(x, torch.arange(64, device=device) % 10, u, noise)
    arguments = {
        "resnet": {"depth": 8},
        "wide_resnet": {"depth": 16, "width": 2},
        "densenet_bc": {},
    }
    theirs, ours = (getattr(models, name)(**arguments[name]).to(device) for _ in range(2))
    theirs.normalise = ImageByImage(theirs.normalise)
    how = engine.choose(ours, (3, 32, 32), device)
    running, objective = how.run(ours), ALOE(EPS, steps=STEPS)
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True)
    calls = {
        "published": partial(published, theirs, batch, sgd(theirs.parameters())),
        "ours": partial(lean, running, objective, batch, sgd(ours.parameters())),
    }
    for call in (*calls.values(), *calls.values()):  # compiles and warms up
        call()
    took = {name: [] for name in calls}
    for pair in range(PAIRS):
        for which in list(calls)[:: 1 if pair % 2 else -1]:
            start = engine.synchronised_time(device)
            calls[which]()
            took[which].append(engine.synchronised_time(device) - start)
    ratios = np.array(took["published"]) / np.array(took["ours"])
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    meter = engine.Meter.read(ours, running, objective, batch)
    over = float(np.median(took["ours"])) * meter.bare / meter.flops
    print(
        f"ALOE step on {device.type}, {name}, 64 + 128 images, {STEPS} attack steps, {PAIRS} pairs, "
        f"{how.precision}{', channels_last' * how.channels_last}{', compiled' * bool(how.compile)}:\n"
        f"  the published loop takes {middle:.2f} times ours, quartiles {low:.2f} to {high:.2f}\n"
        f"  ours takes {over:.2f} times the floor"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--network", default="resnet", choices=["resnet", "wide_resnet", "densenet_bc"]
    )
    name = parser.parse_args().network
    torch.set_num_threads(1)
    compare(torch.device("cpu"), name)
    if torch.cuda.is_available():
        compare(torch.device("cuda"), name)
    else:
        print("ALOE step on cuda: not measured, torch sees no GPU")


if __name__ == "__main__":
    main()
