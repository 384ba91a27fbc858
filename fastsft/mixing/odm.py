"""Online data mixing: a bandit that draws more from sources with a high training loss. A baseline."""

# K sources, R rewards

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fastsft.mixing._steered import Steered
from fastsft.mixing.core import Array, sentence, vector
from fastsft.tasks import Decision, Feedback, MixError


@dataclass(kw_only=True)
class Odm(Steered):
    """Follow the formula of Albalak et al. 2023 (arXiv 2312.02406), decision t = 1, 2, ... for K sources:

        R_i <- .9 R_i + .1 L_i / pi_i ,  e_t = min(1/K, sqrt(ln K / (K t)))
        pi_i = (1 - K e_t) softmax_i(e_{t-1} R) + e_t

    L_i is the mean training loss of source i since the last decision, pi_i the share that drew it. The reward is a high
    loss, also one that can't fall: of noise, of text without a pattern. Floors and caps hold; eta, prior_strength,
    trust, gate and priorities have no part in the formula, and R begins at 0, so the start is left at the first
    decision. Sources with a share of 0 are none of the K.
    """

    needs_train_losses: ClassVar[bool] = True
    rewards: Array = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.priorities:
            raise MixError("`priorities` has no part in ODM, which looks at no ability: leave it out, or use 'align'.")

    def reset(self) -> None:
        self.rewards = np.zeros(len(self.task.sources))

    def decide(self, feedback: Feedback) -> Decision:
        names = self.task.names
        if not feedback.train_losses:
            raise MixError(
                "ODM needs `train_losses` in its feedback, and there are none: keep `needs_train_losses = True` where "
                "the policy is wrapped."
            )
        before, caps = vector(names, feedback.weights), self.caps(feedback)
        losses = np.array([feedback.train_losses.get(name, math.nan) for name in names])
        live = (before > 0) & (self.prior > 0)
        seen = live & np.isfinite(losses)
        self.rewards[seen] = 0.9 * self.rewards[seen] + 0.1 * losses[seen] / before[seen]
        self.decided += 1
        K, q = int(live.sum()), np.zeros(len(names))
        q[live] = bandit(self.rewards[live], exploration(self.decided - 1, K), exploration(self.decided, K))
        moved = self.within(before, self.prior, q, np.zeros(len(names)), caps, trust=math.inf)
        why = sentence(
            names,
            before,
            moved.weights,
            lambda at: f"its smoothed reward, loss over share, is {self.rewards[at]:.3g}",
            moved.said,
            "rewards are alike",
        )
        return self.answer(moved, self.rewards, np.full(len(names), np.nan), why, {"decision": self.decided})


def exploration(t: int, K: int) -> float:
    """Give e_t; e_0 is 1/K."""
    return 1 / K if t == 0 else min(1 / K, math.sqrt(math.log(K) / (K * t)))


def bandit(rewards: Array, before: float, now: float) -> Array:
    """Give pi [K] from R [K], e_{t-1} and e_t."""
    powers = np.exp(before * (rewards - rewards.max()))
    return (1 - len(rewards) * now) * powers / powers.sum() + now
