"""From pilots' mixes and losses to the mix to start with, what it should reach, and how sure that is."""

# K sources, n pilots

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastsft.mixing.core import Array, check_names, check_number, named
from fastsft.mixing.design import bounds
from fastsft.mixing.law import LEVEL, Blend, Surrogate, chosen_factor, contrast_error, interval
from fastsft.mixing.minimise import best_mix
from fastsft.tasks import MixError

PRIORS = ("uniform", "proportional")
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a pilot on a mix would end at: losses, nats per response token, with the 90 % intervals of one such pilot.

    mean: over abilities by their priorities.
    """

    weights: Mapping[str, float]
    losses: Mapping[str, float]
    intervals: Mapping[str, Range]
    mean: float
    mean_interval: Range


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The mix that was chosen, beside the two that need no choosing.

    gain: mean loss forecast for uniform less that for the chosen mix. gain_error: its standard error, by the jackknife
    over pilots, as if the mix had been named beforehand. gain_interval: 90 %, for whichever mix was chosen (Scheffé).
    explained: share of the variance of the pilots' mean losses that surrogates foretell without them.
    errors, shares {ability: {law, plain law, trees: leave-one-out error in nats, share in the ensemble}}.
    """

    chosen: Forecast
    uniform: Forecast
    proportional: Forecast
    gain: float
    gain_error: float
    gain_interval: Range
    explained: float
    errors: Mapping[str, Mapping[str, float]]
    shares: Mapping[str, Mapping[str, float]]
    priorities: Mapping[str, float]

    @property
    def verdict(self) -> str:
        """Say in a sentence or two whether the pilots show a gain over uniform."""
        if self.gain <= self.gain_error:
            return (
                "The pilots show no gain over the uniform mix: what is predicted does not exceed its standard error. "
                "Uniform is as good a start; more or longer pilots may tell."
            )
        if self.gain_interval[0] <= 0:
            return (
                f"The predicted gain over the uniform mix is {self.gain / self.gain_error:.1f} standard errors, but "
                "this mix was chosen as the best of many, and the interval that counts that in holds zero: the gain is "
                "likely, not shown."
            )
        return "The pilots show a gain over the uniform mix: its interval, which counts the choosing in, excludes zero."


def choose(
    mixes: Array,
    losses: Mapping[str, Sequence[float]],
    *,
    sizes: Mapping[str, float],
    priorities: Mapping[str, float] | None = None,
    prior: str = "uniform",
    strength: float = 0.1,
    least: float = 0.0,
    most: Sequence[float] | None = None,
    seed: int = 0,
) -> Choice:
    """Fit surrogates to pilots' mixes [n, K] and losses {ability: [n]}, and minimise the forecast mean.

    sizes {source: anything that is proportional to them}. priorities {ability: weight}; one not named weighs 1. prior,
    strength: what the mix is held to, and how much (`best_mix`). least, most [K]: bounds of the shares.
    """
    sources, K = list(sizes), len(sizes)
    check_pilots(len(mixes), K)
    if prior not in PRIORS:
        raise MixError(f"`prior` must be one of {', '.join(PRIORS)}: got {prior!r}.")
    check_number("strength", strength, low=0)
    shares = weights_of(list(losses), priorities)
    low, high = bounds(K, least, most)
    anchors = {"uniform": np.full(K, 1 / K), "proportional": np.array(list(sizes.values())) / sum(sizes.values())}
    parts = {name: Surrogate.fit(mixes, np.asarray(told, dtype=np.float64)) for name, told in losses.items()}
    blend = Blend(list(parts.values()), list(shares.values()))
    best = best_mix(blend, anchors[prior], low, high, strength=strength, seed=seed)
    gain = float(np.subtract(*blend.predict(np.stack([anchors["uniform"], best]))))
    error = contrast_error(blend, anchors["uniform"], best)
    reach = chosen_factor(len(mixes), K) * error
    return Choice(
        chosen=_forecast(best, sources, parts, blend),
        uniform=_forecast(anchors["uniform"], sources, parts, blend),
        proportional=_forecast(anchors["proportional"], sources, parts, blend),
        gain=gain,
        gain_error=error,
        gain_interval=(gain - reach, gain + reach),
        explained=blend.explained,
        errors={name: part.errors for name, part in parts.items()},
        shares={name: part.shares for name, part in parts.items()},
        priorities=shares,
    )


def _forecast(mix: Array, sources: Sequence[str], parts: Mapping[str, Surrogate], blend: Blend) -> Forecast:
    at = mix[None]

    def ends(forecaster: Surrogate | Blend) -> Range:
        low, high = interval(forecaster, at, LEVEL)
        return float(low[0]), float(high[0])

    return Forecast(
        weights=named(sources, mix),
        losses={name: float(part.predict(at)[0]) for name, part in parts.items()},
        intervals={name: ends(part) for name, part in parts.items()},
        mean=float(blend.predict(at)[0]),
        mean_interval=ends(blend),
    )


def check_pilots(pilots: int, sources: int) -> None:
    """Refuse fewer pilots than a law has numbers."""
    if pilots < sources + 2:
        raise MixError(
            f"{pilots} pilots can't tell {sources} sources apart, for a law of them has {sources + 2} numbers: give "
            f"`pilots` {sources + 2} or more, better {2 * sources + 4}."
        )


def weights_of(abilities: Sequence[str], priorities: Mapping[str, float] | None) -> dict[str, float]:
    """What each ability weighs in the mean, the sum one."""
    given = dict(priorities or {})
    check_names("priorities", given, abilities, "ability")
    raw = {name: check_number(f"priorities.{name}", given.get(name, 1.0), low=0) for name in abilities}
    total = math.fsum(raw.values())
    if not 0 < total < math.inf:
        raise MixError(f"`priorities` must leave one ability a finite weight above 0: got {raw}.")
    return {name: value / total for name, value in raw.items()}
