"""What drawing more of a source does to the loss at the end, not only now.

An ability that is learnt is at rest between two flows: other sources' tokens disturb it, its own restore it. The books
show a large return of its own tokens, yet more of them lower its loss by no more than is left of it, while an ability
that is still falling gains with every token to the end. To tell the two apart, the loss L of an ability is taken to
move with the tokens n still to be drawn as

    dL/dn = - k L + h ,   k = sum_i p_i help_i / L ,   h = sum_i p_i harm_i

by what a token of source i does now: it helps by A_i where that is positive, in proportion to the loss that is left,
and harms by -A_i where it is negative. So L(T) = L exp(-k T) + h (1 - exp(-k T)) / k, and the return of a source is
- dL(T)/dp_i / T. With T = 0 it is A_i.
"""

# K sources, J abilities

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastsft.mixing.core import Array

# k T below which 1 - exp(-k T) is taken by its series
_SMALL = 1e-4
_LEAST_LOSS = 1e-9


class Ahead(NamedTuple):
    """Return of a token of each source [K], in units of importance times nats, and its standard error [K]."""

    signal: Array
    error: Array


def ahead(A: Array, errors: Array, losses: Array, weights: Array, importance: Array, tokens: float) -> Ahead:
    """Give every source's mean return over the next `tokens` tokens.

    A, errors [J, K]: nats that one token more of a source lowers an ability's loss by now, and standard errors (nan:
    not known, taken as no effect). losses [J]; weights [K], the mix; importance [J]. The error is that of A carried
    through, k and h taken as known.
    """
    known, errors = np.nan_to_num(A, nan=0.0), np.nan_to_num(errors, nan=0.0, posinf=0.0)
    left = np.maximum(losses, _LEAST_LOSS)
    helps, harms = np.maximum(known, 0.0), np.maximum(-known, 0.0)
    k, h = helps @ weights / left, harms @ weights
    decay, T = np.exp(-k * tokens), tokens
    series = k * T < _SMALL
    safe = np.where(series, 1.0, k)
    reach = np.where(series, T - k * T**2 / 2, (1 - decay) / safe)  # (1 - exp(-k T)) / k
    bend = np.where(series, -(T**2) / 2 + k * T**3 / 3, (T * decay - reach) / safe)  # its derivative by k
    of_help = decay - h * bend / (left * T)  # return of a nat of help, and of a nat of harm
    of_harm = reach / T
    gain = np.where(known > 0, of_help[:, None], of_harm[:, None])
    signal = importance @ (gain * known)
    return Ahead(signal, np.sqrt(((importance[:, None] * gain * errors) ** 2).sum(0)))
