"""The mining rule by hand, its window, its choice of q, and its place in a training run."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from wrappers import WRAPPERS

from robustood import training
from robustood.data import Data, Split, digits, glyphs
from robustood.mining import Mining, contamination, margins, mine
from robustood.models import readout, small_cnn
from robustood.objectives import ATOM, NTOM, Standard
from robustood.training import fit


@pytest.fixture(scope="module")
def book():
    return digits(train=320)


def line(values):
    """A pool of one-dimensional inputs, and a K+1 network whose margin grows with the input."""
    model = readout(torch.tensor([[0.0], [8.0], [0.0]]), reject=1)
    return model, torch.tensor(values)[:, None]


def test_margins_are_the_log_odds_of_no_rejection(book):
    model = small_cnn(reject=2)
    z = model(book.outliers[:70]).detach().double()
    p = z.softmax(1)
    reject = p[:, 10:].sum(1)
    expected = torch.log((1 - reject) / reject)
    assert torch.allclose(margins(model, book.outliers[:70], 16).double(), expected, atol=1e-5)
    plain = small_cnn()
    p = plain(book.outliers[:70]).detach().double().softmax(1).amax(1)
    found = margins(plain, book.outliers[:70]).double()
    assert torch.allclose(found, torch.log(p / (1 - p)), atol=1e-4)


def test_margins_order_what_the_probability_rounds_to_one():
    model = readout(torch.tensor([[-100.0], [-100.0], [100.0]]), reject=1)
    pool = torch.tensor([[0.9], [0.5], [0.7]])
    assert (model(pool).softmax(1)[:, 2] == 1).all()
    assert margins(model, pool).argsort(descending=True).tolist() == [1, 2, 0]


def test_eight_bit_pools_are_scored_as_pixels(book):
    pool = (book.outliers[:40] * 255).round().to(torch.uint8)
    model = small_cnn(reject=1)
    assert torch.equal(margins(model, pool), margins(model, pool.float() / 255))


@given(
    st.lists(st.floats(0, 1, width=32), min_size=4, max_size=60),
    st.floats(0, 1),
    st.integers(1, 60),
)
def test_the_window_is_exact_and_everything_before_it_is_harder(values, q, n):
    model, pool = line(values)
    size = len(values)
    if int(q * size) + n > size:
        with pytest.raises(ValueError, match=r"q \+ n/N must be at most 1"):
            mine(model, pool, n, q)
        return
    kept = mine(model, pool, n, q)
    assert len(kept) == n == len(set(kept.tolist()))
    m = margins(model, pool)
    order = sorted(range(size), key=lambda i: (-float(m[i]), i))  # ties keep the pool's order
    assert kept.tolist() == order[int(q * size) : int(q * size) + n]
    above, below = m[order[: int(q * size)]], m[order[int(q * size) + n :]]
    assert not len(above) or above.min() >= m[kept].max()
    assert not len(below) or below.max() <= m[kept].min()
    assert torch.equal(kept, mine(model, pool, n, q))


def test_mining_leaves_the_model_as_it_was(book):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 11))
    model.classes, model.reject = 10, 1
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    mine(model, book.outliers[:100], 10, 0.1)
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_contamination_is_twice_the_share_above_the_median():
    inside = torch.linspace(0, 1, 1001)
    pool = torch.cat([torch.full((800,), -1.0), torch.linspace(0, 1, 200)])
    assert contamination(inside, pool) == pytest.approx(0.2)
    assert contamination(inside, torch.full((10,), 2.0)) == 1
    assert contamination(inside, torch.full((10,), -2.0)) == 0


def test_the_rule_as_a_part_of_a_run(book):
    model = small_cnn(reject=1)
    generator = torch.Generator().manual_seed(0)
    mined = Mining(q=0.125)(model, book, generator)
    n = len(book.outliers) // 4
    chosen = mine(model, book.outliers, n, 0.125)
    assert torch.equal(mined.outliers, book.outliers[chosen])
    m = margins(model, book.outliers)
    assert mined.notes["pool"] == len(book.outliers) and mined.notes["mined"] == n
    assert mined.notes["q"] == 0.125
    assert mined.notes["mined hardest"] == pytest.approx(float(m[chosen].max()))
    assert mined.notes["mined easiest"] == pytest.approx(float(m[chosen].min()))
    assert mined.notes["pool margin"] == pytest.approx(float(m.mean()), abs=1e-5)
    some = Mining(q=0.0, share=0.5, sample=200)(model, book, generator)
    assert len(some.outliers) == 100 and some.notes["pool"] == 200
    again = Mining(q=0.0, share=0.5, sample=200)(model, book, generator)
    assert not torch.equal(some.outliers, again.outliers)  # another part of the pool each epoch


def test_automatic_q_leaves_out_what_is_in_distribution(book):
    """A trained K+1 network, a pool with a known share of digits: the mined set holds hardly any."""
    model = small_cnn(reject=1)
    fit(model, NTOM(q=0.0), book, epochs=12, batch_size=64)
    hidden = digits().train.x[400:700]
    pool = torch.cat([glyphs("auxiliary", 900, 7), hidden])  # a quarter are digits
    data = Data(book.train, book.val, book.test, pool)
    auto = Mining(q="auto")(model, data, torch.Generator())
    assert 0.2 < auto.notes["q"] < 0.3
    share = {
        q: np.mean(
            [
                any(torch.equal(u, h) for h in hidden)
                for u in rule(model, data, torch.Generator()).outliers
            ]
        )
        for q, rule in (("auto", Mining(q="auto")), ("0", Mining(q=0.0)))
    }
    assert share["0"] > 0.9 and share["auto"] < 0.35


def test_a_run_mines_before_each_epoch_and_logs_it(book, monkeypatch):
    seen = []
    original = Mining.__call__

    def spy(self, model, data, generator):
        seen.append(margins(model, data.outliers[:5]).tolist())
        return original(self, model, data, generator)

    monkeypatch.setattr(Mining, "__call__", spy)
    model = small_cnn(reject=1)
    history = fit(model, NTOM(), book, epochs=3, batch_size=64)
    assert len(seen) == 3 and seen[0] != seen[1] != seen[2]
    assert [row["q"] for row in history.rows] == [0.125] * 3
    assert all(row["mined hardest"] >= row["mined easiest"] for row in history.rows)


def test_a_run_stopped_inside_an_epoch_mines_by_the_same_weights_again(book, tmp_path):
    """The mined set belongs to the weights at the epoch's start, also after a stop in its middle."""

    def run(folder, minutes=np.inf, stop_at=None):
        model = small_cnn(reject=1, seed=3)
        count = [0]

        def clock():
            count[0] += 1
            return 0.0 if stop_at is None or count[0] < stop_at else 1e9

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.time, "monotonic", clock)
            history = fit(
                model, NTOM(), book, epochs=4, batch_size=64, run_dir=folder, minutes=minutes
            )
        return model, history

    whole, _ = run(tmp_path / "whole")
    _, first = run(tmp_path / "parts", minutes=1, stop_at=20)
    assert not first.finished and 0 < len(first.rows) < 4
    resumed, second = run(tmp_path / "parts")
    assert second.finished
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_objectives_without_mining_see_the_data_as_they_are(book):
    assert not hasattr(Standard(), "prepare")
    assert NTOM(q=0.0).mine == Mining(0.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mining(q=1.5), "q must be .* got 1.5"),
        (lambda: Mining(q=0.9), r"q \+ share must be at most 1, got 0.9 \+ 0.25"),
        (lambda: Mining(q="most"), "q must be one of 'auto', got 'most'"),
        (lambda: Mining(share=0.0), "share must be .* got 0.0"),
        (lambda: Mining(sample=0), "sample must be .* at least 1, got 0"),
        (lambda: mine(*line([0.1, 0.2]), 0, 0.0), "n must be .* at least 1, got 0"),
        (lambda: mine(*line([0.1, 0.2]), 1, -0.1), "q must be .* got -0.1"),
    ],
)
def test_bad_settings_are_refused(untyped, make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_data_set_keeps_its_notes_on_another_device(book):
    noted = Data(book.train, book.val, book.test, book.outliers, notes={"q": 0.5})
    assert noted.to("cpu").notes == {"q": 0.5}
    assert isinstance(noted.to("cpu").train, Split)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_network_is_mined_and_trained_as_the_network_itself(book, wrap):
    net = small_cnn(reject=1)
    pool = book.outliers[:60]
    assert torch.equal(margins(wrap(net), pool), margins(net, pool))
    for objective in (NTOM(), ATOM(0.05, steps=1)):
        own, inner = small_cnn(reject=1), small_cnn(reject=1)
        fit(own, objective, book, epochs=1)
        fit(wrap(inner), objective, book, epochs=1)
        for a, b in zip(own.parameters(), inner.parameters(), strict=True):
            assert torch.equal(a, b)


def test_rejection_is_not_taught_to_a_network_that_names_no_reject_output(book):
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 11))
    with pytest.raises(ValueError, match=r"no reject output.*reject=1.*models.adapt"):
        fit(bare, NTOM(), book, epochs=1)


def test_automatic_q_needs_held_out_images(book, untyped):
    none = dataclasses.replace(book, val=book.val[:0])
    with pytest.raises(ValueError, match=r'q="auto".*data.val is empty.*give q as a number'):
        fit(small_cnn(reject=1), NTOM("auto"), none, epochs=1)
    with pytest.raises(ValueError, match="margins_in is empty"):
        contamination(torch.zeros(0), torch.zeros(3))
    with pytest.raises(ValueError, match="margins_pool contains NaN"):
        contamination(torch.zeros(3), torch.full((3,), torch.nan))
