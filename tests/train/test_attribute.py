"""Sketches of a finished run's samples, and the search for what a query was learnt from."""

import re
import shutil

import pytest
import torch

import fastsft
from fastsft.data import collate
from fastsft.ops import decode_rows
from fastsft.record import RecordError
from fastsft.sketch import SketchSpec, Whitening, sketch_samples
from fastsft.store import Store, StoreError, rank_folder
from fastsft.train import ConfigError, FinishedRun, answer_lines
from fastsft.train.attribute import WHITENING
from tests.train._run_file import write_rows, write_run_file
from tests.train._support import SOURCES, attach, make_lora, make_rows, make_trainer

SMALL = {"size": 512, "format": "bf16"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of ten steps with two checkpoints, LoRA and full weights -> {method: (folder, live trainer)}."""
    torch.set_num_threads(1)
    found = {}
    for method in ("lora", "full"):
        folder = tmp_path_factory.mktemp(method)
        train = {"steps": 10, "method": method, "weight_decay": 0.1, "learning_rate": 2e-3}
        path = write_run_file(folder, sections={"train": train})
        found[method] = folder, fastsft.run(fastsft.load_config(path), root=folder).trainer
    return found


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of the LoRA run to write into, its data and base model beside it."""
    shutil.copytree(trained["lora"][0], tmp_path / "copy")
    return tmp_path / "copy/out"


def sketches_of(store):
    return dict(zip(store.ids(), decode_rows(store.rows()), strict=True))


def assert_same_rows(one, other, share=0.02):
    """int8 and bf16 may round a number that differs in its last bit to either side."""
    assert one.keys() == other.keys()
    for id, row in one.items():
        assert torch.linalg.vector_norm(row - other[id]) < share * torch.linalg.vector_norm(other[id]), id


def queries(folder, rows):
    write_rows(folder / "queries.jsonl", rows)
    return folder / "queries.jsonl"


@pytest.mark.parametrize("precondition", [None, "adam", "ekfac"])
def test_a_query_that_is_a_training_sample_finds_it(run_dir, tmp_path, precondition):
    store = fastsft.attribute(run_dir, precondition=precondition)
    assert store.path == run_dir / "store/checkpoint-10"
    assert store.complete
    assert len(store) == 36
    assert store.format == "int8"
    assert store.sources == sorted(SOURCES)
    assert store.files == ([] if precondition is None else [WHITENING])
    row = make_rows(12, prefix="bricks")[5]
    answer = fastsft.search_store(store.path, queries(tmp_path, [row]), top=5)
    first, second = answer.hits(0)["helpful"][:2]
    assert (first["id"], first["source"], first["tokens"]) == ("bricks-5", "bricks", row.num_supervised + 1)  # eos
    assert first["score"] > 1.2 * second["score"]
    assert first["prompt"].startswith("w")


def test_a_score_is_what_a_step_on_the_sample_takes_off_the_query_loss(run_dir, tmp_path):
    """Sign and unit of the plain score, by taking the step: w - lr * g_i, measured on the query."""
    store = fastsft.attribute(run_dir, precondition=None, size=1 << 16, format="bf16")
    answer = fastsft.search_store(store.path, queries(tmp_path, make_rows(1, seed=5, prefix="new")), top=36)
    run = FinishedRun.open(run_dir)
    model, _, _ = run.load(run.checkpoint())
    model = model.double().eval()
    rows = {row.id: row for row in rows_with_end(36)}
    [query] = rows_with_end(1, seed=5, prefix="new")
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def loss_of(row):
        return model(**collate([row], 0)).loss * row.num_supervised

    before, step = loss_of(query).item(), 1e-6
    hits = answer.hits(0)
    assert len(hits["helpful"]) + len(hits["harmful"]) == 36
    for hit in [*hits["helpful"][:3], *hits["harmful"][:3]]:
        grads = torch.autograd.grad(loss_of(rows[hit["id"]]), weights)
        with torch.no_grad():
            for weight, grad in zip(weights, grads, strict=True):
                weight -= step * grad
            fallen = (before - loss_of(query).item()) / step
            for weight, grad in zip(weights, grads, strict=True):
                weight += step * grad
        # the sketch's noise: products of norms over 256
        assert fallen == pytest.approx(hit["score"], rel=0.15)


def rows_with_end(count, seed=0, prefix=None):
    """Rows as the run's tokenizer makes them: closed by end of text, which is supervised."""
    made = [
        row for name in ([prefix] if prefix else SOURCES) for row in make_rows(min(count, 12), seed=seed, prefix=name)
    ]
    for row in made:
        row.input_ids.append(1)
        row.labels.append(1)
    return made


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checkpoint_is_loaded_as_it_was_trained(trained, method):
    """Weights, and the optimizer's states under the names they had, groups with and without decay included."""
    folder, trainer = trained[method]
    run = FinishedRun.open(folder / "out")
    assert run.steps == [5, 10]
    model, tokenizer, pad_id = run.load(run.checkpoint())
    assert (tokenizer.pad_token_id, pad_id) == (0, 0)
    live = dict(trainer.model.named_parameters())
    optimizer = run.optimizer(model, run.checkpoint())
    states = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {
        name for name, weight in live.items() if weight.requires_grad
    }
    compared = 0
    for name, weight in model.named_parameters():
        assert torch.equal(weight, live[name]), name
        if weight.requires_grad:
            assert torch.equal(optimizer.state[weight]["exp_avg_sq"], states[live[name]]["exp_avg_sq"]), name
            compared += 1
    assert compared > 10
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]


