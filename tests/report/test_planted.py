from __future__ import annotations

import json

import numpy as np
import pytest

from fastsft.record import RecordError
from fastsft.report import summarize
from fastsft.report.planted import auc


def test_auc_equals_counting_pairs_with_ties_as_one_half():
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 4, 40).astype(np.float64)
    positive = generator.random(40) < 0.3
    wins = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(wins), rel=1e-12)


def test_auc_of_equal_scores_is_one_half_and_of_one_kind_undefined():
    assert auc(np.zeros(5), np.array([True, False, False, True, False])) == 0.5
    assert auc(np.arange(3.0), np.array([True, True, True])) is None
    assert auc(np.zeros(0), np.zeros(0, dtype=bool)) is None


def _plant(record, **truth):
    (record.out / "planted.json").write_text(json.dumps(truth), encoding="utf-8")
    return summarize(record.out)["planted"]


def _scores(record, ability=None):
    """Sum phi by sample of gsm8k, row by row."""
    totals: dict[str, float] = {}
    for row in record.influence().to_pylist():
        if row["source"] == "gsm8k" and ability in (None, row["ability"]):
            totals[row["sample_id"]] = totals.get(row["sample_id"], 0.0) + row["phi"]
    return totals


def test_harmful_samples_are_ranked_within_their_sources(run):
    record = run()
    totals = _scores(record)
    order = sorted(totals, key=totals.__getitem__)
    worst = _plant(record, harmful=order[-2:])
    assert (worst["harmful_auc"], worst["harmful_scored"]) == (1.0, 2)
    assert worst["random_auc_range"][0] < 0.5 < worst["random_auc_range"][1]
    assert _plant(record, harmful=order[:2])["harmful_auc"] == 0.0
    assert "gsm8k: all abilities summed" in worst["harmful_how"]


def test_harmful_samples_are_scored_for_the_ability_of_their_source(run):
    record = run()
    events = list(record.events())
    events[0]["data"]["gsm8k"]["ability"] = "code"
    record.path.unlink()
    record.append_all(events)
    totals = _scores(record, "code")
    planted = _plant(record, harmful=[max(totals, key=totals.__getitem__)])
    assert planted["harmful_auc"] == 1.0
    assert "gsm8k: code" in planted["harmful_how"]


def test_only_pairs_of_equal_text_count_as_found(run):
    planted = summarize(run(planted=True).out)["planted"]
    assert (planted["duplicates_found"], planted["duplicates_planted"]) == (0.5, 2)


def test_useless_and_helper_are_judged_by_their_entries(run):
    record = run(planted=True)
    summary = summarize(record.out)
    entries = [entry["by_source"] for entry in summary["ledger"].values()]
    gross = sum(abs(value) for entry in entries for value in entry.values())
    assert summary["planted"]["useless_source_share"] == pytest.approx(sum(abs(e["end"]) for e in entries) / gross)
    assert summary["planted"]["useless_source_draws_share"] == 0.25
    helped = all(summary["ledger"][ability]["by_source"]["gsm8k"] < 0 for ability in ("maths", "code"))
    assert summary["planted"]["helper_ok"] is helped


def test_truths_that_cannot_be_judged_are_null(run):
    planted = _plant(run(influence=False), harmful=["gsm8k-1"], helper_source="nobody", helps=["maths"])
    judged = ("harmful_auc", "random_auc", "duplicates_found", "useless_source_share", "helper_ok")
    assert [planted[key] for key in judged] == [None] * 5


def test_malformed_truths_are_refused(run):
    record = run()
    with pytest.raises(RecordError, match="`harmful` must be a list"):
        _plant(record, harmful="gsm8k-1")
    (record.out / "planted.json").write_text("{", encoding="utf-8")
    with pytest.raises(RecordError, match=r"planted\.json is not JSON"):
        summarize(record.out)
