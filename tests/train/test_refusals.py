"""What can't be used is refused in one sentence: the place, what came, and the way out."""

import json
import re

import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset

import fastsft
from fastsft.data import DataError
from fastsft.record import Record, RecordError
from fastsft.train import AttachError, ConfigError, load_config, parse_config
from fastsft.train.attach import _check
from fastsft.train.demo import demo
from tests.train._run_file import write_run_file
from tests.train._support import attach, make_lora, make_model, make_rows, make_tokenizer, make_trainer

GOOD = {
    "model": "m",
    "sources": {"a": {"path": "a.jsonl"}},
    "targets": {"maths": {"path": "b.jsonl"}},
    "out": "runs/a",
}


def test_a_good_run_file_passes():
    config = parse_config(
        {**GOOD, "train": {"steps": 3, "learning_rate": 1, "alpha": 2}, "attribution": {"store": True, "exact": None}}
    )
    assert config.train.steps == 3
    assert config.attribution.store is True
    assert config.attribution.exact is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"modle": "m"}, "unknown key `modle`: did you mean `model`?"),
        ({"train": {"lerning_rate": 1.0}}, "unknown key `train.lerning_rate`: did you mean `train.learning_rate`?"),
        ({"train": {"zzz": 1}}, "unknown key `train.zzz`: known keys: method, rank,"),
        ({"sources": {"a": {"file": "a.jsonl"}}}, "unknown key `sources.a.file`"),
        ({"sources": {"a": {}}}, "the key `sources.a.path` is missing"),
        ({"sources": {"a": "a.jsonl"}}, "sources.a must be a mapping of keys, got 'a.jsonl'"),
        ({"sources": {}}, "`sources` must name at least one entry"),
        ({"targets": ["a"]}, "`targets` must name at least one entry: targets: {a_name: {path: ...}}"),
        ({"train": 3}, "train must be a mapping of keys, got 3"),
        ({"attribution": [1]}, "attribution must be a mapping of keys, got [1]"),
        ({"attribution": {"store": 1}}, "attribution.store must be bool: got 1"),
        (
            {"attribution": {"store": True, "samples": False}},
            "attribution: `store` keeps the sketches of samples, so it needs `samples: true` and a `sketch_size` above",
        ),
        ({"attribution": {"store": True, "sketch_size": 0}}, "above 0: got samples=True, sketch_size=0"),
        ({"attribution": {"store_format": "fp4"}}, "`store_format` must be one of bf16, int8, 1bit: got 'fp4'"),
        ({"attribution": {"refresh_every": 0}}, "attribution: `refresh_every` must be at least 1: got 0"),
        ({"attribution": {"refresh_every": "often"}}, "attribution.refresh_every must be int: got 'often'"),
        ({"mix": {"eta": 0.3}}, "mix.settings needs a policy that draws by a mix"),
        ({"mix": {"policy": "align", "unit": "bytes"}}, "mix: `unit` must be one of tokens, rows: got 'bytes'"),
        ({"conflict": {"aply": "exact"}}, "unknown key `conflict.aply`: did you mean `conflict.apply`?"),
        ({"train": {"learning_rate": "1e-3"}}, "must be float: got '1e-3'. Write a number with a point, 1.0e-3."),
        ({"train": {"learning_rate": -1.0}}, "train.learning_rate must be positive: got -1.0"),
        ({"train": {"weight_decay": "1e-2"}}, "train.weight_decay must be float: got '1e-2'"),
        ({"train": {"steps": 0}}, "train.steps must be a whole number, at least 1: got 0"),
        ({"train": {"steps": 2.5}}, "train.steps must be int: got 2.5"),
        ({"train": {"packing": 1}}, "train.packing must be bool: got 1"),
        ({"train": {"alpha": "x"}}, "train.alpha must be float or nothing: got 'x'"),
        ({"train": {"optimizer": "adafactor"}}, "train.optimizer must be one of adamw, sgd: got 'adafactor'"),
        ({"train": {"over_long": "cut"}}, "train.over_long must be one of error, drop, truncate: got 'cut'"),
    ],
)
def test_a_bad_key_is_named_with_the_way_out(change, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse_config({**GOOD, **change})


@pytest.mark.parametrize("key", ["model", "sources", "targets", "out"])
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=f"the key `{key}` is missing"):
        parse_config({name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"model: [", "is not YAML in UTF-8: .*line 1.*Mend that place"),
        (b"model: \xff\xfe", "is not YAML in UTF-8"),
        (b"- a\n- b\n", "a run file is a mapping of keys, got list"),
        (b"", "a run file is a mapping of keys, got NoneType"),
        (yaml.safe_dump({**GOOD, "trian": {}}).encode(), "run.yaml: unknown key `trian`: did you mean `train`"),
    ],
)
def test_a_bad_run_file_is_named(tmp_path, content, sentence):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        load_config(path)


def test_a_folder_is_no_run_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(ConfigError, match="is no file: name a run file"):
            load_config(path)


