"""The page about one's own model: each of its snippets runs, and is short."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustood.cli import main

PAGE = (Path(__file__).parents[1] / "book" / "own_model.md").read_text("utf-8")
SNIPPETS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.+?)```", PAGE, re.M | re.S))
COMMAND, REPAIR = "From the command line", "Repair your own network"
TORCHVISION, TIMM, PYTORCH_OOD, FUNCTION, FOREST = (
    k for k in SNIPPETS if k not in (COMMAND, REPAIR)
)


def images(n, channels, size, seed):
    """Nearly alike, so that every input falls to the first attack and the others have nothing left to do."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + 0.01 * torch.rand(n, channels, size, size, generator=generator)


def printed(title, capsys, channels=1, size=8):
    """What a snippet prints, for a few images and a tiny network."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    x_in, x_out, x_train = (images(n, channels, size, seed) for seed, n in enumerate((2, 2, 30)))
    exec(SNIPPETS[title], {"net": net, "x_in": x_in, "x_out": x_out, "x_train": x_train})
    return capsys.readouterr().out


def test_no_snippet_is_longer_than_ten_lines():
    assert len(SNIPPETS) == 7
    for title, code in SNIPPETS.items():
        assert len([line for line in code.splitlines() if line.strip()]) <= 10, title
        if title not in (COMMAND, REPAIR):
            assert "print(evaluate.standard(detector, x_in," in code.splitlines()[-1], title


NETS = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
"""


def test_the_commands_print_a_report_and_write_it(tmp_path, monkeypatch, capsys):
    """As the page says, each line of it, in a folder that holds the files that it names."""
    (commands,) = re.findall(r"^```bash\n(robustood attack .+?)```", PAGE, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.py").write_text(SNIPPETS[COMMAND])
    Path("nets.py").write_text(NETS)
    scope: dict = {}
    exec(NETS, scope)
    torch.save(scope["Net"]().state_dict(), "net.pt")
    for seed, name in enumerate(("in", "out")):
        np.save(f"{name}.npy", images(2, 1, 8, seed).numpy())
    for command in commands.splitlines():
        # 4: the checks find that an untrained network barely moves.
        assert main(command.split()[1:]) in (0, 4)
        assert "both attacked" in capsys.readouterr().out
    assert json.loads(Path("report.json").read_text())["version"] and Path("report.csv").exists()


def test_the_snippet_about_repair_trains_a_network_of_ones_own():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    before = [p.clone() for p in net.parameters()]
    parts = [(images(8, 1, 8, seed), torch.arange(8) % 4) for seed in range(3)]
    exec(SNIPPETS[REPAIR], {"net": net, "parts": parts, "u_train": images(8, 1, 8, 3)})
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_the_snippet_about_a_function_prints_a_report(capsys):
    found = printed(FUNCTION, capsys)
    assert "score within" in found and "by standard-1" in found and "both attacked" in found
    assert all(attack in found for attack in ("as in ALOE", "another random start", "Square"))


@pytest.mark.slow  # 2,000 calls of a forest
def test_the_snippet_about_an_estimator_prints_a_report(capsys):
    found = printed(FOREST, capsys)
    assert "IsolationForest" in found and "Square" in found and "APGD" not in found


@pytest.mark.slow  # half a minute of forward passes
@pytest.mark.parametrize("size", [32, 224])
def test_the_snippet_about_torchvision_prints_a_report(capsys, size):
    found = printed(TORCHVISION, capsys, channels=3, size=size)
    assert "Energy" in found and "as in ALOE" in found and "Square" in found


@pytest.mark.oracle
def test_the_snippet_about_timm_prints_a_report(capsys):
    pytest.importorskip("timm", reason="timm is not installed: pip install --no-deps timm==1.0.31")
    found = printed(TIMM, capsys, channels=3, size=32)
    assert "MSP" in found and "as in ALOE" in found and "Square" in found


@pytest.mark.oracle
def test_the_snippet_about_pytorch_ood_prints_a_report(capsys):
    pytest.importorskip(
        "pytorch_ood", reason="pytorch-ood is not installed: pip install --no-deps pytorch-ood"
    )
    found = printed(PYTORCH_OOD, capsys)
    assert "MaxSoftmax" in found and "as in ALOE" in found and "Square" in found
