"""The benchmark of mixing: its worlds hold what they promise, its arms are fair, its numbers mean what they say."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import table
from benchmarks.system import mixing, mixing_all, mixing_arms, mixing_real, mixing_run, mixing_search, mixing_worlds
from benchmarks.system import mixing_statistics as stats
from fastsft.data import DataError, Row
from fastsft.tasks import MixError, MixPolicy
from fastsft.train.config import ConfigError
from fastsft.train.sampler import Draws


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Worlds on a base model of 30 steps."""
    monkeypatch.setattr(mixing_worlds, "SETTING", mixing_worlds.SETTING._replace(base_steps=30, refresh_every=3))
    mixing_run._case.cache_clear()
    yield
    mixing_run._case.cache_clear()


def answers(rows: list[Row]) -> dict[tuple[int, int], set[int]]:
    """What rows answer to a symbol under a mark."""
    found: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        ids, half = row.input_ids, mixing_worlds.LENGTH
        for symbol, answer in zip(ids[1 : 1 + half], ids[-half:], strict=True):
            found.setdefault((ids[0], symbol), set()).add(answer)
    return found


# worlds


@pytest.mark.parametrize("name", mixing_worlds.WORLDS)
def test_no_prompt_of_a_world_is_in_two_of_its_parts(name: str) -> None:
    data = mixing_worlds.make_data(name, seed=3)
    parts = [*data.sources.values(), *data.validation.values(), *data.test.values()]
    prompts = [tuple(row.input_ids[: mixing_worlds.LENGTH + 1]) for rows in parts for row in rows]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", mixing_worlds.WORLDS)
def test_a_source_has_the_rows_and_tokens_that_its_plan_says(name: str) -> None:
    data, plan = mixing_worlds.make_data(name, seed=0), mixing_worlds.plan_of(name)
    assert list(data.sources) == list(plan.sources)
    for source, rows in data.sources.items():
        assert {row.source for row in rows} == {source}
        assert sum(row.num_supervised for row in rows) == mixing_run.sizes_of(f"world:{name}")[source]
        assert len({row.id for row in rows}) == len(rows) == plan.sources[source].rows


def test_a_world_is_its_seed() -> None:
    one, again, other = (mixing_worlds.make_data("tiny", seed) for seed in (0, 0, 1))
    assert one == again
    assert one.test["maths"] != other.test["maths"]


def test_clash_contradicts_maths_and_no_other_source_does() -> None:
    data = mixing_worlds.make_data("contradiction", seed=0)
    asked, clash = answers(data.test["maths"]), answers(data.sources["clash"])
    both = asked.keys() & clash.keys()
    # two tables of 64 answers agree by chance once in 64
    assert sum(asked[key] == clash[key] for key in both) < len(both) / 10
    maths = answers(data.sources["maths"])
    assert all(maths[key] == asked[key] for key in asked.keys() & maths.keys())


def test_noise_teaches_no_answer_and_a_skill_without_noise_one() -> None:
    data = mixing_worlds.make_data("noise", seed=0)
    several = {source: [len(found) for found in answers(rows).values()] for source, rows in data.sources.items()}
    assert max(several["code"]) == 1
    # 64 symbols drawn many times each
    assert statistics.fmean(several["babble"]) > 20


def test_the_textbook_helps_two_abilities() -> None:
    data = mixing_worlds.make_data("transfer", seed=0)
    taught = {row.input_ids[0] for row in data.sources["textbook"]}
    for ability in ("maths", "code"):
        shared = [row for row in data.test[ability] if row.input_ids[0] in taught]
        assert 0.4 < len(shared) / len(data.test[ability]) < 0.8
    assert not taught & {row.input_ids[0] for row in data.test["general"]}


def test_the_feed_turns_wrong_where_a_run_with_the_worlds_seed_has_drawn_its_good_rows() -> None:
    from fastsft.tasks import Mix
    from fastsft.train.sampler import MixStream

    data = mixing_worlds.make_data("shift", seed=5)
    rows = [row for source in ("code", "feed") for row in data.sources[source]]
    items = {name: [at for at, row in enumerate(rows) if row.source == name] for name in ("code", "feed")}
    mix, draws = Mix({"code": 0.5, "feed": 0.5}), Draws(seed=5)
    stream = MixStream(items, [row.num_supervised for row in rows], mix, batch=16, steps=50, draws=draws)
    fed = [rows[item] for item in stream if rows[item].source == "feed"]
    turns = mixing_worlds.plan_of("shift").sources["feed"].turns_after
    assert turns is not None
    assert len(fed) == 400 > turns
    asked = answers(data.test["maths"])
    for part, right in ((fed[:turns], True), (fed[turns:], False)):
        found = answers(part)
        shared = found.keys() & asked.keys()
        agree = sum(found[key] == asked[key] for key in shared) / len(shared)
        assert (agree == 1) if right else (agree < 0.1)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(DataError, match="difficulty"):
        mixing_run.train({"setting": "world:difficult", "seed": 0, "arm": {}})
    with pytest.raises(DataError, match="real or world:NAME"):
        mixing_run.train({"setting": "rael", "seed": 0, "arm": {}})


