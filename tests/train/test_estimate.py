"""A finished run asked by any method, without a store."""

import json
import shutil

import pytest
import torch

import fastsft
from fastsft.attribution.methods import GradDot
from fastsft.attribution.methods.registry import METHODS
from fastsft.data import DataError, read_source, tokenize_all
from fastsft.sketch.passes import Batching
from fastsft.train import ConfigError, FinishedRun, answer_lines
from fastsft.train.estimate import ALL
from fastsft.train.loop import prepare
from fastsft.train.scoring import check_method
from tests.train._run_file import write_rows, write_run_file
from tests.train._support import SOURCES, influence_of, make_rows


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A LoRA run of twelve steps with three checkpoints, its data and base model beside it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    path = write_run_file(folder, sections={"train": {"steps": 12, "save_every": 4}})
    fastsft.run(fastsft.load_config(path), root=folder)
    return folder / "out"


@pytest.fixture
def file(tmp_path):
    """Three queries, the second of them a training sample."""
    rows = [*make_rows(1, seed=9, prefix="new"), make_rows(12, prefix="bricks")[5], make_rows(12, prefix="maths")[2]]
    write_rows(tmp_path / "queries.jsonl", rows)
    return tmp_path / "queries.jsonl"


def ready(run_dir):
    run = FinishedRun.open(run_dir)
    model, tokenizer, _ = run.load(run.checkpoint())
    return run, model, prepare(run.config, tokenizer, run.root).rows


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers(run_dir, file, method):
    asked = "maths" if method == "in_run" else file
    answer = fastsft.attribute_queries(run_dir, asked, method=method, top=3)
    assert answer.method == method
    assert method in answer.heading
    assert answer.heading.endswith("36 samples")
    assert len(answer.ids) == 36
    sides = answer.hits(0)
    assert set(sides) == ({"highest", "lowest"} if METHODS[method].is_baseline else {"helpful", "harmful"})
    first, second = sides.values()
    assert 0 < len(first) <= 3
    assert all(hit["prompt"].startswith("w") for hit in [*first, *second])
    if not METHODS[method].is_baseline:
        assert all(hit["score"] > 0 for hit in first)
        assert all(hit["score"] < 0 for hit in second)
    assert sum(entry["rows"] for entry in answer.by_source(0).values()) == 36
    text = "\n".join(answer_lines(answer, by_source=True))
    assert answer.unit in text
    json.dumps(answer.as_dict())


def test_the_scores_are_the_methods_at_every_checkpoint(run_dir, file):
    run, model, rows = ready(run_dir)
    answer = fastsft.attribute_queries(run_dir, file, method="grad_dot", top=36, each=True)
    assert "at checkpoints 4, 8, 12 of" in answer.heading
    assert answer.queries == [ALL, "new-0", "bricks-5", "maths-2"]
    tokenizer = run.load(run.checkpoint())[1]
    asked = tokenize_all(read_source("q", file), tokenizer, max_length=48).rows
    targets = {"all": asked, **{row.id: [row] for row in asked}}
    matrix = GradDot(batching=Batching()).fit(model, run.checkpoints(), rows).score(targets).matrix()
    for number in range(4):
        scores = {hit["id"]: hit["score"] for side in answer.hits(number).values() for hit in side}
        expected = {row.id: value for row, value in zip(rows, matrix[:, number].tolist(), strict=True) if value}
        assert scores == pytest.approx(expected, rel=1e-4, abs=1e-6)
        sums = answer.by_source(number)
        for source in SOURCES:
            of = [value for id, value in expected.items() if id.startswith(source)]
            assert sums[source]["sum"] == pytest.approx(sum(of), rel=1e-3, abs=1e-5)
            assert sums[source]["mean"] == pytest.approx(sums[source]["sum"] / 12)
    assert answer.hits(2)["helpful"][0]["id"] == "bricks-5"
    one = fastsft.attribute_queries(run_dir, file, method="grad_dot", checkpoint=8, top=1)
    assert "at checkpoint 8 of" in one.heading
    assert one.hits(0)["helpful"][0]["score"] != answer.hits(0)["helpful"][0]["score"]
    last = fastsft.attribute_queries(run_dir, file, method="grad_dot", checkpoint="last", top=1)
    assert "at checkpoint 12 of" in last.heading


def test_settings_reach_the_method(run_dir, file):
    one, other = (fastsft.attribute_queries(run_dir, file, damping=damping, top=5) for damping in (0.1, 10.0))
    assert one.method == "ekfac"
    assert one.hits(0)["helpful"][0]["score"] > 2 * other.hits(0)["helpful"][0]["score"]


