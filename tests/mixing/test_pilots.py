"""Pilots: short runs under a mix, the run itself where they are as long, and what is known of a run before them."""

import dataclasses
import json

import numpy as np
import pytest

from fastsft.attribution import Attribution
from fastsft.mixing.pilots import Ground, train_pilot
from fastsft.mixing.static import Static
from fastsft.record import Record
from fastsft.tasks import MixError
from fastsft.train.config import MixConfig, load_config
from fastsft.train.loop import fine_tune, load_model, prepare
from fastsft.train.steering import Steering
from tests.train._run_file import write_run_file

UNEVEN = {"apples": 0.5, "bricks": 0.5, "clouds": 0.0}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pilots")
    path = write_run_file(folder, sections={"train": {"steps": 8, "warmup_steps": 4, "learning_rate": 1e-2}})
    return Ground.of(load_config(path), folder)


def job(ground, share=0.5, **weights):
    mix = {**dict.fromkeys(ground.sources, 0.0), **weights}
    return ground.jobs(np.array([[mix[name] for name in ground.sources]]), share)["pilot-000"]


def with_mix(ground, **settings):
    return dataclasses.replace(
        ground, config=dataclasses.replace(ground.config, mix=MixConfig(policy="static", **settings))
    )


def test_a_pilot_draws_by_its_mix_and_is_the_same_again(ground):
    asked = job(ground, **UNEVEN)
    assert (asked["steps"], asked["warmup_steps"]) == (4, 2)
    found = train_pilot(asked)
    assert found["tokens"]["clouds"] == 0
    longest = 9  # supervised tokens of one row
    assert abs(found["tokens"]["apples"] - found["tokens"]["bricks"]) <= 2 * longest
    assert found["before"].keys() == found["after"].keys() == {"maths", "code"}
    assert all(found["before"][name] != found["after"][name] for name in found["after"])
    again = train_pilot(json.loads(json.dumps(asked)))
    assert again["after"] == found["after"]
    other = train_pilot(job(ground, clouds=1.0))
    assert other["before"] == found["before"]
    assert other["after"] != found["after"]


def test_a_pilot_of_all_steps_is_the_run_under_its_mix(ground, tmp_path):
    """The books measure the same losses at the run's end; batches of other shapes round float32 differently."""
    mix = {"apples": 0.5, "bricks": 0.25, "clouds": 0.25}
    config = dataclasses.replace(
        ground.config, mix=MixConfig(policy="static", start=mix), attribution=Attribution(refresh_every=8)
    )
    model, tokenizer = load_model(config.model, ground.root)
    steering = Steering(policy=Static(start=mix), draws=config.mix.draws(config.train.seed))
    prepared = prepare(config, tokenizer, ground.root)
    fine_tune(config, prepared, model, tokenizer, out=tmp_path / "run", steering=steering, report=False)
    refreshes = list(Record.open(tmp_path / "run").events("refresh"))
    found = train_pilot(job(ground, share=1.0, **mix))
    for when, refresh in (("before", refreshes[0]), ("after", refreshes[-1])):
        assert found[when] == pytest.approx(refresh["losses"], abs=2e-6)
    assert refreshes[-1]["step"] == found["steps"] == 8


def test_sizes_are_counted_in_what_shares_are(ground):
    assert ground.sources == ["apples", "bricks", "clouds"]
    assert list(ground.items.values()) == [12, 12, 12]
    assert ground.sizes == list(ground.tokens.values())
    assert with_mix(ground, unit="rows").sizes == [12, 12, 12]


def test_largest_shares_are_what_the_epochs_hold(ground):
    """8 steps of 4 rows are 32 of 36: an epoch of 12 is 12/32 of them."""
    assert ground.most() == [1.0, 1.0, 1.0]
    assert with_mix(ground, unit="rows", max_epochs=1.5).most() == [18 / 32] * 3
    tokens = np.array(list(ground.tokens.values()))
    expected = 2 * tokens / (32 * tokens.sum() / 36)
    np.testing.assert_allclose(with_mix(ground, max_epochs=2).most(), np.minimum(expected, 1), rtol=1e-12)
    with pytest.raises(MixError, match=r"max_epochs 0.5 of all 36 items .* fewer than the 32 .* raise mix.max_epochs"):
        with_mix(ground, unit="rows", max_epochs=0.5).most()


def test_packed_lines_are_counted_source_by_source(tmp_path):
    path = write_run_file(tmp_path, sections={"train": {"packing": True}}, mix={"policy": "static", "unit": "rows"})
    packed = Ground.of(load_config(path), tmp_path)
    assert all(3 <= lines < 8 for lines in packed.items.values())  # 12 rows of 6 to 16 tokens in lines of 48
    found = train_pilot(job(packed, share=0.1, bricks=1.0))
    assert found["tokens"]["apples"] == found["tokens"]["clouds"] == 0 < found["tokens"]["bricks"]


def test_jobs_follow_nothing_but_what_trains_a_pilot(tmp_path):
    """Books, policy, resolver and folder may change between two plans; data, model and training may not."""
    path = write_run_file(tmp_path)
    config, mixes = load_config(path), np.full((1, 3), 1 / 3)
    before = Ground.of(config, tmp_path).jobs(mixes, 0.5)
    other = dataclasses.replace(
        config, out="elsewhere", attribution=Attribution(refresh_every=7), mix=MixConfig(policy="align", start="later")
    )
    assert Ground.of(other, tmp_path).jobs(mixes, 0.5) == before
    train = dataclasses.replace(config.train, learning_rate=1e-4)
    assert Ground.of(dataclasses.replace(config, train=train), tmp_path).jobs(mixes, 0.5) != before
    lines = (tmp_path / "maths.jsonl").read_text().splitlines()
    (tmp_path / "maths.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert Ground.of(config, tmp_path).digest != before["pilot-000"]["digest"]


def test_a_source_without_a_row_is_refused(tmp_path):
    path = write_run_file(tmp_path)
    config = load_config(path)
    long = json.dumps({"id": "long", "prompt": "w2 " * 60, "response": "w3"})
    (tmp_path / "clouds.jsonl").write_text(long + "\n")
    with pytest.raises(MixError, match=r"source 'clouds' has no row to draw \(over train.max_length, 48 tokens"):
        Ground.of(config, tmp_path)
