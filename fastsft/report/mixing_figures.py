"""Describe the charts of a steered mix and of conflict: each function takes a run and gives one altair chart."""

from __future__ import annotations

import math
from itertools import combinations

import altair as alt
import numpy as np

from fastsft.report.conflict import Course
from fastsft.report.figures import MAX_POINTS, Width, colored, sized, steps_axis
from fastsft.report.mixing import Move, in_force
from fastsft.report.run import Run
from fastsft.report.theme import NEUTRAL

# pairs of abilities drawn one by one: those that oppose each other most
MAX_PAIRS = 6


def weights(run: Run, width: Width = "container") -> alt.Chart:
    """Stack the weights in force, from the step that each mix holds from."""
    held = in_force(run)
    # a step of the chart is narrower than a pixel long before that many
    held = held[:: math.ceil(len(held) / MAX_POINTS) or 1]
    ends = [*held, (max(run.last_step, held[-1][0]) + 1, held[-1][1])]
    rows = [
        {"step": step, "source": source, "weight": mix.get(source, 0.0)} for step, mix in ends for source in run.sources
    ]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_area(interpolate="step-after")
        .encode(
            x=steps_axis(),
            y=alt.Y("weight:Q", stack="normalize", title="weight in force", axis=alt.Axis(format="%", tickCount=5)),
            color=colored("source", run.sources),
            tooltip=["source:N", alt.Tooltip("step:Q", title="from step"), alt.Tooltip("weight:Q", format=".3f")],
        )
    )
    return sized(chart, width, 240)


def signals(run: Run, moves: list[Move], width: Width = "container") -> alt.LayerChart:
    """Draw what each decision rested on, by source, with a band of one standard error where the policy gave one."""
    rows = []
    for move in moves:
        for source, signal in move.signal.items():
            if signal is not None:
                error = move.error.get(source) or 0.0
                row = {"step": move.step, "source": source, "signal": signal}
                rows.append({**row, "low": signal - error, "high": signal + error})
    base = alt.Chart(alt.Data(values=rows)).encode(x=steps_axis(), color=colored("source", run.sources))
    title = "signal, in the policy's unit"
    zero = alt.Chart(alt.Data(values=[{"signal": 0}])).mark_rule(strokeWidth=1).encode(y="signal:Q")
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title=title), y2="high:Q")
    line = base.mark_line(point=alt.OverlayMarkDef(size=16)).encode(
        y=alt.Y("signal:Q", title=title, axis=alt.Axis(tickCount=5)),
        tooltip=["source:N", "step:Q", alt.Tooltip("signal:Q", format="+.4g")],
    )
    return sized(alt.layer(zero, band, line), width, 240)


def opposing(course: Course) -> list[tuple[int, int]]:
    """Choose the pairs of abilities to draw, by their numbers: the lowest mean cosines, in the abilities' order."""
    mean, _ = course.mean()
    pairs = [(i, j) for i, j in combinations(range(len(mean)), 2) if np.isfinite(mean[i, j])]
    return sorted(sorted(pairs, key=lambda pair: mean[pair])[:MAX_PAIRS])


def cosines(run: Run, course: Course, width: Width = "container") -> alt.LayerChart:
    """Draw the cosine of each pair of abilities' gradients, refresh by refresh."""
    names = {pair: " · ".join(run.abilities[at] for at in pair) for pair in opposing(course)}
    size = math.ceil(len(course.steps) / MAX_POINTS) or 1
    rows = [
        {"step": step, "pair": name, "cosine": float(table[pair])}
        for step, table in list(zip(course.steps, course.values, strict=True))[::size]
        for pair, name in names.items()
        if np.isfinite(table[pair])
    ]
    zero = alt.Chart(alt.Data(values=[{"cosine": 0}])).mark_rule(strokeWidth=1).encode(y="cosine:Q")
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=alt.OverlayMarkDef(size=16))
        .encode(
            x=steps_axis(),
            y=alt.Y("cosine:Q", title="gradient cosine", axis=alt.Axis(tickCount=5)),
            color=colored("pair", list(names.values()), columns=2),
            tooltip=["pair:N", "step:Q", alt.Tooltip("cosine:Q", format="+.3f")],
        )
    )
    return sized(alt.layer(zero, lines), width, 220)


def factors(run: Run, width: Width = "container") -> alt.LayerChart:
    """Draw what the resolver multiplied the gradients of each ability's sources by, over steps."""
    # what was weighed after the last step was never applied
    events = [event for event in run.conflicts if event["step"] < run.last_step] or run.conflicts
    events = events[:: math.ceil(len(events) / MAX_POINTS)]
    rows = [
        {"step": event["step"], "ability": ability, "factor": factor}
        for event in events
        for ability, factor in event["factors"].items()
        if factor is not None
    ]
    held = [{**row, "step": run.last_step} for row in rows if row["step"] == events[-1]["step"]]
    one = alt.Chart(alt.Data(values=[{"factor": 1}])).mark_rule(color=NEUTRAL, strokeDash=[4, 3]).encode(y="factor:Q")
    lines = (
        alt.Chart(alt.Data(values=rows + held))
        .mark_line(interpolate="step-after")
        .encode(
            x=steps_axis(),
            y=alt.Y("factor:Q", title="factor on the gradients", scale=alt.Scale(zero=False)),
            color=colored("ability", run.abilities),
            tooltip=["ability:N", "step:Q", alt.Tooltip("factor:Q", format=".3f")],
        )
    )
    return sized(alt.layer(one, lines), width, 180)
