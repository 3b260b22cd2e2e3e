"""The checks. Each looks at one symptom and returns a finding, or None where it does not apply.

Shares are shares of the inputs. What is a fact about each input is judged by the share itself; what depends on luck,
as whether one search beats another, by the lower end of its 95 % interval, so that a few inputs raise no alarm. Inputs
that an attack has won already do not count against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from robustood.inputs import TOLERANCE
from robustood.metrics import acceptance, proportion
from robustood.models import frozen, networks
from robustood.perturbations import Ball
from robustood.sanity._evidence import Case, Evidence, noise
from robustood.sanity._findings import Finding, Level

SOME = 0.1  # share of inputs from which a symptom changes a rate by more than the interval of some dozens of inputs
MOST = 0.5  # share from which it is the rule
TIED = 0.05  # a threshold at 95 % TPR cuts off 5 % of the scores: a larger tie straddles it
DISORDER = 0.01  # share of pairs that rounding may put into another order
SURE = 0.99  # confidence with which a threshold breaks its promise
KERNELS = 0.01  # a GPU may choose another kernel, with products in TF32, for another batch size
SUMS = 1e-3  # rounding of a sum of probabilities, also in half precision


def level(share: float) -> Level:
    """The level of a symptom that a share of the inputs has."""
    return "error" if share >= MOST else "warning" if share >= SOME else "ok"


def by_fact(check: str, which: Tensor, found: str, advice: str) -> Finding:
    """A finding about a property of each input."""
    share = float(which.double().mean())
    return finding(check, share, level(share), found, advice)


def by_count(check: str, which: Tensor, found: str, advice: str) -> Finding:
    """A finding about a comparison of two searches, which a few inputs do not decide."""
    counted = proportion(int(which.sum()), len(which))
    return finding(check, counted.value, level(counted.low), found, advice)


def finding(check: str, value: float, level: Level, found: str, advice: str) -> Finding:
    """A finding, with advice where there is something to do."""
    return Finding(level, check, float(value), found if level == "ok" else f"{found}; {advice}")


# --- the model as it is given


def inputs(case: Case) -> Finding:
    """Values outside the box, or outside [0, 1] for images: normalised outside the model, or grey levels."""
    x, box = case.x, case.within.box
    low, high = (float(v) for v in x.aminmax())
    bounds = (0.0, 1.0) if x.ndim == 4 else box or (low, high)
    outside = max(bounds[0] - low, high - bounds[1], 0.0)
    found = f"the inputs lie in [{low:.4g}, {high:.4g}]"
    return finding(
        "inputs",
        outside,
        "error" if outside > TOLERANCE else "ok",
        found,
        "attacks and radii are in pixels in [0, 1]: divide grey levels by the largest, such as 255, and put a mean/std "
        "normalisation inside the model. No attack was made",
    )


def normalisation(case: Case) -> Finding | None:
    """Whether a classifier of images makes at most half as many errors on standardised inputs as on pixels."""
    labels, x = case.subject.labels, case.x
    if labels is None or x.ndim != 4:
        return None
    std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
    try:
        seen = (x, (x - mean) / std.nan_to_num(1.0).clamp_min(1e-3))
        right = [evaluated(case, v).argmax(1) == labels for v in seen]
    except (ValueError, RuntimeError, AssertionError):  # a model that refuses what are no pixels
        return None
    gained, lost = (int((a & ~b).sum()) for a, b in (right[::-1], right))
    wrong = int((~right[0]).sum())
    halved = wrong > 0 and 2 * (wrong - gained + lost) <= wrong
    sure = halved and proportion(gained, gained + lost).low > MOST
    found = f"standardising the pixels makes {gained} of {len(x)} wrong answers right and {lost} right ones wrong"
    advice = (
        "the model expects standardised inputs: put the normalisation inside it, and attack pixels"
    )
    return finding(
        "normalisation", (gained - lost) / len(x), "warning" if sure else "ok", found, advice
    )


def train_mode(case: Case, subject: object) -> Finding:
    """Modules whose behaviour differs between training and evaluation, left in train mode."""
    # Each once: a network may be reached as the model of a detector and within its score.
    parts = list(dict.fromkeys(p for network in networks(subject) for p in network.modules()))
    left = [p for p in parts if p.training and isinstance(p, (_BatchNorm, _DropoutNd))]
    moved, effect = 0.0, "eval mode changes 0% of the outputs"
    if any(part.training for part in parts):
        as_given, again = (evaluated(case, case.x) for _ in range(2))
        if apart(as_given, again) > 0:
            effect = "their outputs are random, so they cannot be compared with eval mode"
        else:
            with frozen(subject):
                moved = apart(as_given, evaluated(case, case.x))
            effect = f"eval mode changes {moved:.0%} of the outputs"
    kinds = ", ".join(sorted({type(part).__name__ for part in left})) or "no such module"
    found = f"{len(left)} modules are in train mode ({kinds}); {effect}"
    bad = max(float(bool(left)), moved)
    advice = "call model.eval() before anything is measured; all attacks of this check were made in eval mode"
    return finding("train_mode", bad, "error" if bad else "ok", found, advice)


def evaluated(case: Case, x: Tensor) -> Tensor:
    with torch.no_grad():
        return case.subject.outputs(x)


def apart(first: Tensor, second: Tensor, rounding: float = 0.0) -> float:
    """Share of inputs whose outputs differ by more than rounding, in units of the largest output."""
    limit = max(noise(first), rounding * float(first.abs().max()))
    return float(((first - second).abs().amax(1) > limit).double().mean())


def randomness(case: Case) -> Finding:
    """Whether two evaluations of the same batch differ."""
    share = apart(evaluated(case, case.x), evaluated(case, case.x))
    advice = (
        "one evaluation is one draw: attack and measure the mean over many draws (expectation over transformation), or "
        "smooth and certify"
    )
    found = f"two evaluations of the same batch differ for {share:.0%} of the inputs"
    return finding("randomness", share, "error" if share else "ok", found, advice)


def batch(case: Case) -> Finding | None:
    """Whether an output depends on the other inputs of the batch, or on the place in it."""
    x, n = case.x, len(case.x)
    alone = evaluated(case, x)
    if apart(alone, evaluated(case, x)):
        return None  # random anyway
    others = (x + x.mean(0)) / 2
    among = evaluated(case, torch.cat([others, x.flip(0)]))[n:].flip(0)
    share = apart(alone, among, 0.0 if x.device.type == "cpu" else KERNELS)
    found = f"in another batch, {share:.0%} of the inputs get another output"
    advice = (
        "an attack on one input attacks its whole batch: use running statistics, no adaptation at test time and no "
        "noise by position"
    )
    return finding("batch", share, "error" if share else "ok", found, advice)


def probabilities(case: Case) -> Finding | None:
    """Whether what should be logits sums to 1 and lies in [0, 1]."""
    if case.subject.logits is None:
        return None
    with torch.no_grad():
        z = case.subject.logits(case.x).double()
    like = ((z.sum(1) - 1).abs() < SUMS) & (z >= 0).all(1) & (z <= 1).all(1)
    share = float(like.double().mean())
    found = f"{share:.0%} of the output rows lie in [0, 1] and sum to 1"
    advice = "these are probabilities: remove the softmax, since scores and losses apply their own"
    return finding("probabilities", share, "error" if share == 1 else "ok", found, advice)


def ties(case: Case) -> Finding:
    """Scores shared with a different in-distribution input; for a classifier, a largest output that is not unique."""
    if case.subject.labels is None:
        which = _tied(case)
        what = "of the inputs share their score with another in-distribution input"
        advice = (
            "rates at a threshold are arbitrary where scores tie: use the unsaturated score in log space, such as "
            "log-odds, in full precision"
        )
    else:
        top = evaluated(case, case.x).topk(2, 1).values
        which = top[:, 0] == top[:, 1]
        what = "of the inputs have two largest outputs"
        advice = "argmax breaks these ties by the order of the classes: return unsaturated, unrounded logits"
    share = float(which.double().mean())
    bad: Level = "error" if share >= MOST else "warning" if share > TIED else "ok"
    return finding("ties", share, bad, f"{share:.0%} {what}", advice)


def _tied(case: Case) -> Tensor:
    """Which inputs have the score of a different in-distribution input; outliers may tie among themselves."""
    x, scores = case.x, evaluated(case, case.x)[:, 0]
    _, content = x.flatten(1).unique(dim=0, return_inverse=True)
    equal = (scores[:, None] == scores[None]) & (content[:, None] != content[None])
    return equal[:, : len(case.sides[0].x)].any(1)


def saturation(case: Case) -> Finding | None:
    """Where the gradient of the cross-entropy underflows although the outputs have one."""
    losses = [(side, side.side.loss) for side in case.sides if side.side.loss is not None]
    gradients = [side.gradient(loss) for side, loss in losses if loss is not None]
    seen = [grad for grad in gradients if grad is not None]
    if not seen:
        return None
    zero = torch.cat([(grad == 0).flatten(1).all(1) for grad in seen])
    found = f"the gradient of the cross-entropy is exactly zero for {zero.double().mean():.0%} of the inputs"
    advice = 'the softmax is saturated: attack with loss="margin" or "dlr", or without the scaling of the logits'
    return by_fact("saturation", zero, found, advice)


def threshold(scores: Tensor, given: float, tpr: float) -> Finding:
    """Whether a threshold accepts the share of in-distribution inputs that it promises."""
    kept = acceptance(scores.cpu().numpy(), given, SURE)
    bad = not kept.low <= tpr <= kept.high
    found = (
        f"the threshold {given:.4g} accepts {kept.value:.3f} of x ({SURE:.0%} interval {kept.low:.3f} to "
        f"{kept.high:.3f}), and promises {tpr:g}"
    )
    advice = "it was set on other data or on attacked inputs: set it by threshold_at_tpr on clean held-out inputs"
    return finding("threshold", kept.value, "error" if bad else "ok", found, advice)


# --- its gradient


def gradient(case: Case) -> Finding | None:
    """A gradient that is missing, zero all the way, or not finite."""
    if not case.within.differentiable:
        return None
    if not case.climbable:
        advice = (
            "attacks by gradient cannot be made: remove what detaches it, or search without gradients and say so "
            "(rule=attacks.Square())"
        )
        return finding("gradient", 1.0, "warning", "there is no gradient at the input", advice)
    zero = case.gather(lambda side: _known(side.white[1].zero, side))
    broken = case.gather(lambda side: _known(side.white[1].broken, side))
    broken = broken | case.gather(lambda side: ~side.harm(side.white[0]).isfinite())
    if broken.any():
        advice = "NaN steers the attack: look for a division by 0, a root at 0 or an overflow"
        share = float(broken.double().mean())
        found = f"the gradient is not finite for {share:.0%} of the inputs"
        return finding("gradient", share, "error" if share >= SOME else "warning", found, advice)
    found = (
        f"the gradient is exactly zero at every step for {zero.double().mean():.0%} of the inputs"
    )
    advice = (
        "the attack moves at random: rounding, clipping or saturation hides the gradient. Attack without that layer, "
        "with a straight-through gradient, or in log space"
    )
    return by_fact("gradient", zero, found, advice)


def _known(which: Tensor | None, side: Evidence) -> Tensor:
    none = torch.zeros(len(side.x), dtype=torch.bool, device=side.x.device)
    return none if which is None else which


def ascent(case: Case) -> Finding | None:
    """Whether a single step along the gradient reaches a higher value than one against it."""
    if not isinstance(case.within, Ball):
        return None  # warped pixels have kinks at the clean image
    promised, stalled = (case.gather(lambda side, i=i: side.stalled[i]) for i in (0, 1))
    judged = stalled[promised]
    share = float(judged.double().mean()) if len(judged) else 0.0
    low = proportion(int(judged.sum()), len(judged)).low if len(judged) else 0.0
    found = f"for {share:.0%} of the inputs a step along the gradient reaches no higher value than one against it"
    advice = "the gradient is not that of the output: look for random, quantised or replaced parts of the backward pass"
    return finding("ascent", share, level(low), found, advice)


def objective(case: Case) -> Finding | None:
    """Whether a detector's first attack objective orders inputs as its score does."""
    pairs = []
    for side in case.sides:
        if (declared := side.side.declared) is None:
            return None
        seen = torch.cat([side.x, side.white[0]]) if case.climbable else side.x
        with torch.no_grad():
            pairs.append(_disorder(side.side.harm(seen), declared(seen)))
    share = max(pairs)
    found = f"the first attack objective and the score order {share:.1%} of the pairs of inputs differently"
    advice = "an attack climbs another function than the deployed score: make it the first column of attack_objectives"
    return finding("objective", share, "error" if share > DISORDER else "ok", found, advice)


