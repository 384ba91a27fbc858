"""A run directory survives a kill, and says which of its files is bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastsft.record import SCHEMA, Record, RecordError


def _started(out: Path) -> Record:
    record = Record.create(out)
    record.append("start", 0, schema=SCHEMA, abilities=["maths"], sources=["red"])
    return record


def _part(record: Record, first: int, last: int) -> Path:
    rows = {"step": [first, last], "sample_id": ["a", "b"], "source": ["red"] * 2, "ability": ["maths"] * 2}
    return record.write_influence(first, last, {**rows, "phi": [0.5, -0.25]})


def test_events_come_back_in_order_and_undefined_numbers_as_null(tmp_path: Path) -> None:
    record = _started(tmp_path)
    record.append("step", 1, loss=float("nan"), lr=1e-3)
    record.append_all([{"event": "step", "step": 2, "loss": 0.5}])
    assert [event["step"] for event in record.events()] == [0, 1, 2]
    assert next(record.events("step"))["loss"] is None
    assert Record.open(tmp_path).start["sources"] == ["red"]


def test_a_line_cut_off_by_a_kill_is_left_out_and_a_bad_one_before_it_is_an_error(tmp_path: Path) -> None:
    record = _started(tmp_path)
    with record.path.open("a") as file:
        file.write('{"event": "step", "st')
    assert [event["event"] for event in record.events()] == ["start"]
    with record.path.open("a") as file:
        file.write('\n{"event": "step", "step": 2}\n')
    with pytest.raises(RecordError, match=r"record.jsonl line 2 is not JSON"):
        list(record.events())


def test_a_cut_line_is_gone_after_truncating_and_appending(tmp_path: Path) -> None:
    record = _started(tmp_path)
    record.append("step", 1)
    record.append("step", 2)
    with record.path.open("a") as file:
        file.write('{"event": "step", "st')
    record.truncate(1)
    record.append("resume", 1)
    assert [(event["event"], event["step"]) for event in record.events()] == [("start", 0), ("step", 1), ("resume", 1)]


def test_truncate_forgets_influence_after_the_step(tmp_path: Path) -> None:
    record = _started(tmp_path)
    _part(record, 1, 4)
    late = _part(record, 5, 9)
    record.truncate(4)
    assert not late.exists()
    assert record.influence().column("phi").to_pylist() == [0.5, -0.25]


def test_a_run_directory_is_not_written_twice_and_another_schema_is_refused(tmp_path: Path) -> None:
    record = _started(tmp_path)
    with pytest.raises(RecordError, match="already holds a run"):
        Record.create(tmp_path)
    text = record.path.read_text().replace(f'"schema": {SCHEMA}', '"schema": 99')
    record.path.write_text(text)
    with pytest.raises(RecordError, match=f"has schema 99, this fastsft reads schema {SCHEMA}"):
        Record.open(tmp_path)
    with pytest.raises(RecordError, match="not a run directory"):
        Record.open(tmp_path / "elsewhere")


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    record = _started(tmp_path)
    path = _part(record, 1, 2)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RecordError, match=path.name):
        record.influence()


def test_a_record_without_its_start_is_said_to_be_one(tmp_path: Path) -> None:
    record = Record.create(tmp_path)
    record.path.write_text(json.dumps({"event": "step", "step": 1}) + "\n")
    with pytest.raises(RecordError, match="has no start event"):
        Record.open(tmp_path)
