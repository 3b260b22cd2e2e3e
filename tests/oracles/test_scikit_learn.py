"""Metrics and detectors against scikit-learn, which has neither but has every part of both.

Metrics agree to 1e-12, ties included. Detectors agree to 1e-8 in double precision where the parts are the same
formula; the weights of layers differ in how a standard deviation is estimated.
"""

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from robustood import losses, metrics
from robustood.detectors import KNN, MSP, Mahalanobis, ViM, wrap
from robustood.models import readout

pytestmark = pytest.mark.oracle


# --- metrics ------------------------------------------------------------------------------------


@pytest.fixture(params=[None, 2, 1, 0], ids=["no ties", "few ties", "ties", "mostly ties"])
def scored(request):
    """Scores of both sides, rounded to so many decimals, and the labels and scores as scikit-learn takes them."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(1, 1, 700), rng.normal(0, 1.5, 400)
    if request.param is not None:
        a, b = a.round(request.param), b.round(request.param)
    return a, b, np.repeat([1, 0], [700, 400]), np.concatenate([a, b])


def test_the_area_under_the_roc_curve_agrees(scored):
    a, b, labels, both = scored
    assert metrics.auroc(a, b) == pytest.approx(roc_auc_score(labels, both), abs=1e-12)


def test_average_precision_agrees_for_both_positives(scored):
    a, b, labels, both = scored
    for positive, theirs in (("in", (labels, both)), ("out", (1 - labels, -both))):
        ours = metrics.aupr(a, b, positive=positive)
        assert ours == pytest.approx(average_precision_score(*theirs), abs=1e-12)


def test_the_points_of_the_roc_curve_agree(scored):
    a, b, labels, both = scored
    theirs = roc_curve(labels, both, drop_intermediate=False)
    for own, other in zip(metrics.roc(a, b), theirs, strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tpr", [0.5, 0.8, 0.95, 1.0])
def test_the_false_positive_rate_is_that_of_the_first_point_of_the_curve_that_reaches_the_rate(
    scored, tpr
):
    a, b, labels, both = scored
    for positive, theirs in (("in", (labels, both)), ("out", (1 - labels, -both))):
        wrong, right, _ = roc_curve(*theirs, drop_intermediate=False)
        first = wrong[(right >= tpr).argmax()]
        assert metrics.fpr_at_tpr(a, b, tpr, positive=positive) == pytest.approx(first, abs=1e-12)


# --- detectors ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cloud():
    """Features of full rank with equally frequent classes, queries, and a head, in double precision."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    y = torch.arange(2000) % 5
    mix = torch.eye(16) + 0.2 * draw(16, 16)
    h = draw(5, 16)[y] + draw(2000, 16) @ mix
    return h, y, 2 * draw(300, 16), readout(draw(5, 16), draw(5))


def test_mahalanobis_agrees_with_the_empirical_covariance(cloud):
    """Theirs are squared distances; ours are minus half of them, the logarithm of a density."""
    h, y, query, head = cloud
    means = torch.stack([h[y == c].mean(0) for c in range(5)])
    theirs = EmpiricalCovariance(assume_centered=True).fit((h - means[y]).numpy())
    squared = [theirs.mahalanobis((query - mean).numpy()) for mean in means]
    ours = Mahalanobis(head).fit(h, y).paper_score(query)
    np.testing.assert_allclose(ours, -0.5 * np.min(squared, 0), rtol=1e-8)


@pytest.mark.parametrize("solver", ["lsqr", "eigen"])
def test_mahalanobis_by_class_agrees_with_linear_discriminants(cloud, solver):
    """With equally frequent classes the softmax of our distances is their posterior."""
    h, y, query, head = cloud
    theirs = LinearDiscriminantAnalysis(solver=solver).fit(h.numpy(), y.numpy())
    ours = Mahalanobis(head).fit(h, y).distances(query)[:, 0].softmax(1)
    np.testing.assert_allclose(ours, theirs.predict_proba(query.numpy()), rtol=1e-6, atol=1e-12)


def test_the_weights_of_layers_agree_with_a_pipeline(cloud):
    """Theirs scales by the deviation over n and ours over n - 1, which moves the penalty by that much."""
    h, y, query, head = cloud
    ours = Mahalanobis(head).fit(h, y)
    near, far = h[:300], query
    plain = [ours.paper_score(each)[:, None].numpy() for each in (near, far)]
    ours.combine(near, far)
    theirs = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(max_iter=1000))
    theirs.fit(np.concatenate(plain), np.repeat([0, 1], 300))
    outlier = theirs.predict_proba(plain[1])[:, 1]
    np.testing.assert_allclose(-ours.paper_score(far), outlier, atol=1e-3)


@pytest.mark.parametrize("k", [1, 5, 50])
def test_neighbours_agree(cloud, k):
    h, y, query, head = cloud
    theirs = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(normalize(h.numpy()))
    distances, _ = theirs.kneighbors(normalize(query.numpy()))
    ours = KNN(head, k).fit(h, y).paper_score(query)
    np.testing.assert_allclose(ours, -distances[:, -1], rtol=1e-8)


@pytest.mark.parametrize("dims", [4, 8, 12])
def test_the_residual_agrees_with_a_singular_value_decomposition(cloud, dims):
    """About ViM's origin, where a PCA would take the mean."""
    h, _, query, head = cloud
    ours = ViM(head, dims).fit(h)
    about = (query - ours.origin).numpy()
    theirs = TruncatedSVD(dims, algorithm="arpack").fit((h - ours.origin).numpy())
    rest = about - theirs.inverse_transform(theirs.transform(about))
    np.testing.assert_allclose(ours.residual(query), np.linalg.norm(rest, axis=1), rtol=1e-8)


def test_probabilities_and_loss_agree_with_logistic_regression(cloud):
    h, y, query, _ = cloud
    theirs = LogisticRegression(max_iter=1000).fit(h.numpy(), y.numpy())
    head = readout(torch.tensor(theirs.coef_), torch.tensor(theirs.intercept_))
    probabilities = theirs.predict_proba(query.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(MSP(head).paper_score(query), probabilities.max(1), rtol=1e-10)
        loss = losses.cross_entropy(head(h), y).mean().item()
    assert loss == pytest.approx(log_loss(y.numpy(), theirs.predict_proba(h.numpy())), rel=1e-10)


def test_a_wrapped_estimator_scores_as_it_does_itself(cloud):
    """Its ``decision_function`` is higher for inliers, as our scores are."""
    h, _, query, _ = cloud
    theirs = IsolationForest(random_state=0).fit(h.numpy())
    ours = wrap(theirs, higher="in").score(query)
    np.testing.assert_allclose(ours, theirs.decision_function(query.numpy()), rtol=1e-6)
    near = wrap(theirs, higher="in").score(h)
    assert metrics.auroc(near, ours) > 0.6  # the queries lie farther out