def _disorder(first: Tensor, second: Tensor) -> float:
    """Share of the pairs that two scores put into opposite orders."""
    a, b = (v[:, None] - v[None] for v in (first, second))
    a, b = a.sign() * (a.abs() > noise(first)), b.sign() * (b.abs() > noise(second))
    return float((a * b < 0).double().mean())


# --- attacks against each other


def no_op(case: Case) -> Finding:
    """Inputs that an attack, the user's if one is given, leaves exactly as they were, or whose value it leaves."""
    moved = lambda side: side.white[0] if case.attack is None else side.given
    same = lambda side: (moved(side) == side.x).flatten(1).all(1) | (side.rise(moved(side)) == 0)
    which = case.gather(same)
    whose = "the white-box attack" if case.attack is None else "the attack"
    found = f"{whose} leaves {which.double().mean():.0%} of the inputs as they were"
    advice = "it does nothing there: check its initial point, step size and rounding, and the radius of the set"
    return by_fact("no_op", which, found, advice)


def own_attack(case: Case) -> Finding | None:
    """Whether a plain white-box attack beats the one that was given."""
    if case.attack is None:
        return None
    which = case.gather(Evidence.outdone)
    found = f"{_compared(case, which)} the white-box attack of this check beats the attack"
    return by_count("own_attack", which, found, "the attack is weak: report the stronger one")


