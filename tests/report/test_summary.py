from __future__ import annotations

import json

import numpy as np
import pytest

from fastsft.record import RecordError
from fastsft.report import summarize, summary_lines, write_pictures, write_report


def test_source_interval_follows_from_the_spread_of_its_draws(run):
    record = run()
    entry = summarize(record.out)["ledger"]["maths"]
    rows = record.influence().to_pylist()
    phi = np.array([row["phi"] for row in rows if row["source"] == "chat" and row["ability"] == "maths"])
    half = 1.96 * np.sqrt(len(phi)) * phi.std(ddof=1)
    value = entry["by_source"]["chat"]
    assert entry["by_source_interval"]["chat"] == pytest.approx([value - half, value + half], rel=1e-6)


def test_entries_per_thousand_tokens(run):
    entry = summarize(run().out)["ledger"]["maths"]
    # 30 steps of 200 tokens from each source
    assert entry["per_1k_tokens"]["chat"] == pytest.approx(entry["by_source"]["chat"] / 6, rel=1e-12)


def test_tokens_after_the_last_interval_are_not_counted(run):
    record = run(end=False)
    before = summarize(record.out)["ledger"]["maths"]["per_1k_tokens"]
    record.append(
        "step", 31, loss=1.0, lr=1e-3, scale=1.0, identity_error=None, documents={"chat": 4}, tokens={"chat": 9999}
    )
    summary = summarize(record.out)
    assert summary["ledger"]["maths"]["per_1k_tokens"] == before
    assert summary["drawn"]["tokens"]["chat"] == 30 * 200 + 9999


def test_report_json_holds_the_summary(run):
    record = run(planted=True)
    write_report(record.out)
    assert json.loads((record.out / "report.json").read_text(encoding="utf-8")) == summarize(record.out)


def test_times_and_identity_error(run):
    summary = summarize(run().out)
    assert summary["step_ratio"] == pytest.approx(20 / 16)
    assert summary["identity_error"] == pytest.approx(2e-6)
    assert summary["displacement_error"] == 1e-7
    assert (summary["finished"], summary["steps"], summary["seconds"]) == (True, 30, 30.0)


def test_unfinished_run_is_reported_as_of_its_last_step(run):
    record = run(end=False)
    summary = summarize(record.out)
    assert (summary["finished"], summary["steps"], summary["seconds"], summary["step_ratio"]) == (False, 30, None, None)
    assert "stopped or still running at step 30" in summary_lines(summary)[0]
    assert "Unfinished" in write_report(record.out).read_text(encoding="utf-8")


def test_run_without_influence_has_books_but_no_samples(run):
    record = run(influence=False)
    summary = summarize(record.out)
    assert summary["ledger"]["maths"]["by_source_interval"]["chat"] is None
    assert summary["ledger"]["maths"]["samples_share"] is None
    assert summary["samples"]["scored"] == 0
    assert "The influence of single samples was not recorded" in write_report(record.out).read_text(encoding="utf-8")


def test_one_source_and_one_ability(run):
    record = run(abilities=("maths",), sources=("gsm8k",))
    page = write_report(record.out).read_text(encoding="utf-8")
    assert list(summarize(record.out)["ledger"]) == ["maths"]
    assert 'id="chart-ledger-0"' in page
    assert 'id="chart-ledger-1"' not in page


def test_run_that_has_only_started(run):
    record = run(intervals=0, influence=False, end=False)
    page = write_report(record.out).read_text(encoding="utf-8")
    assert "No interval has been booked" in page
    assert summary_lines(summarize(record.out))[1].endswith("no interval booked yet")


def test_lines_say_what_changed_and_how_far_to_trust_it(run):
    summary = summarize(run(planted=True).out)
    lines = summary_lines(summary)
    assert len(lines) == 9
    assert all("\n" not in line for line in lines)
    best = min(summary["ledger"]["maths"]["by_source"].items(), key=lambda item: item[1])[0]
    assert lines[1].startswith("maths")
    assert f"most helped by {best}" in lines[1]
    assert "unexplained" in lines[4]
    assert "AUC" in lines[6]
    assert "1.25 times" in lines[8]


def test_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(RecordError, match="is not a run directory"):
        write_report(tmp_path)


def test_other_schema_is_refused(run):
    record = run(intervals=1)
    record.path.write_text(
        record.path.read_text(encoding="utf-8").replace('"schema": 1', '"schema": 99', 1), encoding="utf-8"
    )
    with pytest.raises(RecordError, match="has schema 99"):
        write_report(record.out)


def test_influence_that_is_not_a_number_is_refused(run):
    record = run(intervals=1)
    columns = {"step": [1], "sample_id": ["x"], "source": ["chat"], "ability": ["maths"], "phi": [float("nan")]}
    record.write_influence(6, 6, columns)
    with pytest.raises(RecordError, match="1 rows whose phi is not a number"):
        summarize(record.out)


def test_pictures_are_drawings_of_every_chart(run, tmp_path):
    paths = write_pictures(run(abilities=("maths", "a/b"), intervals=3, mix=True).out, tmp_path / "pictures")
    names = {path.name for path in paths}
    assert {"ledger-1-maths.svg", "ledger-2-a-b.png", "sources.svg", "target-losses.png", "mix.svg"} <= names
    assert {"mix-weights.svg", "mix-supervised.svg", "mix-signal.png", "cosines.svg", "factors.png"} <= names
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"<svg" if path.suffix == ".svg" else b"\x89PNG")
    assert not list((tmp_path / "pictures").glob("*.tmp"))


def test_change_within_its_error_is_called_unclear(run):
    summary = summarize(run().out)
    summary["ledger"]["maths"].update(measured=-0.01, measured_error=0.02)
    summary["ledger"]["code"].update(measured=-0.01, measured_error=0.001)
    lines = summary_lines(summary)
    assert "no clear change" in lines[1]
    assert "better" in lines[2]
