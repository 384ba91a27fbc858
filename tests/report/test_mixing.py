from __future__ import annotations

import json
import re

import pytest

from fastsft.record import RecordError
from fastsft.report import mixing, mixing_tables, summarize, summary_lines, write_report
from fastsft.report.run import read_run

HOSTILE = "<img src=x onerror=alert(1)>"


def _in_force(record, step):
    return [event["weights"] for event in record.events("mix") if event["from_step"] <= step][-1]


def test_weights_hold_from_their_step_and_not_from_their_decision(run):
    record = run(mix=True)
    held = dict(mixing.in_force(read_run(record.out)))
    # decided after steps 5, 10, ..., 30, each LATE = 2 steps before it holds; the last one never does
    assert list(held) == [1, 8, 13, 18, 23, 28]
    assert held[8] == _in_force(record, 8) != _in_force(record, 7)


def test_mean_in_force_is_a_mean_over_steps(run):
    record = run(mix=True)
    mean = mixing.mean_in_force(read_run(record.out))
    for source in ("gsm8k", "end"):
        told = [_in_force(record, step)[source] for step in range(1, 31)]
        assert mean[source] == pytest.approx(sum(told) / 30, rel=1e-12)
    assert sum(mean.values()) == pytest.approx(1.0)


def test_summary_follows_the_mix_of_the_events(run):
    record = run(mix=True)
    mix = summarize(record.out)["mix"]
    weights = [event["weights"] for event in record.events("mix")]
    steps = list(record.events("step"))
    # every third decision keeps the mix; the last of the six comes after the last step
    assert (mix["policy"], mix["decisions"], mix["moved"], mix["unused"]) == ("align", 6, 4, 1)
    assert (mix["start"], mix["end"]) == (weights[0], weights[5])
    assert mix["delay"] == {"least": 2, "median": 2, "most": 2}
    # one source gains what the others lose, so each move is what the first one gained
    assert mix["path_length"] == pytest.approx(weights[6]["gsm8k"] - weights[0]["gsm8k"])
    drawn = sum(step["supervised"]["gsm8k"] for step in steps) / sum(sum(s["supervised"].values()) for s in steps)
    assert mix["drawn"]["supervised"]["gsm8k"] == pytest.approx(drawn)
    assert mix["drawn"]["documents"]["gsm8k"] == 0.25


def test_a_version_said_again_after_a_resume_counts_once(run):
    record = run(mix=True, end=False)
    last = list(record.events("mix"))[-1]
    before = summarize(record.out)["mix"]["decisions"]
    record.append_all([last])
    assert summarize(record.out)["mix"]["decisions"] == before


def test_run_without_a_policy_has_no_mix_and_its_old_page(run):
    record = run()
    summary = summarize(record.out)
    assert (summary["mix"], summary["conflict"]) == (None, None)
    page = write_report(record.out).read_text(encoding="utf-8")
    assert "What was drawn, over time" in page
    assert 'id="conflicts"' not in page
    assert not [line for line in summary_lines(summary) if line.startswith(("mix", "conflict"))]


def test_run_that_only_began_with_a_mix_is_reported(run):
    record = run(mix=True, intervals=0, influence=False, end=False)
    summary = summarize(record.out)
    assert (summary["mix"]["decisions"], summary["mix"]["delay"]) == (0, None)
    assert "It kept to the mix that it began with" in write_report(record.out).read_text(encoding="utf-8")
    line = "mix (align): ends as it began, gsm8k 0.25, wikisql 0.25, chat 0.25, end 0.25; nothing was decided"
    assert line in summary_lines(summary)


def test_mix_without_its_weights_is_refused_with_their_name(run):
    record = run(mix=True, intervals=1)
    events = list(record.events())
    del next(event for event in events if event["event"] == "mix")["weights"]
    record.path.unlink()
    record.append_all(events)
    with pytest.raises(RecordError, match="the mix event of step 0 has no weights"):
        summarize(record.out)


def test_decisions_say_what_moved_first_and_what_was_kept(run):
    rows = mixing_tables.decision_rows(mixing.moves(read_run(run(mix=True).out)))
    first = rows[0]
    assert (first["step"], first["from_step"], first["draw"]) == (5, 8, 112)
    assert [entry["source"] for entry in first["changed"]] == ["gsm8k", "wikisql", "chat", "end"]
    assert (first["changed"][0]["before"], first["changed"][0]["after"]) == ("0.250", "0.475")
    assert first["changed"][0]["signal"] == "+0.0500 ± 0.0100"
    assert first["changed"][-1]["signal"] == "−0.0100"
    assert rows[2]["changed"] == []
    assert [entry["source"] for entry in rows[2]["kept"]] == ["gsm8k", "wikisql", "chat", "end"]


def test_of_many_decisions_the_largest_stand_first_and_all_are_folded(make_run, tmp_path):
    record = make_run(tmp_path / "run", mix=True, intervals=12, influence=False)
    rows = mixing_tables.decision_rows(mixing.moves(read_run(record.out)))
    top = mixing_tables.largest(rows)
    assert len(top) == mixing_tables.MAX_DECISIONS
    assert [row["moved"] for row in top] == sorted((row["moved"] for row in rows), reverse=True)[: len(top)]
    page = write_report(record.out).read_text(encoding="utf-8")
    assert "The 6 decisions that moved the mix most" in page
    assert "<summary>All 12 decisions, in order</summary>" in page


def test_names_and_reasons_are_escaped_wherever_they_stand(make_run, tmp_path):
    record = make_run(
        tmp_path / "run", mix=True, sources=("gsm8k", HOSTILE), abilities=("maths", "<b>code</b>"), samples=2
    )
    html = write_report(record.out).read_text(encoding="utf-8")
    shell = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert "&lt;img src=x onerror" in shell
    assert "lowers its ability&#39;s loss most per token &lt;script&gt;" in shell
    assert not re.search(r"<img|<b>code|<script>window", shell)


def test_line_says_where_the_mix_went(run):
    line = next(line for line in summary_lines(summarize(run(mix=True).out)) if line.startswith("mix"))
    assert re.fullmatch(
        r"mix \(align\): gsm8k 0\.25 -> 0\.\d\d, wikisql 0\.25 -> 0\.\d\d, .*; 4 of 6 decisions moved it", line
    )


def test_report_json_names_and_explains_every_new_number(run):
    record = run(mix=True)
    write_report(record.out)
    summary = json.loads((record.out / "report.json").read_text(encoding="utf-8"))
    assert summary == summarize(record.out)
    told = {"cosines", "interference", "slopes", "resolver", "factors"}
    assert told <= set(summary["conflict"])
    assert told | {"mix"} <= set(summary["meanings"])