def test_full_weights_and_packing_give_the_same_rows_as_padding(trained, tmp_path):
    run_dir = trained["full"][0] / "out"
    padded = fastsft.attribute(run_dir, out=tmp_path / "padded", **SMALL)
    packed = fastsft.attribute(
        run_dir, out=tmp_path / "packed", packing=True, max_tokens=64, precondition="adam", **SMALL
    )
    again = fastsft.attribute(run_dir, out=tmp_path / "again", max_tokens=40, precondition="adam", **SMALL)
    assert padded.about["run"] == str(run_dir.resolve())
    assert_same_rows(sketches_of(packed), sketches_of(again))
    answer = fastsft.search_store(packed.path, queries(tmp_path, make_rows(12, prefix="apples")[2:3]))
    assert answer.hits(0)["helpful"][0]["id"] == "apples-2"


def test_every_checkpoint_has_a_store_of_its_own(run_dir):
    stores = [fastsft.attribute(run_dir, checkpoint=step, **SMALL) for step in FinishedRun.open(run_dir).steps]
    assert [store.path.name for store in stores] == ["checkpoint-5", "checkpoint-10"]
    assert stores[0].model["digest"] != stores[1].model["digest"]
    assert stores[0].spec["whitening"] != stores[1].spec["whitening"]


def test_a_run_by_sgd_has_no_second_moments(tmp_path):
    train = {"steps": 4, "save_every": 4, "optimizer": "sgd", "learning_rate": 0.5}
    path = write_run_file(tmp_path, sections={"train": train, "attribution": {"store": True}})
    fastsft.run(fastsft.load_config(path), root=tmp_path)
    with pytest.raises(ConfigError, match=r"was trained with sgd.*take precondition 'ekfac'"):
        fastsft.attribute(tmp_path / "out", precondition="adam")
    assert Store.open(tmp_path / "out/store/training").spec["sketch"]["precondition"] is None
    answer = fastsft.search_store(tmp_path / "out/store/training", queries(tmp_path, make_rows(1)), top=3)
    assert "a plain gradient step of the run" in answer.unit
    assert len(answer.hits(0)["helpful"]) == 3


class Killed(BaseException):
    pass


