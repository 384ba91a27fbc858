"""The stream of draws: a function of seed, draw and mixes in force, as near its mix as whole items allow."""

import itertools
import pickle

import numpy as np
import pytest

from fastsft.tasks import Mix, MixError
from fastsft.train.sampler import Draws, MixStream

SOURCES = ("apples", "bricks", "clouds")


def make_stream(mix=None, *, sizes=(40, 25, 60), batch=8, steps=12, tokens=None, **draws):
    bounds = np.cumsum([0, *sizes])
    items = {name: range(bounds[k], bounds[k + 1]) for k, name in enumerate(SOURCES[: len(sizes)])}
    tokens = np.ones(bounds[-1], dtype=int) if tokens is None else tokens
    return MixStream(items, tokens, mix or Mix.uniform(list(items)), batch=batch, steps=steps, draws=Draws(**draws))


def sources_of(stream, items):
    """The number of the source of each item."""
    starts = [own[0] for own in (sorted(each.tolist()) for each in stream._items)]
    return np.searchsorted(starts, items, side="right") - 1


@pytest.mark.parametrize("unit", ["rows", "tokens"])
@pytest.mark.parametrize("K", [2, 3, 5, 8])
def test_every_source_is_within_one_item_of_its_share_after_any_draw(unit, K):
    generator = np.random.default_rng(K)
    for _ in range(8):
        sizes = generator.integers(3, 90, K)
        tokens = generator.integers(1, 40, sizes.sum())
        bounds = np.cumsum([0, *sizes])
        items = {f"s{k}": range(bounds[k], bounds[k + 1]) for k in range(K)}
        shares = generator.dirichlet(np.full(K, 0.7))
        mix = Mix(dict(zip(items, shares / shares.sum(), strict=True)))
        stream = MixStream(items, tokens, mix, batch=8, steps=40, draws=Draws(unit=unit))
        drawn = np.array(list(stream))
        cost = tokens[drawn] if unit == "tokens" else np.ones(len(drawn))
        share = (np.searchsorted(bounds, drawn, side="right")[:, None] - 1 == np.arange(K)) * cost[:, None]
        error = np.abs(share.cumsum(0) - shares * cost.cumsum()[:, None]).max()
        assert error < (tokens.max() if unit == "tokens" else 1.0) + 1e-6  # credits add up in floating point


def test_an_epoch_of_a_source_holds_each_item_once_in_an_order_of_its_own():
    stream = make_stream(unit="rows", steps=40)
    drawn = np.array(list(stream))
    for source, size in enumerate((40, 25, 60)):
        own = drawn[sources_of(stream, drawn) == source]
        epochs = [own[at : at + size].tolist() for at in range(0, len(own) - size + 1, size)]
        assert epochs
        for epoch in epochs:
            assert sorted(epoch) == sorted(stream._items[source].tolist())
        assert all(one != other for one, other in itertools.pairwise(epochs))
        assert epochs[0] != sorted(epochs[0])


