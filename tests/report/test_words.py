from __future__ import annotations

import pytest

from fastsft.report.words import change_sentence, duration, percent, places, short, signed, verdict


def _entry(**changes):
    entry = {"intervals": 3, "measured": -1.0, "gross": 2.0, "residual_share": 0.02, "misbooked": 0.0}
    return {**entry, "measured_error": 0.1, "loss_start": 3.0, "loss_end": 2.0, **changes}


@pytest.mark.parametrize(
    ("changes", "rounding", "grade"),
    [
        ({}, (1e-6, None), "good"),
        ({"residual_share": 0.1}, (), "fair"),
        ({"residual_share": 0.5}, (), "poor"),
        ({"misbooked": 0.1}, (), "poor"),
        ({}, (1e-6, 0.3), "poor"),
        ({"residual_share": None, "gross": 0.0}, (), "none"),
        ({"intervals": 0}, (), "none"),
    ],
)
def test_verdict_is_as_good_as_its_worst_check(changes, rounding, grade):
    assert verdict(_entry(**changes), *rounding)[0] == grade


@pytest.mark.parametrize(
    ("measured", "said"), [(-1.0, "maths improved"), (1.0, "maths got worse"), (-0.15, "maths hardly changed")]
)
def test_change_is_called_a_change_only_beyond_its_error(measured, said):
    assert change_sentence("maths", _entry(measured=measured)).startswith(said)


def test_numbers_are_written_with_the_digits_they_need():
    assert [signed(value, 2) for value in (-0.5, 0.254, -0.001, None)] == ["−0.50", "+0.25", "0", "–"]
    assert [places(values) for values in ([12.0, -0.3], [0.012], [], [None, 0.0])] == [2, 4, 2, 2]
    assert [percent(share) for share in (0.0, 0.0001, 0.034, 0.0999, 0.5)] == [
        "0.0 %",
        "< 0.1 %",
        "3.4 %",
        "10 %",
        "50 %",
    ]
    assert [short(value) for value in (2e-6, 0.25)] == ["2 × 10⁻⁶", "0.25"]
    assert [duration(seconds) for seconds in (5.04, 75, 7260)] == ["5.0 s", "1 min 15 s", "2 h 1 min"]
