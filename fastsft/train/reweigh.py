"""Weigh abilities' gradients by a resolver: by the targets' gradients until the next refresh, or exactly, in each step.

Letters: A abilities, S sources (in the order of the books).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsft.attribution.gram import cosines, smooth_gram
from fastsft.attribution.targets import TargetState
from fastsft.record import Record
from fastsft.tasks import MixError, Resolver
from fastsft.train.factors import factors, weigh
from fastsft.train.logits import LogitsTap


class Reweigher:
    """Turn a resolver's weights into a factor for each source's gradients, and write them down at every refresh.

    own: the ability of each source, None for those that keep the factor 1. Abilities without a source take no part:
    there is no gradient to weigh.
    """

    def __init__(
        self,
        resolver: Resolver,
        *,
        apply: str,
        abilities: Sequence[str],
        own: Sequence[str | None],
        smoothing: float,
        limits: tuple[float, float],
        record: Record,
        tap: LogitsTap | None = None,
    ) -> None:
        self.apply, self.smoothing, self.limits = apply, smoothing, limits
        self.record, self.tap = record, tap
        self.taking_part = [ability for ability in abilities if ability in own]
        if len(self.taking_part) < 2:
            raise MixError(
                f"a resolver weighs abilities against each other, and sources belong to {len(self.taking_part)} of the "
                f"targets {', '.join(abilities)}: say which `ability` each source is of."
            )
        # a resolver that names abilities learns their places
        self.resolver: Resolver = resolver.bind(self.taking_part) if hasattr(resolver, "bind") else resolver
        self._rows = [list(abilities).index(ability) for ability in self.taking_part]
        self._of_source = [self.taking_part.index(a) if a in self.taking_part else None for a in own]
        self.gram: np.ndarray | None = None  # of mean diagonal one, smoothed: as the resolver sees it
        self.weights = np.ones(len(self.taking_part))
        self.factors = np.ones(len(self.taking_part))
        self._steps: list[np.ndarray] = []

    def refreshed(self, step: int, state: TargetState) -> None:
        """Resolve anew from the targets' gradients (lagged), and write down what is applied."""
        if self.apply == "lagged":
            self._resolve(state.same_batch_gram.cpu().numpy()[np.ix_(self._rows, self._rows)])
            assert self.tap is not None
            self.tap.factors = torch.tensor(self._by_source())
        elif self._steps:
            self.factors = np.mean(self._steps, axis=0)  # of the steps since the last refresh
            self._steps = []
        if self.gram is not None:
            self._write(step)

    def weigh(self, gram: Tensor) -> Tensor:
        """Factors [S] of one step, from the Gram matrix [S, S] of its sources' gradients (exact)."""
        members = np.zeros((len(self.taking_part), len(self._of_source)))
        for source, ability in enumerate(self._of_source):
            if ability is not None:
                members[ability, source] = 1.0
        self._resolve(members @ gram.double().cpu().numpy() @ members.T)
        self._steps.append(self.factors)
        return torch.tensor(self._by_source(), dtype=gram.dtype)

    def _resolve(self, gram: np.ndarray) -> None:
        # the optimizer's metric shrinks while its second moments grow: each Gram matrix counts by its own scale
        self.gram = smooth_gram(self.gram, gram / max(float(np.mean(np.diag(gram))), 1e-300), self.smoothing)
        self.weights = weigh(self.resolver, self.gram)
        self.factors = factors(self.weights, self.limits)

    def _by_source(self) -> list[float]:
        return [1.0 if ability is None else float(self.factors[ability]) for ability in self._of_source]

    def _write(self, step: int) -> None:
        assert self.gram is not None
        self.record.append(
            "conflict",
            step,
            resolver=type(self.resolver).__name__.lower(),
            apply=self.apply,
            abilities=self.taking_part,
            gram=self.gram.tolist(),
            cosines=cosines(self.gram, shrink=0.0).tolist(),
            weights=self.weights.tolist(),
            factors=dict(zip(self.taking_part, self.factors.tolist(), strict=True)),
        )

    # resuming

    def state_dict(self) -> dict[str, Any]:
        return {"gram": None if self.gram is None else self.gram.tolist(), "factors": self.factors.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gram = None if state["gram"] is None else np.array(state["gram"])
        self.factors = np.array(state["factors"])
        if self.tap is not None:
            self.tap.factors = torch.tensor(self._by_source())