def test_the_same_seed_gives_the_same_stream_and_another_seed_another():
    one, again, other = (list(make_stream(seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_the_order_is_pinned():
    """Philox words and a stable sort: the same on every machine and numpy."""
    assert list(make_stream(unit="rows", steps=1, seed=7)) == PINNED


PINNED = [1, 46, 93, 4, 61, 80, 25, 41]


def test_a_mix_holds_from_the_next_step_of_which_nothing_was_handed_out():
    stream = make_stream(unit="rows")
    draws = iter(stream)
    first = [next(draws) for _ in range(9)]  # one draw into the second step
    entry = stream.set_mix(Mix({"apples": 1.0, "bricks": 0.0, "clouds": 0.0}))
    assert entry.draw == 16
    rest = list(draws)
    assert [stream.in_force(n).version for n in (0, 15, 16)] == [0, 0, 1]
    assert set(sources_of(stream, rest[7:])) == {0}
    assert len(set(sources_of(stream, first + rest[:7]))) == 3


def test_a_mix_that_was_never_drawn_by_leaves_the_log():
    stream = make_stream()
    stream.item(0)
    for share in (0.2, 0.3):
        stream.set_mix(Mix({"apples": share, "bricks": 0.1, "clouds": 0.9 - share}))
    assert [(entry.version, entry.draw) for entry in stream.log] == [(0, 0), (2, 8)]


@pytest.mark.parametrize("stop", range(0, 96, 5))
def test_a_stream_told_again_from_its_log_is_the_stream(stop):
    mixes = [Mix({"apples": a, "bricks": b, "clouds": 1 - a - b}) for a, b in ((0.5, 0.25), (0.0, 0.9), (0.1, 0.1))]
    whole = make_stream()
    drawn = []
    for draw in whole:
        drawn.append(draw)
        if len(drawn) in (20, 47, 80):
            whole.set_mix(mixes.pop(0))
        if len(drawn) == stop:
            state = pickle.loads(pickle.dumps(whole.state_dict()))
    if stop == 0:
        return
    told = make_stream()
    told.load_state_dict(state)
    known = [entry for entry in whole.log if entry.draw <= stop]
    assert list(itertools.islice(iter(told), stop)) == drawn[:stop]
    assert told.log[: len(known)] == known


def test_another_batch_or_other_data_is_refused():
    state = make_stream().state_dict()
    for other, word in ((make_stream(batch=4), "batch"), (make_stream(sizes=(40, 24, 60)), "data")):
        with pytest.raises(MixError, match=word):
            other.load_state_dict(state)


def test_a_source_is_gone_through_so_often_and_its_share_goes_to_the_others():
    stream = make_stream(unit="rows", steps=14, max_epochs=1)  # 112 draws of 125 items; a third is more than 25
    drawn = list(stream)
    counts = np.bincount(sources_of(stream, drawn), minlength=3)
    assert counts.tolist() == [40, 25, 47]
    assert len(set(drawn)) == len(drawn)
    assert stream.end is None


def test_a_stream_stops_when_a_source_is_used_up_if_told_to():
    stream = make_stream(unit="rows", steps=14, max_epochs=1, exhausted="stop")
    drawn = list(stream)
    assert len(drawn) % 8 == 0
    assert len(drawn) == stream.end == 72  # the 25 bricks last for 75 draws of thirds
    assert "bricks" in stream.why_ended
    assert stream.ends_at(72)
    assert not make_stream(unit="rows", steps=14).ends_at(72)


def test_a_stream_ends_when_all_sources_are_used_up():
    stream = make_stream(unit="rows", steps=30, max_epochs=1)
    assert len(list(stream)) == stream.end == 120  # 125 items are fifteen whole steps
    assert all(name in stream.why_ended for name in SOURCES)


def test_a_source_without_weight_is_never_drawn_and_does_not_stop_the_stream():
    mix = Mix({"apples": 0.5, "bricks": 0.0, "clouds": 0.5})
    stream = make_stream(mix, unit="rows", max_epochs=2, exhausted="stop", steps=10)
    assert set(sources_of(stream, list(stream))) == {0, 2}
    assert stream.end is None


def test_the_limit_in_tokens_is_reached_and_not_passed_by_a_step():
    tokens = np.arange(125) % 7 + 1
    stream = make_stream(tokens=tokens, max_tokens=150, steps=30)
    drawn = list(stream)
    total = tokens[drawn].sum()
    assert total >= 150 > total - tokens[drawn[-8:]].sum()
    assert sum(spent[1] for spent in stream.spent(len(drawn) // 8).values()) == total


def test_spent_counts_rows_and_tokens_of_the_steps_taken():
    tokens = np.arange(125) % 7 + 1
    stream = make_stream(tokens=tokens)
    drawn = list(stream)
    for step in (0, 1, 5, 12):
        own = sources_of(stream, drawn[: 8 * step])
        for source, name in enumerate(SOURCES):
            mine = np.array(drawn[: 8 * step], dtype=int)[own == source]
            assert stream.spent(step)[name] == (len(mine), tokens[mine].sum())


def test_rows_without_a_supervised_token_are_drawn_too():
    stream = make_stream(tokens=np.zeros(125, dtype=int))
    assert np.bincount(sources_of(stream, list(stream))).tolist() == [32, 32, 32]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"apples": 0.5, "bricks": 0.4}, "sum to one"),
        ({"apples": 1.5, "bricks": -0.5}, "negative"),
        ({"apples": 0.5, "pears": 0.5}, "pears"),
        ({"apples": 0.5, "bricks": 0.5}, "leaves out 'clouds'"),
        ({"apples": float("nan"), "bricks": 0.5}, "number"),
        ({}, "at least one"),
    ],
)
def test_a_mix_that_is_none_is_refused(weights, words):
    with pytest.raises(MixError, match=words):
        make_stream(Mix(weights))


def test_settings_that_say_nothing_are_refused():
    for settings, words in (
        ({"unit": "bytes"}, "tokens, rows"),
        ({"exhausted": "explode"}, "redistribute, stop"),
        ({"max_epochs": 0}, "positive"),
        ({"max_tokens": -1}, "positive"),
    ):
        with pytest.raises(MixError, match=words):
            Draws(**settings)
    with pytest.raises(MixError, match="'bricks' has no rows"):
        make_stream(sizes=(3, 0, 4))


def test_a_mix_by_size_goes_from_proportional_to_uniform():
    sizes = {"apples": 100, "bricks": 25}
    assert Mix.proportional(sizes).weights == pytest.approx({"apples": 0.8, "bricks": 0.2})
    assert Mix.proportional(sizes, temperature=2).weights == pytest.approx({"apples": 2 / 3, "bricks": 1 / 3})
    assert Mix.proportional(sizes, temperature=1e9).weights == pytest.approx({"apples": 0.5, "bricks": 0.5})
