"""Reports on trained weights: accuracy and detection, clean and attacked, in float32 on any device."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustood import detectors, distributed
from robustood.attacks import pgd
from robustood.checkpoints import Json, write_json, write_whole
from robustood.data import Split, counted_as, load, pixels
from robustood.detectors import Detector
from robustood.engine import arithmetic
from robustood.evaluate import (
    Report,
    attack_score,
    epsilon_curve,
    four_sides,
    ood_report,
    paper_attack,
)
from robustood.evaluate._report import plain
from robustood.identity import identity
from robustood.models import declared_outputs
from robustood.perturbations import Corruption, Linf, PerturbationSet
from robustood.recipes.images import Root, classes, divided, everywhere, passed, to_test
from robustood.recipes.recipe import Evaluation, Recipe
from robustood.recipes.runs import Tell, accuracy, origin, trained

__all__ = ["fitted", "measure", "pick"]

Outside = dict[str, Tensor]
_CORRUPTIONS = Corruption(severities=(5,))  # 19 of the highest severity, and the clean image
# Settings of a single attack, or that select what is measured: they do not change the other scores.
_ASKED = {
    "detectors", "attacks", "side", "eps", "paper", "steps", "restarts", "targets", "curve", "pgd_steps",
}  # fmt: skip
STRONG: Json = {"steps": 100, "restarts": 5, "targets": None}  # None: every class


def measure(
    recipe: Recipe, folder: Path, device: torch.device | str | None, root: Root, tell: Tell
) -> Json:
    """Evaluate a classifier; a stopped evaluation resumes where it was.

    Writes ``report.json`` (accuracy; one row for each detector, attack, side and set; means over all sets but the
    seen distribution; accuracy and rows for each radius of the curve, if any) and ``scores.npz`` (the float32 score
    of each image, in arrays named "detector attack set"); with a plan, ``report_PLAN.json`` and
    ``scores_PLAN.npz``. Arguments and errors as in :func:`robustood.recipes.evaluate`.
    """
    start, want = time.monotonic(), recipe.settings.evaluation
    model, written, device = trained(recipe, folder, device)
    if device.type == "cpu":  # in float32 an H200 takes a fifth to a third longer for this layout
        model = model.to(memory_format=torch.channels_last)
    seen = written["data"]["train"]
    test, outside, cards = to_test(recipe, root, want.sets, seen)
    if (label := int(test.y.max())) >= model.classes:
        raise ValueError(
            f"{recipe.settings.data.test} has the label {label}, but the network has {model.classes} classes; "
            "pack the test images from folders named like those of the training images"
        )
    inside = pick(test, want.n_in)
    outside = {name: pixels(pick(Split(x, x), want.n_out).x) for name, x in outside.items()}
    taken = {k: v for k, v in asdict(want).items() if k not in _ASKED}
    notes = folder / "evaluation" / _short_name([taken, written["sha256"], list(outside)])
    rows, curve, scores = [], [], {}
    with arithmetic():
        rates = _accuracies(model, test, inside, want, tell)
        for name in _detectors_of(want.detectors, model):
            measured = fitted(recipe, name, model, root, classes(seen))
            curve += _along(measured, pixels(inside.x), outside, want, notes, tell)
            for attack in want.attacks if outside else []:
                tell(f"{name}, attack: {attack}")
                for part in _attacked(measured, pixels(inside.x), outside, attack, want, notes):
                    rows += _rows_of(part, name, attack, recipe.settings.data.seen)
                    if part.settings["side"] in ("none", want.side):
                        scores |= {f"{name} {attack} {k}": v for k, v in part.scores.items()}
    report = {
        **origin(recipe, written, device),
        "data": cards,
        **rates,
        "rows": rows,
        "curve": curve,
        "means": _means(rows),
        "minutes": (time.monotonic() - start) / 60,
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{k: v.astype(np.float32) for k, v in scores.items()})
    plan = f"_{recipe.plan}" if recipe.plan else ""
    if distributed.rank() == 0:
        write_whole(folder / f"scores{plan}.npz", buffer.getvalue())
        write_json(folder / f"report{plan}.json", report)
    return report


def _detectors_of(wanted: Sequence[str], model: nn.Module) -> list[str]:
    """The detectors to measure; "auto" is the reject class if there is one, else MSP."""
    reject = declared_outputs(model)[1]
    alone = "RejectClass" if reject else "MSP"
    by_network = [alone] if reject else ["MSP", "ODIN"]
    return [alone if name == "auto" else name for name in wanted or by_network]


def _along(
    measured: Detector,
    inside: Tensor,
    outside: Outside,
    want: Evaluation,
    notes: Path,
    tell: Tell,
) -> list[Json]:
    """Rows of one detector for each radius of the curve, attacked adaptively on the recipe's side."""
    rows: list[Json] = []
    name = type(measured).__name__
    how = _settings_of(want, "steps", "restarts", "targets", "batch_size")
    for each, x in outside.items() if want.curve else ():
        tell(f"{name}, {each}: {len(want.curve)} radii")
        place = f"{name}_curve_{each.replace(':', '_')}_{_short_name([want.curve, how])}"
        found = epsilon_curve(
            measured, inside, x, Linf(1), want.curve, side=want.side, **how, run_dir=notes / place
        )
        rows += [{"detector": name, "set": each, **plain(row)} for row in found]
    return rows


