from __future__ import annotations

import numpy as np
import pytest

from fastsft.report import conflict, mixing_figures, mixing_tables, summarize, summary_lines, write_report
from fastsft.report.run import read_run


def _rewrite(record, change):
    events = list(record.events())
    for event in events:
        change(event)
    record.path.unlink()
    record.append_all(events)
    return read_run(record.out)


def test_cosine_is_shrunken_by_a_tenth_of_the_mean_norm():
    gram, norms = np.array([[3.0, -1.5], [-1.5, 5.0]]), np.array([4.0, 6.0])
    found = conflict.cosines(gram, norms)
    assert found[0, 1] == found[1, 0] == pytest.approx(-1.5 / np.sqrt((4 + 0.5) * (6 + 0.5)))
    assert found[0, 0] == pytest.approx(3 / 4.5)


def test_cosine_of_noise_stays_near_zero_where_the_plain_one_would_not():
    # a gradient that has all but vanished: its product with another is noise of the size of the noise in both
    gram, norms = np.array([[0.0, 0.01], [0.01, 1.0]]), np.array([1e-4, 1.0])
    assert gram[0, 1] / np.sqrt(1e-4) == 1.0
    assert abs(conflict.cosines(gram, norms)[0, 1]) < 0.05


def test_course_leaves_out_the_refresh_before_the_first_step(run):
    read = read_run(run(mix=True, intervals=4).out)
    course = conflict.course(read)
    assert course.steps == [5, 10, 15, 20]
    shrink = 0.1 * (4.0 + 4.1 + 4.2) / 3
    # the fixture's products swing between -1.3 and -1.7 and end as often at one as at the other
    expected = -1.5 / np.sqrt((4.0 + shrink) * (4.1 + shrink))
    assert course.mean()[0][0, 1] == pytest.approx(expected, rel=1e-12)


def test_mean_error_is_that_of_independent_refreshes_and_wider_for_alike_ones():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=2000)
    slow = np.zeros(2000)
    for at in range(1, 2000):
        slow[at] = 0.6 * slow[at - 1] + noise[at]

    def error(values):
        table = np.zeros((len(values), 2, 2))
        table[:, 0, 1] = values
        return conflict.Course(list(range(len(values))), table).mean()[1][0, 1]

    assert error(noise) == pytest.approx(1 / np.sqrt(2000), rel=0.05)
    # a process of first order: its mean has deviation sigma / (1 - 0.6) / sqrt(n); r is known to 3 %
    assert error(slow) == pytest.approx(1 / 0.4 / np.sqrt(2000), rel=0.1)
    assert error(np.full(5, 0.3)) == 0.0
    assert np.isnan(error(noise[:2]))


def test_a_number_that_was_not_finite_is_left_out_of_its_pair_alone(run):
    record = run(mix=True, intervals=4)

    def lose(event):
        if event["event"] == "refresh" and event["step"] == 10:
            event["gram"][0][1] = event["gram"][1][0] = None

    course = conflict.course(_rewrite(record, lose))
    mean, error = course.mean()
    left = [table[0, 1] for step, table in zip(course.steps, course.values, strict=True) if step != 10]
    assert mean[0, 1] == pytest.approx(np.mean(left))
    assert np.isfinite(mean).all()
    assert np.isfinite(error).all()


def test_opposed_and_harmed_name_only_what_is_sure():
    sure, unsure, unknown = (
        {"value": -0.2, "error": 0.05},
        {"value": -0.2, "error": 0.15},
        {"value": -0.2, "error": None},
    )
    own = {"value": 0.9, "error": 0.01}
    table = {
        "a": {"a": own, "b": sure, "c": unsure},
        "b": {"a": sure, "b": own, "c": unknown},
        "c": {"a": unsure, "b": unknown, "c": own},
    }
    assert conflict.opposed({"cosines": table}) == [("a", "b", sure)]
    assert [pair[:2] for pair in conflict.harmed({"interference": table})] == [("a", "a"), ("b", "b"), ("c", "c")]
    assert conflict.opposed({"cosines": None}) == conflict.harmed({"interference": None}) == []


def test_line_names_the_pair_that_opposes(run):
    summary = summarize(run(mix=True).out)
    line = next(line for line in summary_lines(summary) if line.startswith("conflict"))
    assert line.startswith("conflict: gradient cosine, optimizer metric, below zero: maths and code -0.3")
    for row in summary["conflict"]["cosines"].values():
        for cell in row.values():
            cell["value"] = abs(cell["value"])
    assert not [line for line in summary_lines(summary) if line.startswith("conflict")]


def test_factors_are_summed_up_by_ability(run):
    told = summarize(run(mix=True).out)["conflict"]
    assert (told["resolver"], told["apply"]) == ("upgrad", "lagged")
    assert told["factors"]["maths"] == pytest.approx({"last": 1.2, "mean": 1.15, "least": 1.1, "most": 1.2})


def test_only_what_is_sure_has_a_colour():
    cells = {"a": {"a": {"value": 0.5, "error": 0.1}, "b": {"value": -0.4, "error": 0.1}}, "b": {"a": None, "b": None}}
    row, empty = mixing_tables.effect_rows(cells, bad=-1, limit=1.0, own=False)
    assert [(cell["weight"], cell["sign"], cell["own"]) for cell in row["cells"]] == [
        (50, "helps", True),
        (40, "harms", False),
    ]
    assert [cell["said"] for cell in empty["cells"]] == ["–", "–"]
    cells["a"]["b"]["error"] = 0.3
    assert mixing_tables.effect_rows(cells, bad=-1, limit=1.0)[0]["cells"][1]["weight"] == 0


def test_page_names_cosine_effect_and_slope_apart_and_says_what_a_cosine_is_not(run):
    html = write_report(run(mix=True).out).read_text(encoding="utf-8")
    for said in ("Gradient cosine, optimizer metric", "Interference by effect", "too little to tell"):
        assert said in html
    assert "A negative cosine is not the whole of conflict" in html
    assert "The resolver: upgrad" in html


def test_one_refresh_and_one_ability_are_no_conflict(run, make_run, tmp_path):
    record = run(mix=True, abilities=("maths",), sources=("gsm8k", "chat"))
    assert summarize(record.out)["conflict"]["cosines"] is None
    begun = make_run(tmp_path / "begun", mix=True, intervals=0, influence=False, end=False)
    told = summarize(begun.out)["conflict"]
    assert told["refreshes"] == 1
    assert told["cosines"]["maths"]["code"]["error"] is None
    write_report(begun.out)


def test_pairs_that_oppose_most_are_drawn():
    values = np.zeros((3, 5, 5))
    values[:, 0, 4] = -0.9
    pairs = mixing_figures.opposing(conflict.Course([1, 2, 3], values))
    assert len(pairs) == mixing_figures.MAX_PAIRS
    assert (0, 4) in pairs
    values[:, :3, 2] = np.nan
    few = mixing_figures.opposing(conflict.Course([1, 2, 3], values[:, :3, :3]))
    assert few == [(0, 1)]
