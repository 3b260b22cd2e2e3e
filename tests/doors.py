# ruff: noqa: C408
"""One right call of every public function: what the sweep of ``test_doors`` starts from.

``calls(tmp)`` gives, for "module.function" or "module.Class.method", the arguments of a small valid call; for a method
its object stands under ``self``. What is not here stands in ``EXEMPT`` with the reason.
"""

import json
from functools import lru_cache, partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import nn

from robustood import (
    artefacts,
    challenge,
    data,
    detectors,
    evaluate,
    metrics,
    mining,
    objectives,
    results,
    sanity,
    toy,
)
from robustood.attacks import APGD, Ascent
from robustood.checkpoints import save_weights
from robustood.detectors import MSP, post_hoc
from robustood.evaluate import attack_score, ood_report
from robustood.generative import plain_cvae
from robustood.models import small_cnn
from robustood.perturbations import L2, Corruption, Latent, Linf, Spatial
from robustood.recipes import read
from robustood.smoothing import CertifiedScore, CertifiedVote
from robustood.training import History

LOOP = (
    "inside a loop: its tensors passed a door, and a look at their values would wait for the device"
)
LAYER = "a layer or a network's forward: traced and compiled, its input passed a door"
PARTS = "a part of a public function, which stands at the door for it"
RESULT = "a record of results that the library itself fills"
PROTOCOL = "a protocol: nothing to call"
CHECK = "it is a check: its own argument is what is judged, here or in test_inputs"
FETCHES = "downloads"
EXEMPT = {  # by pattern; one "*" stands for one name
    "engine.keep_memory": "takes no arguments",
    "artefacts.check_whole": CHECK,
    "artefacts.read_run": PARTS,
    "artefacts.pack": "writes an archive of runs: see test_artefacts",
    "artefacts.save": "writes into the checkout: see test_artefacts",
    "attacks.APGD.*": LOOP,
    "attacks.Ascent.*": LOOP,
    "attacks.Rule": PROTOCOL,
    "attacks.Square.*": LOOP,
    "attacks.Rule.*": PROTOCOL,
    "attacks.ascent": LOOP,
    "attacks.climb_at": LOOP,
    "attacks.search": LOOP,
    "attacks.value_and_grad": LOOP,
    "callables.codes": PARTS,
    "callables.installed": PARTS,
    "checkpoints.Checkpoint": PARTS,
    "checkpoints.Checkpoint.*": PARTS,
    "checkpoints.as_csv": PARTS,
    "checkpoints.as_json": PARTS,
    "checkpoints.check_same": CHECK,
    "checkpoints.from_json": PARTS,
    "checkpoints.read_state": PARTS,
    "checkpoints.write_state": PARTS,
    "checkpoints.write_json": PARTS,
    "checkpoints.write_table": PARTS,
    "checkpoints.write_whole": PARTS,
    "costs.StepCost": RESULT,
    "costs.check_memory": CHECK,
    "costs.free_memory": PARTS,
    "data.check_trainable": CHECK,
    "data.Augment.*": LOOP,
    "data.Batch": LOOP,
    "data.Drawn.*": LOOP,
    "data.Loaded": RESULT,
    "data.Pairs.*": LOOP,
    "data.Views.redraw": LOOP,
    "data.fetch": FETCHES,
    "challenge.Box": RESULT,
    "challenge.Rates": RESULT,
    "challenge.Verdict": RESULT,
    "challenge.log_odds": LOOP,
    "challenge.Verdict.cells": PARTS,
    "data.redrawn": LOOP,
    "callables.function_state": PARTS,
    "detectors.Gaussian": PARTS,
    "detectors.Gaussian.*": PARTS,
    "detectors.downhill": PARTS,
    "results.Kept": RESULT,
    "results.Shown": RESULT,
    "results.detector": PARTS,
    "results.learned_cells": PARTS,
    "plotting.Scored": PROTOCOL,
    "recipes.Bounds": RESULT,
    "recipes.Evaluation": RESULT,
    "recipes.Images": RESULT,
    "recipes.Images.*": RESULT,
    "recipes.Method": RESULT,
    "recipes.Method.*": RESULT,
    "recipes.Settings": RESULT,
    "recipes.Settings.*": RESULT,
    "recipes.Training": RESULT,
    "rng.*": LOOP,
    "smoothing.propagate": PARTS,
    "detectors.Wrapped": PARTS,
    "detectors.Wrapped.*": "made by detectors.wrap: see test_detectors",
    "detectors.*.class_logits": PARTS,
    "detectors.*.device": PARTS,
    "detectors.*.forward": LAYER,
    "detectors.*.logits": PARTS,
    "detectors.*.check_is_fitted": CHECK,
    "detectors.*.stream": PARTS,
    "detectors.*.of": PARTS,
    "detectors.Detector": PROTOCOL,
    "detectors.Detector.*": PROTOCOL,
    "detectors.GradNorm.factors": PARTS,
    "detectors.GradNorm.logs": PARTS,
    "detectors.KNN.nearest": PARTS,
    "detectors.KNN.query": PARTS,
    "detectors.Mahalanobis.by_class": PARTS,
    "detectors.Mahalanobis.distances": PARTS,
    "detectors.Mahalanobis.layer_scores": PARTS,
    "detectors.Mahalanobis.parts": PARTS,
    "detectors.Mahalanobis.plain": PARTS,
    "detectors.Mahalanobis.unmoved": PARTS,
    "detectors.Mahalanobis.weighed": PARTS,
    "detectors.ODIN.stepped": PARTS,
    "detectors.PRO.rectified": PARTS,
    "detectors.ReAct.outputs": PARTS,
    "detectors.RejectClass.halves": PARTS,
    "detectors.ViM.residual": PARTS,
    "distributed.*": PARTS,
    "engine.Engine.run": PARTS,
    "engine.Meter": RESULT,
    "engine.Meter.*": PARTS,
    "engine.Running": PARTS,
    "engine.Running.*": LAYER,
    "engine.arithmetic": PARTS,
    "engine.flops": PARTS,
    "engine.made_optimiser": PARTS,
    "engine.median_seconds": PARTS,
    "engine.running": PARTS,
    "engine.synchronised_time": PARTS,
    "evaluate.Protocol": RESULT,
    "evaluate.Report": RESULT,
    "evaluate.Report.cells": PARTS,
    "evaluate.*.from_dict": PARTS,
    "evaluate.*.to_dict": PARTS,
    "evaluate.StandardReport": RESULT,
    "evaluate.StandardReport.attack_cells": PARTS,
    "evaluate.StandardReport.cells": PARTS,
    "evaluate.StandardReport.labelled": "takes any keyword and any text",
    "evaluate.StandardReport.summary": PARTS,
    "evaluate.StandardReport.title": PARTS,
    "evaluate.deployed_objective": PARTS,
    "evaluate.standard": "takes seconds: its arguments are swept in test_evaluate",
    "evaluate.surrogate_objectives": PARTS,
    "evaluate.Row": RESULT,
    "evaluate.mahalanobis_surrogate": LOOP,
    "detectors.score_objectives": PARTS,
    "evaluate.score_objectives": PARTS,
    "generative.*.forward": LAYER,
    "generative.Diagonal": LAYER,
    "generative.Diagonal.*": LAYER,
    "generative.Basis": LAYER,
    "generative.Bottleneck": LAYER,
    "generative.ConditionalVAE": LAYER,
    "generative.ConditionalVAE.*": LAYER,
    "generative.Encoder": LAYER,
    "generative.Entered": PARTS,
    "generative.Entered.*": PARTS,
    "generative.Guarantee": RESULT,
    "generative.Guarantee.*": RESULT,
    "generative.Painted": LAYER,
    "generative.Plain": LAYER,
    "generative.Radii": RESULT,
    "generative.Resampled.*": LOOP,
    "generative.SetMetrics": RESULT,
    "generative.SetMetrics.*": RESULT,
    "generative.Variational.*": LOOP,
    "generative.Warp": LAYER,
    "generative.distances": LOOP,
    "generative.divergence": LOOP,
    "generative.largest_ratio": PARTS,
    "generative.log_ratio_bound": PARTS,
    "identity.*": PARTS,
    "inputs.*": CHECK,
    "losses.*": LOOP,
    "metrics.Estimate": RESULT,
    "mining.Mining.*": LOOP,
    "models.*.forward": LAYER,
    "models.*.features": LAYER,
    "models.*.stages": LAYER,
    "models.*.parameter_groups": PARTS,
    "models.Adapted": PARTS,
    "models.Classifier": PARTS,
    "models.CCUModel": PARTS,
    "models.Mixture": PARTS,
    "models.Adapted.outputs": PARTS,
    "models.GradientWatch": PARTS,
    "models.Passes": RESULT,
    "models.Passes.*": PARTS,
    "models.counting": PARTS,
    "models.GradientWatch.*": PARTS,
    "models.batch_statistics": PARTS,
    "models.check_finite": CHECK,
    "models.declared_outputs": PARTS,
    "models.networks": PARTS,
    "models.read": PARTS,
    "models.reading": PARTS,
    "models.input_gradient": PARTS,
    "models.split": PARTS,
    "models.through": PARTS,
    "objectives.*.__call__": LOOP,
    "objectives.*.prepare": LOOP,
    "objectives.*.set_at": LOOP,
    "objectives.*.worst": LOOP,
    "objectives.Objective": PROTOCOL,
    "objectives.OutlierTraining.*": LOOP,
    "perturbations.*.apply": LOOP,
    "perturbations.*.ascend": LOOP,
    "perturbations.*.contains": LOOP,
    "perturbations.*.draw": LOOP,
    "perturbations.*.identity": LOOP,
    "perturbations.*.norm": LOOP,
    "perturbations.*.project": LOOP,
    "perturbations.*.shrink": LOOP,
    "perturbations.*.initial_points": LOOP,
    "perturbations.*.uniform": LOOP,
    "perturbations.Ball": PROTOCOL,
    "perturbations.ImageGenerator": PROTOCOL,
    "perturbations.ImageGenerator.*": PROTOCOL,
    "perturbations.Latent.directed": LOOP,
    "perturbations.Latent.shares": LOOP,
    "perturbations.Latent.truncated": LOOP,
    "perturbations.FiniteSubset.members": LOOP,
    "perturbations.FiniteSubset": PARTS,
    "perturbations.PerturbationSet": PROTOCOL,
    "perturbations.Random.*": LOOP,
    "perturbations.Compose.split": LOOP,
    "perturbations.as_set": CHECK,
    "perturbations.norms": LOOP,
    "perturbations.per_sample": LOOP,
    "perturbations.sized": LOOP,
    "recipes.Recipe": PARTS,
    "recipes.Recipe.model": PARTS,
    "recipes.Recipe.objective": PARTS,
    "recipes.data": "reads packs of images: see data.load",
    "recipes.evaluate": "takes minutes: its arguments are swept in test_recipes",
    "recipes.run_slice": "takes minutes: its arguments are tried in test_slices",
    "recipes.self_test": "takes minutes: see test_slices",
    "recipes.train": "takes minutes: its arguments are swept in test_recipes",
    "sanity.Defence": RESULT,
    "sanity.Finding": RESULT,
    "sanity.Findings": RESULT,
    "sanity.Findings.cells": PARTS,
    "smoothing.CertifiedScore": RESULT,
    "smoothing.CertifiedScore.moved": PARTS,
    "smoothing.CertifiedVote": RESULT,
    "smoothing.IntervalOutliers.*": LOOP,
    "smoothing.Noise.*": LOOP,
    "smoothing.Smoothed.forward": LAYER,
    "streams.*": PARTS,
    "streams.*.*": PARTS,
    "training.Run": PARTS,
    "training.Run.*": PARTS,
    "training.History": RESULT,
    "training.Schedule": PARTS,
    "training.Schedule.*": PARTS,
}


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def grey(n, seed):
    """Images whose pixels are whole grey levels, so that 8 bits hold them exactly."""
    return torch.randint(0, 256, (n, 1, 8, 8), generator=source(seed)).float() / 255


