"""The scores against pytorch-ood: another implementation, the same numbers with the sign turned.

Theirs are outlier scores, higher for outliers. Agreement is to 1e-5 of the score, on a trained
network and, where single precision matters, on well-conditioned random features.
"""

import pytest
import torch

from robustood import detectors, metrics
from robustood.models import readout

pytestmark = pytest.mark.oracle
RELATIVE = 1e-5
SINGLE = 5e-5  # where theirs sums in single precision over features of very different variance


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip(
        "pytorch_ood", reason="pytorch-ood is not installed: pip install --no-deps pytorch-ood"
    )
    return pytest.importorskip("pytorch_ood.detector")


@pytest.fixture(scope="module")
def inputs(book):
    return torch.cat([book.test.x[:200], *(x[:100] for x in book.ood.values())])


@pytest.fixture(scope="module")
def cloud():
    """Random features of full rank with class means, and a head to read them."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(3000) % 10
    means = torch.randn(10, 48, generator=generator)
    mix = torch.eye(48) + 0.1 * torch.randn(48, 48, generator=generator)
    h = means[y] + torch.randn(3000, 48, generator=generator) @ mix
    head = torch.randn(10, 48, generator=generator), torch.randn(10, generator=generator)
    return h, y, 2 * torch.randn(500, 48, generator=generator), readout(*head)


def agree(ours, theirs, name: str, size=None, within=RELATIVE) -> None:
    """``size``: of the terms whose difference is the score; default the score's own."""
    ours, theirs = ours.detach().double(), -theirs.detach().double()
    size = theirs.abs() if size is None else size.detach().double()
    apart = ((ours - theirs).abs() / size).max().item()
    print(f"{name}: largest relative difference {apart:.1e}")
    assert ours.std() > 1e-6  # no agreement of constants
    assert apart < within


@pytest.mark.parametrize(
    ("name", "theirs", "settings"),
    [
        ("MSP", "MaxSoftmax", ()),
        ("MaxLogit", "MaxLogit", ()),
        ("Energy", "EnergyBased", ()),
        ("Energy", "EnergyBased", (3.0,)),
    ],
)
def test_scores_of_the_outputs_agree(peer, net, inputs, name, theirs, settings):
    ours, other = getattr(detectors, name)(net, *settings), getattr(peer, theirs)(net, *settings)
    with torch.no_grad():
        agree(ours.paper_score(inputs), other(inputs), f"{name} {settings or ''}")


def test_entropy_agrees_where_theirs_clips_nothing(peer, net, inputs):
    """Theirs adds 1e-7 log 1e-7 for each class whose probability is smaller: at most 2e-5."""
    with torch.no_grad():
        ours, theirs = detectors.Entropy(net).paper_score(inputs), -peer.Entropy(net)(inputs)
        smallest = net(inputs).softmax(1).amin(1)
        soft = 0.2 * net(inputs)  # no probability below 1e-7
        whole = detectors.Entropy(torch.nn.Identity()).paper_score(soft)
    assert (ours - theirs).abs().max() < 10 * 1.7e-6
    kept = smallest > 1e-7
    assert kept.sum() > 100
    agree(ours[kept], -theirs[kept], "Entropy")
    agree(whole, peer.Entropy.score(soft), "Entropy, softened")


@pytest.mark.parametrize(("temperature", "step"), [(1000.0, 0.0014), (10.0, 0.02), (1.0, 0.1)])
def test_odin_agrees(peer, net, inputs, temperature, step):
    ours = detectors.ODIN(net, temperature, step)
    theirs = peer.ODIN(net, eps=step, temperature=temperature)
    agree(ours.paper_score(inputs), theirs(inputs), f"ODIN T={temperature:g} step={step:g}")


def scaled(theirs, n: int):
    """Theirs keeps the sum of the scatter, not its mean."""
    theirs.precision = theirs.precision * n
    return theirs


def test_mahalanobis_agrees(peer, cloud):
    h, y, query, head = cloud
    ours = detectors.Mahalanobis(head).fit(h, y)
    theirs = scaled(peer.Mahalanobis(None).fit_features(h, y), len(h))
    agree(ours.paper_score(query), theirs.predict_features(query), "Mahalanobis, features")
    outside = query * 30
    agree(ours.paper_score(outside), theirs.predict_features(outside), "Mahalanobis, far features")


def test_mahalanobis_agrees_on_a_network(peer, net, book, inputs):
    """On the units that ever fire; the others leave their covariance to its ridge."""
    with torch.no_grad():
        h, query = net.features(book.train.x), net.features(inputs)
    keep = h.std(0) > 0.1
    h, query = h[:, keep], query[:, keep]
    theirs = scaled(peer.Mahalanobis(None).fit_features(h, book.train.y), len(h))
    ours = detectors.Mahalanobis(readout(torch.eye(h.shape[1]))).fit(h, book.train.y)
    agree(
        ours.paper_score(query),
        theirs.predict_features(query),
        "Mahalanobis, network",
        None,
        SINGLE,
    )


@pytest.mark.parametrize("step", [0.0, 0.01, 0.3])
def test_mahalanobis_with_an_input_step_agrees(peer, cloud, step):
    h, y, query, head = cloud
    ours = detectors.Mahalanobis(head, step=step).fit(h, y)
    theirs = peer.MahalanobisODIN(head.features, eps=step).fit_features(h, y)
    scaled(theirs._base, len(h))
    agree(ours.paper_score(query), theirs.predict(query), f"MahalanobisODIN step={step:g}")