def _settings_of(want: Evaluation, *keys: str) -> Json:
    """Some settings, as keyword arguments of an attack."""
    return {key: getattr(want, key) for key in keys}


def pick(split: Split, n: int) -> Split:
    """At most n samples, always the same ones, spread over the whole set."""
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:n]
    return Split(split.x, split.y)[chosen.sort().values]


def _accuracies(model: nn.Module, test: Split, inside: Split, want: Evaluation, tell: Tell) -> Json:
    """Accuracy: clean on all test images, attacked on some of them, also at each radius of the curve."""
    tell("accuracy")

    def attacked(eps: float) -> dict[str, float]:
        attack = partial(pgd, within=Linf(eps), steps=want.pgd_steps)
        return asdict(accuracy(model, inside, attack if eps else None, want.batch_size))

    return {
        "accuracy": asdict(accuracy(model, test, None, want.batch_size)),
        "attacked_accuracy": attacked(want.eps),
        "accuracy_curve": [{"eps": eps, **attacked(eps)} for eps in want.curve],
    }


def fitted(
    recipe: Recipe, name: str, model: nn.Module, root: Root, names: Sequence[str] = ()
) -> Detector:
    """A detector that is ready to use, fitted on training images if it needs to be.

    Args:
        names: the classes that the network was trained on; empty if they were not recorded.
    """
    want, images = recipe.settings.evaluation, recipe.settings.data
    settings = (want.odin_temperature, want.odin_step) if name == "ODIN" else ()
    found: Detector = getattr(detectors, name)(model, *settings)
    if not found.fitted_attribute:
        return found
    whole = counted_as(load(images.train, root=root), names, "the network")
    some = pick(divided(whole, images)[0], want.n_fit)
    some = passed(some, everywhere(images), {"jpeg": whole.jpeg})
    return found.fit(pixels(some.x), some.y)


def _attacked(
    measured: Detector, inside: Tensor, outside: Outside, attack: str, want: Evaluation, notes: Path
) -> list[Report]:
    """The reports of one detector under one attack: for the recipe's side, or for each side if it is "both".

    Only outliers are corrupted, as in ATOM (Chen et al. 2021, section 4).
    """
    name, size = f"{type(measured).__name__}_{attack}", want.batch_size
    if attack == "none":
        return [ood_report(measured, inside, outside, batch_size=size, run_dir=notes / name)]
    within: PerturbationSet = Linf(want.eps)
    by: Callable[..., Tensor] = attack_score
    how: Json = _settings_of(want, "steps", "restarts", "targets")
    if attack == "strong":
        how = STRONG
    elif attack == "corruption":
        within, how = _CORRUPTIONS, {}  # all of them are tried
    elif attack.endswith("paper"):
        by, how = partial(paper_attack, paper=want.paper), {}
    if composed := attack.startswith("compositional"):
        by = partial(_after_corruption, by)
    run_dir = notes / f"{name}_{_short_name([within, by, how])}"
    how = {**how, "attack": by, "batch_size": size, "run_dir": run_dir}
    if want.side == "out" or composed or attack == "corruption":
        return [ood_report(measured, inside, outside, within, side="out", **how)]
    reports = four_sides(measured, inside, outside, within, **how)
    return [reports[side] for side in ("in", "out", "both")]


def _short_name(settings: object) -> str:
    """A short name for settings, so that other settings get a folder of their own."""
    text = json.dumps(identity(settings=settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _after_corruption(
    attack: Callable[..., Tensor], detector: Detector, x: Tensor, within: Linf, **how: Any
) -> Tensor:
    """The compositional attack: first the worst corruption, then an attack around the corrupted image."""
    start = {k: how[k] for k in ("direction", "generator")}
    return attack(detector, attack_score(detector, x, _CORRUPTIONS, **start), within, **how)


def _rows_of(report: Report, name: str, attack: str, seen: str) -> list[Json]:
    """The rows of a report as they are written to a file."""
    start = {"detector": name, "attack": attack, "side": report.settings["side"]}
    return [{**start, "seen": row["set"] == seen, **plain(row)} for row in report.rows]


def _means(rows: list[Json]) -> list[Json]:
    """Mean AUROC and FPR over the sets not seen in training, together with those of the seen distribution."""
    keys = ("detector", "attack", "side")
    found = []
    for group in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        own = [row for row in rows if tuple(row[k] for k in keys) == group]
        new, seen = ([r for r in own if r["seen"] == flag] for flag in (False, True))
        entry = dict(zip(keys, group, strict=True)) | {"sets": len(new)}
        for metric in ("auroc", "fpr", "fpr_attacked"):
            values = [row[metric]["value"] for row in new]
            entry[metric] = float(np.mean(values)) if values else None
            entry[f"seen_{metric}"] = seen[0][metric]["value"] if seen else None
        found.append(entry)
    return found
