"""What the runs of an arm say beside those of the uniform mix and of the oracle, paired by seed.

A run's loss is the mean of its last evaluations, not of its best. An interval holds the middle 95 % of the means of
all draws of S seeds with replacement, the same draws for every arm. Of 5 seeds it is rather too narrow: read it beside
the numbers of each seed, which the rows keep.
"""

# S seeds, B draws of seeds

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# evaluations that a final loss is the mean of
LAST = 3
# draws of seeds, where there are too many to take all
_DRAWS = 4000
_ALL = 5

Result = Mapping[str, Any]
Interval = list[float]


def final(result: Result, part: str) -> dict[str, float]:
    """Average each ability's last losses, nats per response token."""
    last = result[part][-LAST:]
    return {ability: math.fsum(each[ability] for each in last) / len(last) for ability in last[0]}


def mean_loss(result: Result, part: str) -> float:
    """Average over abilities."""
    return statistics.fmean(final(result, part).values())


def draws_of(S: int) -> np.ndarray:
    """Places of the seeds of each draw [B, S]: all S^S of them, or many at random."""
    if S <= _ALL:
        return np.array(list(itertools.product(range(S), repeat=S)))
    return np.random.Generator(np.random.Philox(0)).integers(0, S, (_DRAWS, S))


def paired(values: Sequence[float]) -> Interval:
    """Average differences of paired runs [S], with the ends of the interval."""
    means = np.asarray(values)[draws_of(len(values))].mean(1)
    return [float(np.mean(values)), *np.quantile(means, [0.025, 0.975]).tolist()]


def share_of_gap(arm: Sequence[float], uniform: Sequence[float], oracle: Sequence[float]) -> Interval | None:
    """What part of the way from uniform to the oracle an arm went, losses [S] each; None where there is no way.

    The seeds of a draw are averaged before they are divided. There is no way where a draw in forty or more finds the
    oracle no better than uniform: what it then is a share of would be noise.
    """
    drawn = draws_of(len(arm))
    gain, gap = (np.subtract(uniform, other) for other in (arm, oracle))
    gaps = gap[drawn].mean(1)
    if np.quantile(gaps, 0.025) <= 0:
        return None
    found = gain[drawn].mean(1)[gaps > 0] / gaps[gaps > 0]
    return [float(gain.mean() / gap.mean()), *np.quantile(found, [0.025, 0.975]).tolist()]


def tokens_to(result: Result, target: float) -> float | None:
    """Tokens after which an arm's mean test loss reached `target`, between evaluations by line; None: it never did."""
    before = (0, statistics.fmean(result["initial"].values()))
    for tokens, losses in zip(result["tokens"], result["test"], strict=True):
        loss = statistics.fmean(losses.values())
        if loss <= target:
            share = (before[1] - target) / (before[1] - loss) if before[1] > loss else 1.0
            return before[0] + (tokens - before[0]) * share
        before = (tokens, loss)
    return None


def path_length(result: Result) -> float:
    """Add up how far the mix moved: half the sum of the shares' changes, each time (1: from one source to another)."""
    mixes = [event["weights"] for event in result["path"]]
    changes = (
        math.fsum(abs(after[source] - before[source]) for source in after) / 2
        for before, after in itertools.pairwise(mixes)
    )
    return math.fsum(changes)


def arm_row(arm: Mapping[int, Result], uniform: Mapping[int, Result], oracle: Mapping[int, Result]) -> dict[str, Any]:
    """Tell one arm's runs {seed: result}, on the seeds that it shares with uniform (and the oracle).

    loss, worst: of each seed, the mean over abilities and the worst ability's, test rows, nats a response token.
    lost: of each seed, by how much the ability that lost most against uniform did. minus_uniform: the mean difference
    with its interval; relative: as a share of uniform's loss. closed: the share of the gap to the oracle. to_uniform:
    of each seed, the share of uniform's tokens after which its final loss was reached, null where it was not.
    overhead: seconds of a step divided by uniform's, the median of the seeds.
    """
    seeds = sorted(set(arm) & set(uniform))
    runs, against = [arm[seed] for seed in seeds], [uniform[seed] for seed in seeds]
    losses = [final(run, "test") for run in runs]
    theirs = [final(run, "test") for run in against]
    loss, base = [statistics.fmean(each.values()) for each in losses], [statistics.fmean(e.values()) for e in theirs]
    difference = paired([mine - other for mine, other in zip(loss, base, strict=True)])
    reached = [tokens_to(run, target) for run, target in zip(runs, base, strict=True)]
    return {
        "seeds": seeds,
        "loss": loss,
        "losses": {ability: [each[ability] for each in losses] for ability in losses[0]},
        "worst": [max(each.values()) for each in losses],
        "lost": [max(mine[a] - other[a] for a in mine) for mine, other in zip(losses, theirs, strict=True)],
        "minus_uniform": difference,
        "relative": [end / statistics.fmean(base) for end in difference],
        "closed": _closed(arm, uniform, oracle),
        "to_uniform": [
            None if tokens is None else tokens / run["tokens"][-1] for tokens, run in zip(reached, against, strict=True)
        ],
        "tokens": [run["tokens"][-1] for run in runs],
        "steps": [run["steps"] for run in runs],
        "seconds": [run["seconds"] for run in runs],
        "overhead": statistics.median(_pace(mine) / _pace(other) for mine, other in zip(runs, against, strict=True)),
        "path_length": [path_length(run) for run in runs],
        "spent": {name: statistics.fmean(run["spent"][name] for run in runs) for name in runs[0]["spent"]},
        "device": runs[0]["device"],
    }


def _closed(arm: Mapping[int, Result], uniform: Mapping[int, Result], oracle: Mapping[int, Result]) -> Interval | None:
    seeds = sorted(set(arm) & set(uniform) & set(oracle))
    three = [[mean_loss(runs[seed], "test") for seed in seeds] for runs in (arm, uniform, oracle)]
    return share_of_gap(*three) if seeds else None


def _pace(run: Result) -> float:
    """Seconds of a step, without evaluations: the process's own on a CPU that others use too."""
    return float(run["seconds" if run["device"] == "cuda" else "cpu_seconds"]) / int(run["steps"])


def rounded(value: Any) -> Any:
    """Keep five digits of every number in what JSON can hold."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value
