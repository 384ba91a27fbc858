"""What training on some of the samples really does to the queries: losses of retrainings, kept on disk."""

# N samples, M subsets, S seeds, Q queries

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsft.evaluate.intervals import Value, between, crossed_draws, spearman_draws, weighted_mean
from fastsft.store import write_whole

SCHEMA = 1
_ARRAYS = ("tokens", "subsets", "losses", "base", "full")
_NAMES = ("ids", "sources", "queries", "abilities")
_WAY_OUT = "Delete it and measure again."


class EvaluationError(ValueError):
    """An evaluation that can't be made, or a file of one that can't be read, with the way out."""


@dataclass(frozen=True, eq=False)
class Truth:
    """Losses of Q queries after retraining on M subsets of N samples with S seeds, in nats per response token.

    subsets [M, N] bool: which samples were trained on; losses [M, S, Q], nan where not measured; base [Q]: before
    training; full [S, Q]: after training on all samples. abilities: whose target each query is of; tokens [Q]: its
    response tokens. about: settings, versions, and `digest`, which names the run and what was measured.
    """

    ids: Sequence[str]
    sources: Sequence[str]
    queries: Sequence[str]
    abilities: Sequence[str]
    tokens: Tensor
    subsets: Tensor
    losses: Tensor
    base: Tensor
    full: Tensor
    about: Mapping[str, Any]

    def __post_init__(self) -> None:
        N, Q, (M, S) = len(self.ids), len(self.queries), self.losses.shape[:2]
        wanted = {"tokens": (Q,), "subsets": (M, N), "losses": (M, S, Q), "base": (Q,), "full": (S, Q)}
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                raise EvaluationError(
                    f"`{name}` of a truth must have the shape {list(shape)}, by its {N} ids and {Q} queries: got "
                    f"{list(getattr(self, name).shape)}."
                )
        if len(self.sources) != N or len(self.abilities) != Q:
            raise EvaluationError(
                f"a truth names a source for each of {N} samples and an ability for each of {Q} queries."
            )

    @property
    def known(self) -> Tensor:
        """Which subsets [M] were retrained with one seed at least."""
        return ~self.losses.isnan().all(2).all(1)

    def measured(self) -> Truth:
        """Leave out the subsets that were never retrained."""
        return dataclasses.replace(self, subsets=self.subsets[self.known], losses=self.losses[self.known])

    def mean_losses(self) -> Tensor:
        """Average over the seeds that were measured -> [M, Q]."""
        return self.losses.nanmean(1)

    def grouped(self) -> Truth:
        """Take each ability as one query: its loss is that of all its queries' response tokens."""
        names = list(dict.fromkeys(self.abilities))
        shares = self.shares(names)
        return dataclasses.replace(
            self,
            queries=names,
            abilities=names,
            tokens=torch.stack([self.tokens[[a == name for a in self.abilities]].sum() for name in names]),
            losses=self.losses @ shares,
            base=self.base @ shares,
            full=self.full @ shares,
        )

    def shares(self, names: Sequence[str]) -> Tensor:
        """The share of each query in the tokens of the abilities named [Q, len(names)]."""
        of = torch.tensor([[ability == name for name in names] for ability in self.abilities], dtype=torch.float64)
        weights = of * self.tokens.double()[:, None]
        return weights / weights.sum(0)

    def ceiling(self, *, seed: int = 0) -> Value:
        """The LDS that scores without any error would reach, given how much seeds differ: see `reliability`.

        Halves are made of the seeds that every measured subset has, and stepped up to the seeds that a subset has on
        the average. nan where there are fewer than two such seeds, or fewer than four subsets.
        """
        losses = self.measured().losses
        here = ~losses.isnan().any(2)  # [M, S]
        whole = losses[:, here.all(0)]
        if whole.shape[1] < 2 or len(whole) < 4:
            return Value(float("nan"), float("nan"), float("nan"))
        seeds = float(here.sum(1).double().mean())
        draws = crossed_draws(len(whole), whole.shape[2], seed=seed)
        every = torch.ones(1, len(whole), dtype=torch.float64)
        drawn = reliability(whole, draws.subsets, seeds=seeds).sqrt()
        found = float(reliability(whole, every, seeds=seeds).sqrt().mean())
        return Value(found, *between(weighted_mean(drawn, draws.queries)))

    def save(self, path: Path) -> Path:
        """Write it whole as one .npz."""
        arrays: dict[str, Any] = {name: getattr(self, name).numpy() for name in _ARRAYS}
        arrays |= {name: np.array(list(getattr(self, name)), dtype=np.str_) for name in _NAMES}
        file = io.BytesIO()
        np.savez_compressed(file, schema=SCHEMA, about=json.dumps(dict(self.about)), **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [file.getvalue()])
        return path

    @classmethod
    def load(cls, path: Path) -> Truth:
        """Read what `save` wrote; a damaged file is refused."""
        try:
            with np.load(path, allow_pickle=False) as file:
                read = {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise EvaluationError(f"{path} can't be read ({error}). {_WAY_OUT}") from None
        absent = {"schema", "about", *_ARRAYS, *_NAMES} - set(read)
        if absent or int(read["schema"]) != SCHEMA:
            raise EvaluationError(
                f"{path} is no truth of schema {SCHEMA} (without {', '.join(sorted(absent)) or 'nothing'}, schema "
                f"{read.get('schema', 'unknown')}). {_WAY_OUT}"
            )
        fields: dict[str, Any] = {name: torch.from_numpy(read[name]) for name in _ARRAYS}
        fields |= {name: read[name].tolist() for name in _NAMES}
        return cls(**fields, about=json.loads(str(read["about"])))


def reliability(losses: Tensor, subsets: Tensor, *, seeds: float | None = None) -> Tensor:
    """The reliability of losses averaged over seeds, of each query and draw of subsets: [M, S, Q], [B, M] -> [B, Q].

    Seeds are split into two halves in all ways (of an odd number one stays out); the halves' Spearman correlation over
    subsets is averaged over the splits and stepped up to `seeds` (S unless told) by Spearman and Brown:
    k r / (1 + (k - 1) r), k = seeds / seeds of a half. Its square root is how well the averages rank the subsets as
    endless seeds would.
    """
    S = losses.shape[1]
    half = S // 2
    splits = [
        (one, other)
        for one in combinations(range(S), half)
        for other in combinations(sorted(set(range(S)) - set(one)), half)
        if one < other
    ]
    total = sum(
        spearman_draws(losses[:, list(one)].mean(1), losses[:, list(other)].mean(1), subsets) for one, other in splits
    )
    found = torch.as_tensor(total) / len(splits)
    k = (S if seeds is None else seeds) / half
    return (k * found / (1 + (k - 1) * found.clamp(min=0))).clamp(0, 1)
