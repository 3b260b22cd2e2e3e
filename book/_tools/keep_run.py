"""Put finished runs on record: weights, scores and numbers go from their folders into ``data/``.

    python book/_tools/keep_run.py runs/aloe_cifar10_cpu runs/oe_cifar10_cpu

``data/results/NAME.json`` gets {"run", "report", "plans"}, as ``robustood.results.load`` reads it; the report is
null before ``robustood evaluate``. Weights go to ``data/weights/`` with their card, scores of single images to
``data/scores/``, those of a further plan as ``NAME.PLAN.npz``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from robustood import results
from robustood.checkpoints import read_json, write_whole

DATA = Path(__file__).resolve().parents[2] / "data"


def keep(folder: Path) -> Path:
    """Copy one run; returns its JSON file.

    Raises:
        ValueError: for a run that is not finished, or a report on other weights.
    """
    folder = folder.resolve()
    kept = results.gather(folder)
    if not kept["run"]["finished"]:
        raise ValueError(f"{folder} is not finished; give its robustood train command again")
    weights = read_json(folder / "weights.json")["sha256"]
    for name, report in {"report": kept["report"], **kept["plans"]}.items():
        if report and report["weights"] != weights:
            raise ValueError(f"{folder}: {name} measured other weights; evaluate again")
    for place in ("results", "scores", "weights"):
        (DATA / place).mkdir(parents=True, exist_ok=True)
    for ending in (".safetensors", ".json"):
        shutil.copyfile(folder / f"weights{ending}", DATA / "weights" / f"{folder.name}{ending}")
    for plan, report in {"": kept["report"], **kept["plans"]}.items():
        if report and report.get("rows"):  # a curve has none, and a learned set neither
            own = f"scores_{plan}.npz" if plan else "scores.npz"
            there = f"{folder.name}.{plan}.npz" if plan else f"{folder.name}.npz"
            shutil.copyfile(folder / own, DATA / "scores" / there)
    file = DATA / "results" / f"{folder.name}.json"
    write_whole(file, (json.dumps(kept, indent=1) + "\n").encode())
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    for each in parser.parse_args().runs:
        try:
            print(keep(each))
        except (ValueError, OSError) as error:
            parser.error(str(error))
