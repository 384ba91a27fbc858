"""Samples with stable ids, from files to batches, and generated worlds with planted truths.

from fastsft.data import Sample, collate, make_world, pack, read_source, tokenize_all

world = make_world(seed=0, quick=True)
samples = world.sources["shop_stories"]          # or read_source("gsm8k", "maths/gsm8k/train.jsonl.gz")
tokenizer = world.tokenizer()
rows = tokenize_all(samples, tokenizer, max_length=64).rows
batch = collate(rows[:4], tokenizer.pad_token_id)
bins = pack(rows, max_length=256, seed=0)        # indices into rows, one list a packed line
"""

from fastsft.data.batches import PackedDataset, RowDataset, collate, collate_packed, pack
from fastsft.data.prompts import told_labels
from fastsft.data.samples import DataError, Sample, content_id
from fastsft.data.sources import check_unique, file_digest, find_file, read_source
from fastsft.data.tokens import IGNORED, Row, Tokenized, tokenize, tokenize_all
from fastsft.data.worlds import Planted, World, answer_of, make_world, small_model, train_base

__all__ = [
    "IGNORED",
    "DataError",
    "PackedDataset",
    "Planted",
    "Row",
    "RowDataset",
    "Sample",
    "Tokenized",
    "World",
    "answer_of",
    "check_unique",
    "collate",
    "collate_packed",
    "content_id",
    "file_digest",
    "find_file",
    "make_world",
    "pack",
    "read_source",
    "small_model",
    "tokenize",
    "tokenize_all",
    "told_labels",
    "train_base",
]
