"""What an ability's loss will be under a mix, learnt from a few pilots: laws, trees, and how far to trust them.

All are fitted to each ability by itself, and weigh in by how well they foretell pilots that they were not shown.
"""

# n pilots, K sources, m mixes asked about

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from scipy.optimize import least_squares

from fastsft.mixing.core import Array

# the law on roots of shares: a source's first percent does more than its fiftieth. The law on shares themselves: where
# it does not. Trees: whatever else. Over three kinds of planted worlds, 16 and 32 pilots, two strengths of noise, the
# three together were off by at most 0.03 standard deviations of the losses more than the best of them alone, which was
# each law in some; without the law on shares by up to 0.09 more.
LAW, PLAIN, TREES = "law", "plain law", "trees"
LAWS = (LAW, PLAIN)
MEMBERS = (LAW, PLAIN, TREES)
# of the interval that is told
LEVEL = 0.9
# shrinks slopes, in units of the losses' variance. On planted laws 1e-4 and 1e-3 predicted alike, 1e-2 a little worse.
_RIDGE = 1e-3
# how far below the smallest loss the floor may lie, in standard deviations of the losses: nearer it would follow the
# noise of one pilot, further it is a straight line
_NEAREST, _FURTHEST = 0.05, 50.0
_STARTS = 4


class Predictor(Protocol):
    """Mixes [m, K] in, losses [m] out."""

    def __call__(self, mixes: Array) -> Array: ...


@dataclass(frozen=True, eq=False)
class ExponentialLaw:
    """loss = floor + scale * exp(bias + slopes . sqrt(mix)), nats; a source with a negative slope helps.

    The mixing law of Ye et al. (arXiv 2403.16952) has mix in the place of sqrt(mix); `root` False is that.
    """

    floor: float
    scale: float
    bias: float
    slopes: Array
    root: bool = True

    def __call__(self, mixes: Array) -> Array:
        features = np.sqrt(mixes) if self.root else mixes
        # 50: a mix far from the pilots must not overflow
        return self.floor + self.scale * np.exp(np.minimum(self.bias + features @ self.slopes, 50.0))


def fit_law(mixes: Array, losses: Array, *, root: bool = True, start: ExponentialLaw | None = None) -> ExponentialLaw:
    """Fit the law by least squares to mixes [n, K] and losses [n], its slopes held by a weak ridge.

    From four floors between just below the smallest loss and zero (or from `start`), each with the slopes that are
    best for its logarithm; the best end is taken. Losses are nats, so the floor is not below zero unless a loss is.
    """
    features = np.sqrt(mixes) if root else mixes
    n, K = features.shape
    smallest, scale = float(losses.min()), float(losses.std()) or 1.0
    scaled = (losses - smallest) / scale
    near = math.log(_NEAREST)
    room = smallest / scale if smallest > 0 else _FURTHEST
    far = max(math.log(min(max(room, _NEAREST), _FURTHEST)), near + 1e-3)
    weight = math.sqrt(_RIDGE * n)

    def residuals(given: Array) -> Array:
        found = np.exp(np.minimum(given[1] + features @ given[2:], 50.0))
        return np.concatenate([found - np.exp(given[0]) - scaled, weight * given[2:]])

    def jacobian(given: Array) -> Array:
        found = np.exp(np.minimum(given[1] + features @ given[2:], 50.0))
        matrix = np.zeros((n + K, K + 2))
        matrix[:n, 0], matrix[:n, 1], matrix[:n, 2:] = -np.exp(given[0]), found, found[:, None] * features
        matrix[n:, 2:] = weight * np.eye(K)
        return matrix

    edge = 1e-6  # a start must lie inside
    if start is None:
        starts = [_start(depth, features, scaled) for depth in np.linspace(near + edge, far - edge, _STARTS)]
    else:
        depth = math.log(max(smallest - start.floor, 1e-300) / scale)
        bias = start.bias + math.log(start.scale / scale)
        starts = [np.array([np.clip(depth, near + edge, far - edge), bias, *start.slopes])]
    free = np.full(K + 1, np.inf)
    limits = (np.array([near, *-free]), np.array([far, *free]))
    ends = [
        least_squares(residuals, at, jacobian, bounds=limits, x_scale="jac", ftol=1e-7, xtol=1e-7, max_nfev=200)
        for at in starts
    ]
    best = min(ends, key=lambda end: round(float(end.cost), 9)).x  # of ends that are the same, the first
    return ExponentialLaw(smallest - scale * math.exp(best[0]), scale, float(best[1]), best[2:], root)


