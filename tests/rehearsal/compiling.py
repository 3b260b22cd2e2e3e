"""Update and attack through the compiler on the CPU, traced but not turned into machine code.

For a process of its own, because the tests' type checks cannot be traced.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rehearsal import parts
from torch import nn
from torch._dynamo.utils import counters

from robustood.attacks._loop import Climb
from robustood.data import Batch
from robustood.engine import Engine, Running
from robustood.objectives import Objective

DRAWS = ("rand", "normal", "uniform", "bernoulli", "dropout", "exponential", "multinomial")
SIZES = (8, 8, 6)  # the last batch of an epoch is smaller


def draws(node: torch.fx.Node) -> bool:
    """Whether a part of a graph draws random numbers; dropout in eval mode does not."""
    name = str(node.target)
    resting = "dropout" in name and False in node.args
    return node.op != "placeholder" and not resting and any(word in name for word in DRAWS)


class Replayed:
    """A backend like a CUDA graph: inputs are copied to fixed tensors, and the next call overwrites the outputs.

    A graph that autograd goes through is run as it stands: its outputs must live until the backward pass.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.draws: list[str] = []
        self.replays = 0

    def __call__(
        self, graph: torch.fx.GraphModule, example: list[torch.Tensor]
    ) -> Callable[..., Any]:
        held: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        drawing = [str(node.target) for node in graph.graph.nodes if draws(node)]

        def run(*given: Any) -> Any:
            if any(isinstance(t, torch.Tensor) and t.requires_grad for t in given):
                return graph(*given)
            self.draws += drawing
            self.replays += 1
            if not held:
                held.extend(t.clone() if isinstance(t, torch.Tensor) else t for t in given)
                kept.extend(t.clone() for t in graph(*held))
            for fixed, t in zip(held, given, strict=True):
                if isinstance(t, torch.Tensor):
                    fixed.copy_(t)
            for fixed, t in zip(kept, graph(*held), strict=True):
                fixed.copy_(t)
            return tuple(kept)

        return run


BACKEND = Replayed()
torch._dynamo.register_backend(BACKEND, name="replayed")


def batches(epoch: int) -> list[Batch]:
    """The batches of an epoch, in the middle of the training."""
    noise = torch.Generator().manual_seed(epoch)
    data = parts.photos(sum(SIZES))
    each = zip(data.train.x.split(SIZES), data.train.y.split(SIZES), data.outliers.split(SIZES))
    return [Batch(x, y, u, noise, progress=0.5) for x, y, u in each]


def losses(
    objective: Objective, network: nn.Module, climb: Climb | None = None
) -> tuple[list[float], list[int]]:
    """The losses of three epochs of gradient descent, and the number of graphs after each epoch."""
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    network.train()
    found, graphs = [], []
    for epoch in range(3):
        for batch in batches(epoch):
            loss = objective(network, replace(batch, climb=climb))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(float(loss.detach()))
        graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs


def case(rule: str, network: str | None = None) -> dict[str, Any]:
    """An objective on its own network or another one, compiled and as it is."""
    torch._dynamo.reset()
    counters.clear()
    BACKEND.begin()
    make = (lambda: parts.NETWORKS[network](1)) if network else (lambda: parts.network_for(rule))
    torch.manual_seed(0)
    expected, _ = losses(parts.OBJECTIVES[rule](), make())
    torch.manual_seed(0)
    running = Running(make(), Engine(compile="replayed"))
    found, graphs = losses(parts.OBJECTIVES[rule](), running, running.climb)
    return {
        "case": f"{rule} on {network}",
        "gap": max(abs(a - b) for a, b in zip(expected, found, strict=True)),
        "graphs": graphs,
        "breaks": dict(counters["graph_break"]),
        "replays": BACKEND.replays,
        "draws": BACKEND.draws,
        "failed": running.failed,
    }
