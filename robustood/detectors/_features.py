"""Scores computed from the penultimate features or from the features of every stage."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from robustood.detectors._base import (
    Columns,
    Detector,
    Direction,
    Inputs,
    Labels,
    Values,
    check_fit,
    downhill,
    signed,
)
from robustood.detectors._gaussian import Gaussian, Moments
from robustood.inputs import check_choice, check_count, check_number, finite_inputs
from robustood.losses import log_odds, to_uniform

Outliers = Float[Tensor, "outliers *shape"]


class Mahalanobis(Detector):
    r"""Distance to the nearest class mean under one tied covariance (Lee et al. 2018, eq. 2).

    $M = \max_c -\tfrac12 (h - \mu_c)^\top \Sigma^{-1} (h - \mu_c)$, on the penultimate features or
    on the channel means of every stage. The stages are summed unless :meth:`combine` has weighted them by a
    logistic regression $t = w^\top M + b$ with label 1 for outliers; then ``paper_score`` is
    $-\sigma(t)$ and the deployed score $-t$.

    Args:
        layers: ``"last"`` or ``"all"``.
        step: $\eta$ of the input step $x - \eta\,\mathrm{sgn} \nabla_x (-M)$, separate for each layer;
            the step counts as a constant in the gradient.

    >>> from robustood.models import readout
    >>> spread = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]])
    >>> h, y = torch.cat([spread, spread + torch.tensor([4.0, 0])]), torch.arange(8) // 4
    >>> detector = Mahalanobis(readout(torch.eye(2))).fit(h, y)
    >>> print(f"{detector.paper_score(torch.tensor([[1.0, 1.0]])).item():.2f}")
    -1.25
    """

    fitted_attribute = "layer_fits"
    layer_fits: Any
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self, model: nn.Module, layers: Literal["last", "all"] = "last", step: float = 0.0
    ):
        super().__init__(model)
        check_choice(layers, "layers", ("last", "all"))
        check_number(step, "step", 0)
        self.layers, self.step = layers, step
        self.layer_fits = None
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *how: Any) -> None:
        """Build the Gaussians that the state holds; a state without any, as that of a network, changes none."""
        fits, device = [], self.device(torch.zeros(1))
        while (own := f"{prefix}layer_fits.{len(fits)}.") + "means" in state_dict:
            kept = (state_dict[own + name].to(device, copy=True) for name in ("whiten", "means"))
            fits.append(Gaussian.whitened(*kept))
        if fits:
            self.layer_fits = nn.ModuleList(fits)
        super()._load_from_state_dict(state_dict, prefix, *how)

    def parts(self, x: Inputs) -> list[Tensor]:
        """The feature vector of each layer."""
        if self.layers == "last":
            return [self.features(x)]
        return [m.flatten(2).mean(2) if m.ndim > 2 else m for m in self.stages(x)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(self, x: Inputs, y: Labels | None = None) -> Mahalanobis:
        """Compute class means and tied covariance of each layer, in one pass over (x, y)."""
        classes = check_fit(x, y)
        moments: list[Moments] = []
        for features, labels in self.stream(self.parts, x, y):
            moments = moments or [Moments(classes, h) for h in features]
            for seen, h in zip(moments, features, strict=True):
                seen.update(h, labels)
        if missing := (moments[0].count == 0).nonzero().flatten().tolist():
            raise ValueError(
                f"y has no sample of the classes {missing}; give each class at least one"
            )
        self.weight = self.bias = None  # an earlier regression weighed other scores
        self.layer_fits = nn.ModuleList(
            Gaussian(m.mean, m.scatter / m.count.sum()) for m in moments
        ).to(features[0].dtype)
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def combine(self, x: Inputs, outliers: Outliers) -> Mahalanobis:
        """Weight the layers by logistic regression of outliers (1) against in-distribution x (0)."""
        from sklearn.linear_model import LogisticRegression  # takes a second to import

        self.check_is_fitted()
        x, outliers = finite_inputs(x), finite_inputs(outliers, "outliers")
        if x.shape[1:] != outliers.shape[1:]:
            raise ValueError(
                f"x and outliers must have samples of the same shape, got {tuple(x.shape[1:])} and "
                f"{tuple(outliers.shape[1:])}; resize one of them"
            )
        both = torch.cat([x, outliers])
        scores = torch.cat([m for m, _ in self.stream(self.layer_scores, both)]).cpu()
        # NumPy has no bfloat16.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scale = scores.std(0).clamp_min(1e-12)
        labels = torch.arange(len(both)) >= len(x)
        fitted = LogisticRegression(max_iter=1000).fit((scores / scale).numpy(), labels.numpy())
        like = self.layer_fits[0].means
        self.weight = (torch.tensor(fitted.coef_[0]) / scale).to(like)
        self.bias = torch.tensor(fitted.intercept_[0]).to(like)
        return self

    def by_class(self, x: Inputs, layer: int) -> Float[Tensor, "batch classes"]:
        """One layer's distances after its own input step."""
        gaussian = self.layer_fits[layer]
        moved = downhill(lambda v: -gaussian(self.parts(v)[layer]).amax(1).sum(), x, self.step)
        return gaussian(self.parts(moved)[layer])

    def distances(self, x: Inputs) -> Float[Tensor, "batch layers classes"]:
        """Distances of all layers, in one forward pass if there is no input step."""
        if self.step:
            self.check_is_fitted()
            return torch.stack([self.by_class(x, i) for i in range(len(self.layer_fits))], 1)
        return self.unmoved(x)

    def unmoved(self, x: Inputs) -> Float[Tensor, "batch layers classes"]:
        """Distances of all layers, without the input step."""
        self.check_is_fitted()
        fits = zip(self.layer_fits, self.parts(x), strict=True)
        return torch.stack([gaussian(h) for gaussian, h in fits], 1)

    def layer_scores(self, x: Inputs) -> Float[Tensor, "batch layers"]:
        """$M_l$ of each layer."""
        return self.distances(x).amax(2)

    def weighed(self, scores: Float[Tensor, "batch layers *classes"]) -> Tensor:
        """$-t$, or the sum over layers if no weights were fitted."""
        if self.weight is None:
            return scores.sum(1)
        return -(torch.tensordot(scores, self.weight, ([1], [0])) + self.bias)

    def plain(self, x: Inputs) -> Values:
        """$t$ of the fitted regression without the input step: what the papers' attack uses."""
        return -self.weighed(self.unmoved(x).amax(2))

    def score(self, x: Inputs) -> Values:
        return self.weighed(self.layer_scores(x))

    def paper_score(self, x: Inputs) -> Values:
        score = self.score(x)
        return score if self.weight is None else -torch.sigmoid(-score)

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score; to raise it, also the closeness to each class, to lower it, a smooth version."""
        distances = self.distances(x)
        score = self.weighed(distances.amax(2))
        if direction == "raise":
            return torch.cat([score[:, None], self.weighed(distances)], 1)
        return signed(torch.stack([score, self.weighed(distances.logsumexp(2))], 1), direction)


class KNN(Detector):
    r"""Distance to the k-th nearest training feature on the unit sphere, negated (Sun et al. 2022).

    $-\|\hat h - \hat h_{(k)}\|_2$ with $\hat h = h / \|h\|_2$. The neighbours are searched at
    every call, so an attack always faces the current ones.

    Args:
        k: which neighbour; the paper uses 50 for CIFAR-10, 200 for CIFAR-100.

    >>> from robustood.models import readout
    >>> bank = torch.tensor([[3.0, 4], [1, 0], [0, 2]]).double()
    >>> for k in (1, 2):
    ...     knn = KNN(readout(torch.eye(2).double()), k).fit(bank, torch.tensor([0, 1, 1]))
    ...     print(f"{knn.paper_score(torch.tensor([[6.0, 8.1]]).double()).item():.5f}")
    -0.00595
    -0.62681
    """

    fitted_attribute = "bank"
    n_untargeted = 2
    bank: Tensor
    prototypes: Tensor

    def __init__(self, model: nn.Module, k: int = 50):
        super().__init__(model)
        check_count(k, "k", low=1)
        self.k = k
        self.register_buffer("bank", None)
        self.register_buffer("prototypes", None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(self, x: Inputs, y: Labels | None = None) -> KNN:
        """Store the features of all training images; no other detector's memory grows with their number."""
        classes = check_fit(x, y)
        if len(x) < self.k:
            raise ValueError(
                f"x must hold at least k = {self.k} samples, got {len(x)}; pass more, or lower k"
            )
        parts = [(normalize(h), c) for h, c in self.stream(self.features, x, y)]
        self.bank, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        means = self.bank.new_zeros(classes, self.bank.shape[1]).index_add_(0, labels, self.bank)
        self.prototypes = normalize(means)
        return self

    def query(self, x: Inputs) -> Float[Tensor, "batch width"]:
        self.check_is_fitted()
        return normalize(self.features(x))

    def nearest(self, q: Tensor) -> tuple[Values, Float[Tensor, "batch k"]]:
        r"""Distance to the k-th neighbour, and cosines with the k nearest.

        $\sqrt{2 - 2\cos}$ cancels where two features nearly coincide, so the distance that is the score is
        computed from the difference.
        """
        cosines, places = (q @ self.bank.T).topk(self.k, dim=1)
        apart = (q - self.bank[places[:, -1]]).square().sum(1)
        return apart.clamp_min(1e-30).sqrt(), cosines

    def score(self, x: Inputs) -> Values:
        return -self.nearest(self.query(x))[0]

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score and the mean cosine with the k nearest; to raise it, also the cosine with each class mean."""
        q = self.query(x)
        farthest, cosines = self.nearest(q)
        columns = [-farthest, cosines.mean(1)]
        if direction == "raise":
            columns += (q @ self.prototypes.T).unbind(1)
        return signed(torch.stack(columns, 1), direction)


class ViM(Detector):
    r"""Virtual-logit matching, $\mathrm{LSE}(z) - \alpha r$ (Wang et al. 2022, eq. 7).

    $r = \|R^\top (h - o)\|_2$ is the norm of the part outside the principal subspace of the training
    features about $o = -W^+ b$, and $\alpha$ scales its mean to that of the largest output.

    Args:
        dims: dimension of the principal subspace; default 1000 of at least 2048 features, 512 of at least
            1000, else half of them.

    >>> from robustood.models import readout
    >>> head = torch.eye(2, 3), torch.tensor([0.5, -0.5])
    >>> o = torch.tensor([-0.5, 0.5, 0])
    >>> h = o + torch.tensor([[3.0, 0, 0.1], [-3, 0, 0.1], [0, 2, -0.1], [0, -2, -0.1]])
    >>> vim = ViM(readout(*head), dims=2).fit(h)
    >>> print(f"{vim.alpha.item():.2f} {vim.paper_score(torch.tensor([[2.0, 1, 0.5]])).item():.5f}")
    12.50 -3.62307
    """

    fitted_attribute = "alpha"
    n_untargeted = 3
    origin: Tensor
    outside: Tensor
    alpha: Tensor

    def __init__(self, model: nn.Module, dims: int | None = None):
        super().__init__(model)
        if dims is not None:
            check_count(dims, "dims", low=1)
        self.dims = dims
        for name in ("origin", "outside", "alpha"):
            self.register_buffer(name, None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(self, x: Inputs, y: Labels | None = None) -> ViM:
        """Compute the principal subspace, then the scale, in two passes over x; labels are not used."""
        check_fit(x, y, labelled=False)
        head = self.head(x)
        width = head.in_features
        dims = self.dims or (1000 if width >= 2048 else 512 if width >= 1000 else width // 2)
        if dims > width:
            raise ValueError(f"dims must be at most the number of features, {width}, got {dims}")
        weight = self.class_logits(head.weight.T).T.double()
        bias = head.weight.new_zeros(head.out_features) if head.bias is None else head.bias
        origin = -torch.linalg.pinv(weight) @ self.class_logits(bias[None])[0].double()
        second = origin.new_zeros(width, width)
        for h, _ in self.stream(self.features, x):
            own = h.double() - origin
            second += own.T @ own
        energy, axes = torch.linalg.eigh(second)
        if dims < width and energy[: width - dims].sum() <= 1e-12 * energy.sum():
            raise ValueError(
                f"dims = {dims} leaves no residual: the features of x lie in a subspace of that dimension; "
                "choose fewer dims"
            )
        self.outside = axes[:, : width - dims].to(head.weight)
        self.origin, self.alpha = origin.to(head.weight), head.weight.new_ones(())
        total = origin.new_zeros(2)
        for h, _ in self.stream(self.features, x):
            top = self.of(h)[0].amax(1)
            total += torch.stack([top.double().sum(), self.residual(h).double().sum()])
        ratio = total[0] / total[1] if dims < width else origin.new_zeros(())
        self.alpha = ratio.to(head.weight)
        return self

    def of(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Class outputs and the virtual logit, of features."""
        z = self.class_logits(self.part("head")(h))
        return z, self.alpha * self.residual(h)

    def residual(self, h: Float[Tensor, "batch width"]) -> Values:
        """$r$, with gradient 0 at 0."""
        return ((h - self.origin) @ self.outside).square().sum(1).clamp_min(1e-30).sqrt()

    def score(self, x: Inputs) -> Values:
        self.check_is_fitted()
        z, virtual = self.of(self.features(x))
        return z.logsumexp(1) - virtual

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score and its two terms; to raise it, also each class output minus the virtual logit."""
        self.check_is_fitted()
        z, virtual = self.of(self.features(x))
        energy = z.logsumexp(1)
        columns = torch.stack([energy - virtual, energy, -virtual], 1)
        if direction == "raise":
            return torch.cat([columns, z - virtual[:, None]], 1)
        return signed(columns, direction)


class ReAct(Detector):
    r"""Energy of clipped features, $\mathrm{LSE}(W \min(h, c) + b)$ (Sun et al. 2021, eq. 3).

    A clipped unit has no gradient, which hides it from a plain attack. The gradient of ``score``
    ignores the clipping; ``attack_objectives`` has both gradients.

    Args:
        clip: c; None to estimate it by :meth:`fit`.
        share: the share of training activations that are below the c of :meth:`fit`.

    >>> from robustood.models import readout
    >>> h, head = torch.tensor([[0.5, 4, 1]]), readout([[1.0, 1, 0], [0, 1, 1]])
    >>> for c in (float("inf"), 1.0):
    ...     print(f"{ReAct(head, clip=c).paper_score(h).item():.6f}")
    5.474077
    2.474077
    """

    fitted_attribute = "clip"
    n_untargeted = 2
    clip: Tensor

    def __init__(self, model: nn.Module, clip: float | None = None, share: float = 0.9):
        super().__init__(model)
        check_number(share, "share", 0, 1)
        self.share = share
        self.register_buffer("clip", None if clip is None else torch.tensor(float(clip)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(self, x: Inputs, y: Labels | None = None) -> ReAct:
        """Set c to a quantile of all activations, up to a millionth of their range, in two passes over x."""
        check_fit(x, y, labelled=False)
        features = lambda: (h.float() for h, _ in self.stream(self.features, x))
        ends = torch.stack([torch.stack(h.aminmax()) for h in features()])
        low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
        bins, count = 2**20, torch.zeros(2**20, dtype=torch.float64)
        for h in features():
            count += torch.histc(h, bins, low, high).cpu().double()
        below = count.cumsum(0)
        place = int(torch.searchsorted(below, self.share * below[-1]))
        self.clip = ends.new_tensor(low + (high - low) * (min(place, bins - 1) + 0.5) / bins)
        return self

    def outputs(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Class outputs of clipped features: with the gradient of the unclipped ones, and with their own."""
        self.check_is_fitted()
        h = self.features(x)
        clipped = h.minimum(self.clip.to(h))
        through = clipped.detach() + (h - h.detach())  # exactly the values, with the gradient of h
        head = self.head(x)
        return self.class_logits(head(through)), self.class_logits(head(clipped))

    def score(self, x: Inputs) -> Values:
        return self.outputs(x)[0].logsumexp(1)

    def paper_score(self, x: Inputs) -> Values:
        return self.outputs(x)[1].logsumexp(1)

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score with both gradients; to raise it, also each output."""
        z, clipped = self.outputs(x)
        columns = torch.stack([z.logsumexp(1), clipped.logsumexp(1)], 1)
        if direction == "raise":
            return torch.cat([columns, z], 1)
        return signed(columns, direction)


class GradNorm(Detector):
    r"""Norm of a gradient, $\|h\|_1 \, \|p - \tfrac1K \mathbf 1\|_1$ (Huang et al. 2021, eq. 5 to 8).

    This is the $\ell_1$ norm of $\partial\,\mathrm{CE}(U, p) / \partial W$ with the mean over classes, so no
    backward pass is needed. The deployed score is its logarithm.

    >>> from robustood.models import readout
    >>> norm = GradNorm(readout([[1.0, 1, 0], [0, 1, 1]]))
    >>> print(f"{norm.paper_score(torch.tensor([[0.5, 4, 1]])).item():.6f}")
    1.347053
    """

    n_untargeted = 3

    def factors(self, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        r"""$\|h\|_1$, $\|p - 1/K\|_1$ and the class outputs."""
        h = self.features(x)
        z = self.class_logits(self.head(x)(h))
        return h.abs().sum(1), (z.softmax(1) - 1 / z.shape[1]).abs().sum(1), z

    def logs(self, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The factors' logarithms, which stay finite at 0, and the class outputs."""
        size, peak, z = self.factors(x)
        tiny = torch.finfo(size.dtype).tiny
        return size.clamp_min(tiny).log(), peak.clamp_min(tiny).log(), z

    def score(self, x: Inputs) -> Values:
        size, peak, _ = self.logs(x)
        return size + peak

    def paper_score(self, x: Inputs) -> Values:
        size, peak, _ = self.factors(x)
        return size * peak

    def attack_objectives(self, x: Inputs, direction: Direction = "raise") -> Columns:
        """The score and its two factors; to raise it, also each class's log-odds, to lower it, closeness to uniform."""
        size, peak, z = self.logs(x)
        columns = torch.stack([size + peak, size, peak], 1)
        if direction == "raise":
            return torch.cat([columns, size[:, None] + log_odds(z)], 1)
        return signed(torch.cat([columns, (size + to_uniform(z))[:, None]], 1), direction)