@pytest.mark.parametrize("k", [1, 5, 50])
def test_neighbours_agree(peer, net, book, inputs, k):
    ours = detectors.KNN(net, k).fit(book.train.x, book.train.y)
    with torch.no_grad():
        h, query = net.features(book.train.x), net.features(inputs)
    theirs = peer.KNN(None, k=k, normalize=True).fit_features(h, book.train.y)
    agree(ours.paper_score(inputs), theirs.predict_features(query), f"KNN k={k}")


@pytest.mark.parametrize("dims", [8, 24, 40])
def test_vim_agrees(peer, cloud, dims):
    h, y, query, head = cloud
    ours = detectors.ViM(head, dims).fit(h, y)
    weight, bias = head.head.weight.detach(), head.head.bias.detach()
    theirs = peer.ViM(None, d=dims, w=weight, b=bias).fit_features(h, y)
    z, virtual = ours.of(query)
    size = z.logsumexp(1) + virtual
    agree(ours.paper_score(query), theirs.predict_features(query), f"ViM dims={dims}", size)
    assert ours.alpha.item() == pytest.approx(theirs.alpha, rel=1e-4)


def test_vim_agrees_on_a_network(peer, net, book, inputs):
    ours = detectors.ViM(net, 16).fit(book.train.x)
    with torch.no_grad():
        h, query = net.features(book.train.x), net.features(inputs)
    theirs = peer.ViM(None, d=16, w=net.head.weight, b=net.head.bias).fit_features(h, book.train.y)
    z, virtual = ours.of(query)
    size = z.logsumexp(1) + virtual
    agree(ours.paper_score(inputs), theirs.predict_features(query), "ViM, network", size, SINGLE)


def test_react_agrees(peer, net, book, inputs):
    ours = detectors.ReAct(net).fit(book.train.x)
    same = peer.ReAct(net.features, net.head, threshold=ours.clip.item())
    agree(ours.paper_score(inputs), same.predict(inputs), "ReAct, one clip")
    own = peer.ReAct(net.features, net.head)
    with torch.no_grad():
        own.fit_feature_maps(net.features(book.train.x), book.train.y)
    # Theirs interpolates between two of the activations.
    assert ours.clip.item() == pytest.approx(own.threshold, rel=1e-3)


def test_gradnorm_agrees(peer, net, inputs):
    theirs = peer.GradNorm(net, param_filter=lambda name: name == "head.weight").to("cpu")
    agree(detectors.GradNorm(net).paper_score(inputs), theirs.predict(inputs), "GradNorm")


@pytest.mark.parametrize("name", ["MaxSoftmax", "EnergyBased"])
def test_a_wrapped_detector_scores_as_ours(peer, net, inputs, name):
    """Their outlier scores, told to be higher for outliers, become the published scores here."""
    theirs = detectors.wrap(getattr(peer, name)(net), higher="out")
    ours = {"MaxSoftmax": detectors.MSP, "EnergyBased": detectors.Energy}[name](net)
    with torch.no_grad():
        agree(ours.paper_score(inputs), -theirs.score(inputs), name)


@pytest.fixture(params=[None, 1, 0], ids=["no ties", "ties", "mostly ties"])
def scored(request):
    """Scores of both sides, rounded to so many decimals, and what theirs takes: outlier scores and labels."""
    generator = torch.Generator().manual_seed(8)
    a = 1 + torch.randn(700, generator=generator, dtype=torch.float64)
    b = 1.5 * torch.randn(400, generator=generator, dtype=torch.float64)
    if request.param is not None:
        a, b = a.round(decimals=request.param), b.round(decimals=request.param)
    return a, b, -torch.cat([a, b]), torch.cat([torch.zeros(700), -torch.ones(400)])


def test_the_metrics_agree_ties_included(peer, scored):
    """Theirs has the outliers as positives, always; AUROC and FPR need no other difference."""
    from pytorch_ood.metrics import functional

    a, b, outlier_scores, labels = scored
    theirs = functional.auroc(outlier_scores, labels).item()
    assert metrics.auroc(a, b) == pytest.approx(theirs, abs=1e-12)
    for tpr in (0.5, 0.8, 0.95, 1.0):
        theirs = functional.fpr_at_tpr(outlier_scores, labels, tpr).item()
        assert metrics.fpr_at_tpr(a, b, tpr, positive="out") == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(("positive", "name"), [("in", "id"), ("out", "ood")])
def test_the_area_under_precision_and_recall_differs_by_the_rule_alone(
    peer, scored, positive, name
):
    """Ours adds steps. Theirs joins the same points by straight lines, whose area may be larger or smaller."""
    from pytorch_ood.metrics import functional

    a, b, outlier_scores, labels = scored
    precision, recall, _ = functional.pr_curve(outlier_scores, labels, positive=name)
    steps = -((recall[1:] - recall[:-1]) * precision[:-1]).sum().item()
    ours = metrics.aupr(a, b, positive=positive)
    assert ours == pytest.approx(steps, abs=1e-12)
    lines = functional.aupr(outlier_scores, labels, positive=name).item()
    print(f"AUPR, {positive} positive: steps {ours:.4f}, lines {lines:.4f}")
    assert abs(ours - lines) < 0.1
