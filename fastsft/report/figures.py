"""Describe the charts beside the ledger's: each function takes numbers and gives one altair chart.

`width` is "container" in the page and pixels in a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import altair as alt

from fastsft.report.books import Book, shares
from fastsft.report.mixing import UNITS
from fastsft.report.run import Run
from fastsft.report.theme import NEUTRAL

Width = int | Literal["container"]
# more points than this are averaged into as many bins; the page says so
MAX_POINTS = 400
MIX_BINS = 48


def target_losses(run: Run, width: Width = "container") -> alt.LayerChart:
    """Draw each ability's loss at the refreshes, with a band of one standard error."""
    rows = []
    for event in run.refreshes:
        for ability, loss in event["losses"].items():
            if loss is not None:
                error = event.get("errors", {}).get(ability) or 0.0
                rows.append(
                    {"step": event["step"], "ability": ability, "loss": loss, "low": loss - error, "high": loss + error}
                )
    base = alt.Chart(alt.Data(values=rows)).encode(x=steps_axis(), color=colored("ability", run.abilities))
    y = alt.Y("low:Q", title="target loss, nats per response token", scale=alt.Scale(zero=False))
    band = base.mark_area(opacity=0.18).encode(y=y, y2="high:Q")
    line = base.mark_line(point=True).encode(
        y=alt.Y("loss:Q", scale=alt.Scale(zero=False)),
        tooltip=[alt.Tooltip("ability:N"), alt.Tooltip("step:Q"), alt.Tooltip("loss:Q", format=".4f")],
    )
    return sized(alt.layer(band, line), width, 260)


def train_loss(run: Run, width: Width = "container") -> alt.Chart:
    """Draw the training loss, averaged over bins of steps where there are many."""
    points = [(step["step"], step["loss"]) for step in run.steps if step.get("loss") is not None]
    size = math.ceil(len(points) / MAX_POINTS) or 1
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    rows = [{"step": chunk[-1][0], "loss": sum(loss for _, loss in chunk) / len(chunk)} for chunk in chunks]
    chart = alt.Chart(alt.Data(values=rows)).mark_line(color=NEUTRAL, strokeWidth=1.5)
    y = alt.Y("loss:Q", title="training loss", scale=alt.Scale(zero=False))
    return sized(chart.encode(x=steps_axis(), y=y), width, 150)


def unexplained(books: Sequence[Book], width: Width = "container") -> alt.Chart:
    """Draw the unexplained share up to each refresh: these books solid, start-of-interval books dashed."""
    rows = []
    for book in books:
        own, start_only = shares(book)
        kinds = [("both ends", own)] + ([("start only", start_only)] if start_only is not None else [])
        for kind, column in kinds:
            pairs = zip(book.last.tolist(), column.tolist(), strict=True)
            rows += [
                {"step": step, "share": share, "ability": book.ability, "gradient": kind}
                for step, share in pairs
                if math.isfinite(share)
            ]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=alt.OverlayMarkDef(size=22))
        .encode(
            x=steps_axis(),
            y=alt.Y("share:Q", title="unexplained share of the gross flow", axis=alt.Axis(format="%", tickCount=5)),
            color=colored("ability", [book.ability for book in books]),
            strokeDash=alt.StrokeDash("gradient:N", sort=["both ends", "start only"], legend=None),
            tooltip=["ability:N", "gradient:N", "step:Q", alt.Tooltip("share:Q", format=".2%")],
        )
    )
    return sized(chart, width, 220)


