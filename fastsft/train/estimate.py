"""`fastsft attribute RUN --query FILE`: which samples of a run helped and harmed a query, by a method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fastsft.attribution.methods import Block, Method, Scores, Summary
from fastsft.attribution.methods.registry import entry
from fastsft.data import Row, Sample, read_source, tokenize_all
from fastsft.sketch.passes import Batching
from fastsft.train.config import ConfigError
from fastsft.train.finished import FinishedRun
from fastsft.train.loop import prepare
from fastsft.train.query import texts_of
from fastsft.train.scoring import check_method, decoder, fitted, places_of, plainly

ALL = "all queries together"
MARKED = 5


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a method found. Scores: positive where training on the sample lowers the query's loss, but for a baseline's,
    which only rank."""

    method: str
    unit: str
    # what was asked, where, and of how many samples
    heading: str
    queries: list[str]
    ids: Sequence[str]
    sources: Sequence[str]
    summary: Summary
    notes: list[str]
    # prompt and response by sample id, where the run still has them
    texts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    is_baseline: bool = False
    # by (sample's place, query): the tokens that carry most of the score, where it was asked for
    marks: Mapping[tuple[int, int], list[dict[str, Any]]] = field(default_factory=dict)

    def hits(self, query: int) -> dict[str, list[dict[str, Any]]]:
        """Return the most helpful samples of a query, and the most harmful; of a baseline both ends of its ranking."""
        top = self.summary.top
        high = list(self._hits(query, top.largest, top.largest_rows))
        low = list(self._hits(query, top.smallest, top.smallest_rows))
        if self.is_baseline:
            return {"highest": high, "lowest": low}
        return {
            "helpful": [hit for hit in high if hit["score"] > 0],
            "harmful": [hit for hit in low if hit["score"] < 0],
        }

    def _hits(self, query: int, scores: Tensor, rows: Tensor) -> Iterator[dict[str, Any]]:
        for score, row in zip(scores[query].tolist(), rows[query].tolist(), strict=True):
            if row < 0:
                return
            prompt, response = self.texts.get(self.ids[row], (None, None))
            marked = {"marked": self.marks[row, query]} if (row, query) in self.marks else {}
            yield {
                "row": row,
                "id": self.ids[row],
                "source": self.sources[row],
                "step": None,
                "score": score,
                "prompt": prompt,
                "response": response,
                **marked,
            }

    def by_source(self, query: int) -> dict[str, dict[str, float | int | None]]:
        """Return number, sum and mean of the scores of each source's samples."""
        counts, sums = Counter(self.sources), self.summary.by_source
        found: dict[str, dict[str, float | int | None]] = {}
        for name, total in sums.items():
            value = float(total[query])
            found[name] = {"rows": counts[name], "sum": value, "mean": value / counts[name]}
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, of types that JSON knows."""
        answers = [
            {"query": name, **self.hits(number), "by_source": self.by_source(number)}
            for number, name in enumerate(self.queries)
        ]
        return {
            "method": self.method,
            "asked": self.heading,
            "rows": len(self.ids),
            "unit": self.unit,
            "notes": self.notes,
            "answers": answers,
        }


def attribute_queries(
    run_dir: str | Path,
    queries: str | Path,
    *,
    method: str = "ekfac",
    checkpoint: int | str = "all",
    top: int = 20,
    each: bool = False,
    tokens: bool = False,
    max_tokens: int = 4096,
    root: str | Path | None = None,
    **settings: Any,
) -> Estimate:
    """Score every sample of a finished run for a file of queries, without a store.

    queries: rows {prompt, response} or {messages}, in any file that `fastsft.data.read_source` knows, or the name of a
    target of the run. method: a name of `fastsft.attribution.methods.registry.METHODS`; settings: its own, as
    damping=0.1. checkpoint: a step, "last", or "all" that the run kept, each weighed by the learning rates it stands
    for. The answer has all queries together, their loss in nats per response token, and with `each` every query after
    it. tokens: also the tokens of the best samples that carry most of their scores. max_tokens: of a batch. root: where
    the run file's relative paths start, if not where they did.
    """
    run = FinishedRun.open(run_dir, root=None if root is None else Path(root))
    if top < 1 or max_tokens < 1:
        raise ConfigError(f"`top` and `max_tokens` must be at least 1: got {top} and {max_tokens}.")
    name = str(queries) if str(queries) in run.config.targets and not Path(queries).exists() else ALL
    known = plainly(entry, method)
    places = places_of(run, known, method, checkpoint)
    check_method(run, method, settings, places, names=[name, *(["each"] if each else [])], tokens=tokens)
    if name != ALL and not each and method == "in_run":
        places = []  # it is booked already
    asked = None if name != ALL else read_source("queries", _resolved(queries), root=run.root)

    model, tokenizer, pad_id = run.load(run.checkpoint())
    prepared = prepare(run.config, tokenizer, run.root)
    notes: list[str] = []
    rows = prepared.targets[name] if asked is None else _tokenised(run, asked, tokenizer, notes)
    targets = {name: rows} | (_each(rows, name) if each else {})
    context = {"batching": Batching(max_tokens=max_tokens, pad_id=pad_id), "decode": decoder(tokenizer)}
    with tqdm(total=len(prepared.rows) * len(targets), desc=f"{method}: fit", unit="score") as bar:
        made = fitted(run, method, model, prepared.rows, places, {**context, **settings})
        bar.set_description(f"{method}: scores")
        scores = plainly(made.score, targets)
        summary = replace(scores, blocks=lambda: _shown(scores, bar)).summary(top)
    found = Estimate(
        method=method,
        unit=scores.unit,
        heading=f"{method}{_where(places)} of {run.out}: {len(scores.ids)} samples",
        queries=list(scores.queries),
        ids=scores.ids,
        sources=scores.sources,
        summary=summary,
        notes=notes,
        is_baseline=known.is_baseline,
    )
    hits = [hit for number in range(len(found.queries)) for side in found.hits(number).values() for hit in side]
    texts = texts_of(run, {hit["id"] for hit in hits}, notes)
    marks = _marks(found, made, targets, prepared.rows, tokenizer) if tokens else {}
    return replace(found, texts=texts, marks=marks)


def _shown(scores: Scores, bar: tqdm) -> Iterator[Block]:
    for block in scores:
        yield block
        bar.update(block.values.numel())


def _resolved(path: str | Path) -> str | Path:
    """A file beside the user comes before one beside the run file."""
    place = Path(path)
    return place.resolve() if place.exists() else path


def _tokenised(run: FinishedRun, asked: Sequence[Sample], tokenizer: Any, notes: list[str]) -> list[Row]:
    longest = run.config.train.max_length
    cut = tokenize_all(asked, tokenizer, max_length=longest, over_long="truncate")
    if cut.dropped or cut.truncated:
        notes.append(f"over {longest} tokens: {len(cut.dropped)} queries dropped, {len(cut.truncated)} cut.")
    return cut.rows


def _each(rows: Sequence[Row], taken: str) -> dict[str, list[Row]]:
    """Every row by itself under its id."""
    return {row.id if row.id != taken else f"{row.id} (one of them)": [row] for row in rows}


def _where(places: Sequence[Path]) -> str:
    if not places:
        return ""
    steps = [place.name.removeprefix("checkpoint-") for place in places]
    if len(steps) > 6:
        steps = [*steps[:2], "...", *steps[-2:]]
    return f" at checkpoint{'s' * (len(places) > 1)} {', '.join(steps)}"


def _marks(
    found: Estimate, made: Method, targets: Mapping[str, Sequence[Row]], rows: Sequence[Row], tokenizer: Any
) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Of each sample that was found the tokens that carry most of its score, in a second pass."""
    sides = {
        (hit["row"], number): side in ("helpful", "highest")
        for number in range(len(found.queries))
        for side, hits in found.hits(number).items()
        for hit in hits
    }
    marks = {}
    for block in made.score(targets, per="token"):
        assert block.tokens is not None
        for row, scores in zip(block.rows, block.tokens, strict=True):
            for column in range(scores.shape[1]):
                key = row, block.first + column
                if key in sides:
                    marks[key] = _marked(scores[:, column], rows[row], tokenizer, largest=sides[key])
    return marks


def _marked(scores: Tensor, row: Row, tokenizer: Any, *, largest: bool) -> list[dict[str, Any]]:
    values, places = scores.topk(min(MARKED, len(scores)), largest=largest)
    return [
        {"at": at, "text": tokenizer.decode([row.input_ids[at]]), "score": value}
        for value, at in zip(values.tolist(), places.tolist(), strict=True)
    ]