GOOD_ROW = '{"id": "x", "prompt": "w2 w3", "response": "w4"}'
BAD_DATA = {
    "not json": ("{prompt", "apples.jsonl, row 1: not JSON .* Mend or remove the line"),
    "missing field": (
        '{"prompt": "w2", "completion": "w3"}',
        'row 1: no field "response"; the nearest is "completion"',
    ),
    "empty response": ('{"prompt": "w2", "response": " "}', "row 1: the response is empty.*fill it in or drop the row"),
    "duplicate id": (f"{GOOD_ROW}\n{GOOD_ROW}", "rows 1 and 2 both have the id 'x'; give one of them another id"),
    "id of another source": (
        '{"id": "bricks-0", "prompt": "w2", "response": "w3"}',
        "'bricks-0' appears in source 'apples' and in source 'bricks'.*give each an id of its own",
    ),
    "over-long": (
        json.dumps({"id": "long", "prompt": "w2 " * 60, "response": "w3"}),
        "sample 'long' of source 'apples' has 62 tokens, `max_length` is 48; raise `max_length`, or choose",
    ),
    "empty file": ("", "source 'apples' has no rows: add rows to it, or take the source out"),
}


@pytest.mark.parametrize(("content", "sentence"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_is_refused_before_training(tmp_path, content, sentence):
    path = write_run_file(tmp_path, sections={"train": {"over_long": "error"}})
    (tmp_path / "apples.jsonl").write_text(content)
    with pytest.raises(DataError, match=sentence):
        fastsft.run(load_config(path), root=tmp_path)
    assert not (tmp_path / "out/record.jsonl").exists()


def test_a_missing_data_file_is_named_with_its_neighbour(tmp_path):
    path = write_run_file(tmp_path, targets={"maths": {"path": "math.jsonl"}})
    with pytest.raises(DataError, match=r"math.jsonl: no such file.*the nearest name is 'maths.jsonl'"):
        fastsft.run(load_config(path), root=tmp_path)


def test_a_missing_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = write_run_file(tmp_path, model="modle")
    with pytest.raises(ConfigError, match=r"model 'modle' can't be loaded .*correct the name, or name its folder"):
        fastsft.run(load_config(path), root=tmp_path)


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded(tmp_path):
    path = write_run_file(tmp_path, model="absent")
    Record.create(tmp_path / "out").append("start", 0, schema=1)
    before = (tmp_path / "out/record.jsonl").read_text()
    with pytest.raises(RecordError, match=r"already holds a run. Choose another `out`, resume it, or delete"):
        fastsft.run(load_config(path), root=tmp_path)
    with pytest.raises(RecordError, match="already holds a run"):
        demo(tmp_path / "out")
    assert (tmp_path / "out/record.jsonl").read_text() == before
    assert not (tmp_path / "out/config.yaml").exists()


def test_attach_refuses_a_folder_that_holds_a_run_or_another_schema(tmp_path):
    trainer = make_trainer(tmp_path / "trainer", make_lora())
    Record.create(tmp_path / "old").append("start", 0, schema=99, versions={"fastsft": "9.9"})
    with pytest.raises(RecordError, match=r"has schema 99, this fastsft reads schema 1. Read it with .*9\.9"):
        attach(trainer, tmp_path / "old")
    Record.create(tmp_path / "same").append("start", 0, schema=1)
    attach(trainer, tmp_path / "same")
    with pytest.raises(RecordError, match="already holds a run"):
        trainer.train()


def items(rows, **more):
    return [{"input_ids": row.input_ids, "labels": row.labels, **more} for row in rows]


def test_a_streaming_dataset_is_refused(tmp_path):
    dataset = IterableDataset.from_generator(lambda: iter(items(make_rows(4))))
    trainer = make_trainer(tmp_path, make_lora(), dataset)
    with pytest.raises(
        AttachError, match=r"a length and numbered rows: got IterableDataset. Load it without streaming"
    ):
        attach(trainer, tmp_path / "run")


def test_torch_compile_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, make_lora())
    trainer.args.torch_compile = True
    with pytest.raises(AttachError, match=r"torch_compile=True leaves out module hooks.*train with it off"):
        attach(trainer, tmp_path / "run")


def test_data_parallel_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, make_lora())
    trainer.args._n_gpu = 2
    with pytest.raises(AttachError, match="DataParallel: start one process a GPU instead"):
        attach(trainer, tmp_path / "run")


@pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_training_is_refused(tmp_path, flag):
    trainer = make_trainer(tmp_path, make_lora())
    _check(trainer)
    setattr(trainer, flag, True)
    with pytest.raises(AttachError, match="train on one process or under DDP"):
        attach(trainer, tmp_path / "run")