@pytest.mark.parametrize("precondition", [None, "adam", "ekfac"])
def test_resuming_after_a_kill_gives_the_store_of_an_unbroken_build(run_dir, tmp_path, monkeypatch, precondition):
    settings = {"precondition": precondition, "max_tokens": 48, **SMALL}
    build = attribute_in_small_shards(monkeypatch)
    whole = fastsft.attribute(run_dir, out=tmp_path / "whole", **settings)

    def some(*given, **named):
        for number, batch in enumerate(sketch_samples(*given, **named)):
            if number == 6:
                raise Killed
            yield batch

    monkeypatch.setattr(build, "sketch_samples", some)
    with pytest.raises(Killed):
        fastsft.attribute(run_dir, out=tmp_path / "broken", **settings)
    torn = Store.open(tmp_path / "broken")
    assert not torn.complete
    assert 0 < len(torn) < 36
    with pytest.raises(StoreError, match=r"holds a store already. Go on with it \(resume\)"):
        fastsft.attribute(run_dir, out=tmp_path / "broken", **settings)

    skipped = []

    def rest(*given, **named):
        skipped.append(len(named["skip"]))
        return sketch_samples(*given, **named)

    monkeypatch.setattr(build, "sketch_samples", rest)
    # neither is the whitening fitted again: eigenvectors need not come out the same
    monkeypatch.setattr(build, "fit_whitening", None)
    done = fastsft.attribute(run_dir, out=tmp_path / "broken", resume=True, **settings)
    assert skipped == [len(torn)]
    assert done.complete
    assert done.ids() == whole.ids()
    assert done.spec == whole.spec
    assert_same_rows(sketches_of(done), sketches_of(whole))
    assert len(fastsft.attribute(run_dir, out=tmp_path / "broken", resume=True, **settings)) == 36


def attribute_in_small_shards(monkeypatch):
    import sys

    module = sys.modules["fastsft.train.attribute"]
    model = module.attribute_model
    monkeypatch.setattr(module, "attribute_model", lambda *a, **named: model(*a, **named, shard_rows=4))
    return module


def test_a_build_killed_before_its_store_begins_again(run_dir, monkeypatch):
    import sys

    module = sys.modules["fastsft.train.attribute"]

    def dies(*given, **named):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "fit_whitening", dies)
        with pytest.raises(Killed):
            fastsft.attribute(run_dir, **SMALL)
    assert len(fastsft.attribute(run_dir, resume=True, **SMALL)) == 36


def test_two_processes_write_the_rows_of_one(run_dir, tmp_path):
    run = FinishedRun.open(run_dir)
    rows = rows_with_end(36)
    spec = SketchSpec(size=512, precondition="ekfac")
    model, _, _ = run.load(run.checkpoint())
    one = fastsft.attribute_model(model, rows, out=tmp_path / "one", spec=spec, format="bf16")
    with pytest.raises(StoreError, match="is missing: let the first process begin before the others"):
        fastsft.attribute_model(model, rows, out=tmp_path / "two", spec=spec, format="bf16", rank=1, world=2)
    for rank in range(2):
        part = fastsft.attribute_model(model, rows, out=tmp_path / "two", spec=spec, format="bf16", rank=rank, world=2)
        assert part.path == rank_folder(tmp_path / "two", rank)
        assert part.ids() != one.ids()
        assert len(part) == 18
    two = Store.open(tmp_path / "two")
    assert two.complete
    assert_same_rows(sketches_of(two), sketches_of(one))
    for world, place in ((1, "two"), (2, "one"), (1, "two")):
        with pytest.raises(StoreError, match=f"written by another number of processes than {world}: start as many"):
            fastsft.attribute_model(model, rows, out=tmp_path / place, spec=spec, world=world)


def test_a_model_of_ones_own_is_stored_and_said_how_to_search(tmp_path):
    rows = make_rows(6)
    store = fastsft.attribute_model(make_lora(), rows, out=tmp_path / "s", spec=SketchSpec(size=512), name="mine")
    assert (len(store), store.model["name"], store.spec["whitening"]) == (6, "mine", None)
    with pytest.raises(StoreError, match=r"does not say which run it is of .*sketch the queries by"):
        fastsft.search_store(tmp_path / "s", queries(tmp_path, rows[:1]))