def test_the_real_case_has_its_rows_and_none_of_them_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("ROWS", 8), ("VALIDATION", 3), ("TEST", 4)):
        monkeypatch.setattr(mixing_real, name, number)
    try:
        data, _, _ = mixing_real.load()
    except ConfigError:
        pytest.skip("the shared data are not there")
    assert [len(rows) for rows in data.sources.values()] == [8] * 5
    parts = [*data.sources.values(), *data.validation.values(), *data.test.values()]
    ids = [row.id for rows in parts for row in rows]
    assert len(set(ids)) == len(ids) == 5 * 8 + 3 * (3 + 4)
    assert max(len(row.input_ids) for rows in parts for row in rows) <= mixing_real.LONGEST


# trainings


def job(arm: Mapping[str, Any], **numbers: float) -> dict[str, Any]:
    return {"setting": "world:contradiction", "seed": 0, "arm": dict(arm), "numbers": {"tokens": 1200, **numbers}}


def test_books_that_steer_nothing_leave_the_run_as_it_is(quick: None) -> None:
    uniform = mixing_arms.arm_of("uniform", mixing_run.sizes_of("world:contradiction"), None)
    assert uniform is not None
    static, booked = mixing_run.train(job(uniform)), mixing_run.train(job({"policy": "fixed"}))
    assert booked["test"] == static["test"]
    assert booked["spent"] == static["spent"]
    assert len(booked["path"]) > 1
    assert stats.path_length(booked) == 0
    json.dumps(booked)


def test_arms_spend_the_same_tokens_and_are_measured_at_the_same_marks(quick: None) -> None:
    one = mixing_run.train(job({"mix": {"maths": 1.0, "code": 0.0, "general": 0.0, "clash": 0.0}}))
    other = mixing_run.train(job({"policy": "random weights"}))
    assert one["tokens"] == other["tokens"]
    assert sum(one["spent"].values()) == one["tokens"][-1] == one["spent"]["maths"]
    # no more than the batch over the budget
    assert 1200 <= one["tokens"][-1] < 1200 + 16 * mixing_worlds.LENGTH
    assert stats.path_length(other) > 0.5
    # the source of an ability lowers its loss, and no other's
    fall = {ability: one["initial"][ability] - one["test"][-1][ability] for ability in one["initial"]}
    assert max(fall, key=lambda ability: fall[ability]) == "maths"
    assert fall["maths"] > 0.2


def test_a_pilot_spends_its_share(quick: None) -> None:
    pilot = mixing_run.train(job({"mix": {"maths": 0.5, "code": 0.5, "general": 0.0, "clash": 0.0}}, share=0.25))
    assert 300 <= pilot["tokens"][-1] < 300 + 16 * mixing_worlds.LENGTH
    assert pilot["steps"] == math.ceil(300 / (16 * mixing_worlds.LENGTH))


# arms


@pytest.mark.parametrize("name", mixing_arms.STEERED)
def test_every_steered_arm_can_be_made(name: str) -> None:
    sizes = {"a": 100, "b": 300}
    arm = mixing_arms.arm_of(name, sizes, {"a": 0.3, "b": 0.7})
    assert arm is not None
    steering = mixing_arms.steering_of(json.loads(json.dumps(arm)), Draws(), {"a": "x", "b": "y"}, ["x", "y"])
    assert isinstance(steering.policy, MixPolicy)
    assert (steering.resolver is not None) == ("upgrad" in name)


def test_an_arm_that_starts_from_a_predicted_mix_waits_for_it() -> None:
    assert mixing_arms.arm_of("align from predicted", {"a": 1, "b": 2}, None) is None
    arm = mixing_arms.arm_of("align from predicted", {"a": 1, "b": 2}, {"a": 0.25, "b": 0.75})
    assert arm is not None
    assert arm["start"] == {"a": 0.25, "b": 0.75}
    with pytest.raises(MixError, match="there is no arm 'alinge'"):
        mixing_arms.check_names(["alinge"])


def test_static_arms_go_by_size() -> None:
    sizes = {"a": 100, "b": 400}
    assert mixing_arms.static_mix("uniform", sizes).weights == {"a": 0.5, "b": 0.5}
    assert mixing_arms.static_mix("proportional", sizes).weights == {"a": 0.2, "b": 0.8}
    assert mixing_arms.static_mix("temperature 2", sizes).weights == pytest.approx({"a": 1 / 3, "b": 2 / 3})