def test_another_optimizer_is_refused_before_the_first_step(tmp_path):
    model = make_lora()
    before = [weight.detach().clone() for weight in model.parameters()]
    trainer = make_trainer(tmp_path / "trainer", model, optim="adafactor")
    attach(trainer, tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"got Adafactor. With a transformers trainer set optim='adamw_torch' or 'sgd'"
    ):
        trainer.train()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_a_store_of_no_layer_is_refused_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path / "trainer", make_model())
    attach(trainer, tmp_path / "run", store=True, narrow=0, exact=None)
    with pytest.raises(ValueError, match=r"`store` keeps sketches of exactly followed layers.*or leave `store` out"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_without_trainable_layers_is_refused(tmp_path):
    model = make_model()
    for name, weight in model.named_parameters():
        weight.requires_grad = "norm" in name
    trainer = make_trainer(tmp_path / "trainer", model)
    attach(trainer, tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"no trainable linear layer to follow. Unfreeze some weights, or add adapters"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ({"maths": []}, "target 'maths' has no rows: give it held-out samples or leave it out"),
        ({"maths": [{"prompt": "w2", "response": "w3"}]}, "the trainer has no processing_class to tokenise it with"),
        ({"maths": [{"input_ids": [2, 3], "labels": [-100, -100]}]}, "row 0 has no response token to judge by"),
    ],
)
def test_bad_targets_are_refused(tmp_path, targets, sentence):
    with pytest.raises(ValueError, match=sentence):
        attach(make_trainer(tmp_path, make_lora()), tmp_path / "run", targets=targets)


def test_no_targets_at_all_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, make_lora())
    with pytest.raises(ValueError, match="`targets` is empty: name at least one ability"):
        fastsft.attach(trainer, {}, out=tmp_path / "run")


def test_a_long_target_is_cut_with_a_note(tmp_path):
    trainer = make_trainer(tmp_path / "trainer", make_lora(), max_steps=1)
    trainer.processing_class = make_tokenizer()
    long = [{"prompt": "w2", "response": "w3 " * 80}, {"prompt": "w2", "response": "w4"}]
    run = attach(trainer, tmp_path / "run", targets={"maths": long})
    trainer.train()
    notes = [event["text"] for event in run.record.events("note")]
    assert notes == ["target maths, over 64 tokens: 0 rows dropped, 1 cut."]


def test_a_target_row_is_named_by_its_place(tmp_path):
    trainer = make_trainer(tmp_path, make_lora())
    trainer.processing_class = make_tokenizer()
    for row, sentence in (({"prompt": "w2"}, 'no field "response"'), ("w2", "a row must be an object")):
        with pytest.raises(DataError, match=f"target 'maths', row 2: {sentence}"):
            attach(trainer, tmp_path / "run", targets={"maths": [{"prompt": "w2", "completion": "w3"}, row]})


def test_two_samples_of_one_id_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, make_lora(), Dataset.from_list(items(make_rows(4), id="twin")))
    with pytest.raises(ValueError, match="sample id 'twin' stands twice in the training set: make the ids distinct"):
        attach(trainer, tmp_path / "run")


def test_text_that_is_not_tokenised_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, make_lora(), [{"prompt": "w2", "response": "w3"}] * 4)
    with pytest.raises(ValueError, match=r"no `input_ids` .*tokenise it first, or use TRL's SFTTrainer"):
        attach(trainer, tmp_path / "run")


def test_a_collator_put_in_later_is_noticed(tmp_path):
    trainer = make_trainer(tmp_path / "trainer", make_lora())
    attach(trainer, tmp_path / "run")
    trainer.get_train_dataloader = lambda: type(trainer).get_train_dataloader(trainer)
    with pytest.raises(RuntimeError, match=r"came without the numbers of its samples.*Attach last"):
        trainer.train()


def padded_on_the_left(features):
    width = max(len(feature["input_ids"]) for feature in features)
    gaps = [width - len(feature["input_ids"]) for feature in features]
    pairs = list(zip(features, gaps, strict=True))
    return {
        "input_ids": torch.tensor([[0] * gap + feature["input_ids"] for feature, gap in pairs]),
        "labels": torch.tensor([[-100] * gap + feature["labels"] for feature, gap in pairs]),
        "attention_mask": torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps]),
    }


def test_scores_of_tokens_padded_on_the_left_are_refused(tmp_path):
    """They would be booked to the wrong tokens; samples as a whole are right on either side."""
    for tokens in (False, True):
        trainer = make_trainer(tmp_path / "trainer", make_lora(), collator=padded_on_the_left)
        run = attach(trainer, tmp_path / f"run{tokens}", tokens=tokens)
        if tokens:
            with pytest.raises(AttachError, match=r"set `padding_side='right'` .* or attribute with tokens=False"):
                trainer.train()
        else:
            trainer.train()
            assert max(event["identity_error"] for event in run.record.events("step")) < 1e-5


def test_only_a_trainer_can_be_attached(tmp_path):
    with pytest.raises(TypeError, match=r"must be a transformers Trainer .*: got int. For a loop of your own see"):
        fastsft.attach(3, {}, out=tmp_path)