def test_a_run_may_be_moved_with_its_store_or_without(run_dir, tmp_path):
    inside = fastsft.attribute(run_dir, **SMALL)
    outside = fastsft.attribute(run_dir, out=tmp_path / "s", **SMALL)
    assert inside.about["run"] == "../.."
    file = queries(tmp_path, make_rows(12, prefix="clouds")[1:2])
    wanted = fastsft.search_store(inside.path, file).hits(0)
    moved = run_dir.rename(tmp_path / "moved")
    assert fastsft.search_store(moved / "store/checkpoint-10", file).hits(0) == wanted
    with pytest.raises(StoreError, match="is not there: say where it is now with `run`"):
        fastsft.search_store(outside.path, file)
    found = fastsft.search_store(outside.path, file, run=moved).hits(0)
    assert [hit["id"] for hit in found["helpful"]] == [hit["id"] for hit in wanted["helpful"]]


def test_other_weights_than_the_stores_are_refused(run_dir, tmp_path):
    store = fastsft.attribute(run_dir, **SMALL)
    weights = run_dir / "checkpoints/checkpoint-10/adapter_model.safetensors"
    shutil.copyfile(run_dir / "checkpoints/checkpoint-5/adapter_model.safetensors", weights)
    with pytest.raises(StoreError, match=r"checkpoint-10 are not those that .* \(their digests differ\)"):
        fastsft.search_store(store.path, queries(tmp_path, make_rows(1)))


def test_another_whitening_than_the_stores_is_refused(run_dir, tmp_path):
    store = fastsft.attribute(run_dir, **SMALL)
    assert Whitening.load(store.file(WHITENING)).digest == store.spec["whitening"]
    with pytest.raises(StoreError, match=r"fitted with damping=0.1: got 0.2. Resume with what"):
        fastsft.attribute(run_dir, resume=True, damping=0.2, **SMALL)
    other = fastsft.attribute(run_dir, checkpoint=5, **SMALL)
    shutil.copyfile(other.file(WHITENING), store.file(WHITENING))
    with pytest.raises(StoreError, match="is damaged: its digest"):
        fastsft.search_store(store.path, queries(tmp_path, make_rows(1)))


def test_what_is_no_finished_run_is_refused(run_dir, tmp_path):
    with pytest.raises(RecordError, match="is not a run directory"):
        fastsft.attribute(tmp_path)
    trainer = make_trainer(tmp_path / "trainer", make_lora(), max_steps=1)
    attach(trainer, tmp_path / "attached")
    trainer.train()
    with pytest.raises(ConfigError, match=r"attached to a trainer of your own.*call fastsft.attribute_model\(model,"):
        fastsft.attribute(tmp_path / "attached")
    with pytest.raises(ConfigError, match=r"no checkpoint '7' in .*: name one of the steps 5, 10, or 'last'"):
        fastsft.attribute(run_dir, checkpoint="7")
    with pytest.raises(ConfigError, match="no checkpoint 'best'"):
        fastsft.attribute(run_dir, checkpoint="best")
    weights = run_dir / "checkpoints/checkpoint-5/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(
        ConfigError, match=r"checkpoint-5 can't be loaded \(.*\): take another checkpoint, and the base"
    ):
        fastsft.attribute(run_dir, checkpoint=5)
    (run_dir / "checkpoints/checkpoint-10/optimizer.pt").unlink()
    with pytest.raises(ConfigError, match=r"optimizer.pt is missing.*take precondition 'ekfac'"):
        fastsft.attribute(run_dir, precondition="adam")
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(ConfigError, match="holds no checkpoint with weights"):
        fastsft.attribute(run_dir)


def test_an_optimizer_of_another_model_is_refused(trained, run_dir):
    file = run_dir / "checkpoints/checkpoint-10/optimizer.pt"
    state = torch.load(file, weights_only=True)
    name = next(key for key, value in state["state"].items() if value["exp_avg_sq"].dim() == 2)
    state["state"][name]["exp_avg_sq"] = torch.ones(3, 5)
    torch.save(state, file)
    with pytest.raises(ConfigError, match=r"does not fit this model: its exp_avg_sq of .* has the shape \[3, 5\]"):
        fastsft.attribute(run_dir, precondition="adam")
    shutil.copyfile(trained["full"][0] / "out/checkpoints/checkpoint-10/optimizer.pt", file)
    with pytest.raises(ConfigError, match=r"does not fit this model \(.*\): is it of another run"):
        fastsft.attribute(run_dir, precondition="adam")
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ConfigError, match=r"optimizer.pt can't be read .*: take another checkpoint"):
        fastsft.attribute(run_dir, precondition="adam")


