"""How fast is the fit of Mahalanobis, and how much memory does it need? Against pytorch-ood.

Run ``python tests/benchmarks/bench_detectors.py``. 50,000 features of width 342 and ten classes,
what a DenseNet has on CIFAR-10. Both are timed in turn, 9 rounds in one process on one thread, and
compared round by round: on a shared machine only the median of paired ratios means anything. The
peak of memory beyond the features themselves is that of a fresh process for each. The numbers are
printed and never judged.

The means and sums here are in double precision and stable for any mean, the product of one centred
batch is in single precision; theirs are in single precision throughout.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import torch

from robustood.detectors import Mahalanobis
from robustood.models import readout

ROUNDS, SAMPLES, WIDTH, CLASSES = 9, 50_000, 342, 10


def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Nonnegative features with class means."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    means = torch.rand(CLASSES, WIDTH, generator=generator)
    h = torch.empty(SAMPLES, WIDTH)
    for part, labels in zip(h.split(1000), y.split(1000), strict=True):  # no peak of memory
        part.normal_(generator=generator).add_(means[labels]).relu_()
    return h, y


def ours(h: torch.Tensor, y: torch.Tensor):
    return Mahalanobis(readout(torch.zeros(CLASSES, WIDTH))).fit(h, y)


def theirs(h: torch.Tensor, y: torch.Tensor):
    from pytorch_ood.detector import Mahalanobis as Peer

    return Peer(None).fit_features(h, y)


FITS = {"robustood": ours}
if importlib.util.find_spec("pytorch_ood"):
    FITS["pytorch-ood"] = theirs


def peak() -> float:
    """Peak memory of this process in MB since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def extra_memory(name: str) -> float:
    """Peak memory of one fit beyond what the process held before it, in MB (Linux)."""
    h, y = features()
    FITS[name](h[:1000], y[:1000])  # whatever is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = peak()
    FITS[name](h, y)
    return peak() - before


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:
        print(extra_memory(sys.argv[1]))
        return
    h, y = features()
    print(f"{SAMPLES:,} features of width {WIDTH}, {CLASSES} classes, {ROUNDS} rounds, one thread")
    fitted = {name: fit(h, y) for name, fit in FITS.items()}  # warm up
    times: dict[str, list[float]] = {name: [] for name in FITS}
    for turn in range(ROUNDS):
        names = list(FITS)[:: 1 if turn % 2 else -1]  # nobody is always first
        for name in names:
            times[name].append(seconds(lambda name=name: FITS[name](h, y)))
    for name, values in times.items():
        command = [sys.executable, __file__, name]
        memory = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f"{name}: median {1e3 * np.median(values):.0f} ms, {memory:.0f} MB beyond the features"
        )
    if "pytorch-ood" not in FITS:
        print("pytorch-ood is not installed (pip install --no-deps pytorch-ood): no comparison")
        return
    fitted["pytorch-ood"].precision *= SAMPLES
    apart = fitted["robustood"].score(h[:500]) + fitted["pytorch-ood"].predict_features(h[:500])
    print(f"the scores differ by at most {apart.abs().max().item():.1e}")
    ratios = np.array(times["robustood"]) / np.array(times["pytorch-ood"])
    print(
        f"robustood / pytorch-ood: median {np.median(ratios):.2f}, "
        f"from {ratios.min():.2f} to {ratios.max():.2f}"
    )


if __name__ == "__main__":
    main()
