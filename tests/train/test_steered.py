"""A mix in a trainer: what is drawn is what the stream says, whoever trains, and what can't be steered is refused."""

import json

import numpy as np
import pytest
from transformers import Trainer

import fastsft
from fastsft.data import PackedDataset, RowDataset, pack
from fastsft.record import Record
from fastsft.tasks import Decision, Mix, MixError
from fastsft.train import ConfigError, Draws, Steering, load_config, parse_config, steer_static
from fastsft.train.loop import run as run_file
from tests.train._run_file import write_run_file
from tests.train._steered import ABILITIES, Follow, drawn_of
from tests.train._support import SOURCES, make_lora, make_rows, make_targets, make_trainer


class Still:
    """The same mix, whatever happens."""

    def __init__(self, **weights):
        self.mix = Mix(weights)
        self.told = []

    def begin(self, task):
        self.task = task
        return self.mix

    def decide(self, feedback):
        self.told.append(feedback)
        return Decision(weights=feedback.weights, signal={}, error={}, why="still.")


SHARES = {"apples": 0.25, "bricks": 0.25, "clouds": 0.5}


def attach(trainer, out, policy, **draws):
    return fastsft.attach(
        trainer,
        make_targets(),
        out=out,
        settings=fastsft.Attribution(refresh_every=2),
        steering=Steering(policy=policy, draws=Draws(**draws), abilities=ABILITIES),
    )


def test_every_step_holds_the_mix_and_the_policy_is_told_of_it(tmp_path):
    trainer = make_trainer(tmp_path / "t", make_lora(), RowDataset(make_rows(48)), max_steps=6)
    policy = Still(**SHARES)
    run = attach(trainer, tmp_path / "run", policy, unit="rows")
    trainer.train()
    for event in run.record.events("step"):
        assert event["documents"] == {"apples": 1, "bricks": 1, "clouds": 2}
    source_of = {row.id: row.source for row in trainer.train_dataset.rows}
    tokens = {row.id: sum(label != -100 for label in row.labels[1:]) for row in trainer.train_dataset.rows}
    drawn = drawn_of(run.record)
    for told in policy.told:
        for event in run.record.events("step"):
            own = [id for id in drawn[event["step"]] if source_of[id] == "clouds"]
            assert event["supervised"]["clouds"] == sum(tokens[id] for id in own)
        for name in SOURCES:
            steps = range(told.first + 1, told.step + 1)
            own = [id for step in steps for id in drawn[step] if source_of[id] == name]
            assert told.tokens[name] == sum(tokens[id] for id in own)
    assert sum(policy.told[-1].used.values()) == sum(tokens[id] for step in drawn.values() for id in step)
    intervals = list(run.record.events("interval"))
    assert [(told.first, told.step) for told in policy.told] == [(e["from"], e["to"]) for e in intervals]
    for told, event in zip(policy.told, intervals, strict=True):
        assert told.entries == {a: entry["by_source"] for a, entry in event["abilities"].items()}
        assert told.progress == told.step / 6
    refreshes = list(run.record.events("refresh"))
    assert policy.told[0].initial == refreshes[0]["losses"]
    assert policy.told[-1].losses == refreshes[-1]["losses"]
    assert {source.name: source.ability for source in policy.task.sources} == {**ABILITIES, "clouds": None}
    assert sum(source.tokens for source in policy.task.sources) == sum(tokens.values())
    first = next(run.record.events("mix"))
    assert (first["version"], first["draw"], first["from_step"]) == (0, 0, 1)
    assert first["weights"] == SHARES


@pytest.mark.parametrize(("optimizer", "beta"), [("adamw_torch", 0.9), ("sgd", 0.0)])
def test_tokens_are_credited_to_the_interval_in_which_momentum_spends_them(tmp_path, optimizer, beta):
    trainer = make_trainer(tmp_path / "t", make_lora(), RowDataset(make_rows(48)), max_steps=9, optim=optimizer)
    policy = Follow()
    told = []
    policy.decide = lambda feedback: (told.append(feedback), Follow.decide(policy, feedback))[1]
    run = attach(trainer, tmp_path / "run", policy)
    trainer.train()
    drawn = np.array([list(event["supervised"].values()) for event in run.record.events("step")], dtype=float)
    for feedback in told:
        spent = np.zeros(3)
        for step in range(feedback.first + 1, feedback.step + 1):
            spent += sum((1 - beta) * beta ** (step - draw) * drawn[draw - 1] for draw in range(1, step + 1))
        np.testing.assert_allclose(list(feedback.credited.values()), spent, rtol=1e-12)
    assert any(feedback.credited != feedback.tokens for feedback in told) == (beta > 0)


