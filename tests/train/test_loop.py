"""What `fastsft run` reads, and where it looks for it."""

import pytest
import torch

from fastsft.data import PackedDataset, collate_packed, file_digest, pack
from fastsft.train import load_config
from fastsft.train.loop import Padding, load_model, prepare
from tests.train._run_file import write_run_file
from tests.train._support import SOURCES, make_model, make_rows, weights_of


@pytest.mark.parametrize("place", ["root", "FASTSFT_DATA", "current folder"])
def test_a_model_folder_is_looked_up_like_data(tmp_path, monkeypatch, place):
    write_run_file(tmp_path / "data")
    if place == "FASTSFT_DATA":
        monkeypatch.setenv("FASTSFT_DATA", str(tmp_path / "data"))
    elif place == "current folder":
        monkeypatch.chdir(tmp_path / "data")
    model, tokenizer = load_model("model", tmp_path / "data" if place == "root" else None)
    assert tokenizer.pad_token_id == 0
    saved = weights_of(make_model())
    assert all(torch.equal(weight, saved[name]) for name, weight in weights_of(model).items())


def test_prepare_keeps_rows_and_samples_in_step_and_says_what_it_dropped(tmp_path):
    path = write_run_file(tmp_path, sections={"train": {"max_length": 14}})
    prepared = prepare(load_config(path), load_model("model", tmp_path)[1], tmp_path)
    assert [sample.id for sample in prepared.samples] == [row.id for row in prepared.rows]
    assert all(len(row.input_ids) <= 14 for row in prepared.rows)
    dropped = 12 * len(SOURCES) - len(prepared.rows)
    assert dropped > 0
    assert f"over 14 tokens: {dropped} training samples dropped, 0 cut." in prepared.notes
    for source in SOURCES:
        assert prepared.data[source]["rows"] == 12
        assert prepared.data[source]["sha256"] == file_digest(tmp_path / f"{source}.jsonl")


def test_packed_lines_are_padded_as_packing_itself_does():
    rows = make_rows(10)
    bins = pack(rows, 40, seed=0)
    dataset = PackedDataset(rows, bins)
    batch = Padding(0, 40)([dataset[number] for number in range(len(bins))])
    expected = collate_packed([[rows[at] for at in each] for each in bins], 40, 0)
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
