"""Conflicts between abilities: the resolver that a run file names, one of a user's own, and weights as loss factors.

>>> import numpy as np
>>> resolver = make_resolver("upgrad", abilities=["maths", "code"])
>>> factors(resolver(np.array([[1.0, -0.5], [-0.5, 4.0]]))).round(2).tolist()
[1.14, 0.86]
"""

# K abilities

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastsft.attribution.gram import Array, read_gram
from fastsft.mixing.resolvers import MGDA, AlignedMTL, Gem, PCGrad, Random, Uniform, UPGrad
from fastsft.tasks import MixError, Resolver
from fastsft.train.factors import factors, weigh

__all__ = ["NAMES", "factors", "from_torchjd", "make_resolver", "weigh"]

NAMES = ("none", "upgrad", "pcgrad", "gem", "aligned_mtl", "mgda", "uniform", "random")


def make_resolver(
    name: str, *, abilities: Sequence[str], protected: Sequence[str] = (), seed: int = 0
) -> Resolver | None:
    """Make the resolver that a run file's `conflict` names, for a run with targets of these abilities.

    "none" gives None. protected: abilities that no step may oppose, for `gem` alone, which protects all when none is
    named. seed: for `random`.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(str(name), NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(NAMES)}."
        raise MixError(f"there is no resolver {name!r}: {hint}")
    _check_protected(protected, abilities)
    if protected and name != "gem":
        raise MixError(
            f"`protected` names {', '.join(protected)}, and the resolver {name!r} protects none in particular: take "
            f"`resolver: gem`, or leave `protected` out."
        )
    made: dict[str, Resolver | None] = {
        "none": None,
        "upgrad": UPGrad(),
        "pcgrad": PCGrad(),
        "gem": Gem(protected=tuple(protected) or None),
        "aligned_mtl": AlignedMTL(),
        "mgda": MGDA(),
        "uniform": Uniform(),
        "random": Random(seed=seed),
    }
    return made[name]


def _check_protected(protected: Sequence[str], abilities: Sequence[str]) -> None:
    if not abilities:
        raise MixError("`abilities` is empty: a resolver weighs at least one ability. Give the run target samples.")
    for ability in protected:
        if ability not in abilities:
            raise MixError(
                f"`protected` names {ability!r}, and the run's abilities are {', '.join(abilities)}: name one of these."
            )
    if len(set(protected)) != len(protected):
        raise MixError(f"`protected` must name each ability once: got {', '.join(protected)}.")


@dataclass(frozen=True)
class _FromTorch:
    weighting: Any

    def __call__(self, gram: Any) -> Array:
        with torch.no_grad():
            weights = self.weighting(torch.from_numpy(read_gram(gram)))
        return weights.detach().cpu().double().numpy()


def from_torchjd(weighting: Any) -> Resolver:
    """Make a resolver of a TorchJD weighting, such as UPGradWeighting(), or of anything that maps a tensor G to one.

    It gets G in float64 on the CPU. It must be a function of G: one that draws from torch's generator, like TorchJD's
    PCGradWeighting, or keeps a state, gives other weights in a resumed run.
    """
    if any(kind.__name__ == "Aggregator" for kind in type(weighting).__mro__):
        raise MixError(
            f"{type(weighting).__name__} is a TorchJD aggregator, which takes gradients, not their Gram matrix: hand "
            f"over its weighting, `aggregator.gramian_weighting`."
        )
    if not callable(weighting):
        raise MixError(f"`weighting` must be callable on a Gram matrix: got {weighting!r}.")
    return _FromTorch(weighting)
