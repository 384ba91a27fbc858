"""Sketch the gradient of every sample at a model's present weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastsft.data import Row
from fastsft.sketch.passes import Batching, Loss, attribution_only, make_batch, run_batch
from fastsft.sketch.project import Sketcher
from fastsft.sketch.spec import SketchSpec
from fastsft.sketch.whiten import Whitening


@dataclass(frozen=True, eq=False)
class SketchBatch:
    """Sketches [D, K] of D samples, float32 (float64 where the weights are), and of each its id, its source and the
    number of tokens that carry its loss."""

    sketches: Tensor
    ids: list[str]
    sources: list[str]
    tokens: list[int]


def sketch_samples(
    model: nn.Module,
    rows: Sequence[Row],
    spec: SketchSpec,
    *,
    whitening: Whitening | None = None,
    loss: Loss = "sum",
    max_tokens: int = 4096,
    packing: bool = False,
    pad_id: int = 0,
    dropout: bool = False,
    skip: Collection[str] = (),
) -> Iterator[SketchBatch]:
    """Sketch each row's gradient of its own loss, a batch at a time, longest rows first.

    model: a causal language model of transformers, or one called like it: model(input_ids=..., use_cache=False).logits.
    The loss is the sum or the mean over a row's supervised tokens, so a sketch does not depend on the batch its row
    was in, on padding, packing or order, but for rounding. Settings: see `Batching`. `skip` are ids to leave out, those
    that a store has already. The model is frozen and in eval mode until the iterator is exhausted or closed.
    whitening: what the spec's precondition names; give samples and queries the same.
    """
    batching = Batching(loss=loss, max_tokens=max_tokens, packing=packing, pad_id=pad_id, dropout=dropout)
    left_out = set(skip)
    plan = batching.plan([row for row in rows if row.id not in left_out])
    return _sketches(model, plan, Sketcher(spec, whitening), batching)


def _sketches(
    model: nn.Module, plan: Sequence[Sequence[Row]], sketcher: Sketcher, batching: Batching
) -> Iterator[SketchBatch]:
    with attribution_only(model, sketcher, extra=sketcher.spec.extra, dropout=batching.dropout) as capture:
        sketcher.follow(capture.layers)
        for batch in plan:
            sketcher.begin(len(batch))
            run_batch(model, capture, make_batch(batch, batching, capture.layers[0].weight.device))
            yield SketchBatch(
                sketcher.sketches,
                ids=[row.id for row in batch],
                sources=[row.source for row in batch],
                tokens=[row.num_supervised for row in batch],
            )
