"""How fast are the metrics? Against scikit-learn on a million scores.

Run ``python tests/benchmarks/bench_metrics.py``. Half of the scores are in-distribution. Both
libraries are timed in turn, 7 rounds in one process on one thread, and compared round by round: on
a shared machine only paired ratios mean anything. The values are compared first. The numbers are
printed and never judged.

The difference is one of algorithm: scikit-learn sorts the indices of all scores and gathers scores
and labels by them; here each side is sorted by itself, by value, and counted in the other by binary
search with sorted queries. A threshold needs no sorting at all, only a partition. On tied scores the
interpolated FPR belongs to no threshold, so it differs from the rate.
"""

import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from robustood.metrics import aupr, auroc, fpr_at_tpr

ROUNDS, SIDE = 7, 500_000


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interpolated(y: np.ndarray, s: np.ndarray) -> float:
    """FPR at 95 % TPR as it is usually written with scikit-learn."""
    fpr, tpr, _ = roc_curve(y, s)
    return float(np.interp(0.95, tpr, fpr))


def main() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([1, 0], SIDE)
    kinds = {
        "continuous": (rng.normal(1, 1, SIDE), rng.normal(0, 1, SIDE)),
        "tied (1000 levels)": (rng.integers(100, 1000, SIDE) / 1, rng.integers(0, 900, SIDE) / 1),
    }
    print(f"{2 * SIDE:,} float64 scores, {ROUNDS} rounds, one thread")
    for kind, (a, b) in kinds.items():
        s = np.concatenate([a, b])
        calls = {
            "auroc": (lambda a=a, b=b: auroc(a, b), lambda s=s: roc_auc_score(y, s)),
            "fpr_at_tpr": (
                lambda a=a, b=b: fpr_at_tpr(a, b, positive="in"),
                lambda s=s: interpolated(y, s),
            ),
            "aupr": (
                lambda a=a, b=b: aupr(a, b, positive="in"),
                lambda s=s: average_precision_score(y, s),
            ),
        }
        for name, (ours, theirs) in calls.items():
            gap = abs(ours() - theirs())  # also warms up
            times = np.empty((ROUNDS, 2))
            for turn in range(ROUNDS):
                for which in (0, 1) if turn % 2 else (1, 0):  # nobody is always first
                    times[turn, which] = seconds((ours, theirs)[which])
            ratio = times[:, 1] / times[:, 0]
            mine, other = 1e3 * np.median(times, axis=0)
            print(
                f"{kind}, {name}: {mine:.0f} ms against {other:.0f} ms, scikit-learn takes "
                f"{np.median(ratio):.1f} [{ratio.min():.1f}, {ratio.max():.1f}] times as long "
                f"(values differ by {gap:.0e})"
            )


if __name__ == "__main__":
    main()
