"""What the books of a run are asked to hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

FORMATS = ("bf16", "int8", "1bit")
FACTORS = ("previous", "exact", "jacobian")


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Settings of in-run attribution. The defaults suit LoRA with AdamW."""

    # steps between two measurements of the targets: more is cheaper, and leaves more unexplained
    refresh_every: int = 10
    # refresh adaptively, between 1 and 4 * refresh_every steps, to keep the residual's share of the gross flow below
    residual_bound: float | None = None
    # influence of every sample, or of sources alone
    samples: bool = True
    # also of every token (from the gradient at the start of the interval)
    tokens: bool = False
    # Adam's scale for samples: of the step before, corrected through a sketch; "exact", without one; or the whole
    # derivative of the step, "jacobian" (these two keep every narrow layer's per-document gradient for an interval)
    factor: str = "previous"
    # while the second moment is this young, gradients are kept and the factor is "exact"
    warm_steps: int = 10
    # memory for that; past it samples of these steps go through the sketch, with more noise
    keep_bytes: int = 2 << 30
    # a layer whose narrower side is at most this wide (LoRA) is contracted exactly
    narrow: int = 64
    # wider layers (full weights) are too, where this regular expression finds their name, at the cost of their weight
    # gradient once more. The others (all with None) are followed by factors: cheaper, and an approximation
    exact: str | None = "."
    # rank of the common basis of the target gradients, for factors
    rank: int = 16
    # numbers per sample that carry the end-of-interval correction; 0 for none
    sketch_size: int = 4096
    # also keep every sample's sketch of its step in RUN/store/training, `sketch_size` numbers each, to search later
    store: bool = False
    # "bf16", "int8" or "1bit"
    store_format: str = "int8"
    # padded tokens of a target batch
    target_batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("refresh_every", 1), ("warm_steps", 1), ("rank", 1), ("narrow", 0), ("sketch_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}: got {getattr(self, name)}.")
        if self.sketch_size % 16:
            raise ValueError(f"`sketch_size` must be a multiple of 16 (or 0): got {self.sketch_size}.")
        if self.factor not in FACTORS:
            raise ValueError(f"`factor` must be one of {', '.join(FACTORS)}: got {self.factor!r}.")
        if self.residual_bound is not None and self.residual_bound <= 0:
            raise ValueError(f"`residual_bound` must be positive: got {self.residual_bound}.")
        if self.tokens and not self.samples:
            raise ValueError("`tokens` needs `samples: true`.")
        if self.store_format not in FORMATS:
            raise ValueError(f"`store_format` must be one of {', '.join(FORMATS)}: got {self.store_format!r}.")
        if self.store and not (self.samples and self.sketch_size):
            raise ValueError(
                f"`store` keeps the sketches of samples, so it needs `samples: true` and a `sketch_size` above 0: got "
                f"samples={self.samples}, sketch_size={self.sketch_size}."
            )
        if self.exact is not None:
            try:
                re.compile(self.exact)
            except re.error as error:
                raise ValueError(f"`exact` is not a regular expression ({error}): got {self.exact!r}.") from None