# search


def test_a_lattice_holds_uniform_and_uniform_without_each_source() -> None:
    mixes = mixing_search.lattice(["a", "b", "c"], 2)
    assert all(math.isclose(sum(mix.values()), 1) and min(mix.values()) >= 0 for mix in mixes)
    assert len({mixing_search.name_of(mix) for mix in mixes}) == len(mixes) == 1 + 3 + 6
    assert mixes[0] == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert {"a": 0.0, "b": 0.5, "c": 0.5} in mixes


def test_a_neighbour_gives_what_it_has_and_no_more() -> None:
    found = mixing_search.neighbours({"a": 0.04, "b": 0.96, "c": 0.0}, 0.1)
    assert {"a": 0.0, "b": 1.0, "c": 0.0} in [mixing_search_rounded(mix) for mix in found]
    assert len(found) == 4  # c has nothing to give
    assert all(math.isclose(sum(mix.values()), 1) and min(mix.values()) >= 0 for mix in found)


def mixing_search_rounded(mix: Mapping[str, float]) -> dict[str, float]:
    return {name: round(weight, 9) for name, weight in mix.items()}


def test_the_oracle_is_chosen_by_validation_and_not_by_test() -> None:
    good_on_test = run([5.0, 5.0, 5.0], test=[1.0, 1.0, 1.0])
    good_on_validation = run([2.0, 2.0, 2.0], test=[3.0, 3.0, 3.0])
    assert mixing_search.best_of({"a": {100: good_on_test}, "b": {100: good_on_validation}}) == "b"
    # a mix that was not tried on all seeds takes no part
    assert mixing_search.best_of({"a": {100: good_on_test, 101: good_on_test}, "b": {100: good_on_validation}}) == "a"


# statistics


def run(losses: list[float], *, test: list[float] | None = None, tokens: list[int] | None = None) -> dict[str, Any]:
    """A run's result with one ability."""
    return {
        "initial": {"x": 6.0},
        "tokens": tokens or [100 * at for at in range(1, len(losses) + 1)],
        "validation": [{"x": loss} for loss in losses],
        "test": [{"x": loss} for loss in (test or losses)],
        "steps": 10,
        "spent": {"a": 1},
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "path": [],
        "device": "cpu",
    }


def test_a_final_loss_is_the_mean_of_the_last_three_evaluations() -> None:
    assert stats.final(run([0.0, 1.0, 2.0, 6.0]), "test") == {"x": 3.0}


def test_an_interval_is_of_the_means_of_all_draws_of_seeds() -> None:
    # of two seeds: 0, 1/2, 1/2, 1
    assert stats.paired([0.0, 1.0]) == pytest.approx([0.5, *np.quantile([0, 0.5, 0.5, 1], [0.025, 0.975])])
    assert stats.paired([-0.25] * 7) == [-0.25] * 3


def test_a_share_of_the_gap_is_of_means_and_none_where_there_is_no_gap() -> None:
    share = stats.share_of_gap([1.5, 3.0], [2.0, 4.0], [1.0, 2.0])
    assert share == pytest.approx([0.5] * 3)
    assert stats.share_of_gap([1.0, 1.0], [1.0, 2.0], [1.1, 1.0]) is None


def test_tokens_to_a_loss_lie_on_the_line_between_evaluations_or_are_none() -> None:
    found = run([4.0, 2.0])
    assert stats.tokens_to(found, 3.0) == 150
    assert stats.tokens_to(found, 5.0) == 50  # from the loss before the first step, 6
    assert stats.tokens_to(found, 1.0) is None


def test_a_path_is_as_long_as_the_mix_moved() -> None:
    mixes = [{"a": 0.5, "b": 0.5}, {"a": 0.75, "b": 0.25}, {"a": 0.5, "b": 0.5}]
    assert stats.path_length({"path": [{"weights": mix} for mix in mixes]}) == 0.5


def test_an_arm_is_set_against_uniform_of_the_same_seed() -> None:
    uniform = {seed: run([float(seed + 4)] * 3) for seed in (0, 1)}
    oracle = {seed: run([float(seed + 2)] * 3) for seed in (0, 1)}
    arm = {seed: {**run([float(seed + 3)] * 3), "cpu_seconds": 1.5} for seed in (0, 1, 2)}
    row = stats.arm_row(arm, uniform, oracle)
    assert row["seeds"] == [0, 1]
    assert row["loss"] == [3.0, 4.0]
    assert row["minus_uniform"] == [-1.0] * 3
    assert row["closed"] == pytest.approx([0.5] * 3)
    assert row["relative"] == pytest.approx([-1 / 4.5] * 3)
    assert row["lost"] == [-1.0, -1.0]
    assert row["overhead"] == pytest.approx(1.5)