X, U = grey(6, 0), grey(6, 1)
COLOURED = (255 * X).byte().repeat(1, 3, 1, 1)
LOWER = (0.9 * 255 * X).floor() / 255
Y = torch.tensor([0, 1, 2, 0, 1, 2])
MANY, MANY_Y = grey(60, 2), torch.arange(60) % 3  # enough to fit every detector
NET, REJECT = small_cnn(3).eval(), small_cnn(3, reject=1).eval()
VAE = plain_cvae((1, 8, 8), latent=2, hidden=4, decoder=4).eval()
A, B = [0.875, 0.75, 0.6875, 0.625, 0.25], [0.5625, 0.375, 0.34375, 0.1875]  # exact in float32
FINDINGS = sanity.Findings((sanity.Finding("ok", "ties", 0.0, "0% of the inputs tie"),))
TOY = toy.TsiprasDistribution(0.9, 10, 0.4)
FAR = toy.GaussianOutliers(d=6)
WITHIN = Linf(0.1)
DATA = data.Data(*[data.Split(X, Y)] * 3, U, {"u": U})
POOL = np.random.default_rng(0).normal(size=(9, 6))

DETECTORS = ("MSP", "MaxLogit", "Entropy", "Energy", "ODIN", "Mahalanobis", "KNN", "ViM", "ReAct", "GradNorm",
             "RejectClass", "PRO")  # fmt: skip


