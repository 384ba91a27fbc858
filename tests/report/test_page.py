"""The page as text: nothing a run holds may become markup or script, and nothing may be fetched."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest

from fastsft.report import page, tables, write_report


@pytest.fixture
def html(run):
    return write_report(run(tokens=True, planted=True).out).read_text(encoding="utf-8")


def test_only_the_three_own_scripts_are_in_the_page(html):
    opened = re.findall(r"<script[^>]*>", html)
    assert opened == ['<script type="application/json" id="report-data">', "<script>", "<script>"]
    assert html.count("</script") == 3
    assert "&lt;script&gt;window.injected" in html


def test_data_block_holds_the_text_unchanged(html, run):
    block = re.search(r'id="report-data">(.*?)</script>', html, re.DOTALL)
    assert block is not None
    assert not set("<>&") & set(block.group(1))
    samples = json.loads(block.group(1))["samples"]
    assert samples["gsm8k-0"]["response"] == "<script>window.injected = 1; alert(1)</script>"
    assert samples["gsm8k-1"]["response"] == "مرحبا بالعالم"


def test_page_names_no_address_to_fetch(html):
    shell = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#|data:)", shell)
    assert "default-src 'none'" in unescape(shell)
    assert "url(" not in shell


def test_long_text_and_many_samples_are_cut_and_said_so(run, monkeypatch):
    monkeypatch.setattr(tables, "MAX_CHARACTERS", 10)
    monkeypatch.setattr(tables, "MAX_SAMPLES", 3)
    html = write_report(run().out).read_text(encoding="utf-8")
    block = re.search(r'id="report-data">(.*?)</script>', html, re.DOTALL)
    assert block is not None
    data = json.loads(block.group(1))
    for ability, both in data["lists"].items():
        assert len(both["helpful"]) == min(3, both["num_helpful"])
        assert len(both["harmful"]) == min(3, both["num_harmful"])
        phi = [data["samples"][sample]["phi"][ability] for sample in both["helpful"]]
        assert phi == sorted(phi)
        assert max(phi, default=-1) < 0
    assert any("more characters in samples.parquet" in sample["prompt"] for sample in data["samples"].values())
    assert "at most 3 of each sign per ability" in html


def test_token_scores_are_summed_over_draws_of_the_same_length(run):
    record = run(tokens=True, intervals=2)
    columns = {"step": [11], "sample_id": ["chat-5"], "source": ["chat"], "ability": ["maths"], "phi": [0.5]}
    record.write_influence(11, 11, {**columns, "tokens": [[0.1, 0.2, 0.2]]})
    read = page.read_run(record.out)
    flows = page.sample_flows(read)
    row = tables.sample_rows(read, flows, tables.extremes(read, flows))["chat-5"]
    fitting = [
        r["tokens"]
        for r in record.influence().to_pylist()
        if (r["sample_id"], r["ability"]) == ("chat-5", "maths") and len(r["tokens"]) == 2
    ]
    assert row["heat"]["draws"]["maths"] == len(fitting) == row["draws"] - 1
    assert row["heat"]["phi"]["maths"] == pytest.approx([sum(column) for column in zip(*fitting, strict=True)])


def test_sample_without_text_is_kept_and_marked(run):
    record = run(intervals=2)
    (record.out / "samples.parquet").unlink()
    read = page.read_run(record.out)
    flows = page.sample_flows(read)
    rows = tables.sample_rows(read, flows, tables.extremes(read, flows))
    assert rows
    assert all(row["missing"] for row in rows.values())
