"""The same samples in the same optimizer steps have the same influence, however the batch is laid out."""

import pytest
import torch
from torch.utils.data import Dataset, SequentialSampler

from fastsft.data import PackedDataset, RowDataset
from fastsft.record import Record, read_table
from fastsft.train.samples import table_of_dataset
from tests.train._support import (
    assert_adds_up,
    assert_close,
    attach,
    influence_of,
    ledger_of,
    make_lora,
    make_model,
    make_rows,
    make_trainer,
)

STEPS, PER_STEP = 4, 16
# the models are float64, so sums in another order differ by 1e-13; phi is stored as float32
SHARE = 1e-6


class Lines(Dataset):
    """Packed lines of four documents each, in the order of the rows."""

    def __new__(cls, rows):
        return PackedDataset(rows, [list(range(first, first + 4)) for first in range(0, len(rows), 4)])


def books(out, *, batch, accumulation, method="lora", packed=False, **settings):
    """Train on rows in their order -> {influence}, {ledger} of the run."""
    rows = make_rows(STEPS * PER_STEP)
    model = (make_lora() if method == "lora" else make_model()).double()
    if settings.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    trainer = make_trainer(
        out / "trainer",
        model,
        Lines(rows) if packed else RowDataset(rows),
        width=64 if packed else None,
        max_steps=STEPS,
        per_device_train_batch_size=batch // 4 if packed else batch,
        gradient_accumulation_steps=accumulation,
        adam_epsilon=1e-4,
        **settings,
    )
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    # a sketch of this size leaves noise; kept gradients (`factor="exact"`) leave none
    run = attach(trainer, out / "run", factor="exact")
    trainer.train()
    assert_adds_up(run.record)
    return influence_of(run.record), ledger_of(run.record)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """16 documents in one micro-batch a step, by method."""
    return {
        method: books(tmp_path_factory.mktemp(method), batch=16, accumulation=1, method=method)
        for method in ("lora", "full")
    }


LAYOUTS = {
    "4x4": {"batch": 4, "accumulation": 4},
    "checkpointing": {"batch": 16, "accumulation": 1, "gradient_checkpointing": True},
    "packed": {"batch": 16, "accumulation": 1, "packed": True},
    "packed 4x4": {"batch": 4, "accumulation": 4, "packed": True},
    "two workers": {"batch": 8, "accumulation": 2, "dataloader_num_workers": 2},
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_influence_and_ledger_do_not_depend_on_the_layout(tmp_path, plain, layout, method):
    phi, ledger = books(tmp_path, method=method, **layout)
    expected_phi, expected_ledger = plain[method]
    assert len(phi) == STEPS * PER_STEP * 2
    assert_close(phi, expected_phi, share=SHARE)
    assert_close(ledger, expected_ledger, share=SHARE)


def test_one_row_per_document_step_and_ability_through_the_sketch(tmp_path):
    """The default factor gives the same influence as the exact one, up to the sketch's noise."""
    rows = make_rows(STEPS * PER_STEP)
    found = []
    for factor in ("previous", "exact"):
        trainer = make_trainer(
            tmp_path / "trainer", make_lora(), RowDataset(rows), max_steps=STEPS * 4, per_device_train_batch_size=4
        )
        run = attach(trainer, tmp_path / factor, factor=factor, warm_steps=3)
        trainer.train()
        found.append(influence_of(run.record))
        assert run.record.influence().num_rows == STEPS * PER_STEP * 2
    sketched, exact = (torch.tensor([phi[key] for key in sorted(phi)]) for phi in found)
    assert float(torch.corrcoef(torch.stack([sketched, exact]))[0, 1]) > 0.98


def test_fastsfts_own_datasets_bring_their_ids_and_sources():
    rows = make_rows(8)
    for dataset in (RowDataset(rows), Lines(rows)):
        table = table_of_dataset(dataset, lambda tokens: " ".join(map(str, tokens)))
        assert list(table.ids) == [row.id for row in rows]
        assert list(table.sources) == [row.source for row in rows]
        assert table.tokens(3) == rows[3].input_ids
        prompt, response = table.text(3)
        assert f"{prompt} {response}".split() == [str(token) for token in rows[3].input_ids]
        assert response.split() == [str(label) for label in rows[3].labels if label != -100]


def test_tokens_of_a_sample_follow_its_length(tmp_path):
    """Token scores come one a token, padded or packed, and their texts beside them."""
    for packed in (False, True):
        rows = make_rows(16)
        trainer = make_trainer(
            tmp_path / f"trainer{packed}",
            make_lora(),
            Lines(rows) if packed else RowDataset(rows),
            width=64 if packed else None,
            max_steps=2,
            per_device_train_batch_size=2 if packed else 8,
        )
        run = attach(trainer, tmp_path / f"run{packed}", tokens=True)
        trainer.train()
        lengths = {row.id: len(row.input_ids) for row in rows}
        table = Record.open(tmp_path / f"run{packed}").influence().to_pydict()
        assert set(table["sample_id"]) == set(lengths)
        for name, tokens in zip(table["sample_id"], table["tokens"], strict=True):
            assert len(tokens) == lengths[name]
        texts = read_table(run.record.out / "token_text.parquet").to_pydict()
        assert {name: len(each) for name, each in zip(texts["sample_id"], texts["tokens"], strict=True)} == lengths
