"""TRAK: a linear model of the output in randomly projected gradients, fitted in closed form (Park et al. 2023)."""

# N samples, Q queries, D rows of a batch, K sketch size, V vocabulary, T supervised tokens

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from fastsft.attribution.methods._base import Moments, Per, Queries, Targets, only_samples
from fastsft.attribution.methods._checkpoints import Checkpoint, load, present, restored, shares
from fastsft.attribution.methods._gradients import chunks
from fastsft.attribution.methods._scores import Block, Scores
from fastsft.data import IGNORED, Row, told_labels
from fastsft.sketch import SketchSpec
from fastsft.sketch.passes import Batch, Batching, attribution_only, head_sees, make_batch
from fastsft.sketch.project import Sketcher

# rows of a block of scores
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class _Member:
    """What is kept of a checkpoint: features [N, K] on disk, and the root of K = Phi^T Phi + damping [K, K]."""

    features: np.memmap
    factor: Tensor


class Trak:
    """score(i, q) = mean_c[phi_q^T (Phi^T Phi + damping)^-1 phi_i] * mean_c[1 - p_i] over checkpoints c, by their
    shares: the two factors are averaged apart, as traker does (arXiv 2303.14186).

    phi_i = P^T grad f_i, f_i = sum over response tokens of log(p / (1 - p)), p the token's probability, P the sketch;
    p_i is the mean of p over the sample's response tokens. A query's f is the mean over its response tokens. A larger f
    is a smaller loss, so positive scores help. Checkpoints may be those of one run or the last ones of several.

    damping: what is added to Phi^T Phi, as a share of its mean eigenvalue. TRAK itself has none and so needs more
    samples than sketch numbers; 0.01 lets small sets be fitted and, beside projection's own noise of 1 / sqrt(K) (0.02
    for 2048), changes little where it is not needed. A pass over the samples at `fit`; their features stay in a
    temporary file of N * K numbers a checkpoint (where TMPDIR says), which goes with this object.
    """

    name = "trak"
    unit = "log-odds per response token of the query that training on the sample adds"

    def __init__(
        self, *, sketch: SketchSpec | None = None, damping: float = 0.01, batching: Batching | None = None
    ) -> None:
        if damping < 0:
            raise ValueError(f"`damping` of trak, a share of the mean eigenvalue, must not be negative: got {damping}.")
        self.sketch = SketchSpec(size=2048) if sketch is None else sketch
        if self.sketch.precondition is not None:
            raise ValueError(f"trak has a curvature of its own: `sketch` must have no precondition, got {self.sketch}.")
        self.damping, self.batching = damping, Batching() if batching is None else batching

    def fit(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        samples: Sequence[Row],
        optimizer_state: Sequence[Moments] | None = None,
    ) -> Self:
        """Project every sample's gradient at every checkpoint."""
        self.model, self.samples = model, list(samples)
        if self.damping == 0 and self.sketch.size > len(self.samples):
            raise ValueError(
                f"trak with damping=0 needs at least as many samples as sketch numbers: got {len(self.samples)} "
                f"samples and size {self.sketch.size}. Take a smaller sketch, or a damping above 0."
            )
        self.checkpoints = list(checkpoints) or [present(model)]
        self.shares = shares(self.checkpoints)
        self.members: list[_Member] = []
        self.doubt = torch.zeros(len(self.samples), dtype=torch.float64)  # mean of 1 - p
        with restored(model):
            for checkpoint, share in zip(self.checkpoints, self.shares, strict=True):
                load(model, checkpoint)
                self.members.append(self._member(checkpoint, share))
        return self

    def _member(self, checkpoint: Checkpoint, share: float) -> _Member:
        K, products = self.sketch.size, torch.zeros(0, 0, dtype=torch.float64)
        kept: np.memmap | None = None
        with closing(self._features(self.samples)) as parts:  # also where the disk is full
            for places, features, probability in parts:
                if kept is None:
                    products = torch.zeros(K, K, dtype=torch.float64, device=features.device)
                    kept = _on_disk(len(self.samples), features)
                wide = features.double()
                products.addmm_(wide.T, wide)
                kept[places] = features.cpu().numpy()
                self.doubt[places] += share * (1 - probability.double().cpu())
        if kept is None:
            raise ValueError("`samples` is empty: trak needs samples to fit.")
        products.diagonal().add_(self.damping * products.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(products)
        pivots = factor.diagonal()
        if failed or pivots.min() < 1e-7 * pivots.max():  # squares below float64's rounding: no inverse to speak of
            raise ValueError(
                f"the projected gradients of {len(self.samples)} samples at {checkpoint.name} span fewer than {K} "
                f"directions, and damping={self.damping} does not make up for it: take a larger damping, or a smaller "
                f"sketch."
            )
        return _Member(kept, factor)

    def _features(self, rows: Sequence[Row]) -> Generator[tuple[list[int], Tensor, Tensor]]:
        """Give the rows' features at the model's weights, a batch at a time: places, [D, K], mean probability [D]."""
        sketcher, batching = Sketcher(self.sketch), self.batching
        with attribution_only(self.model, sketcher, extra=self.sketch.extra, dropout=batching.dropout) as capture:
            sketcher.follow(capture.layers)
            for places in (batch for batches in chunks(batching.plan(rows), rows) for batch in batches):
                made = make_batch([rows[place] for place in places], batching, capture.layers[0].weight.device)
                sketcher.begin(len(places))
                with torch.enable_grad(), capture.batch(made.documents):
                    margins, documents = token_margins(self.model, made)
                    margins.sum().backward()
                sums = margins.new_zeros(len(places), 2)
                probability = torch.stack([margins.detach().sigmoid(), torch.ones_like(margins)], dim=1)
                sums.index_add_(0, documents, probability.detach())
                yield places, sketcher.sketches, sums[:, 0] / sums[:, 1]

    def score(self, targets: Targets, *, per: Per = "sample") -> Scores:
        """Score every sample for every query."""
        only_samples(self.name, per)
        queries = Queries.of(targets)
        return Scores.of(self, self.samples, queries.names, lambda: self._blocks(queries))

    def _blocks(self, queries: Queries) -> Iterator[Block]:
        solved = []
        with restored(self.model):
            for checkpoint, member in zip(self.checkpoints, self.members, strict=True):
                load(self.model, checkpoint)
                features = self._query_features(queries).double()
                solved.append(torch.cholesky_solve(features.T, member.factor).cpu())  # [K, Q]
        for start in range(0, len(self.samples), _ROWS):
            some = slice(start, min(len(self.samples), start + _ROWS))
            values = torch.zeros(some.stop - start, len(queries), dtype=torch.float64)
            for share, member, directions in zip(self.shares, self.members, solved, strict=True):
                values += share * (torch.from_numpy(member.features[some]).double() @ directions)
            yield Block(list(range(start, some.stop)), 0, values * self.doubt[some, None])

    def _query_features(self, queries: Queries) -> Tensor:
        """The features [Q, K] of the queries' mean margins."""
        rows = [row for rows in queries.rows for row in rows]
        owners = torch.tensor([number for number, rows in enumerate(queries.rows) for _ in rows])
        total: Tensor | None = None
        for places, features, _ in self._features(rows):
            if total is None:
                total = features.new_zeros(len(queries), features.shape[1])
            total.index_add_(0, owners[places].to(features.device), features)
        assert total is not None
        return total / torch.tensor(queries.tokens, device=total.device)[:, None]


def token_margins(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Give log(p / (1 - p)) of every supervised token [T], and the document that each is of [T].

    The label's logit less the log of the others' summed exponentials: exact where p rounds to one.
    """
    places = (batch.labels[:, 1:] != IGNORED).nonzero()
    device = batch.inputs["input_ids"].device
    lines, columns = places.to(device).unbind(1)
    with told_labels(batch.labels), head_sees(model, lines, columns) as gathered:
        logits = model(**batch.inputs, use_cache=False).logits
    logits = logits[0] if gathered else logits[lines, columns]  # [T, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wanted = batch.labels[:, 1:][places[:, 0], places[:, 1]].to(device)[:, None]
    others = logits.scatter(1, wanted, -torch.inf).logsumexp(1)
    flat = lines * batch.labels.shape[1] + columns
    documents = torch.bucketize(flat, batch.documents.offsets[1:], right=True)
    return logits.gather(1, wanted)[:, 0] - others, documents


def _on_disk(rows: int, like: Tensor) -> np.memmap:
    """Make an array [rows, K] in a temporary file that has no name and goes with the array."""
    kind = {torch.float32: np.float32, torch.float64: np.float64}[like.dtype]
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=kind, mode="w+", shape=(rows, like.shape[1]))
