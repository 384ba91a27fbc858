"""Budgets: times in words, and how many retrainings they allow."""

import time

import pytest

from fastsft.evaluate import EvaluationError, seconds_of
from fastsft.evaluate.budget import Clock


def clock(seconds, *, full=10.0, overhead=0.0, processes=2, share=0.5, removals=0):
    return Clock(time.time() + seconds, seconds, full, overhead, processes, share, removals)


def test_times_are_read():
    assert [seconds_of(each) for each in ("90s", "30m", "2h", "1.5 h", 45, "45")] == [90, 1800, 7200, 5400, 45, 45]
    for wrong in ("soon", "-3m", "0m", "3d"):
        with pytest.raises(EvaluationError, match="such as 90s, 30m or 2h"):
            seconds_of(wrong)


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        (61, (12, 2)),  # 12 x 2 subsets of half: 12 full ones, 6 rounds of 2
        (200, (40, 2)),
        (246, (32, 3)),  # 48 runs and one more full one
        (496, (48, 4)),
        (10**5, (100, 4)),
    ],
)
def test_time_goes_to_subsets_first_then_to_seeds(seconds, sizes):
    assert clock(seconds + 0.5).sizes() == sizes


def test_what_else_takes_time_is_left_aside():
    assert clock(200.5, overhead=50).sizes() == (30, 2)
    # 10 removals of 10 s on 2 processes
    assert clock(200.5, removals=10).sizes() == (30, 2)
    assert clock(200.5, processes=1).sizes() == (20, 2)


def test_too_little_is_refused_with_what_it_takes():
    with pytest.raises(EvaluationError, match=r"12 subsets with 2 seeds .* 1\.0 min .* Give 2m or more"):
        clock(40, overhead=30).sizes()
