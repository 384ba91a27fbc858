"""Resolvers: a Gram matrix [K, K] of the abilities' gradients in, their weights [K] out; pure functions, numpy float64.

The combined direction is d = sum_j w_j g_j, so (G w)_i = <g_i, d> says what a step along d does for ability i. Only
ratios of weights matter to a run (`factors`). Equal to TorchJD 0.18's weightings of the same name (its DualProj is our
Gem), but for what the classes say. G may have no negative eigenvalue: `positive` sees to it.
"""

# K abilities, R a root of G: G = R^T R

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import nnls

from fastsft.attribution.gram import Array, read_gram, spectrum
from fastsft.tasks import MixError

Scale = Literal["min", "median", "rmse"]


@dataclass(frozen=True, kw_only=True)
class UPGrad:
    """Project every gradient to where it opposes none, and average: w = sum_i argmin {v^T G v : v >= e_i / K}.

    Jacobian descent for multi-objective optimization (arXiv 2406.16232). G is divided by its trace and `ridge` added to
    its diagonal, so (G w)_i >= -ridge * trace(G) * w_i. Unlike TorchJD, which takes a trace below 1e-4 for zero, small
    gradients are resolved like large ones.
    """

    ridge: float = 1e-4

    def __post_init__(self) -> None:
        _check_ridge(self.ridge)

    def __call__(self, gram: Any) -> Array:
        root = _root(gram, self.ridge)
        K = len(root)
        return np.sum([_raised(root, start, range(K)) for start in np.eye(K) / K], axis=0)


@dataclass(frozen=True, kw_only=True)
class Gem:
    """Project the mean gradient to where it opposes no protected ability: argmin {v^T G v : v >= 1/K}, = 1/K elsewhere.

    Gradient episodic memory (arXiv 1706.08840, equation 11), with its "memories" chosen. protected: places in G; None
    protects all, as TorchJD's DualProj; or names, which a run turns into places by `bind`. Ridge and trace as in
    `UPGrad`: (G w)_i >= -ridge * trace(G) * w_i for those.
    """

    protected: tuple[int, ...] | tuple[str, ...] | None = None
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        _check_ridge(self.ridge)
        if self.protected is not None and not self._named:
            object.__setattr__(self, "protected", _read_places(self.protected, "protected"))

    @property
    def _named(self) -> bool:
        return bool(self.protected) and all(isinstance(each, str) for each in self.protected or ())

    def bind(self, abilities: Sequence[str]) -> Gem:
        """Find the protected abilities among those whose gradients a run weighs, in the order of its matrices."""
        if not self._named:
            return self
        names = [str(name) for name in self.protected or ()]
        absent = [name for name in names if name not in abilities]
        if absent:
            raise MixError(
                f"`protected` names {absent[0]!r}, and no source is of that ability, so it has no gradient to weigh: "
                f"the run weighs {', '.join(abilities)}."
            )
        return Gem(protected=tuple(list(abilities).index(name) for name in names), ridge=self.ridge)

    def __call__(self, gram: Any) -> Array:
        root = _root(gram, self.ridge)
        K = len(root)
        if self._named:
            raise MixError(f"`protected` holds names, {self.protected}: `bind` them to the abilities of `gram` first.")
        free = range(K) if self.protected is None else [int(place) for place in self.protected]
        if any(place >= K for place in free):
            raise MixError(f"`protected` must name places in `gram`, 0 to {K - 1}: got {self.protected}.")
        return _raised(root, np.full(K, 1 / K), free)


@dataclass(frozen=True, kw_only=True)
class PCGrad:
    """Take from every gradient, one after another, what opposes each other, and sum: c_j -= min((G c)_j, 0) / G_jj.

    Gradient surgery (arXiv 2001.06782). The paper draws the order anew for each gradient; here it is `order`, or, None,
    the mean over the K cyclic orders of the abilities. So how a run lists them has an effect for K > 2.
    """

    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.order is not None:
            order = _read_places(self.order, "order")
            if sorted(order) != list(range(len(order))):
                raise MixError(f"`order` must hold each of 0 to K - 1 once: got {order}.")
            object.__setattr__(self, "order", order)

    def __call__(self, gram: Any) -> Array:
        spectrum(gram)
        values = read_gram(gram)
        K = len(values)
        places = np.arange(K)
        orders = (places + places[:, None]) % K if self.order is None else np.array([self.order])
        if orders.shape[1] != K:
            raise MixError(f"`order` must hold the {K} abilities of `gram`: got {self.order}.")
        coefficients = np.tile(np.eye(K), (len(orders), 1, 1))  # [orders, gradient, its parts]
        rows = np.arange(len(orders))
        for column in orders.T:
            products = np.einsum("oij,oj->oi", coefficients, values[column])
            size = values.diagonal()[column][:, None]
            opposed = (products < 0) & (places != column[:, None]) & (size > 0)
            coefficients[rows, :, column] -= np.divide(products, size, out=np.zeros_like(products), where=opposed)
        return coefficients.sum(1).mean(0)


