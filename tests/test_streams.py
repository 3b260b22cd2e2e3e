"""The random numbers of a run: named, independent, and where they were after a stop."""

import torch

from robustood.streams import Stream, Streams, stream_seed


def test_every_use_in_every_epoch_has_a_seed_of_its_own():
    """Also in runs of 100,000 epochs; the seeds are part of every kept result."""
    assert stream_seed(3, 5, Stream.BATCHES) == 3_000_014
    assert stream_seed(3, 5, Stream.CHOICE) == 3_250_014
    assert stream_seed(3, 5, Stream.LAYERS) == 3_500_014
    ends = [stream_seed(s, e, use) for s in (0, 1) for use in Stream for e in (0, 99_999)]
    assert ends == sorted(set(ends))


def drawn(streams):
    """A number for the batches, and one for the layers."""
    return torch.rand(1, generator=streams.batches).item(), torch.rand(1).item()


def test_an_epoch_draws_the_same_whatever_was_drawn_before():
    found = []
    for before in (0, 7):
        streams = Streams(1, torch.device("cpu"))
        streams.begin(0)
        for _ in range(before):
            drawn(streams)
        torch.rand(1, generator=streams.of(4, Stream.CHOICE))
        streams.begin(4)
        found.append(drawn(streams))
    assert found[0] == found[1] and found[0][0] != found[0][1]


def test_a_state_goes_on_where_it_was():
    streams = Streams(1, torch.device("cpu"))
    streams.begin(0)
    drawn(streams)
    state = streams.state()
    expected = drawn(streams)
    again = Streams(1, torch.device("cpu"))
    again.begin(0)
    again.restore(state)
    assert drawn(again) == expected


def test_one_of_several_processes_knows_its_place(monkeypatch):
    monkeypatch.setattr("robustood.distributed.rank", lambda: 1)
    monkeypatch.setattr("robustood.distributed.world", lambda: 2)
    assert Streams(0, torch.device("cpu")).begin(0).place == (1, 2)
