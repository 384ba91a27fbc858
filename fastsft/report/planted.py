"""Compare the books with truths that were planted in the data, each beside what chance would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsft.record import digest
from fastsft.report.flows import SampleFlow
from fastsft.report.run import Run, own_ability

RANDOM_DRAWS = 20


def auc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float | None:
    """Chance that a positive scores above a negative; a tie counts one half. None without both kinds."""
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return None
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(size) - (size - 1) / 2)[group]
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def planted_truths(
    run: Run, flows: Mapping[str, SampleFlow], ledger: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Score the planted truths; None where nothing was planted, null where a truth can't be judged."""
    if run.planted is None:
        return None
    return {
        **_harmful(run, flows, set(run.planted.get("harmful") or [])),
        **_duplicates(run, run.planted.get("duplicates") or []),
        **_useless(run, ledger),
        **_helper(run, ledger),
    }


def _harmful(run: Run, flows: Mapping[str, SampleFlow], harmful: set[str]) -> dict[str, Any]:
    homes = {flow.source for sample, flow in flows.items() if sample in harmful}
    own = {source: own_ability(run, source) for source in homes}
    candidates = sorted(sample for sample, flow in flows.items() if flow.source in homes)
    scores = np.array([_score(flows[sample], own[flows[sample].source]) for sample in candidates], dtype=np.float64)
    positive = np.array([sample in harmful for sample in candidates], dtype=bool)
    generator = np.random.default_rng(0)
    chance = [auc(generator.standard_normal(len(candidates)), positive) for _ in range(RANDOM_DRAWS)]
    known = [value for value in chance if value is not None]
    told = sorted(f"{source}: {ability or 'all abilities summed'}" for source, ability in own.items())
    return {
        "harmful_auc": auc(scores, positive),
        "random_auc": float(np.mean(known)) if known else None,
        "random_auc_range": [min(known), max(known)] if known else None,
        "harmful_planted": len(harmful),
        "harmful_scored": int(positive.sum()),
        "harmful_how": (
            "score of a sample: its phi summed over its draws, higher is more harmful, for the ability of its source "
            f"({'; '.join(told) or 'none scored'}); ranked among the scored samples of the sources that hold harmful "
            f"ones; ties count one half; random: mean of {RANDOM_DRAWS} seeded draws of normal scores"
        ),
    }


def _score(flow: SampleFlow, ability: str | None) -> float:
    return sum(flow.phi.values()) if ability is None else flow.phi.get(ability, 0.0)


def text_digests(run: Run) -> dict[str, str]:
    """Hash prompt and response of every sample."""
    columns = (run.samples[name].to_pylist() for name in ("id", "prompt", "response"))
    return {sample: digest(f"{prompt}\0{response}") for sample, prompt, response in zip(*columns, strict=True)}


def equal_texts(run: Run) -> dict[str, int]:
    """Count the texts that occur more than once among the samples, and the samples that hold them."""
    repeated = [count for count in Counter(text_digests(run).values()).values() if count > 1]
    return {"texts": len(repeated), "samples": sum(repeated)}


def _duplicates(run: Run, pairs: list[list[str]]) -> dict[str, Any]:
    digests = text_digests(run)
    found = sum(first in digests and digests[first] == digests.get(second) for first, second in pairs)
    return {
        "duplicates_found": found / len(pairs) if pairs and digests else None,
        "duplicates_planted": len(pairs),
        "duplicates_how": "a planted pair is found when the sha256 of prompt and response is equal for both members",
    }


def _useless(run: Run, ledger: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    assert run.planted is not None
    source = run.planted.get("useless_source")
    entries = [entry["by_source"] for entry in ledger.values() if source in entry["by_source"]]
    gross = sum(abs(value) for entry in entries for value in entry.values())
    drawn: Counter[str] = Counter()
    for step in run.steps:
        drawn.update(step.get("documents") or {})
    return {
        "useless_source": source,
        "useless_source_share": sum(abs(entry[source]) for entry in entries) / gross if gross else None,
        "useless_source_draws_share": drawn[source] / drawn.total() if source and drawn.total() else None,
        "useless_source_how": "its |entries| as a share of all, over all abilities; beside it, its share of the draws",
    }


def _helper(run: Run, ledger: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    assert run.planted is not None
    source, helps = run.planted.get("helper_source"), run.planted.get("helps") or []
    entries = {ability: ledger[ability]["by_source"].get(source) for ability in helps if ability in ledger}
    judged = bool(source and helps) and len(entries) == len(helps) and None not in entries.values()
    return {
        "helper_source": source,
        "helper_entries": entries,
        "helper_ok": all(value < 0 for value in entries.values()) if judged else None,
        "helper_how": "true when the entry of the helper is negative for every ability it was planted to help",
    }
