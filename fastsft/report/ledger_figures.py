"""Describe the ledger's charts: one ability's waterfall, when each source acted, and source x ability at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import altair as alt

from fastsft.report.books import Book
from fastsft.report.figures import Width, colored, sized, steps_axis
from fastsft.report.theme import HARMS, HELPS, NEUTRAL
from fastsft.report.words import places, plain, ranked, signed

_SIGN = alt.Scale(domain=["helps", "harms", "other"], range=[HELPS, HARMS, NEUTRAL])
# pixels of one line of the waterfall
_ROW = 25
# sources drawn one by one in the timeline; the rest are added up
MAX_LINES = 5


def waterfall(entry: Mapping[str, Any], width: Width = "container") -> alt.LayerChart:
    """Walk from the loss at the start to the loss at the end: sources by size, decay, unfollowed, unexplained."""
    rows = _steps_down(entry)
    order = [row["label"] for row in rows]
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelLimit=125, grid=False))
    low, high = min(min(row["x"], row["x2"]) for row in rows), max(max(row["x"], row["x2"]) for row in rows)
    error = entry["measured_error"] or 0.0
    low, high = min(low, rows[-1]["x"] - error), max(high, rows[-1]["x"] + error)
    span = (high - low) or 1.0
    # a number stands left of its bar where there is room for it, so that nothing runs off a narrow screen
    for row in rows:
        row["side"] = "left" if row["left"] - low > 0.4 * span else "right"
    crowded = any(row["side"] == "right" and row["right"] - low > 0.65 * span for row in rows)
    scale = alt.Scale(domain=[low - 0.04 * span, high + (0.4 if crowded else 0.06) * span], nice=False, zero=False)
    loss = entry["loss_start"] is not None
    title = "loss, nats per response token" if loss else "change of the loss, nats per response token"
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=y,
        tooltip=[alt.Tooltip("label:N", title="entry"), alt.Tooltip("said:N", title="nats")],
    )
    x = alt.X("x:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5))
    sign = alt.Color("sign:N", scale=_SIGN, legend=None)
    links = (
        base.transform_filter("datum.next != null")
        .mark_rule(opacity=0.45)
        .encode(x=alt.X("x2:Q", title=title, scale=scale), y2="next:N")
    )
    bars = (
        base.transform_filter("datum.kind == 'flow'").mark_bar(height={"band": 0.62}).encode(x=x, x2="x2:Q", color=sign)
    )
    ends = base.transform_filter("datum.kind == 'end'").mark_tick(thickness=2.5, height={"band": 0.8}).encode(x=x)
    right = base.transform_filter("datum.side == 'right'").mark_text(align="left", dx=7)
    left = base.transform_filter("datum.side == 'left'").mark_text(align="right", dx=-7)
    texts = [
        side.encode(x=alt.X(f"{field}:Q", title=title, scale=scale), text="said:N")
        for side, field in ((right, "right"), (left, "left"))
    ]
    layers = [links, bars, ends, *texts]
    if error:
        layers.append(_error_bar(rows[-1], error, y, scale, title))
    return sized(alt.layer(*layers), width, _ROW * len(rows))


def _steps_down(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    flows = [(_apart(name), value) for name, value in ranked(entry["by_source"])]
    flows += [
        ("weight decay", entry["decay"]),
        ("not followed", entry["unfollowed"]),
        ("unexplained", entry["residual"]),
    ]
    decimals = places([value for _, value in flows])
    at = entry["loss_start"] or 0.0
    known = entry["loss_start"] is not None
    rows = [_row("start", at, at, plain(at, decimals) if known else "0", "end")]
    for position, (label, value) in enumerate(flows):
        sign = "other" if position >= len(entry["by_source"]) else "helps" if value < 0 else "harms"
        rows.append(_row(label, at, at + value, signed(value, decimals), "flow", sign))
        at += value
    end = plain(at, decimals) if known else signed(at, decimals)
    rows.append(_row("end", at, at, end, "end", reach=entry["measured_error"] or 0.0))
    for row, following in pairwise(rows):
        row["next"] = following["label"]
    return rows


def _apart(source: str) -> str:
    reserved = ("start", "end", "weight decay", "not followed", "unexplained")
    return f"{source} (source)" if source in reserved else source


def _row(
    label: str, x: float, x2: float, said: str, kind: str, sign: str = "other", reach: float = 0.0
) -> dict[str, Any]:
    ends = {"x": x, "x2": x2, "left": min(x, x2) - reach, "right": max(x, x2) + reach}
    return {"label": label, "said": said, "kind": kind, "sign": sign, "next": None, **ends}


def _error_bar(end: Mapping[str, Any], error: float, y: alt.Y, scale: alt.Scale, title: str) -> alt.Chart:
    data = alt.Data(values=[{"label": end["label"], "low": end["x"] - error, "high": end["x"] + error}])
    return (
        alt.Chart(data).mark_rule(strokeWidth=1.5).encode(y=y, x=alt.X("low:Q", scale=scale, title=title), x2="high:Q")
    )


def timeline(book: Book, sources: Sequence[str], width: Width = "container") -> alt.LayerChart:
    """Draw what was booked to each source so far, at each refresh; the smallest sources are added up as one line."""
    totals = dict(zip(sources, book.by_source.sum(axis=0).tolist(), strict=True))
    largest = sorted(totals, key=lambda source: -abs(totals[source]))
    shown = [source for source in sources if source in largest[:MAX_LINES] or len(sources) == MAX_LINES + 1]
    columns = {source: book.by_source[:, sources.index(source)] for source in shown}
    if len(shown) < len(sources):
        columns["all others"] = book.by_source.sum(axis=1) - sum(columns.values())
    steps = [book.first_step, *book.last.tolist()]
    rows = [
        {"step": step, "source": name, "nats": value}
        for name, column in columns.items()
        for step, value in zip(steps, [0.0, *column.cumsum().tolist()], strict=True)
    ]
    # the domain holds every source, so that a source has one colour on the whole page
    color = colored("source", [*sources, "all others"], shown=list(columns))
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line()
        .encode(
            x=steps_axis(),
            y=alt.Y("nats:Q", title="booked so far, nats", axis=alt.Axis(tickCount=6)),
            color=color,
            tooltip=["source:N", "step:Q", alt.Tooltip("nats:Q", format="+.4f")],
        )
    )
    zero = alt.Chart(alt.Data(values=[{"nats": 0}])).mark_rule(strokeWidth=1).encode(y="nats:Q")
    # as high as the waterfall beside it, less its legend
    return sized(alt.layer(zero, lines), width, max(150, _ROW * (len(sources) + 5) - 60))


def source_map(summary: Mapping[str, Any], width: Width = "container") -> alt.LayerChart:
    """Show source x ability as coloured cells, symmetrical about zero (the page uses a table instead)."""
    entries = [
        (ability, source, value)
        for ability, entry in summary["ledger"].items()
        for source, value in entry["by_source"].items()
    ]
    decimals = places([value for *_, value in entries])
    limit = max((abs(value) for *_, value in entries), default=0.0) or 1.0
    rows = [
        {"ability": ability, "source": source, "nats": value, "said": signed(value, decimals)}
        for ability, source, value in entries
    ]
    scale = alt.Scale(domain=[-limit, 0, limit], range=[HELPS, "#ffffff", HARMS], interpolate="rgb")
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(
            "ability:N", sort=summary["abilities"], title=None, axis=alt.Axis(labelAngle=0, orient="top", domain=False)
        ),
        y=alt.Y("source:N", sort=summary["sources"], title=None),
    )
    cells = base.mark_rect().encode(color=alt.Color("nats:Q", scale=scale, title="nats (blue helps)"))
    return sized(alt.layer(cells, base.mark_text().encode(text="said:N")), width, 30 * max(1, len(summary["sources"])))