def test_each_query_is_answered_beside_their_mean(run_dir, tmp_path):
    store = fastsft.attribute(run_dir, **SMALL)
    rows = [make_rows(12, prefix=source)[3] for source in SOURCES]
    answer = fastsft.search_store(store.path, queries(tmp_path, rows), top=36, each=True)
    assert answer.queries == ["mean of all queries", *(row.id for row in rows)]
    scores = [{hit["id"]: hit["score"] for side in answer.hits(number).values() for hit in side} for number in range(4)]
    largest = max(map(abs, scores[0].values()))
    for id, score in scores[0].items():
        # a scan rounds each query to 8 bits
        assert score == pytest.approx(sum(each.get(id, 0.0) for each in scores[1:]) / 3, abs=0.01 * largest)
    for number, row in enumerate(rows, start=1):
        assert answer.hits(number)["helpful"][0]["id"] == row.id
        sums = answer.by_source(number)
        for source in SOURCES:
            found = [score for id, score in scores[number].items() if id.startswith(source)]
            assert sums[source]["rows"] == 12
            assert sums[source]["sum"] == pytest.approx(sum(found), rel=1e-4, abs=1e-4)
            assert sums[source]["mean"] == pytest.approx(sums[source]["sum"] / 12)
    assert [answered["query"] for answered in answer.as_dict()["answers"]] == answer.queries


def test_tables_are_aligned_and_no_wider_than_the_terminal(run_dir, tmp_path):
    store = fastsft.attribute(run_dir, **SMALL)
    answer = fastsft.search_store(store.path, queries(tmp_path, make_rows(2, prefix="apples")), top=3)
    texts = dict.fromkeys(store.ids(), ("漢字\n\x1b[31m" * 20, "response"))
    answer = type(answer)(**{**vars(answer), "texts": texts})
    lines = list(answer_lines(answer, width=60, by_source=True))
    tables = [line for line in lines if line.startswith("   ") or re.match(r"  \d", line)]
    assert len(tables) >= 8
    assert all("\x1b" not in line and "\n" not in line for line in lines)
    for line in tables:
        assert sum(2 if "漢字".find(each) >= 0 else 1 for each in line) <= 60
    assert any(line.endswith("...") for line in tables)
    assert "by source:" in lines
    assert any(re.search(r"apples +12 +[+-]", line) for line in lines)
    assert any("helpful" in line and "lowers the query's loss" in line for line in lines)


def test_texts_of_samples_never_drawn_are_read_from_the_sources(tmp_path):
    path = write_run_file(tmp_path, sections={"train": {"steps": 2, "save_every": 2}})
    fastsft.run(fastsft.load_config(path), root=tmp_path)
    store = fastsft.attribute(tmp_path / "out", **SMALL)
    file = queries(tmp_path, make_rows(12, prefix="apples"))
    answer = fastsft.search_store(store.path, file, top=36)
    assert all(hit["prompt"] for side in answer.hits(0).values() for hit in side)
    (tmp_path / "clouds.jsonl").unlink()
    answer = fastsft.search_store(store.path, file, top=36)
    assert any("never drawn are left out" in note and "clouds.jsonl" in note for note in answer.notes)
    assert any(hit["prompt"] is None for side in answer.hits(0).values() for hit in side)
    assert list(answer_lines(answer))


def test_a_query_file_that_cannot_be_used_is_named(run_dir, tmp_path):
    store = fastsft.attribute(run_dir, **SMALL)
    with pytest.raises(ValueError, match=r"absent.jsonl: no such file"):
        fastsft.search_store(store.path, tmp_path / "absent.jsonl")
    with pytest.raises(StoreError, match="is not a store"):
        fastsft.search_store(tmp_path / "none", tmp_path / "absent.jsonl")
