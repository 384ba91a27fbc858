"""Gated adapters under trainers and under the books: Trainer, TRL, resume, and what each expert did to each ability."""

import json

import pytest
import torch
from datasets import Dataset

import fastsft
from fastsft.adapters import GatedError
from fastsft.attribution.methods import GradDot
from fastsft.capturing import capture
from fastsft.data import PackedDataset, RowDataset, pack
from fastsft.train.loop import Padding
from tests.adapters._models import KINDS, gated_model, make_batch
from tests.train._support import (
    SOURCES,
    assert_adds_up,
    assert_same_bits,
    attach,
    influence_of,
    make_model,
    make_rows,
    make_tokenizer,
    make_trainer,
    weights_of,
    words,
)


def small(granularity="sequence", **settings):
    return gated_model(granularity=granularity, double=False, **settings)


@pytest.mark.parametrize("sharing", ["block", "linear"])
@pytest.mark.parametrize(("gate", "granularity"), KINDS)
def test_a_capture_sees_the_gradient_of_every_factor(gate, granularity, sharing):
    model, gated = gated_model(gate, granularity, sharing=sharing)
    gated.freeze_expert("maths")
    model.train()
    ids, labels = make_batch(rows=3)
    model(ids, labels=labels).loss.backward()
    plain = {name: p.grad.clone() for name, p in gated.named_parameters() if p.grad is not None}
    model.zero_grad()
    with capture(model) as captured, captured.batch(rows=tuple(ids.shape)):
        model(ids, labels=labels).loss.backward()
    # being seen changes no gradient but for its rounding
    for name, p in gated.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, plain[name], rtol=0, atol=1e-12)
    seen = captured.document_grads()
    # all but biases and tables, whose gradients are no sums over tokens
    assert set(seen) == {name for name in plain if name.endswith("weight")}
    for name, grads in seen.items():
        torch.testing.assert_close(grads.sum(0), plain[name], rtol=0, atol=1e-12)


def test_documents_of_a_capture_are_their_own_gradients():
    model, _ = gated_model("softmax", "sequence")
    ids, labels = make_batch(rows=3)
    with capture(model) as captured, captured.batch(rows=tuple(ids.shape)):
        model(ids, labels=labels).loss.backward()
    seen = captured.document_grads()
    for row in range(3):
        model.zero_grad()
        # the mean over all rows' tokens is three times that of each
        (model(ids[row : row + 1], labels=labels[row : row + 1]).loss / 3).backward()
        for name, grads in seen.items():
            torch.testing.assert_close(grads[row], model.get_parameter(name).grad, rtol=0, atol=1e-12)


def train(tmp_path, model, gated, *, steps=6, **settings):
    trainer = make_trainer(tmp_path / "t", model, max_steps=steps, **settings)
    trainer.optimizer = torch.optim.AdamW(gated.parameter_groups(5e-3))
    return trainer


def intervals(run):
    events = [json.loads(line) for line in (run.record.out / "record.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "interval"], events


@pytest.mark.parametrize(
    ("granularity", "settings"),
    [
        ("sequence", {}),
        ("sequence", {"activation_checkpointing": True}),
        ("token", {"activation_checkpointing": True, "gradient_accumulation_steps": 2}),
    ],
)
def test_the_books_split_by_expert_and_balance(tmp_path, granularity, settings):
    model, gated = small(granularity)
    gated.freeze_expert("general")
    trainer = train(tmp_path, model, gated, **settings)
    run = attach(trainer, tmp_path / "run")
    trainer.train()
    found, events = intervals(run)
    parts = {"maths", "code", "memory", "router"}
    for event in found:
        assert event["displacement_error"] < 1e-4  # float32
        for entry in event["abilities"].values():
            assert set(entry["by_part"]) == parts
            for source, whole in entry["by_source"].items():
                assert sum(part[source] for part in entry["by_part"].values()) == pytest.approx(whole, abs=1e-12)
    for event in events:
        if event["event"] == "step":
            assert event["identity_error"] < 1e-5
    assert_adds_up(run.record)
    assert len(influence_of(run.record))


def test_the_books_change_no_weight(tmp_path):
    plain, gated = small()
    train(tmp_path / "a", plain, gated).train()
    seen, gated = small()
    trainer = train(tmp_path / "b", seen, gated)
    attach(trainer, tmp_path / "run")
    trainer.train()
    assert_same_bits(weights_of(plain), weights_of(seen))


@pytest.mark.parametrize("settings", [{"gradient_accumulation_steps": 2}, {"activation_checkpointing": True}])
def test_trainers_settings(tmp_path, settings):
    model, gated = small()
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    train(tmp_path, model, gated, **settings).train()
    moved = {name for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])}
    assert moved
    assert moved <= {name for name, _ in gated.named_parameters()}