@dataclass(frozen=True, kw_only=True)
class AlignedMTL:
    """Give all principal directions of the gradients one length: w = sqrt(lambda) V Lambda^(-1/2) V^T 1/K.

    Independent component alignment (CVPR 2023). lambda: the lowest eigenvalue, the (lower) median or the mean ("rmse").
    A weight may be negative. Eigenvalues below `smallest` of the highest count as absent, since noise there would get
    the largest weights; TorchJD drops those below K * 2e-16.
    """

    scale: Scale = "median"
    smallest: float = 1e-9

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise MixError(f"`scale` must be one of {', '.join(get_args(Scale))}: got {self.scale!r}.")
        if not 0 < self.smallest < 1:
            raise MixError(
                f"`smallest` must be a share of the highest eigenvalue, above 0, below 1: got {self.smallest}."
            )

    def __call__(self, gram: Any) -> Array:
        values, vectors = spectrum(gram)
        start = np.full(len(values), 1 / len(values))
        kept = values > self.smallest * values[-1]
        if not kept.any():
            return start
        values, vectors = values[kept], vectors[:, kept]
        length = {"min": values[0], "median": values[(len(values) - 1) // 2], "rmse": values.mean()}[self.scale]
        return vectors @ (np.sqrt(length / values) * (vectors.T @ start))


# relative to the trace: makes the answer one where several are as good, and moves it by no more than this
_UNIQUE = 1e-10


@dataclass(frozen=True)
class MGDA:
    """Find the shortest average of the gradients: argmin {w^T G w : w >= 0, sum w = 1}. A diagnostic, not for training.

    Multiple-gradient descent (Désidéri 2012). w^T G w near zero: no step helps all abilities. Noise moves it ten times
    as far as UPGrad. Exact by one non-negative least-squares problem, |R v|^2 + (1 - sum v)^2, whose v / sum v it is;
    TorchJD's Frank-Wolfe stops short.
    """

    def __call__(self, gram: Any) -> Array:
        root = _root(gram, _UNIQUE)
        K = len(root)
        system = np.vstack([root, np.ones((1, K))])
        found = _nonnegative(system, np.append(np.zeros(K), 1.0))
        return found / found.sum()


@dataclass(frozen=True)
class Uniform:
    """Weigh all alike: a control."""

    def __call__(self, gram: Any) -> Array:
        K = len(read_gram(gram))
        return np.full(K, 1 / K)


@dataclass(frozen=True, kw_only=True)
class Random:
    """Weigh at random, softmax of standard normals: a control that is strong (arXiv 2111.10603).

    The numbers come from the seed and a digest of G's bytes, so a resumed run that meets the same G gets the same
    weights.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise MixError(f"`seed` must be a whole number: got {self.seed!r}.")

    def __call__(self, gram: Any) -> Array:
        # + 0.0: a zero has one sign
        values = (read_gram(gram) + 0.0).astype("<f8")
        digest = hashlib.blake2b(f"weights {self.seed} ".encode() + values.tobytes(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        raised = np.exp(generator.standard_normal(len(values)))
        return raised / raised.sum()


def _root(gram: Any, ridge: float) -> Array:
    """R [K, K] with R^T R = G / trace(G) + ridge * identity, by eigenvalues: they may be below zero by rounding."""
    values, vectors = spectrum(gram)
    total = values.sum()
    share = values / total if total > 0 else values
    return np.sqrt(share + ridge)[:, None] * vectors.T


def _raised(root: Array, start: Array, free: Sequence[int]) -> Array:
    """argmin {|R v| : v >= start}, with v = start outside the places `free`."""
    raised = start.copy()
    places = np.array(free, dtype=np.int64)
    raised[places] += _nonnegative(root[:, places], -root @ start)
    return raised


def _nonnegative(system: Array, wanted: Array) -> Array:
    # 3 rounds for each unknown is SciPy's own limit; a hundred were never needed, and running out raises
    return nnls(system, wanted, maxiter=100 * system.shape[1])[0]


def _read_places(places: Any, name: str) -> tuple[int, ...]:
    given = tuple(places)
    whole = all(isinstance(place, int) and not isinstance(place, bool) and place >= 0 for place in given)
    if not whole or len(set(given)) != len(given) or not given:
        raise MixError(f"`{name}` must hold different places in `gram`, 0 or more, at least one: got {given}.")
    return given


def _check_ridge(ridge: float) -> None:
    if not (math.isfinite(ridge) and ridge > 0):
        raise MixError(
            f"`ridge` must be positive: got {ridge}. It is relative to the trace; a matrix of low rank has no one "
            f"answer without it."
        )