def test_accumulated_micro_batches_are_one_step_of_the_mix(tmp_path):
    seen = []
    for batch, accumulation in ((8, 1), (2, 4)):
        out = tmp_path / str(batch)
        trainer = make_trainer(
            out / "t",
            make_lora(),
            RowDataset(make_rows(48)),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        seen.append(drawn_of(_trained(attach(trainer, out / "run", Still(**SHARES)))))
    assert seen[0] == seen[1]


def _trained(run):
    run.trainer.train()
    return run.record


def test_packed_lines_are_of_one_source_each_and_keep_the_mix(tmp_path):
    path = write_run_file(tmp_path, mix={"policy": "still", "unit": "rows"}, sections={"train": {"packing": True}})
    policy = Still(**SHARES)
    run = run_file(load_config(path), root=tmp_path, steering=Steering(policy=policy, draws=Draws(unit="rows")))
    dataset = run.trainer.train_dataset
    assert isinstance(dataset, PackedDataset)
    assert sorted(at for line in dataset.bins for at in line) == list(range(36))
    for line in dataset.bins:
        assert len({dataset.rows[at].source for at in line}) == 1
    assert sum(len(line) > 1 for line in dataset.bins) > 3
    stream = run.steerer.controller.stream
    for step in range(1, 15):
        taken = {name: stream.spent(step)[name][0] - stream.spent(step - 1)[name][0] for name in SOURCES}
        assert taken == {"apples": 1, "bricks": 1, "clouds": 2}
    for event in run.record.events("step"):
        lines = [dataset.bins[stream.item(draw)] for draw in range(4 * event["step"] - 4, 4 * event["step"])]
        assert sum(event["documents"].values()) == sum(map(len, lines))


def test_a_dataset_with_columns_is_mixed_by_its_sources(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = make_rows(30)
    columns = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    dataset = datasets.Dataset.from_dict({**columns, "source": [row.source for row in rows]})
    trainer = make_trainer(tmp_path / "t", make_lora(), dataset)
    run = attach(trainer, tmp_path / "run", Still(**SHARES), unit="rows")
    for event in _trained(run).events("step"):
        assert event["documents"] == {"apples": 1, "bricks": 1, "clouds": 2}


def test_a_static_mix_needs_no_books(tmp_path):
    trainer = make_trainer(tmp_path, make_lora(), RowDataset(make_rows(48)), max_steps=5)
    stream = steer_static(trainer, Mix(SHARES), Draws(unit="rows", seed=2))
    trainer.train()
    assert stream.spent(5) == {name: (int(20 * share), stream.spent(5)[name][1]) for name, share in SHARES.items()}


@pytest.mark.parametrize(
    ("draws", "words"), [({"max_tokens": 60}, "limit is 60"), ({"max_epochs": 0.5}, "max_epochs=0.5")]
)
def test_a_run_stops_where_its_draws_end_and_says_why(tmp_path, draws, words):
    trainer = make_trainer(
        tmp_path / "t", make_lora(), RowDataset(make_rows(24)), max_steps=50, save_strategy="steps", save_steps=40
    )
    run = attach(trainer, tmp_path / "run", Still(**SHARES), **draws)
    trainer.train()
    stream = run.steerer.controller.stream
    last = stream.end // stream.batch
    assert 0 < last < 40
    assert [event["step"] for event in run.record.events("step")] == list(range(1, last + 1))
    notes = [event["text"] for event in run.record.events("note")]
    assert any(f"ended at step {last}" in note and words in note for note in notes)
    assert len(list(run.record.events("end"))) == 1
    assert (tmp_path / f"t/checkpoint-{last}/fastsft_steering.json").exists()


def test_training_losses_by_source_reach_a_policy_that_asks_for_them(tmp_path):
    policy = Still(**SHARES)
    policy.needs_train_losses = True
    trainer = make_trainer(tmp_path / "t", make_lora(), RowDataset(make_rows(48)), learning_rate=1e-9)
    attach(trainer, tmp_path / "run", policy)
    trainer.train()
    for told in policy.told:
        values = list(told.train_losses.values())
        assert list(told.train_losses) == list(SOURCES)
        assert all(2 < value < 8 for value in values if not np.isnan(value))  # ln 64 is 4.2
    means = np.nanmean([list(told.train_losses.values()) for told in policy.told], axis=0)
    assert means == pytest.approx(means.mean(), rel=0.2)


class Sampled(Trainer):
    def _get_train_sampler(self, dataset=None):
        return super()._get_train_sampler(dataset)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "two mixes are asked for at once.*'group_by_length'"),
        ({"max_steps": -1, "num_train_epochs": 2}, r"set max_steps .*\(12 steps draw as many rows as 2 epochs of 24\)"),
    ],
)
def test_a_trainer_that_samples_by_itself_is_refused(tmp_path, settings, words):
    trainer = make_trainer(tmp_path / "t", make_lora(), **settings)
    with pytest.raises(MixError, match=words):
        attach(trainer, tmp_path / "run", Still(**SHARES))


