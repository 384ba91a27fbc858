"""The store that a run keeps while it trains: its rows are the samples' own gradients, killed and resumed or not."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fastsft
from fastsft.attribution.optimizer import rule_of
from fastsft.capturing import find_layers
from fastsft.data import Row, RowDataset, collate
from fastsft.ops import decode_rows, sketch_matrix
from fastsft.sketch import SketchSpec
from fastsft.store import Store, StoreError
from fastsft.train import FinishedRun
from tests.train import _store_rank
from tests.train._run_file import write_rows, write_run_file
from tests.train._support import (
    SOURCES,
    assert_same_bits,
    attach,
    make_lora,
    make_model,
    make_rows,
    make_trainer,
    weights_of,
)
from tests.train.test_resume import kill
from tests.train.test_two_processes import ROOT, free_port

SIZE = 256


def rows_of(folder):
    """{(id, step): (source, tokens, row)}"""
    store = Store.open(folder)
    meta = store.meta.to_pylist()
    found = decode_rows(store.rows())
    return {(m["id"], m["step"]): (m["source"], m["tokens"], row) for m, row in zip(meta, found, strict=True)}


def assert_same_rows(one, other):
    assert one.keys() == other.keys()
    assert one
    for key, (source, tokens, row) in one.items():
        assert (source, tokens) == other[key][:2]
        assert torch.equal(row, other[key][2]), key


def grads_by_hand(trainer, rows):
    """Call after attaching: {step: ({id: each sample's gradient by autograd alone}, the scale before the step)}."""
    found = {}
    model, step = trainer.model, trainer.training_step
    names = {layer.name: layer.weight for layer in find_layers(model)}

    def training_step(model_, inputs, *rest, **named):
        at, scales = trainer.state.global_step + 1, None
        if at > 1:
            scales = {name: scale_of(trainer, weight) for name, weight in names.items()}
        batch = [rows[(at - 1) * 4 + n] for n in range(4)]
        total = sum(sum(label != -100 for label in row.labels) for row in batch)
        grads = {}
        for row in batch:
            made = collate([row], 0)
            loss = model(**made).loss * (row.num_supervised / total)
            grads[row.id] = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
        found[at] = (grads, scales)
        return step(model_, inputs, *rest, **named)

    trainer.training_step = training_step
    return found


def scale_of(trainer, weight):
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return rule_of(optimizer).scale(weight, next(iter(optimizer.param_groups)))


def in_order(trainer):
    from torch.utils.data import SequentialSampler

    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)


def sketch(grads, scales, size):
    spec = SketchSpec(size=size)
    return sum(
        sketch_matrix(each.double(), size, spec.layer_seed(name), precondition=scales[name].double().sqrt())
        for name, each in grads.items()
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_rows_are_the_samples_own_gradients(tmp_path, method):
    """By definition: autograd one sample at a time, the optimizer's scale of the step before."""
    torch.manual_seed(0)
    model = (make_lora() if method == "lora" else make_model()).double()
    rows = make_rows(24)
    trainer = make_trainer(tmp_path / "t", model, RowDataset(rows), max_grad_norm=0.05)
    in_order(trainer)
    run = attach(trainer, tmp_path / "run", store=True, store_format="bf16", sketch_size=SIZE, warm_steps=1)
    wanted = grads_by_hand(trainer, rows)
    trainer.train()
    found = rows_of(tmp_path / "run/store/training")
    assert len(found) == 24
    clips = {event["step"]: event["scale"] for event in run.record.events("step")}
    assert max(clips.values()) < 0.9  # clipped: c has a part in it
    for (id, step), (source, tokens, row) in found.items():
        by_id = {each.id: each for each in rows}
        assert (source, tokens) == (by_id[id].source, len(by_id[id].input_ids))
        grads, scales = wanted[step]
        if scales is None:
            continue
        expected = clips[step] * sketch(grads[id], scales, SIZE)
        # bf16 keeps 8 bits
        assert torch.linalg.vector_norm(row - expected) < 0.004 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("settings", [{"warm_steps": 10}, {"factor": "exact"}], ids=str)
def test_kept_gradients_are_sketched_with_the_scale_after_their_step(tmp_path, settings):
    rows = make_rows(24)
    trainer = make_trainer(tmp_path / "t", make_lora().double(), RowDataset(rows))
    in_order(trainer)
    run = attach(trainer, tmp_path / "run", store=True, store_format="bf16", sketch_size=SIZE, **settings)
    wanted = grads_by_hand(trainer, rows)
    trainer.train()
    clips = {event["step"]: event["scale"] for event in run.record.events("step")}
    compared = 0
    for (id, step), (_, _, row) in rows_of(tmp_path / "run/store/training").items():
        if step + 1 in wanted:
            grads, scales = wanted[step][0][id], wanted[step + 1][1]
            expected = clips[step] * sketch(grads, scales, SIZE)
            assert torch.linalg.vector_norm(row - expected) < 0.004 * torch.linalg.vector_norm(expected)
            compared += 1
    assert compared == 20


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_are_the_same_bits_with_and_without_a_store(tmp_path, method):
    weights = []
    for store in (None, False, True):
        model = make_lora() if method == "lora" else make_model()
        trainer = make_trainer(tmp_path / f"t{store}", model)
        if store is not None:
            attach(trainer, tmp_path / f"run{store}", store=store, sketch_size=SIZE)
        trainer.train()
        weights.append(weights_of(model))
    assert_same_bits(weights[0], weights[1])
    assert_same_bits(weights[0], weights[2])
    assert not (tmp_path / "runFalse/store").exists()
    store = Store.open(tmp_path / "runTrue/store/training")
    assert store.complete
    assert len(store) == 24
    assert store.about["layers_followed"] == len(store.about["layers"])


def test_a_killed_run_has_the_rows_of_an_unbroken_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        write_run_file(folder, sections={"attribution": {"store": True, "sketch_size": SIZE}})
    fastsft.run(fastsft.load_config(whole / "run.yaml"), root=whole)
    kill(broken, 8)
    assert max(step for _, step in rows_of(broken / "out/store/training")) == 5
    fastsft.run(fastsft.load_config(broken / "run.yaml"), root=broken, resume=True)
    one = rows_of(whole / "out/store/training")
    assert len(one) == 14 * 4
    assert_same_rows(rows_of(broken / "out/store/training"), one)


@pytest.mark.parametrize("between", ["", "new store written", "old store put aside", "shard not listed"])
def test_rows_of_later_steps_are_dropped_on_resume(tmp_path, between):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(tmp_path / "trainer", make_lora(), **settings)
    attach(trainer, tmp_path / "run", store=True, sketch_size=SIZE)
    trainer.train()
    folder = tmp_path / "run/store/training"
    unbroken = rows_of(folder)
    assert max(step for _, step in unbroken) == 8
    new, old = folder.with_name("training.new"), folder.with_name("training.old")
    if between == "new store written":  # a kill left it: it may be half of one
        shutil.copytree(folder, new)
        (new / "manifest.json").unlink()
    elif between == "old store put aside":
        shutil.copytree(folder, new)
        folder.rename(old)
    elif between == "shard not listed":
        store = Store.open(folder)
        manifest = replace(store.manifest, shards=store.manifest.shards[:1], complete=False)
        assert len(store.manifest.shards) > 1
        manifest.save(folder)

    trainer = make_trainer(tmp_path / "trainer", make_lora(), **settings)
    attach(trainer, tmp_path / "run", store=True, sketch_size=SIZE)
    trainer.train(resume_from_checkpoint=str(tmp_path / "trainer/checkpoint-4"))
    assert_same_rows(rows_of(folder), unbroken)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["training"]


def test_a_store_asked_for_later_says_where_it_begins(tmp_path):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    for store, checkpoint in ((False, None), (True, tmp_path / "trainer/checkpoint-4")):
        trainer = make_trainer(tmp_path / "trainer", make_lora(), **settings)
        run = attach(trainer, tmp_path / "run", store=store, sketch_size=SIZE)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert sorted({step for _, step in rows_of(tmp_path / "run/store/training")}) == [5, 6, 7, 8]
    assert any("begins after step 4" in event["text"] for event in run.record.events("note"))


def test_an_interrupted_run_can_be_resumed_in_the_same_process(tmp_path):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(tmp_path / "trainer", make_lora(), **settings)
    step = trainer.training_step

    def training_step(*given, **named):
        if trainer.state.global_step == 6:
            raise KeyboardInterrupt
        return step(*given, **named)

    trainer.training_step = training_step
    attach(trainer, tmp_path / "run", store=True, sketch_size=SIZE)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = make_trainer(tmp_path / "trainer", make_lora(), **settings)
    attach(again, tmp_path / "run", store=True, sketch_size=SIZE)
    again.train(resume_from_checkpoint=str(tmp_path / "trainer/checkpoint-4"))
    assert sorted({at for _, at in rows_of(tmp_path / "run/store/training")}) == list(range(1, 9))


def test_a_store_of_training_is_searched_for_what_a_query_was_learnt_from(tmp_path):
    path = write_run_file(tmp_path, sections={"attribution": {"store": True}, "train": {"steps": 9}})
    fastsft.run(fastsft.load_config(path), root=tmp_path)
    folder = tmp_path / "out/store/training"
    drawn = {id for id, _ in rows_of(folder)}
    assert len(drawn) == 36
    ranks = []
    for source in SOURCES:
        row = make_rows(12, prefix=source)[3]
        write_rows(tmp_path / "q.jsonl", [row])
        answer = fastsft.search_store(folder, tmp_path / "q.jsonl", top=36)
        ids = [hit["id"] for hit in answer.hits(0)["helpful"]]
        ranks.append(ids.index(row.id))
        assert answer.hits(0)["helpful"][0]["step"] is not None
    assert max(ranks) <= 2, ranks


def on_two(out):
    port = str(free_port())
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        }
        command = [sys.executable, "-m", "tests.train._store_rank", str(out), str(_store_rank.PER_STEP // 2)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def test_two_processes_keep_the_store_of_one(tmp_path):
    """In training, samples that stand twice in a step included; and of a finished run, under torchrun."""
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        out.mkdir()
    path = write_run_file(two / "finished", sections={"train": {"steps": 5}})
    fastsft.run(fastsft.load_config(path), root=two / "finished")
    _store_rank.main(one, _store_rank.PER_STEP)
    outputs = on_two(two)

    alone, merged = rows_of(one / "run/store/training"), rows_of(two / "run/store/training")
    assert alone.keys() == merged.keys()
    assert len(alone) == 21  # three of 24 draws were of a sample that its step had already
    for key, (source, tokens, row) in alone.items():
        assert merged[key][:2] == (source, tokens)
        # float64 models, rows of 8 bits
        assert torch.linalg.vector_norm(merged[key][2] - row) < 0.005 * torch.linalg.vector_norm(row), key
    folders = sorted(folder.name for folder in (two / "run/store/training").iterdir())
    assert folders == ["rank000", "rank001"]

    store = Store.open(two / "finished/out/store/checkpoint-5")
    assert store.complete
    assert sorted(store.ids()) == sorted(f"{source}-{number}" for source in SOURCES for number in range(12))
    for rank, output in enumerate(outputs):
        assert f"rank{rank:03d}: 18" in output
    fresh = fastsft.attribute(two / "finished/out", out=tmp_path / "fresh", size=256, format="bf16")
    assert fresh.spec == store.spec
    rows = dict(zip(fresh.ids(), decode_rows(fresh.rows()), strict=True))
    for id, row in zip(store.ids(), decode_rows(store.rows()), strict=True):
        assert torch.linalg.vector_norm(row - rows[id]) < 0.02 * torch.linalg.vector_norm(row), id


def test_a_run_of_another_number_of_processes_is_refused(tmp_path):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(tmp_path / "trainer", make_lora(), **settings)
    attach(trainer, tmp_path / "run", store=True, sketch_size=SIZE)
    trainer.train()
    folder = tmp_path / "run/store/training"
    folder.rename(tmp_path / "rank000")
    folder.mkdir()
    (tmp_path / "rank000").rename(folder / "rank000")
    trainer = make_trainer(tmp_path / "trainer", make_lora(), **settings)
    attach(trainer, tmp_path / "run", store=True, sketch_size=SIZE)
    with pytest.raises(StoreError, match="written by another number of processes than 1: resume with as many"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "trainer/checkpoint-4"))


def test_a_query_is_scaled_as_the_run_was_on_the_layers_of_the_store(tmp_path):
    """By hand: the query's gradient of the layers followed exactly, times the root of the checkpoint's scale."""
    sections = {
        "train": {"method": "full", "steps": 6},
        "attribution": {"store": True, "store_format": "bf16", "sketch_size": SIZE, "narrow": 0, "exact": "q_proj"},
    }
    path = write_run_file(tmp_path, sections=sections)
    fastsft.run(fastsft.load_config(path), root=tmp_path)
    folder = tmp_path / "out/store/training"
    [query] = make_rows(1, prefix="new")
    write_rows(tmp_path / "q.jsonl", [query])
    answer = fastsft.search_store(folder, tmp_path / "q.jsonl", top=24)
    assert len(Store.open(folder).about["layers"]) == 2

    finished = FinishedRun.open(tmp_path / "out")
    model, _, _ = finished.load(finished.checkpoint())
    optimizer = finished.optimizer(model, finished.checkpoint())
    closed = Row("new-0", "queries", [*query.input_ids, 1], [*query.labels, 1])
    model.eval()(**collate([closed], 0)).loss.backward()
    rule, group = rule_of(optimizer), optimizer.param_groups[0]
    weights = {name: weight for name, weight in model.named_parameters() if "q_proj" in name}
    grads = {name: weight.grad for name, weight in weights.items()}
    vector = sketch(grads, {name: rule.scale(weight, group) for name, weight in weights.items()}, SIZE)
    rows = rows_of(folder)
    for hit in [each for side in answer.hits(0).values() for each in side]:
        row = rows[hit["id"], hit["step"]][2]
        # a scan rounds the query to 8 bits
        assert abs(hit["score"] - float(row.double() @ vector)) < 0.004 * float(row.norm() * vector.norm())
