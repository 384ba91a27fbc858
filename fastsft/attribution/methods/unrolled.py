"""Unrolled differentiation: the exact derivative of a query's final loss by each sample's weight in a finished run."""

# N samples, Q queries, P trainable parameters end to end, n supervised tokens of a batch, T tokens of a sample

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from fastsft.attribution.methods._base import Moments, Per, Queries, Targets
from fastsft.attribution.methods._checkpoints import Checkpoint, load, restored
from fastsft.attribution.methods._curvature_products import hessian_products, predict, twice_differentiable
from fastsft.attribution.methods._optimizer_steps import State
from fastsft.attribution.methods._replay import Replay, Schedule, Step
from fastsft.attribution.methods._scores import Block, Scores
from fastsft.data import Row
from fastsft.sketch.passes import Batching


class Unrolled:
    """score(i, q) = -d L_q(final weights) / d w_i at w = 1, where w_i multiplies sample i's loss in all of its steps.

    Reverse mode through the whole run (MAGIC, Ilyas & Engstrom 2025, arXiv 2504.16430): the query's gradient at the
    final weights goes back step by step through AdamW or SGD, its moments, decay and clipping, and through the Hessian
    of each step's loss. All trainable parameters take part, norms and embeddings too. Needs float32 or float64 weights
    and a run without dropout; costs some four backward passes a query and step.

    normaliser: "fixed" divides a step's loss by the tokens that were there; "weighted" by sum_i w_i tokens_i, as a run
    that leaves the sample out would. final: the run's last weights by parameter name; `fit` refuses where the replay
    misses them by more than `tolerance` of the way from the first weights, and `report` says by how much it missed.
    keep_bytes: of states kept on the CPU; over it, segments of the run are taken again on the way back, once a block of
    queries. direction_bytes: of adjoints that exist at once, which sets the block. product_bytes: what one batched
    backward pass may take on a GPU.

    smooth: differentiate sqrt(v_hat + smooth) in place of sqrt(v_hat), at the weights of the run as it was. Where a
    gradient is as small as AdamW's eps the exact derivative is huge and holds for no change of any size, and in
    float32 such gradients are rounding: four steps of LoRA from B = 0 at eps 1e-8 gave exact derivatives that did not
    foretell what removing a sample does, and smooth=1e-8 ones that did. Raise it towards v_hat of a usual parameter.

    per="token": every supervised token's own weight in place of the sample's, at the place of its label.
    """

    name = "unrolled"
    unit = "nats per response token that the query's final loss would rise by, to first order, without the sample"

    def __init__(
        self,
        schedule: Schedule,
        *,
        normaliser: Literal["fixed", "weighted"] = "fixed",
        final: Mapping[str, Tensor] | None = None,
        tolerance: float = 0.01,
        smooth: float = 0.0,
        keep_bytes: int = 2**32,
        direction_bytes: int = 2**31,
        product_bytes: int = 2**32,
        batching: Batching | None = None,
    ) -> None:
        self.batching = Batching() if batching is None else batching
        if normaliser not in ("fixed", "weighted"):
            raise ValueError(f"`normaliser` must be 'fixed' or 'weighted': got {normaliser!r}.")
        if smooth < 0 or self.batching.loss != "sum":
            raise ValueError(
                f"Unrolled needs `smooth` of 0 or more, and a Batching with loss='sum', as the steps' losses are: got "
                f"{smooth} and {self.batching.loss!r}."
            )
        self.schedule, self.normaliser, self.smooth = schedule, normaliser, smooth
        self.final, self.tolerance = final, tolerance
        self.keep_bytes, self.direction_bytes, self.product_bytes = keep_bytes, direction_bytes, product_bytes
        self.report = ""

    def fit(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        samples: Sequence[Row],
        optimizer_state: Sequence[Moments] | None = None,
    ) -> Self:
        """Take the run again from checkpoints[0], the weights before step 1; other checkpoints are not read."""
        if not checkpoints or checkpoints[0].about.get("step", 0) != 0:
            raise ValueError(
                f"Unrolled begins where the run began: checkpoints[0] must be the weights before step 1, got "
                f"{checkpoints[0].name + ', of a later step' if checkpoints else 'no checkpoint'}. Give "
                f"Checkpoint('start', weights) first, saved before training, LoRA's random A included."
            )
        self.model, self.samples = model, list(samples)
        with restored(model):
            load(model, checkpoints[0])
            first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            self.replay = Replay(
                model,
                self.samples,
                self.schedule,
                batching=self.batching,
                keep_bytes=self.keep_bytes,
                smooth=self.smooth,
            )
            self.replay.load(self.replay.final)
            self._compare(first)
        return self

    def _compare(self, first: Mapping[str, Tensor]) -> None:
        """Say by how much the model's weights, the replay's last, miss the run's; refuse beyond the tolerance."""
        if self.final is None:
            return
        missed = moved = 0.0
        for name, parameter in self.replay.parameters.items():
            if name not in self.final or self.final[name].shape != parameter.shape:
                raise ValueError(f"`final` has no weights of {name} in the shape {list(parameter.shape)}.")
            wanted = self.final[name].to(parameter).double()
            missed += float((parameter.detach().double() - wanted).square().sum())
            moved += float((first[name].double() - wanted).square().sum())
        share = (missed / moved) ** 0.5 if moved else float(missed > 0)
        self.report = (
            f"the replay of {len(self.schedule)} steps missed the run's final weights by {share:.2g} of the way that "
            f"the run went (tolerance {self.tolerance:g})"
        )
        if share > self.tolerance:
            raise ValueError(
                f"{self.report}: check the schedule's batches, learning rates, decay and clipping, the first weights, "
                f"and that the run had no dropout and trained in {next(iter(first.values())).dtype}."
            )

    def score(self, targets: Targets, *, per: Per = "sample") -> Scores:
        """Score every sample (and supervised token) for every query; samples that no step drew score 0."""
        queries = Queries.of(targets)
        return Scores.of(self, self.samples, queries.names, lambda: self._blocks(queries, per))

    def _blocks(self, queries: Queries, per: Per) -> Iterator[Block]:
        # in float64: three adjoints before and after a step, the gradient's, and its product with the Hessian
        at_once = max(1, self.direction_bytes // (8 * 8 * len(self.replay.final)))
        for first in range(0, len(queries), at_once):
            part = Queries(queries.names[first : first + at_once], queries.rows[first : first + at_once])
            with restored(self.model):
                block = self._walk(part, first, per)
            yield block

    def _walk(self, queries: Queries, first: int, per: Per) -> Block:
        """Walk back through the run with a block of queries."""
        adjoint = self._end(queries)
        sizes = [len(row.input_ids) if per == "token" else 1 for row in self.samples]
        book = _Book(sizes, len(queries))
        for step in self.replay.back():
            adjoint = self._through(step, adjoint, book)
        tokens = book.scores.split(sizes)
        values = torch.stack([each.sum(0) for each in tokens])
        return Block(list(range(len(self.samples))), first, values, list(tokens) if per == "token" else None)

    def _end(self, queries: Queries) -> State:
        """The adjoint of the final state: each query's gradient at the final weights, no moment counts any more."""
        self.replay.load(self.replay.final)
        gradients = self.replay.final.new_zeros(len(queries), len(self.replay.final))
        with twice_differentiable(self.model):
            for place, (rows, tokens) in enumerate(zip(queries.rows, queries.tokens, strict=True)):
                for _, batch in self.replay.batches_of(rows, range(len(rows))):
                    gradients[place] += self.replay.grad(predict(self.model, batch).losses().sum() / tokens)
        gradients = gradients.double()
        zeros = torch.zeros_like(gradients)
        return State(gradients, zeros, zeros if self.schedule.optimizer == "adamw" else None)

    def _through(self, step: Step, adjoint: State, book: _Book) -> State:
        """Take the adjoint of the state after a step to that before it, and book the step's samples in `tokens`."""
        adjoint, vectors = self.replay.step_back(step, adjoint)
        total = self.replay.tokens[step.number]
        # a token also adds to what the step's loss is divided by
        shift = (vectors @ step.gradient.double())[:, None] if self.normaliser == "weighted" else 0.0
        weights, parameters = adjoint.weights.clone(), list(self.replay.parameters.values())
        parts = self.replay.split(vectors.to(step.gradient.dtype))
        with twice_differentiable(self.model):
            for places, batch in self.replay.parts(step.number):
                products, dots, found = hessian_products(self.model, parameters, batch, parts, self.product_bytes)
                for part, product in zip(self.replay.split(weights), products, strict=True):
                    part += product / total
                book.add(((shift - dots) / total).T, places, found.documents, found.places)
        return State(weights, *adjoint[1:])


class _Book:
    """Scores of all samples' tokens end to end [sum of sizes, Q]; a sample of size 1 has one line in all."""

    def __init__(self, sizes: Sequence[int], Q: int) -> None:
        self.sizes = torch.tensor(sizes)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.scores = torch.zeros(sum(sizes), Q, dtype=torch.float64)

    def add(self, scores: Tensor, rows: list[int], documents: Tensor, places: Tensor) -> None:
        """Add scores [n, Q] to their lines; a sample may be drawn twice in a batch, in `rows` of the batch."""
        of = torch.tensor(rows)[documents.cpu()]
        self.scores.index_add_(0, self.starts[of] + places.cpu().minimum(self.sizes[of] - 1), scores.double().cpu())