def test_a_target_of_the_run_is_asked_by_its_name(run_dir, tmp_path, monkeypatch):
    answer = fastsft.attribute_queries(run_dir, "code", method="in_run", top=36)
    assert answer.queries == ["code"]
    assert "checkpoint" not in answer.heading
    phi = influence_of(fastsft.Record.open(run_dir))
    total = sum(value for (_, _, ability), value in phi.items() if ability == "code")
    assert sum(entry["sum"] for entry in answer.by_source(0).values()) == pytest.approx(-total, rel=1e-4)
    each = fastsft.attribute_queries(run_dir, "code", method="grad_dot", each=True, top=1)
    assert each.queries == ["code", *(f"code-{number}" for number in range(4))]
    # a file of that name comes first
    write_rows(tmp_path / "code", make_rows(1, prefix="other"))
    (tmp_path / "code").rename(tmp_path / "code.jsonl")
    monkeypatch.chdir(tmp_path)
    assert fastsft.attribute_queries(run_dir, "code.jsonl", method="random").queries == [ALL]


def test_tokens_that_carry_a_score_are_marked(run_dir, file):
    _, _, rows = ready(run_dir)
    answer = fastsft.attribute_queries(
        run_dir, file, method="grad_dot", checkpoint="last", top=2, each=True, tokens=True
    )
    for number in range(4):
        for side, hits in answer.hits(number).items():
            for hit in hits:
                row = rows[hit["row"]]
                marks = hit["marked"]
                assert 0 < len(marks) <= 5
                assert all(
                    mark["text"] == f"w{row.input_ids[mark['at']]}" for mark in marks if row.input_ids[mark["at"]] > 1
                )
                values = [mark["score"] for mark in marks]
                assert values == sorted(values, reverse=side == "helpful")
    hit = answer.hits(0)["helpful"][0]
    whole = answer.hits(0)["helpful"][0]["score"]
    assert hit["marked"][0]["score"] > whole / len(rows[hit["row"]].input_ids)
    assert "marked" in json.dumps(answer.as_dict())


def test_a_query_under_the_name_of_all_is_still_told_apart(run_dir, tmp_path):
    lines = [{"id": name, "prompt": "w2 w3", "response": f"w{at}"} for at, name in enumerate((ALL, "other"), start=4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer = fastsft.attribute_queries(run_dir, tmp_path / "q.jsonl", method="grad_dot", each=True)
    assert answer.queries == [ALL, f"{ALL} (one of them)", "other"]
    assert answer.hits(0) != answer.hits(1) != answer.hits(2)


def test_a_store_of_training_answers_a_file(tmp_path, file):
    path = write_run_file(tmp_path, sections={"train": {"steps": 6, "save_every": 6}, "attribution": {"store": True}})
    fastsft.run(fastsft.load_config(path), root=tmp_path)
    answer = fastsft.attribute_queries(tmp_path / "out", file, method="in_run", top=5)
    assert "at checkpoint 6 of" in answer.heading
    assert "sketches of training" in answer.unit
    assert len(answer.hits(0)["helpful"]) == 5


@pytest.fixture
def no_loading(monkeypatch):
    def load(*given):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(FinishedRun, "load", load)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "ekfak"}, "no method 'ekfak': did you mean 'ekfac'"),
        ({"method": "length", "damping": 0.1}, "length has no setting `damping`"),
        ({"damping": -1.0}, "`damping`, a share of each layer's mean eigenvalue, must be above 0: got -1.0"),
        ({"method": "logra", "size": 7}, "size"),
        ({"method": "unrolled", "smooth": -1.0}, "`smooth` of 0 or more"),
        ({"top": 0}, "`top` and `max_tokens` must be at least 1: got 0"),
        ({"checkpoint": 5}, "there is no checkpoint 5 in .*: name one of the steps 4, 8, 12"),
        ({"method": "unrolled", "checkpoint": 4}, "unrolled looks at the whole run"),
        ({"method": "in_run"}, "own abilities, code, maths, by their names, .*Name an ability, train with"),
        ({"method": "less", "tokens": True}, "less scores whole samples only: ask without tokens"),
        ({"method": "bm25", "tokens": True}, "bm25 scores whole samples only"),
    ],
    ids=lambda each: "" if isinstance(each, str) else " ".join(map(str, each.values())),
)
def test_what_cannot_be_is_one_sentence_before_a_model_is_loaded(run_dir, file, no_loading, given, words):
    with pytest.raises(ConfigError, match=words):
        fastsft.attribute_queries(run_dir, file, **given)


def test_what_a_method_allows_is_not_refused(run_dir):
    check_method(FinishedRun.open(run_dir), "trak", {"damping": 0.0}, [], names=[], tokens=False)


def test_what_is_missing_on_disk_is_said_before_a_model_is_loaded(run_dir, file, tmp_path, no_loading):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        fastsft.attribute_queries(run_dir, tmp_path / "absent.jsonl")
    shutil.copytree(run_dir.parent, tmp_path / "copy")
    copy = tmp_path / "copy/out"
    (copy / "checkpoints/checkpoint-8/optimizer.pt").unlink()
    for method in ("less", "adam_dot"):
        with pytest.raises(ConfigError, match=r"checkpoint-8/optimizer.pt is missing"):
            fastsft.attribute_queries(copy, file, method=method)
    sorted((copy / "influence").glob("*"))[-1].unlink()
    with pytest.raises(ConfigError, match="have no samples of step"):
        fastsft.attribute_queries(copy, file, method="unrolled")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ConfigError, match="holds no checkpoint with weights"):
        fastsft.attribute_queries(copy, file)