# the race


def fake_launch(work: str, jobs: Mapping[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    """Losses as if one source harmed, and each other one helped the ability of its name; keeps what it did."""
    path = out / "finished.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    known = mixing.finished(out)
    lines = [] if known else [json.dumps({"schema": 1, "work": work})]
    for id, told in jobs.items():
        if id not in known:
            mix = told["arm"].get("mix", {"maths": 0.3, "code": 0.3, "general": 0.3, "clash": 0.1})
            tokens = 1000 * told["numbers"]["share"]
            loss = {
                name: 3 * math.exp(-tokens * mix[name] / 300) + mix["clash"] + 0.001 * told["seed"]
                for name in ("maths", "code", "general")
            }
            known[id] = {**run([1.0, 1.0, 1.0]), "validation": [loss] * 3, "test": [loss] * 3, "initial": loss}
            lines.append(json.dumps({"id": id, "job": "", "seconds": 1.0, "result": known[id]}))
    with path.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))
    more["say"](f"{len(lines)} finished")
    return {id: known[id] for id in jobs}


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("race")
    asked = mixing.Race(settings=("world:contradiction",), seeds=2, selection=1, grid=2, numbers={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "launch", fake_launch)
        return mixing.race(asked, place, None, processes=1, budget=None)


def test_a_race_has_every_arm_and_an_oracle_that_drops_the_harmful_source(raced: list[dict[str, Any]]) -> None:
    by_name = {row["provider"]: row for row in raced}
    assert list(by_name) == list(mixing_arms.ARMS)
    oracle = by_name["oracle"]
    assert oracle["mix"]["clash"] < 0.02
    assert max(oracle["mix"].values()) < 0.45
    assert oracle["relative"][2] < 0
    assert oracle["closed"] == pytest.approx([1.0] * 3)
    # uniform, four without a source, ten of the lattice, two rounds
    assert oracle["search"]["runs"] > 15
    assert all(mix["clash"] < 0.2 for mix in by_name["predicted"]["mixes"])
    assert by_name["uniform"]["closed"] == [0.0, 0.0, 0.0]


def test_the_tables_of_a_race_name_every_arm(raced: list[dict[str, Any]]) -> None:
    never = {**raced[-1], "provider": "never", "to_uniform": [None, None, 0.5]}
    details = table.mixing_details([*raced, never])
    assert "not reached" in details.splitlines()[-1]
    summary = table.mixing_summary(raced)
    assert all(f"| {name} |" in summary for name in mixing_arms.ARMS)
    assert "contradiction: uniform ends at" in summary


def test_a_race_writes_its_rows_and_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "launch", fake_launch)
    out, arms = tmp_path / "rows.jsonl", ("uniform", "align")
    asked = mixing.Race(settings=("world:contradiction", "world:tiny"), seeds=2, arms=arms, numbers={})
    monkeypatch.setattr(mixing, "sizes_of", lambda setting: dict.fromkeys(("maths", "code", "general", "clash"), 600))
    rows = mixing.race(asked, tmp_path / "work", out, processes=1, budget=None)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["case"], row["provider"]) for row in written] == [
        (case, arm) for case in asked.settings for arm in arms
    ]
    assert all({"op", "case", "machine", "versions", "commit", "date"} <= set(row) for row in written)
    lines = len((tmp_path / "work" / "finished.jsonl").read_text().splitlines())
    assert mixing.race(asked, tmp_path / "work", None, processes=1, budget=None) == rows
    assert len((tmp_path / "work" / "finished.jsonl").read_text().splitlines()) == lines == 1 + 8


def test_a_cut_search_predicts_nothing_and_keeps_the_arms_that_need_no_search() -> None:
    asked = mixing.Race(settings=("world:tiny",), seeds=2, numbers={})
    study = mixing.Study(asked, {})
    jobs = study.last()
    assert "world:tiny/align/1" in jobs
    assert not any("predicted" in id or "/mix " in id for id in jobs)
    assert study.rows() == []


def test_the_call_for_all_is_one_that_the_race_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(mixing, "race", lambda asked, work, out, **more: taken.append((asked, work, out, more)) or [])
    monkeypatch.setattr(
        "sys.argv", mixing_all.command("worlds", tmp_path, 500.0, 3, ["--seeds", "2", "--arms", "align"])[2:]
    )
    mixing.main()
    ((asked, work, out, more),) = taken
    assert asked.settings == tuple(f"world:{name}" for name in mixing_worlds.WORLDS)
    assert (asked.seeds, asked.arms) == (2, ("uniform", "align"))
    assert more == {"processes": 3, "budget": 500.0}
    assert (work, out) == (tmp_path / "worlds", tmp_path / "mixing_worlds.jsonl")