class Darkness:
    """Stands for an estimator of scikit-learn."""

    def decision_function(self, h):
        return -h.mean(1)


def report():
    return ood_report(MSP(NET), X, {"u": U}, WITHIN, side="out", steps=1)


@lru_cache
def verdict():
    """A small standard report: of a finite set, which is searched in one step."""
    return evaluate.standard(MSP(NET), X, {"u": U}, Corruption(["fog"], [1]))


def fitted():
    """Every detector, fitted."""
    lowest = detectors.PRO(detectors.KNN(NET), steps=2).fit(MANY, MANY_Y)
    reject = detectors.RejectClass(REJECT)
    return {**post_hoc(NET, MANY, MANY_Y), "RejectClass": reject, "PRO": lowest}


def prepare(tmp: Path):
    """The files that the table names."""
    save_weights(tmp / "net.safetensors", NET, seed=0)
    (tmp / "made.json").write_text(json.dumps({"a": 1}))
    data.write_pack(tmp / "mine_test.npz", COLOURED, Y, ["a", "b", "c"])
    for name, each in zip("abc", X, strict=False):
        (tmp / "tree" / name).mkdir(parents=True)
        for i in range(2):
            picture = Image.fromarray((255 * each[0]).byte().numpy() // (1 + i))
            picture.resize((16, 16)).save(tmp / "tree" / name / f"{i}.png")
    return tmp


def drawing(a):
    figure, axis = plt.subplots(figsize=(1, 1))
    axis.plot([0, a])
    return figure


def calls(tmp: Path):
    """The table; everything in it is made anew, or is left as it was by every function."""
    scene = data.scenes(2, seed=0, size=8)
    light = data.random_lights(2, 3, source())
    shipped = next(name for name in artefacts.names("scores") if "." not in name)
    score = {"detector a in": np.float32(A), "detector a u": np.float32(B)}
    rate = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 100}
    known = results.Kept({"means": [{"detector": "detector"}], "rows": [], "accuracy": rate}, score)
    sweep = dict(model=NET, x=X, y=Y, within=WITHIN)
    many = dict(n=20, batch_size=64)
    fit = dict(epochs=1, batch_size=3, outlier_batch_size=2, lr=0.01, weight_decay=0.0, warmup=0.1)
    how = dict(steps=2, step_size=0.05, restarts=1)
    network = dict(classes=3, reject=1, seed=0, normalise="cifar", channels=3)
    table = {
        "artefacts.find": dict(kind="results", name="atom_cifar10_cpu"),
        "artefacts.names": dict(kind="results"),
        "artefacts.restore": dict(name=shipped, folder=tmp / "restored"),
        "artefacts.result": dict(name="atom_cifar10_cpu"),
        "artefacts.scores": dict(name=shipped, plan=None),
        "attacks.APGD": dict(momentum=0.7, rising=0.7),
        "attacks.Ascent": {},
        "attacks.fgsm": sweep,
        "attacks.maximise": dict(
            objective=lambda v: v.flatten(1).sum(1), x=X, within=WITHIN, **how, rule=Ascent(), keep="best",
            generator=source(),
        ),
        "attacks.pgd": dict(**sweep, **how, loss="ce", keep="best", rule=APGD(), generator=source()),
        "attacks.Square": dict(share=0.5, generator=source()),
        "attacks.worst_case": dict(
            model=NET, x=X, y=(NET(X).argmax(1) + 1) % 3, within=WITHIN, batch_size=4, generator=source()
        ),  # misclassified from the start, so that no attack is needed
        "attacks.robust_accuracy": dict(
            model=NET, x=X, y=Y, attack=lambda model, x, y: x, batch_size=4, confidence=0.9
        ),
        "callables.modules": dict(value=NET),
        "callables.parts": dict(value=partial(max, 2)),
        "checkpoints.load_weights": dict(path=tmp / "net.safetensors", model=small_cnn(3)),
        "checkpoints.read_json": dict(path=tmp / "made.json", keys=["a"]),
        "checkpoints.save_weights": dict(path=tmp / "again.safetensors", model=NET),
        "corruptions.corrupt": dict(
            x=X[:2], name="fog", severity=2, seeds=torch.tensor([4, 5])
        ),
        "data.Augment": dict(crop=2, flip=True),
        "data.Data": dict(
            train=data.Split(X, Y), val=data.Split(X, Y), test=data.Split(X, Y), outliers=U, ood={"u": U},
            notes={"share": 0.5}, compressed=U,
        ),
        "data.Data.to": dict(self=DATA, device="cpu"),
        "data.Drawn": dict(x=X, y=U, labels=Y, change=lambda x, generator: x),
        "data.Lights": dict(elevation=light.elevation, azimuth=light.azimuth, colour=light.colour),
        "data.Pairs": dict(x=X, y=U, labels=Y),
        "data.Scenes": dict(kind=scene.kind, height=scene.height, albedo=scene.albedo),
        "data.Split": dict(x=X, y=Y),
        "data.Split.to": dict(self=data.Split(X, Y), device="cpu"),
        "data.Views": dict(x=X, y=U, labels=Y, views=torch.stack([X, U], 1), pairing="first"),
        "data.Views.of": dict(
            self=data.Views, views=torch.stack([X, U], 1), labels=Y, pairing="any", seed=0
        ),
        "challenge.Box.score": dict(self=challenge.box("C"), x=X),
        "challenge.box": dict(name="A"),
        "challenge.clean_images": {},
        "challenge.judge": dict(box=challenge.box("C"), images=challenge.clean_images()),
        "challenge.names": {},
        "data.available": dict(root=tmp),
        "data.check": dict(name="mine", split="test", root=tmp),
        "data.compress": dict(images=COLOURED, quality=80),
        "data.corrupted": dict(split=data.Split(X, Y), names=["fog", "contrast"], severity=2, seed=0),
        "data.counted_as": dict(
            loaded=data.Loaded(COLOURED, Y, "mine", names=("a", "b", "c")), names=["x", "a", "b", "c"], by="others"
        ),
        "data.digest": dict(images=COLOURED),
        "data.digits": dict(train=50, seed=0),
        "data.draw": dict(data=DATA, batch_size=3, outlier_batch_size=2, generator=source(), augment=data.Augment(1)),
        "data.folder": dict(path=tmp / "tree", name="tree", size=8, root=tmp, split="test"),
        "data.folder_of_views": dict(path=tmp / "tree", size=8, pairing="any", seed=0),
        "data.glyphs": dict(which="test", n=3, seed=0, pen=True),
        "data.hold_out": dict(split=data.Split(X, Y), n=2, seed=0),
        "data.light_grid": dict(elevations=[30.0, 50.0], azimuths=[0, 90], warmths=[0.5], strength=0.5),
        "data.sample": dict(source=tmp / "tree", n=1, size=8, seed=0, root=tmp),
        "data.load": dict(name="mine", split="test", root=tmp),
        "data.noise": dict(n=3, seed=0),
        "data.paired": dict(data=DATA, change=lambda x, generator: x.flip(3), border=1, seed=0),
        "data.patches": dict(which="test", n=3, seed=0),
        "data.perturbed": dict(
            split=data.Split(X, Y), change=lambda x, generator: x.flip(3), generator=source(), border=1
        ),
        "data.pixels": dict(images=X),
        "data.random_lights": dict(scenes=2, lights=3, generator=source(), held_out=True),
        "data.read_pack": dict(path=tmp / "mine_test.npz"),
        "data.relit": dict(train=4, val=2, test=2, lights=2, size=8, pairing="first", seed=0),
        "data.render": dict(scenes=scene, lights=light),
        "data.root": dict(path=tmp),
        "data.scenes": dict(n=2, seed=0, size=8),
        "data.without_overlap": dict(
            outliers=data.Loaded(
                (255 * X).byte(), torch.arange(6) % 2, "tinyimagenet", ids=("n01641577", "n00000001")
            ),
            known="cifar10",
        ),
        "data.write_pack": dict(
            path=tmp / "new_test.npz", images=COLOURED, labels=Y,
            names=["a", "b", "c"], ids=["1", "2", "3"], jpeg=90, per=4, source="drawn",
        ),
        "detectors.post_hoc": dict(model=NET, x=MANY, y=MANY_Y),
        "costs.step_cost": dict(
            model=NET, objective=objectives.Standard(), batch=data.Batch(X, Y), precision="float32",
            optimiser=partial(torch.optim.SGD, lr=0.1),
        ),
        "engine.Engine": dict(
            precision="float32", channels_last=True, compile=False, tf32=True, benchmark=True,
            measured={"compiled": 1.0},
        ),
        "engine.choose": dict(
            model=NET, shape=(1, 8, 8), device="cpu", precision="float32", channels_last=True, compile="auto",
            batch_size=4,
        ),
        "evaluate.Report.from_json": dict(self=evaluate.Report, text_or_path=report().to_json()),
        "evaluate.Report.mean": dict(self=report(), metric="auroc"),
        "evaluate.Report.to_csv": dict(self=report(), path=tmp / "report.csv"),
        "evaluate.Report.to_json": dict(self=report(), path=tmp / "report.json"),
        "evaluate.StandardReport.from_json": dict(self=evaluate.StandardReport, text_or_path=verdict().to_json()),
        "evaluate.StandardReport.to_csv": dict(self=verdict(), path=tmp / "verdict.csv"),
        "evaluate.StandardReport.to_json": dict(self=verdict(), path=tmp / "verdict.json"),
        "evaluate.attack_in_turn": dict(
            detector=MSP(NET), x=X, within=[WITHIN, L2(0.1)], direction="raise", steps=2, restarts=1
        ),
        "evaluate.attack_score": dict(
            detector=MSP(NET), x=X, within=WITHIN, direction="raise", **how, targets=1, rule=Ascent(), batch_size=4,
            generator=source(),
        ),
        "evaluate.epsilon_curve": dict(
            detector=MSP(NET), x_in=X, x_out=U, within=WITHIN, radii=[0.01, 0.02], side="both",
            run_dir=tmp / "report", steps=1,
        ),
        "evaluate.four_sides": dict(detector=MSP(NET), x_in=X, x_out={"u": U}, within=WITHIN, steps=1),
        "evaluate.measure": dict(clean=A, scores_in=A, scores_out=B, tpr=0.8, confidence=0.9),
        "evaluate.ood_report": dict(
            detector=MSP(NET), x_in=X, x_out={"u": U}, within=WITHIN, side="out", attack=attack_score, tpr=0.8,
            confidence=0.9, batch_size=4, seed=0, run_dir=tmp / "report", steps=1,
        ),
        "evaluate.paper_attack": dict(
            detector=MSP(NET), x=X[:2], within=WITHIN, direction="raise", paper="atom", batch_size=4, generator=source()
        ),
        "evaluate.scores": dict(detector=MSP(NET), x=X, batch_size=4),
        "evaluate.surrogate": dict(detector=MSP(NET), direction="raise", paper="aloe"),
        "generative.Resampled": dict(generator=VAE),
        "generative.Variational": dict(
            beta=0.1, schedule=((0.1, 0.0), (0.5, 1.0)), distance="cross-entropy", fresh=True
        ),
        "generative.basis_cvae": dict(shape=(1, 8, 8), latent=2, hidden=4, decoder=4, pictures=2, seed=0),
        "generative.guarantee": dict(model=VAE, x=X, target=U, alpha=0.4, draws=3, seed=0),
        "generative.plain_cvae": dict(shape=(1, 8, 8), latent=2, hidden=4, decoder=4, residual=True, seed=0),
        "generative.radii": dict(model=VAE, x=X, target=U, batch_size=4),
        "generative.residual_cvae": dict(
            shape=(3, 8, 8), latent=2, width=4, blocks=1, pool=1, residual=True, seed=0
        ),
        "generative.set_metrics": dict(
            model=VAE, x=X, target=U, radius=1.0, distance="cross-entropy", steps=1, samples=2, batch_size=4, seed=0
        ),
        "generative.warp_cvae": dict(shape=(1, 8, 8), latent=2, hidden=4, maps=4, warps=1, filters=2, seed=0),
        "metrics.acceptance": dict(scores=A, threshold=0.7, confidence=0.9),
        "metrics.as_printed": dict(scores_in=A, scores_out=B, code="atom"),
        "metrics.aupr": dict(scores_in=A, scores_out=B, positive="out"),
        "metrics.auroc": dict(scores_in=A, scores_out=B),
        "metrics.confidence_interval": dict(
            metric=metrics.auroc, scores_in=A, scores_out=B, confidence=0.9, method="bootstrap", resamples=20, seed=0
        ),
        "metrics.detection_error": dict(scores_in=A, scores_out=B, prior=0.4),
        "metrics.fpr_at_tpr": dict(scores_in=A, scores_out=B, tpr=0.8, positive="in"),
        "metrics.paired_difference": dict(
            metric=metrics.auroc, first=(A, B), second=(A[::-1], B), confidence=0.9, resamples=20, seed=0
        ),
        "metrics.proportion": dict(successes=3, n=8, confidence=0.9),
        "metrics.roc": dict(scores_in=A, scores_out=B),
        "metrics.threshold_at_tpr": dict(scores_in=A, tpr=0.8),
        "metrics.tie_rate": dict(scores_in=A, scores_out=B),
        "mining.Mining": dict(q=0.1, share=0.5, sample=4),
        "mining.contamination": dict(margins_in=torch.tensor(A), margins_pool=torch.tensor(B)),
        "mining.margins": dict(model=REJECT, pool=U, batch_size=4),
        "mining.mine": dict(model=REJECT, pool=U, n=3, q=0.125),
        "mining.window": dict(m=torch.tensor(A), n=2, q=0.2),
        "models.Normalise": dict(mean=[0.5], std=[0.2]),
        "models.adapt": dict(
            module=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), head="1", reject=0, normalise=nn.Identity()
        ),
        "models.densenet_bc": dict(**network, depth=10, growth=4, init="papers"),
        "models.frozen": dict(model=NET, mode="batch"),
        "models.ccu_model": dict(base=NET, x=X, outliers=U, components=2, seed=0),
        "models.mlp": dict(inputs=5, hidden=[4], classes=3, reject=1, seed=0),
        "models.preact_resnet18": network,
        "models.readout": dict(weight=[[1.0, 2.0], [0.5, 1.0], [0.0, 2.0]], bias=torch.zeros(3), reject=1),
        "models.resnet": dict(**network, depth=8, width=8),
        "models.seeded": dict(seed=0),
        "models.small_cnn": dict(classes=3, reject=1, channels=1, size=8, seed=0, width=1, batch_norm=True),
        "models.wide_resnet": dict(**network, depth=10, width=1),
        "objectives.ACET": dict(within=WITHIN, steps=2, bn="eval"),
        "objectives.ADV": dict(within=WITHIN, steps=2, bn="eval"),
        "objectives.ALOE": dict(within=WITHIN, steps=2, bn="eval"),
        "objectives.AOE": dict(within=WITHIN, steps=2, bn="eval"),
        "objectives.ATOM": dict(within=WITHIN, q=0.1, steps=2, bn="eval"),
        "objectives.NTOM": dict(q=0.1, bn="eval"),
        "objectives.MinedALOE": dict(within=WITHIN, q=0.1, steps=2, bn="eval"),
        "objectives.Adversarial": dict(
            within=WITHIN, **how, ramp=0.5, mode="eval", keep="last", clean=True
        ),
        "objectives.InnerMax": dict(within=WITHIN, **how, ramp=0.5, mode="eval", keep="last"),
        "objectives.CCU": dict(weight=0.5),
        "objectives.OutlierExposure": dict(weight=0.5),
        "objectives.OutlierTraining": dict(
            inside=WITHIN, outside=WITHIN, outlier_loss=objectives.to_uniform, weight=0.5, attacked_share=0.5,
            mine=mining.Mining(), steps=2, bn="eval",
        ),
        "objectives.ROWL": dict(inner=WITHIN, steps=2),
        "objectives.SOFL": dict(weight=1.0, start=0.4),
        "objectives.Standard": {},
        "objectives.TRADES": dict(within=WITHIN, **how, ramp=0.5, mode="eval", keep="last", beta=2.0),
        "perturbations.Ball.scaled": dict(self=WITHIN, factor=0.5),
        "perturbations.Corruption": dict(names=["fog", "contrast"], severities=[1, 3]),
        "perturbations.L2": dict(eps=0.5, box=(0, 1)),
        "perturbations.Latent": dict(generator=VAE, radius=1.0, box=(0, 1)),
        "perturbations.Latent.scaled": dict(self=Latent(VAE, 1.0), factor=0.5),
        "perturbations.Linf": dict(eps=0.5, box=(0, 1)),
        "perturbations.Random": dict(within=WITHIN),
        "perturbations.Spatial": dict(rotation=10.0, translation=0.4, scale=0.2, fill="border"),
        "perturbations.Spatial.grid": dict(self=Spatial(10.0, 1.0), points=[3, 3, 3, 1]),
        "perturbations.Compose": dict(first=Corruption(["fog"], [1]), second=WITHIN),
        "plotting.band": dict(
            axis=plt.figure().gca(), x=[1.0, 2.0], estimates=[metrics.proportion(3, 8)] * 2, label="a", colour="red"
        ),
        "plotting.fall": dict(
            axis=plt.figure().gca(), rows=[{"eps": e, "auroc": metrics.proportion(3, 8)} for e in (0.0, 0.1)],
            column="auroc",
        ),
        "plotting.roc": dict(
            axis=plt.figure().gca(), measured={"a": report(), "b": (A, B)}, outliers="u", tpr=0.8, clean=A
        ),
        "plotting.score_histograms": dict(
            axis=plt.figure().gca(), measured={"a": report()}, outliers="u", bins=[0.0, 0.5, 1.0], tpr=0.8, clean=A
        ),
        "plotting.image_grid": dict(images=X[:3], titles=["a", "b", "c"], columns=2, scale=0.5),
        "plotting.use_style": {},
        "recipes.commands": dict(run=results.load()[0]),
        "recipes.names": {},
        "recipes.plans": {},
        "recipes.read": dict(name_or_path="aloe_cifar10_fast", changes=["training.epochs=3"], plan="strong"),
        "recipes.Recipe.to_json": dict(self=read("aloe_cifar10_fast")),
        "results.Kept.auroc": dict(self=known, attack="a", sets=["u"], detector="detector"),
        "results.Kept.fpr": dict(self=known, attack="a", sets=["u"], detector="detector"),
        "results.Kept.pair": dict(self=known, attack="a", sets=["u"], detector="detector"),
        "results.Kept.rate": dict(self=known, name="accuracy"),
        "results.kept": dict(name="oe_cifar10_cpu", plan="atom"),
        "results.load": dict(folder=tmp),
        "results.pooled": dict(scores=score, detector="detector", attack="a", sets=["u"]),
        "results.shown": dict(head=["a", "b"], rows=[["c", 1], ["d", 2.5]]),
        "results.table": dict(runs=[], markdown=True),
        "sanity.Defence.check": dict(
            self=sanity.Defence(NET, "Nothing is wrong."), x=X, y=Y, outliers=U, within=WITHIN, steps=1
        ),
        "sanity.Findings.from_dict": dict(self=sanity.Findings, kept=FINDINGS.to_dict()),
        "sanity.Findings.to_dict": dict(self=FINDINGS),
        "sanity.check": dict(
            model_or_detector=MSP(NET), x=X, y=U, within=WITHIN, seed=0, samples=4, steps=1,
            attack=partial(attack_score, steps=1), threshold=0.0, tpr=0.9,
        ),
        "sanity.zoo": dict(network=NET, robust=NET, exposed=REJECT),
        "tables.html": dict(cells=[["a", "b"], ["c", "d"]]),
        "tables.text": dict(cells=[["a", "b"], ["c", "d"]], markdown=True),
        "smoothing.CertifiedScore.lower": dict(self=CertifiedScore(*[torch.tensor([0.5])] * 3, 0.1), radius=0.1),
        "smoothing.CertifiedScore.upper": dict(self=CertifiedScore(*[torch.tensor([0.5])] * 3, 0.1), radius=0.1),
        "smoothing.IntervalOutliers": dict(eps=0.1, weight=0.5, share=0.4, ramp=0.3),
        "smoothing.Noise": dict(within=L2(1.0), sigma=0.25),
        "smoothing.Smoothed": dict(model=NET, within=L2(1.0), sigma=0.25, draws=3, seed=0),
        "smoothing.certified_accuracy": dict(
            found=CertifiedVote(Y, torch.ones(6), torch.ones(6)), y=Y, radii=[0.1, 0.2], confidence=0.9
        ),
        "smoothing.certified_score": dict(
            score=lambda v: v.flatten(1).mean(1), x=X, within=L2(1.0), sigma=0.01, **many, alpha=0.01,
            at=torch.zeros_like(X), generator=source(),
        ),
        "smoothing.certify": dict(
            model=NET, x=X, within=L2(1.0), sigma=0.25, n0=4, **many, alpha=0.01, at=torch.zeros_like(X),
            generator=source(),
        ),
        "smoothing.guaranteed_auroc": dict(
            lower=lambda r: torch.tensor(A), upper=lambda r: torch.tensor(B), radii=[0.1], confidence=0.9
        ),
        "smoothing.interval_bounds": dict(model=NET, lower=LOWER, upper=X),
        "smoothing.interval_score": dict(model=REJECT, x=X, eps=0.1),
        "smoothing.lower_bound": dict(hits=torch.tensor([3, 4]), n=8, alpha=0.01),
        "smoothing.margin_bounds": dict(model=NET, lower=LOWER, upper=X, y=Y),
        "smoothing.mean_bound": dict(mean=torch.tensor([0.5, 0.9]), n=8, alpha=0.01),
        "smoothing.predict": dict(
            model=NET, x=X, within=L2(1.0), sigma=0.25, **many, alpha=0.01, at=torch.zeros_like(X), generator=source()
        ),
        "smoothing.sigma_for": dict(radius=0.5, n=100, alpha=0.01),
        "smoothing.votes": dict(
            model=NET, x=X, within=L2(1.0), sigma=0.25, **many, at=torch.zeros_like(X), generator=source()
        ),
        "smoothing.worst_cross_entropy": dict(model=NET, lower=LOWER, upper=X, y=Y),
        "toy.GaussianOutliers": dict(d=6, sigma=5.0, eps=0.5, nu=1.0, rho=0.3, a=2.0, b=9.0),
        "toy.GaussianOutliers.estimate": dict(self=FAR, inside=POOL, outliers=POOL + 1),
        "toy.GaussianOutliers.fnr": dict(self=FAR, theta=np.arange(1.0, 7)),
        "toy.GaussianOutliers.hardest": dict(self=FAR, inside=POOL, pool=POOL + 1, n=3, q=0.2),
        "toy.GaussianOutliers.inside": dict(self=FAR, n=3, rng=np.random.default_rng(0)),
        "toy.GaussianOutliers.limit_cosine": dict(self=FAR),
        "toy.GaussianOutliers.limit_fnr": dict(self=FAR),
        "toy.GaussianOutliers.pool": dict(self=FAR, n=5, rng=np.random.default_rng(0), contamination=0.2),
        "toy.GaussianOutliers.robust_fpr": dict(self=FAR, theta=np.arange(1.0, 7)),
        "toy.TsiprasDistribution": dict(p=0.9, d=10, eta=0.5),
        "toy.TsiprasDistribution.answer": dict(self=TOY, x=TOY.sample(5, 0)[0], t=1.0),
        "toy.TsiprasDistribution.averaging_accuracy": dict(self=TOY, eps=0.1),
        "toy.TsiprasDistribution.best_linear": dict(self=TOY, eps=0.1),
        "toy.TsiprasDistribution.bound": dict(self=TOY, delta=0.1),
        "toy.TsiprasDistribution.frontier": dict(self=TOY, t=0.5, eps=0.2),
        "toy.TsiprasDistribution.gap": dict(self=TOY, t=0.5),
        "toy.TsiprasDistribution.linear_accuracy": dict(self=TOY, w=np.arange(1.0, 12), eps=0.1, bias=0.2),
        "toy.TsiprasDistribution.optimal_robust_accuracy": dict(self=TOY, eps=0.1),
        "toy.TsiprasDistribution.sample": dict(self=TOY, n=5, seed=0),
        "toy.TsiprasDistribution.shift": dict(self=TOY, eps=0.1),
        "toy.TsiprasDistribution.symmetric_accuracy": dict(self=TOY, t=0.5, eps=0.1),
        "toy.TsiprasDistribution.threshold": dict(self=TOY, eps=0.1),
        "toy.adversarial_linear": dict(
            x=TOY.sample(5, 0)[0], y=TOY.sample(5, 0)[1], eps=0.1, loss="logistic", steps=3, lr=0.02
        ),
        "toy.adversarial_svm": dict(dist=TOY, eps=0.1),
        "toy.frontier_lp": dict(dist=TOY, eps=0.2, deltas=[0.05, 0.1], bins=5),
        "toy.phi": dict(x=0.5),
        "toy.population_hinge": dict(dist=TOY, w1=0.5, s=0.5, eps=0.1),
        "training.History.column": dict(self=History([{"loss": 1.0}]), name="loss"),
        "training.fit": dict(
            model=small_cnn(3), objective=objectives.OutlierExposure(), data=DATA, **fit, seed=0,
            milestones=[0.5], augment=data.Augment(1), device="cpu", minutes=5.0, run_dir=tmp / "run",
        ),
        "widgets.attempt": dict(check=lambda answer: None, answer=lambda: 1),
        "widgets.explore": dict(draw=drawing, alt="a line", labels={"a": "slope"}, start={"a": 1}, dpi=20, a=[1, 2]),
        "widgets.live": dict(draw=drawing, labels={"a": "slope"}, a=[1, 2]),
    }  # fmt: skip
    for name, detector in fitted().items():
        table[f"detectors.{name}"] = dict(model=REJECT if name == "RejectClass" else NET)
        if "fit" in vars(type(detector)):
            table[f"detectors.{name}.fit"] = dict(self=detector, x=MANY, y=MANY_Y)
        table[f"detectors.{name}.attack_objectives"] = dict(self=detector, x=X, direction="lower")
        table[f"detectors.{name}.paper_score"] = dict(self=detector, x=X)
        table[f"detectors.{name}.score"] = dict(self=detector, x=X)
    table["detectors.PRO"] = dict(base=MSP(NET), steps=2, step=0.01)
    table["detectors.wrap"] = dict(
        score=Darkness(),
        higher="in",
        features=lambda x: x.flatten(1)[:, :3],
        model=NET,
        name="darkness",
    )
    table["detectors.Mahalanobis.combine"] = dict(self=fitted()["Mahalanobis"], x=MANY, outliers=U)
    return table