def _compared(case: Case, which: Tensor) -> str:
    return f"for {which.double().mean():.0%} of the inputs"


def steps(case: Case) -> Finding:
    """Whether three times the steps raise the value much further."""
    which = case.beaten(lambda side: side.longer_rise)
    found = f"{_compared(case, which)} three times the steps raise the value by a quarter more"
    return by_count("steps", which, found, "the attack has not converged: use more steps")


def restarts(case: Case) -> Finding:
    """Whether other initial points raise the value much further."""
    which = case.beaten(lambda side: side.restarted_rise)
    found = f"{_compared(case, which)} more initial points raise the value by a quarter more"
    advice = (
        "the outcome depends on the initial point: use restarts, and search without gradients too"
    )
    return by_count("restarts", which, found, advice)


def radius(case: Case) -> Finding | None:
    """Whether twice the radius helps: the attack must find worse inputs in a larger set."""
    if not _growable(case):
        return None
    no_more = lambda side: side.wider_rise <= side.white_rise + side.tolerance
    which = case.gather(lambda side: no_more(side) & ~side.won)
    found = f"{_compared(case, which)} twice the radius does not raise the value"
    advice = "an attack that does not gain from a larger set is blind: look at its gradients"
    return by_count("radius", which, found, advice)


def _growable(case: Case) -> bool:
    ball = case.within
    if not isinstance(ball, Ball) or ball.radius == 0:
        return False
    return ball.box is None or ball.radius <= (ball.box[1] - ball.box[0]) / 4


