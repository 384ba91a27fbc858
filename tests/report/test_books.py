from __future__ import annotations

import math

import numpy as np
import pytest

from fastsft.record import RecordError
from fastsft.report import summarize
from fastsft.report.books import open_book, shares
from fastsft.report.run import read_run


def test_entries_and_residual_add_up_to_the_measured_change(run):
    record = run()
    ledger = summarize(record.out)["ledger"]
    for ability, entry in ledger.items():
        told = sum(event["abilities"][ability]["measured"] for event in record.events("interval"))
        total = sum(entry["by_source"].values()) + entry["decay"] + entry["unfollowed"] + entry["residual"]
        assert entry["measured"] == pytest.approx(told, abs=1e-12)
        assert total == pytest.approx(told, abs=1e-9)
        assert entry["loss_end"] - entry["loss_start"] == pytest.approx(told, abs=1e-9)


def test_carried_momentum_is_booked_as_unfollowed(run):
    # 6 intervals of 2e-4 unfollowed and 1e-5 carried
    assert summarize(run().out)["ledger"]["maths"]["unfollowed"] == pytest.approx(6 * 2.1e-4, rel=1e-9)


def test_shares_equal_sums_over_the_events(run):
    record = run()
    entry = summarize(record.out)["ledger"]["code"]
    events = [event["abilities"]["code"] for event in record.events("interval")]
    sources = events[0]["by_source"]
    gross = sum(abs(sum(event["by_source"][source] for event in events)) for source in sources)
    residual = sum(event["residual"] for event in events)
    start = sum(
        event["measured"] - event["decay"] - event["unfollowed"] - event["carried"] - sum(event["start_only"].values())
        for event in events
    )
    assert entry["residual_share"] == pytest.approx(abs(residual) / gross, rel=1e-9)
    assert entry["start_only_share"] == pytest.approx(abs(start) / gross, rel=1e-9)
    assert entry["samples_share"] == pytest.approx(0.1, rel=1e-9)
    assert entry["misbooked"] < 1e-12


def test_shares_over_time_end_at_the_share_of_the_run(run):
    record = run()
    own, start_only = shares(open_book(read_run(record.out), "maths"))
    entry = summarize(record.out)["ledger"]["maths"]
    assert own.shape == (6,)
    assert own[-1] == entry["residual_share"]
    assert start_only is not None
    assert start_only[-1] == entry["start_only_share"]


def test_correlation_equals_pearson_and_needs_three_intervals(run, make_run, tmp_path):
    record = run()
    events = [event["abilities"]["maths"] for event in record.events("interval")]
    predicted = [event["measured"] - event["residual"] for event in events]
    expected = np.corrcoef(predicted, [event["measured"] for event in events])[0, 1]
    assert summarize(record.out)["correlation"]["maths"] == pytest.approx(expected, rel=1e-9)
    few = make_run(tmp_path / "few", intervals=2)
    assert summarize(few.out)["correlation"]["maths"] is None


def test_measured_error_is_the_smaller_bound(run, make_run, tmp_path):
    # six intervals: 6 * 0.004 = 0.024 < sqrt(2) * 0.05; thirty: 0.12 > sqrt(2) * 0.05
    assert summarize(run().out)["ledger"]["maths"]["measured_error"] == pytest.approx(0.024)
    many = make_run(tmp_path / "many", intervals=30, influence=False)
    assert summarize(many.out)["ledger"]["maths"]["measured_error"] == pytest.approx(0.05 * math.sqrt(2))


def test_interval_with_an_undefined_loss_is_left_out_and_counted(run):
    record = run(intervals=3)
    events = list(record.events())
    lost = [event for event in events if event["event"] == "interval"][1]
    booked = lost["abilities"]["maths"]["measured"]
    before = summarize(record.out)["ledger"]["maths"]["measured"]
    lost["abilities"]["maths"]["measured"] = None
    record.path.unlink()
    record.append_all(events)
    entry = summarize(record.out)["ledger"]["maths"]
    assert (entry["intervals"], entry["intervals_left_out"]) == (2, 1)
    assert entry["measured"] == pytest.approx(before - booked, abs=1e-12)


def test_residual_that_the_entries_do_not_leave_is_reported(run):
    record = run(intervals=3)
    events = list(record.events())
    next(event for event in events if event["event"] == "interval")["abilities"]["maths"]["residual"] += 0.5
    record.path.unlink()
    record.append_all(events)
    assert summarize(record.out)["ledger"]["maths"]["misbooked"] == pytest.approx(0.5)


def test_interval_without_a_needed_key_is_refused_with_its_name(run):
    record = run(intervals=2)
    events = list(record.events())
    del next(event for event in events if event["event"] == "interval")["abilities"]["code"]["decay"]
    record.path.unlink()
    record.append_all(events)
    with pytest.raises(RecordError, match=r"ends at step 5 has no decay for ability 'code'"):
        summarize(record.out)
