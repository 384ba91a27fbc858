"""TRL's SFTTrainer, unpacked and packed; its fused loss head gives no logits."""

import pytest
from datasets import Dataset

import fastsft
from fastsft.train import Draws, Steering
from fastsft.train.samples import _token_id
from tests.train._steered import ABILITIES, Follow, Lean
from tests.train._support import (
    SOURCES,
    assert_adds_up,
    assert_same_bits,
    attach,
    influence_of,
    make_lora,
    make_model,
    make_rows,
    make_tokenizer,
    weights_of,
    words,
)

trl = pytest.importorskip("trl")


def make_sft(out, rows, *, method="lora", **settings):
    items = []
    for row in rows:
        prompt, response = words(row)
        items.append({"prompt": prompt, "completion": f" {response}", "id": row.id, "source": row.source})
    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 32,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        **settings,
    }
    return trl.SFTTrainer(
        model=make_lora() if method == "lora" else make_model(),
        args=trl.SFTConfig(output_dir=str(out), **given),
        train_dataset=Dataset.from_list(items),
        processing_class=make_tokenizer(),
    )


def targets_as_text():
    return {
        ability: [dict(zip(("prompt", "completion"), words(row), strict=True)) for row in make_rows(4, prefix=ability)]
        for ability in ("maths", "code")
    }


CASES = {
    "unpacked": {},
    "unpacked, full, accumulation": {"method": "full", "gradient_accumulation_steps": 3, "max_steps": 2},
    "packed": {"packing": True, "per_device_train_batch_size": 2},
    "packed, full, accumulation": {
        "method": "full",
        "packing": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "max_steps": 2,
    },
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:trl")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sft_trainer_is_followed_to_the_bit(tmp_path, case):
    rows = make_rows(24)
    plain = make_sft(tmp_path / "trainer", rows, **case)
    plain.train()
    followed = make_sft(tmp_path / "trainer", rows, **case)
    run = attach(followed, tmp_path / "run", targets=targets_as_text())
    followed.train()
    assert_same_bits(weights_of(plain.model), weights_of(followed.model))

    record = run.record
    assert max(event["identity_error"] for event in record.events("step")) < 1e-5
    assert_adds_up(record)
    table = record.influence().to_pydict()
    if case.get("packing"):
        whole = {_token_id([*row.input_ids, 1]): len(row.input_ids) + 1 for row in rows}
        assert set(table["sample_id"]) <= set(whole)
        assert set(table["source"]) == {"train"}
        drawn = sum(sum(event["tokens"].values()) for event in record.events("step"))
        assert drawn == sum(whole[name] for name in table["sample_id"]) / 2
    else:
        source_of = {row.id: row.source for row in rows}
        assert set(table["sample_id"]) == set(source_of)
        assert [source_of[name] for name in table["sample_id"]] == table["source"]
    keys = list(zip(table["step"], table["sample_id"], table["ability"], strict=True))
    assert len(keys) == len(set(keys)) == len(influence_of(record))
    documents = sum(sum(event["documents"].values()) for event in record.events("step"))
    assert len(keys) == 2 * documents
    assert any(table["phi"])


def test_packed_documents_have_the_influence_of_unpacked_ones(tmp_path):
    """All rows in one step: the same documents, so the same influence, found in TRL's packed lines by their place."""
    rows = make_rows(12)
    found = {}
    for packing in (False, True):
        trainer = make_sft(
            tmp_path / "trainer",
            rows,
            packing=packing,
            max_steps=1,
            per_device_train_batch_size=12,
            adam_epsilon=1e-4,
        )
        run = attach(trainer, tmp_path / f"run{packing}", targets=targets_as_text())
        trainer.train()
        found[packing] = influence_of(run.record)
    names = {row.id: _token_id([*row.input_ids, 1]) for row in rows}
    unpacked = {(step, names[sample], ability): phi for (step, sample, ability), phi in found[False].items()}
    assert unpacked.keys() == found[True].keys()
    largest = max(map(abs, unpacked.values()))
    # float32 sums in another order: measured 1e-6 of the largest
    assert max(abs(found[True][key] - phi) for key, phi in unpacked.items()) < 1e-4 * largest


@pytest.mark.parametrize("resolver", [None, Lean()], ids=["mix alone", "exact resolver"])
def test_a_mix_steers_sft(tmp_path, resolver):
    trainer = make_sft(tmp_path / "t", make_rows(30))
    steering = Steering(
        policy=Follow(), draws=Draws(unit="rows"), resolver=resolver, apply="exact", abilities=ABILITIES
    )
    run = fastsft.attach(trainer, targets_as_text(), out=tmp_path / "run", steering=steering)
    trainer.train()
    stream = run.steerer.controller.stream
    for event in run.record.events("step"):
        drawn = {
            name: stream.spent(event["step"])[name][0] - stream.spent(event["step"] - 1)[name][0] for name in SOURCES
        }
        assert event["documents"] == drawn
        # completions alone are supervised, and the token that ends them
        assert 0 < sum(event["supervised"].values()) < sum(event["tokens"].values())
    assert len(list(run.record.events("mix"))) > 2
    assert bool(list(run.record.events("conflict"))) == (resolver is not None)
    assert_adds_up(run.record)


def test_a_fused_loss_head_is_told_how_documents_can_be_weighed(tmp_path):
    trainer = make_sft(tmp_path / "t", make_rows(30))
    steering = Steering(resolver=Lean(), apply="lagged", abilities=ABILITIES)
    fastsft.attach(trainer, targets_as_text(), out=tmp_path / "run", steering=steering)
    with pytest.raises(ValueError, match="switch such a loss off, or use apply='exact'"):
        trainer.train()