def _start(depth: float, features: Array, scaled: Array) -> Array:
    """Where the fit starts: the floor `depth` (log) below the smallest loss, slopes by weighted ridge of the log."""
    above = scaled + math.exp(depth)
    design = np.column_stack([np.ones(len(features)), features]) * above[:, None]  # d log(x) = dx / x
    ridge = np.diag([1e-9] + [_RIDGE * len(features)] * features.shape[1])
    solved = np.linalg.solve(design.T @ design + ridge, design.T @ (np.log(above) * above))
    return np.array([depth, *solved])


def fit_trees(mixes: Array, losses: Array) -> Predictor:
    """Fit gradient boosting to mixes [n, K] and losses [n]: 30 trees of depth 2, leaves of 2 pilots or more.

    Of a size for 16 to 64 pilots: 100 smaller steps, or depths 1 and 3, predicted alike. Scikit-learn's histogram
    boosting keeps 20 rows a leaf unless told, so below 40 pilots it is a constant; set free it predicted no better.
    """
    from sklearn.ensemble import GradientBoostingRegressor

    trees = GradientBoostingRegressor(
        n_estimators=30, learning_rate=0.2, max_depth=2, min_samples_leaf=2, random_state=0
    )
    predictor: Callable[[Array], Array] = trees.fit(np.sqrt(mixes), losses).predict
    return lambda asked: predictor(np.sqrt(asked))