def test_a_resumed_training_is_the_one_never_stopped(tmp_path):
    model, gated = small()
    train(tmp_path / "whole", model, gated, steps=6, save_strategy="steps", save_steps=3).train()
    again, gated = small(seed=9)
    trainer = train(tmp_path / "again", again, gated, steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole/t/checkpoint-3"))
    assert_same_bits(weights_of(model), weights_of(again))


def test_label_smoothing_takes_the_labels_out_and_is_refused(tmp_path):
    model, gated = small()
    trainer = train(tmp_path, model, gated, label_smoothing_factor=0.1)
    with pytest.raises(GatedError, match="got no labels that say where prompts end"):
        trainer.train()
    model, gated = small("token")
    train(tmp_path, model, gated, label_smoothing_factor=0.1).train()


@pytest.mark.parametrize("packing", [False, True])
def test_trl(tmp_path, packing):
    trl = pytest.importorskip("trl")
    model, gated = small()
    items = []
    for row in make_rows(24):
        prompt, response = words(row)
        items.append({"prompt": prompt, "completion": f" {response}", "id": row.id, "source": row.source})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "t"),
        max_steps=4,
        per_device_train_batch_size=4,
        packing=packing,
        max_length=32,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(items),
        processing_class=make_tokenizer(),
        optimizers=(torch.optim.AdamW(gated.parameter_groups(5e-3)), None),
    )
    targets = {
        ability: [dict(zip(("prompt", "completion"), words(row), strict=True)) for row in make_rows(4, prefix=ability)]
        for ability in ("maths", "code")
    }
    run = fastsft.attach(trainer, targets, out=tmp_path / "run", settings=fastsft.Attribution(refresh_every=2))
    trainer.train()
    assert_adds_up(run.record)
    found, _ = intervals(run)
    sources = ["train"] if packing else SOURCES  # TRL's packing drops the column
    assert set(found[-1]["abilities"]["maths"]["by_source"]) == set(sources)
    assert set(found[-1]["abilities"]["maths"]["by_part"]) == {"maths", "code", "general", "memory", "router"}


def test_packed_and_padded_rows_train_alike(tmp_path):
    """One step on the same rows, packed or not, moves the same: gates look at each document's own prompt."""
    rows = make_rows(8, longest=10)
    found = []
    for packed in (False, True):
        model, gated = gated_model()
        dataset = PackedDataset(rows, pack(rows, 32, seed=0)) if packed else RowDataset(rows)
        batch = Padding(0, 32 if packed else None)([dataset[at] for at in range(len(dataset))])
        model(**batch).loss.backward()
        found.append({name: p.grad for name, p in gated.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=0, atol=1e-12)


def test_methods_after_the_run_score_gated_models():
    """They call the model without labels, and say where prompts end."""
    model, _ = gated_model("softmax", "sequence")
    rows, queries = make_rows(5), make_rows(2, seed=4, prefix="query")

    def gradient(row, *, mean):
        model.zero_grad()
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        loss = model(ids, labels=labels).loss
        (loss if mean else loss * (labels[:, 1:] != -100).sum()).backward()
        return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if p.requires_grad and p.dim() == 2])

    asked = [gradient(query, mean=True) for query in queries]
    truth = torch.stack([torch.stack([gradient(row, mean=False) @ each for each in asked]) for row in rows])
    scores = GradDot().fit(model, [], rows).score(queries).matrix()
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))  # float32


def test_plain_lora_and_full_runs_have_no_parts(tmp_path):
    trainer = make_trainer(tmp_path / "t", make_model(), max_steps=2)
    run = attach(trainer, tmp_path / "run")
    trainer.train()
    assert all("by_part" not in entry for event in intervals(run)[0] for entry in event["abilities"].values())


def test_the_report_says_what_each_expert_carried(tmp_path):
    model, gated = small()
    trainer = train(tmp_path, model, gated)
    run = attach(trainer, tmp_path / "run")
    trainer.train()
    page = run.report().read_text(encoding="utf-8")
    summary = json.loads((tmp_path / "run/report.json").read_text(encoding="utf-8"))
    assert "What each expert carried" in page
    assert summary["method"] == "gated adapters"
    for ability, parts in summary["experts"].items():
        assert set(parts) == {"maths", "code", "general", "memory", "router"}
        for source, whole in summary["ledger"][ability]["by_source"].items():
            assert sum(each[source] for each in parts.values()) == pytest.approx(whole, abs=1e-12)
