"""Write report.html, one file that opens from disk with no network, and report.json beside it.

All text is escaped by jinja2, or set as text by the page's own script; data sits in JSON blocks that can't close
their element; a content policy lets only the page's own scripts run, known by hash, and no request leave.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastsft.record import write_text
from fastsft.report import experts, figures, ledger_figures, mixing_page, tables, words
from fastsft.report.books import Book, open_book
from fastsft.report.flows import SampleFlow, sample_flows
from fastsft.report.run import Run, read_run
from fastsft.report.summary import summarize_run
from fastsft.report.theme import HARMS, HELPS, config

# shown where scripts are off
NUM_STATIC = 5


def write_report(run_dir: str | Path) -> Path:
    """Write report.html and report.json into the run directory; give the path of the page."""
    run = read_run(run_dir)
    flows = sample_flows(run)
    summary = summarize_run(run, flows)
    out = run.record.out
    write_text(out / "report.json", json.dumps(summary, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    return write_text(out / "report.html", render(run, summary, flows))


def render(run: Run, summary: Mapping[str, Any], flows: Mapping[str, SampleFlow]) -> str:
    """Give the HTML of the page."""
    books = [book for book in (open_book(run, ability) for ability in run.abilities) if len(book.last)]
    lists = tables.extremes(run, flows)
    samples = tables.sample_rows(run, flows, lists)
    charts = draw(run, summary, books)
    data = {
        "charts": {name: chart.to_dict() for name, chart in charts.items()},
        "themes": {"light": config(), "dark": config(dark=True)},
        "abilities": run.abilities,
        "lists": lists,
        "samples": samples,
    }
    scripts = [_script(_bundle()), _script(_asset("report.js"))]
    environment = Environment(
        loader=PackageLoader("fastsft.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        {name: getattr(words, name) for name in ("signed", "plain", "percent", "short", "duration")}
    )
    return environment.get_template("report.html.jinja").render(
        summary=summary,
        abilities=[_ability(summary, ability) for ability in run.abilities],
        cells={key: tables.source_cells(summary, key) for key in ("by_source", "per_1k_tokens")},
        booked=[book.ability for book in books],
        **mixing_page.told(run, summary),
        part_rows=experts.part_rows(summary["experts"] or {}),
        part_sources={
            ability: experts.source_rows(parts, run.sources) for ability, parts in (summary["experts"] or {}).items()
        },
        charts=set(charts),
        lists=lists,
        samples=samples,
        num_static=NUM_STATIC,
        max_samples=tables.MAX_SAMPLES,
        averaged=len(run.steps) > figures.MAX_POINTS,
        has_heat=any("heat" in row for row in samples.values()),
        provenance=[(name, list(tables.flat(summary[key]))) for name, key in _PROVENANCE if summary[key] is not None],
        css=Markup(f":root{{--helps:{HELPS};--harms:{HARMS}}}\n" + _asset("report.css")),
        scripts=scripts,
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src {' '.join(_hash(script) for script in scripts)}",
        data=_json(data),
    )


def draw(
    run: Run, summary: Mapping[str, Any], books: Sequence[Book], width: figures.Width = "container"
) -> dict[str, Any]:
    """Describe every chart this run has the numbers for; `ledger-<n>` and `timeline-<n>` are the n-th ability's."""
    charts: dict[str, Any] = {}
    for book in books:
        number, entry = run.abilities.index(book.ability), summary["ledger"][book.ability]
        charts[f"ledger-{number}"] = ledger_figures.waterfall(entry, width)
        charts[f"timeline-{number}"] = ledger_figures.timeline(book, run.sources, width)
    if any(loss is not None for event in run.refreshes for loss in event["losses"].values()):
        charts["target-losses"] = figures.target_losses(run, width)
    if any(step.get("loss") is not None for step in run.steps):
        charts["train-loss"] = figures.train_loss(run, width)
    if any(step.get("documents") for step in run.steps):
        charts["mix"] = figures.mix(run, width=width)
    charts |= mixing_page.draw(run, summary, width)
    if books:
        names = [book.ability for book in books]
        charts["unexplained"] = figures.unexplained(books, width)
        pairs = ("predicted by the books, nats", "measured, nats")
        charts["predicted"] = figures.agreement(
            [row for book in books for row in _predicted(book)], *pairs, names, width
        )
        sums = [row for book in books for row in _sums(run, book)]
        if sums:
            charts["sums"] = figures.agreement(
                sums, "entry of the source, nats", "sum of its samples, nats", names, width
            )
    return charts


def _predicted(book: Book) -> list[dict[str, Any]]:
    columns = zip(book.last.tolist(), book.predicted.tolist(), book.measured.tolist(), strict=True)
    return [{"ability": book.ability, "label": f"to step {step}", "x": x, "y": y} for step, x, y in columns]


def _sums(run: Run, book: Book) -> list[dict[str, Any]]:
    if book.samples is None:
        return []
    columns = zip(run.sources, book.by_source.sum(axis=0).tolist(), book.samples.sum(axis=0).tolist(), strict=True)
    return [{"ability": book.ability, "label": source, "x": x, "y": y} for source, x, y in columns]


def _ability(summary: Mapping[str, Any], ability: str) -> dict[str, Any]:
    entry = summary["ledger"][ability]
    grade, badge = words.verdict(entry, summary["identity_error"], summary["displacement_error"])
    booked = bool(entry["intervals"])
    return {
        "name": ability,
        "entry": entry,
        "grade": grade,
        "badge": badge,
        "change": words.change_sentence(ability, entry) if booked else f"{ability}: no interval has been booked yet.",
        "cause": words.cause_sentence(entry) if booked else "",
    }


_PROVENANCE = (
    ("Model", "model"),
    ("Method", "method"),
    ("Optimizer", "optimizer"),
    ("Seed", "seed"),
    ("Targets", "targets"),
    ("Settings", "settings"),
    ("Data", "data"),
    ("Versions", "versions"),
)


def _asset(name: str) -> str:
    return (files("fastsft.report") / name).read_text(encoding="utf-8")


@cache
def _bundle() -> str:
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _script(text: str) -> Markup:
    """Keep a script inside its element: `</script` and `<!--` stand only in strings, where \\x3c means the same."""
    return Markup(text.replace("</script", "\\x3c/script").replace("<!--", "\\x3c!--").replace("\r\n", "\n"))


def _hash(script: Markup) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(data: Mapping[str, Any]) -> Markup:
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
