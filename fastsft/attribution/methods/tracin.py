"""TracIn: the gradient dot product summed along a run's checkpoints."""

from __future__ import annotations

from fastsft.attribution.methods._gradients import GradientMethod


class TracIn(GradientMethod):
    """score(i, q) = sum over checkpoints of share * <g_q, g_i> (TracInCP, Pruthi et al. 2020, arXiv 2002.08484).

    Shares are learning rates divided by their sum: times the run's summed learning rate, a score estimates the nats
    that plain gradient steps on the sample took off the query's loss.
    """

    name = "tracin"
    unit = "nats per response token by gradient steps on the sample, per unit of the run's summed learning rate"