def large_radius(case: Case) -> Finding | None:
    """What is left where every input could be made the same one, so that nothing can be told apart."""
    if not isinstance(case.within, Ball) or case.within.radius == 0:
        return None
    low, high = case.within.box or (float(v) for v in case.x.aminmax())
    left, chance = case.measure(lambda side: side.killed(high - low)), case.subject.chance
    bad: Level = "error" if left > chance + SOME else "ok"
    found = (
        f"with a radius that lets all inputs become the same, {case.subject.metric} is {left:.2f}; at most "
        f"{chance:.2f} is possible"
    )
    advice = "the attack fails at finding what is known to exist: its gradients mislead it"
    return finding("large_radius", left, bad, found, advice)


def black_box(case: Case) -> Finding:
    """Whether a search without gradients beats the white-box attack."""
    which = case.beaten(lambda side: side.black_rise)
    found = f"{_compared(case, which)} a short random search beats the white-box attack"
    advice = "gradients are masked or mislead: search without gradients, with many more queries (rule=attacks.Square())"
    if not isinstance(case.within, Ball):
        advice = "in sets of few parameters gradients mislead: search by a grid or by many random members"
    return by_count("black_box", which, found, advice)


def transfer(case: Case) -> Finding:
    """Whether the maxima of other objectives beat the attack's own."""
    which = case.beaten(lambda side: side.transferred_rise)
    found = f"{_compared(case, which)} the maximum of another objective beats the white-box attack"
    advice = "the attack climbs a poor objective: add the score itself, the margin and one objective per class"
    return by_count("transfer", which, found, advice)


def eight_bits(case: Case) -> Finding | None:
    """Whether the attacked images survive as files of 8 bits."""
    if not isinstance(case.within, Ball) or case.within.box != (0, 1) or case.x.ndim != 4:
        return None
    gained = case.gather(lambda side: side.white_rise > side.tolerance)
    halved = case.gather(lambda side: 2 * side.rounded_rise < side.white_rise)
    found = f"rounding to 8 bits takes half of the rise from {(gained & halved).double().mean():.0%} of the inputs"
    advice = "the attack lives between grey levels: round inside the attack, and report the rounded result"
    counted = by_count("eight_bits", gained & halved, found, advice)
    return counted if counted.level == "ok" else replace(counted, level="warning")


Check = Callable[[Case], Finding | None]
AS_GIVEN: tuple[Check, ...] = (inputs, randomness, batch)
EVALUATED: tuple[Check, ...] = (probabilities, ties)
ATTACKED: tuple[Check, ...] = (normalisation, saturation, gradient, objective)
CLIMBED: tuple[Check, ...] = (
    ascent, no_op, own_attack, steps, restarts, radius, large_radius, black_box, transfer, eight_bits,
)  # fmt: skip
