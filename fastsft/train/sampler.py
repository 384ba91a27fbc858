"""Which item every draw of a run is: an index stream that follows a mix, and can be told again from its start.

Draw n is a pure function of the seed, n, and the mixes in force up to n: the stream keeps no random state. Its only
memory that matters is the log of mixes, each stamped with the draw from which it holds; a resumed run reads the log
and repeats the stream, with any number of loader workers, and every rank computes the same one.

Letters: K sources, B draws of an optimizer step over all ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from fastsft.tasks import Mix, MixError

UNITS = ("tokens", "rows")
EXHAUSTED = ("redistribute", "stop")


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How a mix becomes draws."""

    # what shares are counted in: supervised tokens, or rows (packed lines, where rows are packed)
    unit: str = "tokens"
    # how often a source may be gone through (2.5: twice and a half); None: as often as the mix asks
    max_epochs: float | None = None
    # what happens when a source is used up: its share goes to the others, or training stops
    exhausted: str = "redistribute"
    # stop after the first step at which so many supervised tokens have been drawn
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("unit", UNITS), ("exhausted", EXHAUSTED)):
            if getattr(self, name) not in allowed:
                raise MixError(f"`{name}` must be one of {', '.join(allowed)}: got {getattr(self, name)!r}.")
        for name in ("max_epochs", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise MixError(f"`{name}` must be positive, or nothing for no limit: got {value}.")


@dataclass(frozen=True)
class Stamped:
    """A mix of the log: its version, the draw from which it holds, its weights [K]."""

    version: int
    draw: int
    weights: tuple[float, ...]


class MixStream(Sampler[int]):
    """Give item numbers, source by source as the mix says, each source without replacement.

    Every draw goes to the source that would be first to have earned its next item (earliest deadline first), so that
    after any number of draws each source is within one item of its share; a source goes through all its items in a
    fresh order before any comes again. The mix changes between optimizer steps only.

    items {source: item numbers}; tokens [items]: supervised tokens of each item.
    """

    def __init__(
        self,
        items: Mapping[str, Sequence[int]],
        tokens: Sequence[int],
        mix: Mix,
        *,
        batch: int,
        steps: int,
        draws: Draws | None = None,
    ) -> None:
        self.names = list(items)
        self.draws, self.batch, self.steps = draws or Draws(), batch, steps
        empty = [name for name in self.names if not len(items[name])]
        if empty:
            raise MixError(
                f"source {empty[0]!r} has no rows to draw: leave it out, or see whether all were over `max_length`."
            )
        self._items = [np.asarray(items[name], dtype=np.int64) for name in self.names]
        self._tokens = np.asarray(tokens, dtype=np.int64)
        epochs = math.inf if self.draws.max_epochs is None else self.draws.max_epochs
        self._limits = [epochs * len(found) for found in self._items]
        self.log = [self._stamped(0, 0, mix)]
        self._forget()

    def _forget(self) -> None:
        K = len(self.names)
        self._plan: list[int] = []
        self._credit = np.zeros(K)
        self._cursor = [0] * K
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._spent = [np.zeros((K, 2), dtype=np.int64)]  # rows and supervised tokens of each source, after each step
        self.end: int | None = None  # draws in all, once it is known that the stream ends early
        self.why_ended = ""

    def _stamped(self, version: int, draw: int, mix: Mix) -> Stamped:
        return Stamped(version, draw, tuple(mix.over(self.names).weights.values()))

    # the mix

    @property
    def mix(self) -> Mix:
        """The mix that was decided last, in force or about to be."""
        return Mix(dict(zip(self.names, self.log[-1].weights, strict=True)))

    def start_with(self, mix: Mix) -> None:
        """Begin with another mix than the one given; before the first draw."""
        assert not self._plan
        self.log = [self._stamped(0, 0, mix)]

    def set_mix(self, mix: Mix) -> Stamped:
        """Draw by `mix` from the next step of which nothing has been handed out; say from which draw that is.

        A loader fetches ahead, so that draw lies some steps later: at least one, with workers more.
        """
        return self.set_mix_at(len(self._plan), mix)

    def set_mix_at(self, draw: int, mix: Mix) -> Stamped:
        """Draw by `mix` from the step on that begins with `draw`, which is not before what the log holds already."""
        if draw % self.batch or draw < max(len(self._plan), self.log[-1].draw):
            raise MixError(
                f"a mix can hold from the beginning of a step that is not drawn yet: got draw {draw}, steps have "
                f"{self.batch} draws, {len(self._plan)} are drawn and the last mix holds from {self.log[-1].draw}."
            )
        entry = self._stamped(self.log[-1].version + 1, draw, mix)
        if self.log[-1].draw == entry.draw:
            self.log.pop()  # nothing was ever drawn by it
        self.log.append(entry)
        return entry

    def in_force(self, draw: int) -> Stamped:
        """The entry of the log that holds at a draw."""
        return next(entry for entry in reversed(self.log) if entry.draw <= draw)

    # the draws

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        for draw in range(len(self)):
            if draw == len(self._plan) and not self._plan_step():
                return
            yield self._plan[draw]

    def item(self, draw: int) -> int:
        """The item of a draw; draws before it are planned if they were not."""
        while draw >= len(self._plan):
            if not self._plan_step():
                raise IndexError(f"the stream ends after {self.end} draws: {self.why_ended}")
        return self._plan[draw]

    def ends_at(self, draw: int) -> bool:
        """Whether no step follows the one that ends before `draw`."""
        return len(self._plan) <= draw and not self._plan_step()

    def epoch_tokens(self, source: str) -> int:
        """Supervised tokens of one epoch of a source."""
        return int(self._tokens[self._items[self.names.index(source)]].sum())

    def spent(self, step: int) -> dict[str, tuple[int, int]]:
        """Rows and supervised tokens drawn from each source in the first `step` steps."""
        return {name: (int(row[0]), int(row[1])) for name, row in zip(self.names, self._spent[step], strict=True)}

    def _plan_step(self) -> bool:
        """Plan the draws of one more optimizer step; False where there is none."""
        if self.end is not None or len(self._plan) >= len(self):
            return False
        spent, limit = self._spent[-1].copy(), self.draws.max_tokens
        if limit is not None and spent[:, 1].sum() >= limit:
            return self._finish(f"{spent[:, 1].sum()} supervised tokens were drawn, the limit is {limit}.")
        weights, credit, cursor = np.array(self.in_force(len(self._plan)).weights), self._credit.copy(), [*self._cursor]
        step: list[int] = []
        for _ in range(self.batch):
            chosen = self._choose(weights, credit, cursor)
            if chosen is None:
                return self._finish(self._what_ran_out(weights, cursor))
            item = self._next(chosen, cursor)
            cost = self._cost(item)
            credit += self._shares(weights, cursor) * cost
            credit[chosen] -= cost
            cursor[chosen] += 1
            spent[chosen] += (1, self._tokens[item])
            step.append(item)
        self._credit, self._cursor = credit, cursor
        self._plan += step
        self._spent.append(spent)
        return True

    def _finish(self, why: str) -> bool:
        self.end, self.why_ended = len(self._plan), why
        return False

    def _shares(self, weights: np.ndarray, cursor: list[int]) -> np.ndarray:
        """The mix over the sources that have an item left; zeros where none has."""
        left = np.array([at < limit for at, limit in zip(cursor, self._limits, strict=True)])
        total = float((weights * left).sum())
        return weights * left / total if total > 0 else np.zeros_like(weights)

    def _choose(self, weights: np.ndarray, credit: np.ndarray, cursor: list[int]) -> int | None:
        """The source whose credit will be first to pay for its next item, of those that are owed a part of it."""
        shares = self._shares(weights, cursor)
        used_up = (weights > 0) & (shares == 0)
        if not shares.any() or (self.draws.exhausted == "stop" and used_up.any()):
            return None
        idle = shares == 0
        credit += shares * credit[idle].sum()  # what is owed to a source that is not drawn goes with its share
        credit[idle] = 0.0
        best, chosen = math.inf, int(shares.argmax())
        for at in np.flatnonzero(shares):
            cost = self._cost(self._next(int(at), cursor))
            deadline = (cost - credit[at]) / shares[at]
            if credit[at] + shares[at] * cost > 1e-9 and deadline < best - 1e-9:
                best, chosen = deadline, int(at)
        return chosen

    def _cost(self, item: int) -> float:
        # a row without a supervised token still takes its place in a batch
        return max(float(self._tokens[item]), 1.0) if self.draws.unit == "tokens" else 1.0

    def _next(self, source: int, cursor: list[int]) -> int:
        epoch, place = divmod(cursor[source], len(self._items[source]))
        known = self._orders.get(source)
        if known is None or known[0] != epoch:
            known = (epoch, self._order(source, epoch))
            self._orders[source] = known
        return int(known[1][place])

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """A source's items in the order of one epoch: sorted by Philox words keyed by (seed, source, epoch)."""
        key = hashlib.blake2b(f"{self.draws.seed} {self.names[source]} {epoch}".encode(), digest_size=16).digest()
        words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(len(self._items[source]))
        return self._items[source][np.argsort(words, kind="stable")]

    def _what_ran_out(self, weights: np.ndarray, cursor: list[int]) -> str:
        out = [
            name
            for name, weight, at, limit in zip(self.names, weights, cursor, self._limits, strict=True)
            if weight > 0 and at >= limit
        ]
        return f"{', '.join(out)} had no row left within max_epochs={self.draws.max_epochs}."

    # what lasts

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: who drew (`about`), and by which mixes."""
        return {"about": self._about(), "log": [[e.version, e.draw, list(e.weights)] for e in self.log]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the log of the run that is resumed; refused where this stream would draw otherwise."""
        for key, mine in self._about().items():
            if state["about"].get(key) != mine:
                raise MixError(
                    f"the checkpoint was drawn with {key} = {state['about'].get(key)}, this run has {mine}: resume "
                    f"with the same data, batch and settings of the mix, or start a new run."
                )
        self.log = [Stamped(version, draw, tuple(weights)) for version, draw, weights in state["log"]]
        self._forget()

    def _about(self) -> dict[str, Any]:
        data = hashlib.blake2b(digest_size=8)
        for name, items in zip(self.names, self._items, strict=True):
            data.update(f"{name} {len(items)}".encode() + items.tobytes() + self._tokens[items].tobytes())
        draws = {name: getattr(self.draws, name) for name in ("unit", "max_epochs", "exhausted", "max_tokens", "seed")}
        return {"batch": self.batch, "data": data.hexdigest(), **draws}

    def digest(self) -> str:
        """Name the stream so far by 16 hex digits: equal on all ranks, or they draw different samples."""
        said = json.dumps([self._about(), self.state_dict()["log"], len(self._plan)], sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