def agreement(
    rows: list[dict[str, Any]], x: str, y: str, abilities: Sequence[str], width: Width = "container"
) -> alt.LayerChart:
    """Scatter two numbers that should be equal, with the line where they are. rows: ability, label, x, y in nats."""
    values = [row[key] for row in rows for key in ("x", "y")]
    low, high = (min(values, default=0.0), max(values, default=1.0))
    margin = 0.06 * (high - low) or 1e-3
    scale = alt.Scale(domain=[low - margin, high + margin], nice=False, zero=False)
    line = alt.Chart(
        alt.Data(values=[{"x": low - margin, "y": low - margin}, {"x": high + margin, "y": high + margin}])
    )
    points = (
        alt.Chart(alt.Data(values=rows))
        .mark_point(opacity=0.75)
        .encode(
            x=alt.X("x:Q", title=x, scale=scale, axis=alt.Axis(tickCount=5)),
            y=alt.Y("y:Q", title=y, scale=scale, axis=alt.Axis(tickCount=5)),
            color=alt.Color(
                "ability:N",
                sort=list(abilities),
                scale=alt.Scale(domain=list(abilities)),
                title=None,
                legend=_key(abilities),
            ),
            shape=alt.Shape(
                "ability:N",
                sort=list(abilities),
                scale=alt.Scale(domain=list(abilities)),
                title=None,
                legend=_key(abilities),
            ),
            tooltip=[
                "ability:N",
                "label:N",
                alt.Tooltip("x:Q", title=x, format=".5f"),
                alt.Tooltip("y:Q", title=y, format=".5f"),
            ],
        )
    )
    return sized(
        alt.layer(line.mark_line(color=NEUTRAL, strokeWidth=1, strokeDash=[4, 3]).encode(x="x:Q", y="y:Q"), points),
        width,
        300,
    )


def mix(run: Run, unit: str = "documents", width: Width = "container") -> alt.Chart:
    """Draw each source's share of what was drawn, over bins of steps. unit: a key of `mixing.UNITS`."""
    steps = [step for step in run.steps if step.get(unit)]
    size = math.ceil(len(steps) / MIX_BINS) or 1
    rows = []
    for at in range(0, len(steps), size):
        chunk = steps[at : at + size]
        for source in run.sources:
            drawn = sum(step[unit].get(source, 0) for step in chunk)
            ends = [chunk[0]["step"]] + ([chunk[-1]["step"] + 1] if chunk[-1] is steps[-1] else [])
            rows += [{"step": step, "source": source, "drawn": drawn} for step in ends]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_area(interpolate="step-after")
        .encode(
            x=steps_axis(),
            y=alt.Y(
                "drawn:Q",
                stack="normalize",
                title=f"share of {UNITS[unit]} drawn",
                axis=alt.Axis(format="%", tickCount=5),
            ),
            color=colored("source", run.sources),
            tooltip=["source:N", "step:Q", alt.Tooltip("drawn:Q", title=UNITS[unit])],
        )
    )
    return sized(chart, width, 240)


def steps_axis() -> alt.X:
    """Give the axis of optimizer steps."""
    return alt.X(
        "step:Q",
        title="step",
        axis=alt.Axis(tickMinStep=1, tickCount=8, grid=False, format="d"),
        scale=alt.Scale(nice=False),
    )


def colored(
    field: str, domain: Sequence[str], *, shown: Sequence[str] | None = None, columns: int | None = None
) -> alt.Color:
    """Colour a nominal field from the theme's category range, in the order of `domain`; the legend names `shown`."""
    return alt.Color(
        f"{field}:N",
        sort=list(domain),
        scale=alt.Scale(domain=list(domain)),
        title=None,
        legend=_key(shown or domain, columns, symbolType="circle"),
    )


def _key(domain: Sequence[str], columns: int | None = None, **settings: Any) -> alt.Legend | None:
    """Give a legend that fits a phone; none for a single name."""
    fitting = columns or alt.ExprRef("width < 480 ? 2 : 4")
    return (
        alt.Legend(orient="top", columns=fitting, labelLimit=125, symbolOpacity=1, values=list(domain), **settings)
        if len(domain) > 1
        else None
    )


def sized(chart: Any, width: Width, height: int) -> Any:
    """Set the size; axes and legends are counted in the width."""
    return chart.properties(width=width, height=height, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