class Forecaster(Protocol):
    """What an ability, or a mean of abilities, is forecast by."""

    @property
    def residuals(self) -> Array:
        """Loss measured minus loss forecast without that pilot [n]."""
        ...

    def predict(self, mixes: Array) -> Array:
        """Losses [m] of mixes [m, K]."""
        ...

    def refits(self, mixes: Array) -> Array:
        """The same without each of the pilots in turn [n, m]."""
        ...


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The predictors of one ability, and themselves fitted without each pilot in turn.

    left_out {name: [n]}: what each says of the pilot that it was not shown.
    """

    losses: Array
    members: dict[str, Predictor]
    without: dict[str, list[Predictor]]
    left_out: dict[str, Array]

    @classmethod
    def fit(cls, mixes: Array, losses: Array) -> Surrogate:
        """Fit to mixes [n, K] and losses [n]. Costs 3 (n + 1) fits of some 3 to 20 ms."""
        law, plain = fit_law(mixes, losses), fit_law(mixes, losses, root=False)
        fits: dict[str, Callable[[Array, Array], Predictor]] = {
            LAW: lambda some, told: fit_law(some, told, start=law),
            PLAIN: lambda some, told: fit_law(some, told, root=False, start=plain),
            TREES: fit_trees,
        }
        rows = np.arange(len(losses))
        without = {name: [fit(mixes[rows != at], losses[rows != at]) for at in rows] for name, fit in fits.items()}
        left_out = {
            name: np.array([float(refit(mixes[[at]])[0]) for at, refit in enumerate(refits)])
            for name, refits in without.items()
        }
        return cls(losses, {LAW: law, PLAIN: plain, TREES: fit_trees(mixes, losses)}, without, left_out)

    @cached_property
    def errors(self) -> dict[str, float]:
        """Leave-one-out error of each member, root mean square in nats."""
        return {name: _rms(self.losses - left_out) for name, left_out in self.left_out.items()}

    @cached_property
    def shares(self) -> dict[str, float]:
        """What each member weighs: by the inverse of its squared leave-one-out error."""
        tiny = 1e-9 * max(float(np.abs(self.losses).max()), 1e-300)
        raw = {name: 1 / (error + tiny) ** 2 for name, error in self.errors.items()}
        return {name: value / sum(raw.values()) for name, value in raw.items()}

    @property
    def residuals(self) -> Array:
        """See `Forecaster`; the shares know the pilot left out, which flatters a little."""
        return self.losses - _sum(share * self.left_out[name] for name, share in self.shares.items())

    def predict(self, mixes: Array, members: Sequence[str] = MEMBERS) -> Array:
        """See `Forecaster`; of some members alone it is their part of the sum."""
        return _sum(self.shares[name] * self.members[name](mixes) for name in members)

    def refits(self, mixes: Array) -> Array:
        return _sum(
            share * np.array([refit(mixes) for refit in self.without[name]]) for name, share in self.shares.items()
        )


@dataclass(frozen=True, eq=False)
class Blend:
    """A weighted mean of abilities' forecasts; `weights` sum to one."""

    parts: Sequence[Surrogate]
    weights: Sequence[float]

    @property
    def losses(self) -> Array:
        return _sum(weight * part.losses for part, weight in zip(self.parts, self.weights, strict=True))

    @property
    def residuals(self) -> Array:
        return _sum(weight * part.residuals for part, weight in zip(self.parts, self.weights, strict=True))

    def predict(self, mixes: Array, members: Sequence[str] = MEMBERS) -> Array:
        told = (part.predict(mixes, members) for part in self.parts)
        return _sum(weight * each for weight, each in zip(self.weights, told, strict=True))

    def refits(self, mixes: Array) -> Array:
        return _sum(weight * part.refits(mixes) for part, weight in zip(self.parts, self.weights, strict=True))

    @cached_property
    def explained(self) -> float:
        """Share of the pilots' variance that forecasts without them explain; 0 or less where they say nothing."""
        variance = float(self.losses.var())
        return 1 - float(np.mean(self.residuals**2)) / variance if variance > 0 else 0.0


def interval(forecast: Forecaster, mixes: Array, level: float = LEVEL) -> tuple[Array, Array]:
    """Where a pilot on each of mixes [m, K] would end -> low [m], high [m].

    Jackknife+ (Barber et al., Annals of Statistics 2021): quantiles over pilots of what is forecast without a pilot,
    less and plus the error made at it. Holds at least 2 * level - 1 of mixes drawn as the pilots were, and about
    `level`; pilots on a sequence, and a mix that was chosen, are not quite that. Below 1 / (1 - level) - 1 pilots (9)
    it is as wide as they allow, which is less than `level` asks for.
    """
    told, off = forecast.refits(mixes), np.abs(forecast.residuals)[:, None]
    n = len(told)
    rank = min(math.ceil(level * (n + 1)), n)
    return np.sort(told - off, axis=0)[n - rank], np.sort(told + off, axis=0)[rank - 1]


def contrast_error(forecast: Forecaster, one: Array, other: Array) -> float:
    """Standard error of the difference of the losses of two mixes [K], by the jackknife over pilots."""
    told = forecast.refits(np.stack([one, other]))
    differences = told[:, 0] - told[:, 1]
    n = len(differences)
    return float(np.sqrt((n - 1) / n * np.sum((differences - differences.mean()) ** 2)))


def chosen_factor(pilots: int, sources: int, level: float = LEVEL) -> float:
    """By how many standard errors a difference must be widened when a mix was chosen by it.

    Scheffé: sqrt(K F(level; K, n - K - 1)), which holds for all mixes at once, so for whichever came out best; 3.6 for
    5 sources and 16 pilots, where a mix named beforehand needs 1.8.
    """
    from scipy.stats import f

    return math.sqrt(sources * float(f.ppf(level, sources, max(pilots - sources - 1, 1))))


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _sum(parts: Any) -> Array:
    return np.sum(list(parts), axis=0)
