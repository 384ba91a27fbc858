"""Write the main charts as SVG and PNG files, for a README or a model card; no browser needed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import vl_convert

from fastsft.record import write_text
from fastsft.report import ledger_figures
from fastsft.report.books import open_book
from fastsft.report.flows import sample_flows
from fastsft.report.page import draw
from fastsft.report.run import read_run
from fastsft.report.summary import summarize_run
from fastsft.report.theme import config

WIDTH = 640


def write_pictures(run_dir: str | Path, folder: str | Path) -> list[Path]:
    """Write each chart of the run as <name>.svg and <name>.png into `folder`; give the paths."""
    run = read_run(run_dir)
    summary = summarize_run(run, sample_flows(run))
    books = [book for book in (open_book(run, ability) for ability in run.abilities) if len(book.last)]
    charts = draw(run, summary, books, WIDTH)
    if books:
        charts["sources"] = ledger_figures.source_map(summary, WIDTH)
    paths = []
    for name, chart in charts.items():
        kind, _, number = name.partition("-")
        if number.isdigit():
            name = f"{kind}-{int(number) + 1}-{_file_name(run.abilities[int(number)])}"
        paths += _write(Path(folder) / name, chart.to_dict())
    return paths


def _write(stem: Path, spec: dict[str, Any]) -> list[Path]:
    # a picture may lie on any ground, so it brings its own
    themed = {**config(font="sans-serif"), "background": "white", "padding": 12}
    svg = vl_convert.vegalite_to_svg(spec, config=themed)
    png = vl_convert.vegalite_to_png(spec, config=themed, scale=2)
    image = stem.with_name(stem.name + ".png")
    vector = write_text(stem.with_name(stem.name + ".svg"), svg)
    temporary = image.with_name(f"{image.name}.{os.getpid()}.tmp")
    temporary.write_bytes(png)
    os.replace(temporary, image)
    return [vector, image]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w-]+", "-", text).strip("-") or "ability"
