"""Gradient dot product: first order, no optimizer, no curvature."""

from __future__ import annotations

from fastsft.attribution.methods._gradients import GradientMethod


class GradDot(GradientMethod):
    """score(i, q) = <g_q, g_i> (Charpiat et al. 2019, arXiv 2102.13042; one checkpoint of TracIn)."""

    name = "grad_dot"
    unit = "nats per response token that a plain gradient step on the sample takes off, per unit of learning rate"