def test_a_trainer_with_a_sampler_of_its_own_is_refused(tmp_path):
    trainer = make_trainer(tmp_path / "t", make_lora())
    trainer.__class__ = Sampled
    with pytest.raises(MixError, match="Sampled has a sampler of its own"):
        attach(trainer, tmp_path / "run", Still(**SHARES))


def test_data_that_can_not_be_mixed_are_refused(tmp_path):
    rows = [row for row in make_rows(24) if row.source == "apples"]
    trainer = make_trainer(tmp_path / "t", make_lora(), RowDataset(rows))
    with pytest.raises(MixError, match="two sources or more"):
        fastsft.attach(trainer, make_targets(), out=tmp_path / "run", steering=Steering(policy=Still(apples=1.0)))
    rows = make_rows(24)
    trainer = make_trainer(tmp_path / "t", make_lora(), PackedDataset(rows, pack(rows, 48, seed=0)), width=48)
    with pytest.raises(MixError, match="pack each source by itself"):
        attach(trainer, tmp_path / "run", Still(**SHARES))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"apples": 0.5, "bricks": 0.6, "clouds": 0.1}, r"policy 'wrong' decided at step 1: .* sum to one"),
        ({"apples": 1.0}, "leaves out 'bricks'"),
    ],
)
def test_a_policys_answer_that_is_no_mix_stops_the_run_with_a_sentence(tmp_path, weights, words):
    class Wrong(Still):
        def decide(self, feedback):
            return Decision(weights=weights, signal={}, error={}, why="")

    trainer = make_trainer(tmp_path / "t", make_lora())
    attach(trainer, tmp_path / "run", Wrong(**SHARES))
    with pytest.raises(MixError, match=words):
        trainer.train()


def test_a_run_file_that_is_steered_needs_its_policy(tmp_path):
    path = write_run_file(tmp_path, mix={"policy": "align"})
    with pytest.raises(ConfigError, match=r"start it by fastsft\.run"):
        run_file(load_config(path), root=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_source_whose_rows_are_all_too_long_is_named(tmp_path):
    path = write_run_file(tmp_path, mix={"policy": "follow"}, sections={"train": {"max_length": 12}})
    for line in (tmp_path / "bricks.jsonl",):
        rows = [json.loads(text) for text in line.read_text().splitlines()]
        words = " ".join(["w5"] * 20)
        line.write_text("".join(json.dumps({**row, "response": words}) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="source 'bricks' has no row left to draw"):
        run_file(load_config(path), root=tmp_path, steering=Steering(policy=Follow()))


def test_keys_of_the_mix_that_are_the_policys_own_are_kept_for_it(tmp_path):
    raw = {"model": "m", "sources": {"a": {"path": "a"}}, "targets": {"a": {"path": "b"}}, "out": "o"}
    mix = parse_config({**raw, "mix": {"policy": "align", "unit": "rows", "eta": 0.5}}).mix
    assert (mix.unit, mix.settings) == ("rows", {"eta": 0.5})
    again = parse_config({**raw, "mix": {"policy": "align", "unit": "rows", "settings": {"eta": 0.5}}}).mix
    assert again == mix
    for section, words in (
        ({"eta": 0.5}, "mix.settings needs a policy"),
        ({"max_epochs": 2}, "mix.max_epochs needs a policy|must be float"),
        ({"policy": "align", "unit": "bytes"}, "tokens, rows"),
        ({"policy": "align", "max_tokens": -5}, "positive"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_config({**raw, "mix": section})
    with pytest.raises(ConfigError, match="lagged, exact"):
        parse_config({**raw, "conflict": {"resolver": "upgrad", "apply": "soon"}})


def test_the_record_of_a_run_that_is_not_steered_has_no_mix(tmp_path):
    trainer = make_trainer(tmp_path / "t", make_lora())
    fastsft.attach(trainer, make_targets(), out=tmp_path / "run")
    trainer.train()
    assert not [e for e in Record.open(tmp_path / "run").events() if e["event"] in ("mix", "conflict")]
