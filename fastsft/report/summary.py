"""Turn a run into the content of report.json: every number the page says, and how it was computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from fastsft.report.books import Book, correlation, loss_at, measured_error, open_book, samples_share, shares
from fastsft.report.conflict import summarize_conflict
from fastsft.report.experts import summarize_experts
from fastsft.report.flows import SampleFlow, Spread, sample_flows, spreads
from fastsft.report.mixing import summarize_mix
from fastsft.report.planted import equal_texts, planted_truths
from fastsft.report.run import Run, read_run

REPORT_SCHEMA = 1

MEANINGS = {
    "ledger": "nats per response token of the ability; negative lowers its loss, so it helps",
    "by_source": "what the source's samples did to the ability's loss, both ends of every interval weighed",
    "by_source_interval": "95 %: entry +- 1.96 * sqrt(draws) * sd of the phi of its draws; null without samples",
    "per_1k_tokens": "the entry divided by the thousands of tokens drawn from the source in the booked steps",
    "measured_error": (
        "an upper bound of the standard error over target rows: the smaller of the sum of the intervals' errors and "
        "sqrt(error_start^2 + error_end^2)"
    ),
    "unfollowed": "parameters that were not followed, and `carried`: momentum from before the run was attached",
    "residual": "measured - sum(by_source) - decay - unfollowed",
    "residual_share": "|residual| / sum over sources of |by_source|, over the whole run",
    "start_only_share": "the same share, had the target gradient been taken only at the start of each interval",
    "samples_share": "sum over sources of |sum of its samples' phi - entry| / sum of |entry|",
    "misbooked": "sum over intervals of |recorded residual - what the recorded entries leave|; should be rounding",
    "correlation": "Pearson, over intervals, of by_source + decay + unfollowed with the measured change",
    "identity_error": "median over steps of the share of the optimizer's gradient that the captured gradients miss",
    "displacement_error": "median over intervals of |change of the weights - sum of its booked parts| / |change|",
    "experts": (
        "{ability: {part: {source: nats}}}: by_source split by the part of a gated adapter that moved (an expert, "
        "memory, router); null for other models"
    ),
    "mix": (
        "unit: what shares are counted in. weights {source: share of the draws}: "
        "`start`; `end`, in force at the last step; `mean` over steps; `drawn`: "
        "the shares of what was drawn, by what is counted. decisions: mixes decided after the first; moved: those that "
        "changed a weight by 0.0005 or more; unused: those that no step was drawn by; path_length: sum over decisions "
        "of half the sum of |after - before|; delay: steps after a decision that the mix before still held; null if no "
        "policy steered the mix"
    ),
    "cosines": (
        "gradient cosine, optimizer metric: G_ij / sqrt((n_i + t) (n_j + t)) of the abilities' target gradients, "
        "n squared norms, t = 0.1 * their mean; averaged over refreshes after the first step. error: from the spread "
        "over refreshes, widened for likeness of neighbours; the target rows are the same at all of them. The "
        "diagonal has G from two halves of the rows: the share of a gradient that is more than noise"
    ),
    "interference": (
        "by the books: what the sources of the first ability did to the second, nats per thousand `unit` drawn of "
        "them; sum of entries / sum of tokens over intervals, error from the spread of intervals about that ratio"
    ),
    "slopes": (
        "by regression: the same, from measured - decay - unfollowed of each interval on the tokens drawn of each "
        "ability's sources, times how much the books say tokens did just then, with a trend for each; Bayesian ridge "
        "toward `interference` with its root mean square as standard deviation; null where the error did not fall to "
        "half of that, so the mix moved too little to tell. A mix that only drifts is hard to tell from learning that "
        "slows: take the error as a lower bound"
    ),
    "resolver": "what weighed the abilities' gradients; apply: lagged (by the last refresh) or exact (in the step)",
    "factors": "what the gradients of each ability's sources were multiplied by: last, mean, least and most",
    "step_ratio": "seconds per step with the books, over seconds per step without them (step_seconds - own_seconds)",
}


def summarize(run_dir: str | Path) -> dict[str, Any]:
    """Compute the content of report.json."""
    run = read_run(run_dir)
    return summarize_run(run, sample_flows(run))


def summarize_run(run: Run, flows: Mapping[str, SampleFlow]) -> dict[str, Any]:
    """Compute the content of report.json of a run already read."""
    spread = spreads(run)
    books = {ability: open_book(run, ability) for ability in run.abilities}
    ledger = {ability: _ledger_entry(run, book, spread) for ability, book in books.items()}
    identity = [step["identity_error"] for step in run.steps if step.get("identity_error") is not None]
    displacement = [
        event["displacement_error"] for event in run.intervals if event.get("displacement_error") is not None
    ]
    end = run.end or {}
    return {
        "schema": REPORT_SCHEMA,
        "record_schema": run.start["schema"],
        "name": run.record.out.resolve().name,
        "abilities": run.abilities,
        "sources": run.sources,
        "steps": run.last_step,
        "finished": run.end is not None,
        "resumed_at": [event["step"] for event in run.resumes],
        "ledger": ledger,
        "identity_error": median(identity) if identity else None,
        "displacement_error": median(displacement) if displacement else None,
        "correlation": {ability: correlation(book) for ability, book in books.items()},
        "planted": planted_truths(run, flows, ledger),
        "samples": {
            "known": len(run.samples),
            "scored": len(flows),
            "draws": sum(flow.draws for flow in flows.values()),
            "equal_texts": equal_texts(run),
        },
        "drawn": {"documents": _drawn(run, "documents"), "tokens": _drawn(run, "tokens")},
        "experts": summarize_experts(run),
        "mix": summarize_mix(run),
        "conflict": summarize_conflict(run),
        "loss": {"first": _loss(run, 0), "last": _loss(run, -1)},
        "seconds": end.get("seconds"),
        "step_seconds": end.get("step_seconds"),
        "own_seconds": end.get("own_seconds"),
        "refresh_seconds": end.get("refresh_seconds"),
        "step_ratio": _step_ratio(end),
        **{key: run.start.get(key) for key in _PROVENANCE},
        "notes": [{"step": note["step"], "text": note["text"]} for note in run.notes],
        "meanings": MEANINGS,
    }


_PROVENANCE = ("versions", "seed", "model", "method", "optimizer", "targets", "settings", "data")


def _ledger_entry(run: Run, book: Book, spread: Mapping[tuple[str, str], Spread]) -> dict[str, Any]:
    ability, last = book.ability, int(book.last[-1]) if len(book.last) else 0
    measured, decay, unfollowed = (float(column.sum()) for column in (book.measured, book.decay, book.unfollowed))
    by_source = dict(zip(run.sources, book.by_source.sum(axis=0).tolist(), strict=True))
    own, start_only = shares(book)
    tokens = _drawn(run, "tokens", book.first_step, last)
    return {
        "intervals": len(book.last),
        "intervals_left_out": book.left_out,
        "from": book.first_step,
        "to": last,
        "loss_start": loss_at(run, book.first_step, ability)[0] if len(book.last) else None,
        "loss_end": loss_at(run, last, ability)[0] if len(book.last) else None,
        "measured": measured,
        "measured_error": measured_error(run, book),
        "by_source": by_source,
        "by_source_interval": {
            source: _interval(value, spread.get((ability, source))) for source, value in by_source.items()
        },
        "per_1k_tokens": {
            source: 1000 * value / tokens[source] if tokens.get(source) else None for source, value in by_source.items()
        },
        "decay": decay,
        "unfollowed": unfollowed,
        "residual": measured - sum(by_source.values()) - decay - unfollowed,
        "gross": sum(abs(value) for value in by_source.values()),
        "residual_share": _last(own),
        "start_only_share": None if start_only is None else _last(start_only),
        "samples_share": samples_share(book),
        "misbooked": book.misbooked,
    }


def _interval(value: float, spread: Spread | None) -> list[float] | None:
    return None if spread is None else [value - spread.half_width, value + spread.half_width]


def _last(column: Any) -> float | None:
    return float(column[-1]) if len(column) and math.isfinite(column[-1]) else None


def _drawn(run: Run, what: str, after: int = -1, last: int | None = None) -> dict[str, int]:
    total: Counter[str] = Counter(dict.fromkeys(run.sources, 0))
    for step in run.steps:
        if step["step"] > after and (last is None or step["step"] <= last):
            total.update(step.get(what) or {})
    return dict(total)


def _loss(run: Run, position: int) -> float | None:
    losses = [step["loss"] for step in run.steps if step.get("loss") is not None]
    return losses[position] if losses else None


def _step_ratio(end: Mapping[str, Any]) -> float | None:
    step, own = end.get("step_seconds"), end.get("own_seconds")
    return step / (step - own) if step is not None and own is not None and step > own else None
