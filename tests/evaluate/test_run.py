"""`fastsft evaluate` from end to end on a tiny run, what it prints and keeps, and the sentence that sums it up."""

import json
import sys

import pytest
from typer.testing import CliRunner

from fastsft import cli
from fastsft.evaluate import EvaluationError, LdsRow, Value, evaluate
from fastsft.evaluate.table import plain, verdict


def test_it_judges_every_method_and_is_taken_up_again(tiny_run, tmp_path):
    told = []
    options = {"subsets": 4, "seeds": 2, "queries_per_target": 2, "top": 2, "out": tmp_path, "processes": 1}
    found = evaluate(tiny_run, methods=["grad_dot", "in_run"], say=told.append, **options)
    assert {row.method for row in found.rows} == {"grad_dot", "in_run", "bm25", "embedding", "random"}
    assert [row.method for row in found.rows if row.per == "ability"] == ["in_run"]
    assert {row.method for row in found.tail} == {row.method for row in found.rows}
    for row in found.rows:
        assert row.lds.low <= row.lds.mean <= row.lds.high
        assert (row.difference is None) == (row.method == "bm25")
    lines = str(found).splitlines()
    assert "36 samples, 4 queries; 4 subsets of 50% retrained with 2 seeds each" in lines[0]
    assert lines[-1] == verdict(found.rows)
    names = ("grad_dot ", "in_run (by ability) ", "bm25 ", "embedding ", "random ")
    assert sum(line.startswith(names) for line in lines) == 5
    written = json.loads((tmp_path / "evaluate.json").read_text())
    assert written["rows"][0]["lds"]["mean"] == found.rows[0].lds.mean
    assert written["verdict"] == lines[-1]
    assert sum("of 10:" in line for line in told) == 10

    del told[:]
    again = evaluate(tiny_run, methods=["grad_dot", "in_run"], say=told.append, **options)
    assert again.rows == found.rows
    assert again.tail == found.tail
    assert not any(line.startswith("scored by") or "of 10:" in line for line in told)

    (tmp_path / "scores" / "bm25.npz").write_bytes(b"PK of old")
    with pytest.raises(EvaluationError, match=r"bm25.npz can't be read .* Delete it: the method scores again"):
        evaluate(tiny_run, methods=["grad_dot", "in_run"], say=told.append, **options)


def test_what_can_be_mended_is_said_before_anything_runs(tiny_run, tmp_path):
    def refused(words, **given):
        with pytest.raises(EvaluationError, match=words):
            evaluate(tiny_run, out=tmp_path / "new", say=print, **given)
        assert not (tmp_path / "new").exists()

    refused("no method 'ekfca': did you mean 'ekfac'", methods=["ekfca"])
    refused("such as 90s", budget="long")
    refused("go together: got 4 and None", subsets=4)
    result = CliRunner().invoke(cli.app, ["evaluate", str(tiny_run), "--methods", "grad_dto"])
    assert result.exit_code == 2
    assert "fastsft: there is no method 'grad_dto'" in result.stderr


def row(method, mean, low, high, *, difference):
    return LdsRow(method, "query", Value(mean, low, high), difference, 0.5)


def test_the_verdict_asks_that_the_interval_excludes_zero():
    rows = [
        row("bm25", 0.2, 0.1, 0.3, difference=None),
        row("ekfac", 0.6, 0.5, 0.7, difference=Value(0.4, 0.3, 0.5)),
        row("less", 0.3, 0.2, 0.4, difference=Value(0.1, -0.01, 0.2)),
        row("grad_cos", 0.4, 0.3, 0.5, difference=Value(0.2, 0.1, 0.3)),
    ]
    assert verdict(rows).startswith("ekfac and grad_cos beat BM25 in LDS")
    assert verdict(rows[:3]).startswith("ekfac beats BM25")
    assert verdict([rows[0], rows[2]]).startswith("No method beats BM25")


def test_what_is_undefined_is_null_in_json():
    nan = float("nan")
    found = plain([row("bm25", nan, 0.0, 1.0, difference=None)])
    assert found[0]["lds"] == {"mean": None, "low": 0.0, "high": 1.0}
    json.dumps(found, allow_nan=False)


def test_a_plan_that_a_budget_cut_off_is_gone_on_with(tiny_run, linear_retraining, monkeypatch, tmp_path):
    asked, _, _ = linear_retraining
    ends = []
    instead = sys.modules["fastsft.evaluate.measure"].launch

    def launch(work, jobs, out, *, deadline=None, **options):
        ends.append(deadline)
        return instead(work, jobs, out, deadline=0.0 if deadline and len(ends) < 3 else None, **options)

    for module in ("measure", "run"):
        monkeypatch.setattr(sys.modules[f"fastsft.evaluate.{module}"], "launch", launch)
    options = {"methods": [], "queries_per_target": 4, "share": 0.5, "top": 2, "out": tmp_path, "say": print}
    cut = evaluate(tiny_run, budget="1h", **options)
    # at a second a retraining the largest plan fits; the launcher above leaves out its second seed
    assert (cut.about["subsets"], cut.about["seeds"]) == (100, 4)
    assert "300 of 400 retrainings on subsets were done before the budget ended" in cut.notes[0]
    del asked[:]
    whole = evaluate(tiny_run, budget="30m", **options)
    assert len(asked) == 2 + 4 + 400
    assert not any("retrainings" in note for note in whole.notes)
