"""In-run influence: what every sample of the run did to every ability, booked while it trains.

Sample i, drawn in step t, displaces the weights by - psi * c G_i: G_i is its share of the batch gradient, c what the
trainer did to the whole (clipping, loss scaling), and psi the optimizer's elementwise response, its echo through
momentum included: psi = sum over steps k >= t of beta1^(k-t) (1-beta1) lr_k s_k / (1-beta1^k), s = 1/(sqrt(v_hat)+eps).
(The linear term of arXiv 2602.00329 is k = t alone.) Interval by interval, in nats per response token of ability a,

    phi(i, a) = - sum over intervals of < 1/2 (g_a(start) + g_a(end)) * psi(steps of the interval), c G_i >.

A sample stays open until two thirds of its echo have passed; what is left is then booked at once.

While the backward pass shows a layer that is booked exactly (LoRA, or chosen full weights), G_i is contracted with
what is known by then, g_a(start) * s of the step before, and sketched; the difference to the sum above comes through
the sketch when the interval closes. In the first steps s is too young for that: gradients are kept, and contracted
exactly. Other wide layers are projected on a common rank-C basis of the target gradients at the start: G_i becomes a
C x C core.

Letters: D documents, A abilities, S sources, K sketch size, C rank, O x I a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsft import ops
from fastsft.attribution.layout import Layout
from fastsft.attribution.optimizer import Rule
from fastsft.attribution.settings import Attribution
from fastsft.capturing import Documents, Layer
from fastsft.sketch import SketchSpec

# a sample is settled once less than this share of its gradient is left in the first moment (10 steps at beta1 = 0.9)
OPEN = 0.35


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch: its documents, and of each the sample and the source (index into the run's sources)."""

    documents: Documents
    samples: Sequence[str]
    sources: Tensor
    lengths: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.documents) == len(self.samples) == len(self.sources) == len(self.lengths):
            raise ValueError(
                f"a batch needs one sample id, source and length a document: got {len(self.documents)} documents, "
                f"{len(self.samples)} ids, {len(self.sources)} sources, {len(self.lengths)} lengths."
            )


@dataclass(frozen=True, eq=False)
class _Basis:
    """A wide layer's common basis of the scaled target gradients: T_a ~ U M_a V^T."""

    U: Tensor  # [O, C]
    V: Tensor  # [I, C]
    M: Tensor  # [A, C, C]


@dataclass(eq=False)
class _Seen:
    """What one micro-batch left behind until its samples are settled."""

    batch: Batch
    phi: Tensor  # [D, A] what is booked so far, over -c
    wide: Tensor  # [D, A] the part of it on wide layers followed by factors
    scores: Tensor  # [D, A]: < g(start) * used, G > over exact layers
    sketch: Tensor | None  # [D, K] of sqrt(used) * G
    tokens: Tensor | None  # [T, A]
    keep: bool  # whether exact layers' gradients are kept instead of scored and sketched
    factor: Tensor | float = 1.0  # [D, 1] what a resolver multiplied each document's gradient by in the step itself
    grads: dict[int, Tensor] = field(default_factory=dict)  # exact layer -> [D, O, I], where they are kept
    cores: list[tuple[int, _Basis, Tensor]] = field(default_factory=list)  # wide layer, its basis, [D, C, C]
    waiting: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # layer, x, dy until the step is taken


@dataclass(eq=False)
class _Step:
    """One optimizer step whose samples are open. Lists have one [O, I] or [A, O, I] an exact layer."""

    step: int
    seen: list[_Seen]
    scale: Tensor  # c
    start: list[Tensor]  # g(start) of the interval it was taken in
    used: list[Tensor]  # s that `scores` were contracted with
    units: list[Tensor]  # lr s / (1 - beta1^t) of this step: what a unit of first moment displaced
    pace: float  # units over s, on the first parameter group
    effect: float  # what a unit of scaled gradient displaces in all, were s to stay as it is
    jacobian: list[Tensor] | None
    intervals: int = 0
    weight: float = 0.0  # what is left of its gradient in the first moment


class SampleBook:
    """Contract every document's gradient with the target gradients while the backward pass shows them."""

    def __init__(
        self, layout: Layout, layers: Sequence[Layer], rule: Rule, settings: Attribution, num_abilities: int
    ) -> None:
        self.layout, self.layers, self.rule, self.settings = layout, layers, rule, settings
        self.num_abilities = num_abilities
        self.steps = rule.steps()
        self._exact = [index for index, exact in enumerate(layout.is_exact) if exact]
        self._seeds = [SketchSpec(seed=settings.seed).layer_seed(layer.name) for layer in layers]
        self._start: list[Tensor] = []  # target gradients at the start of the interval, of each layer [A, O, I]
        self._scales: dict[int, Tensor] = {}  # s after the last step, of each exact layer [O, I]
        self._roots: dict[int, Tensor] = {}  # their square roots
        self._rooted: dict[int, Tensor] = {}  # g(start) * sqrt(s) [A, O, I]
        self._basis: dict[int, _Basis] = {}
        self._window: list[_Seen] = []
        self._open: list[_Step] = []
        self._sketched: list[tuple[int, Batch, Tensor]] = []  # step, batch, [D, K] of the steps taken, for the store

    # what the backward pass shows

    def batch(self, batch: Batch) -> None:
        """Begin a micro-batch."""
        D, A, K = len(batch.documents), self.num_abilities, self.settings.sketch_size
        zeros = self.layout.zeros
        tokens = zeros(batch.documents.num_tokens, A) if self.settings.tokens else None
        keep = self.keeps
        if not keep and not self._rooted:
            self._roots = {index: scale.sqrt() for index, scale in self._scales.items()}
            self._rooted = {index: self._start[index] * root for index, root in self._roots.items()}
        sketch = zeros(D, K) if K and not keep else None
        self._window.append(_Seen(batch, zeros(D, A), zeros(D, A), zeros(D, A), sketch, tokens, keep))

    @property
    def keeps(self) -> bool:
        """Whether exact layers' gradients are kept: it was asked for, or the second moment is young and they fit."""
        young = self.steps < self.settings.warm_steps and self.kept_bytes < self.settings.keep_bytes
        return self.settings.factor != "previous" or self.steps == 0 or young

    @property
    def crowded(self) -> bool:
        """Whether gradients of this young a second moment should be kept and no longer fit."""
        return self.settings.factor == "previous" and 0 < self.steps < self.settings.warm_steps and not self.keeps

    @property
    def has_open(self) -> bool:
        return bool(self._open)

    @property
    def kept_bytes(self) -> int:
        """Memory that kept gradients take now."""
        seen = [*self._window, *(seen for step in self._open for seen in step.seen)]
        return sum(g.numel() * g.element_size() for each in seen for g in each.grads.values())

    def see_exact(self, index: int, x: Tensor, dy: Tensor, groups: Tensor, sums: Tensor) -> None:
        """Take an exact layer: x [T,I], dy [T,O]; sources are summed into `sums` [S,O,I] in the same pass."""
        seen = self._window[-1]
        offsets = seen.batch.documents.offsets
        if seen.keep:
            grads = ops.document_grads(x, dy, offsets)
            sums.flatten(1).index_add_(0, groups, grads.flatten(1).to(sums.dtype))
            seen.grads[index] = seen.grads[index] + grads if index in seen.grads else grads
            if seen.tokens is not None:
                seen.waiting.append((index, x, dy))
            return
        # sqrt(s) on both sides: the sketch's noise is the product of the two norms
        found = ops.influence_dot(
            x,
            dy,
            offsets,
            self._rooted[index],
            precondition=self._roots[index],
            groups=groups,
            sums=sums,
            sketch=seen.sketch,
            seed=self._seeds[index],
        )
        seen.scores += _given(found.scores)
        self._score_tokens(seen, index, x, dy)

    def see_wide(self, index: int, x: Tensor, dy: Tensor) -> None:
        """Take a wide layer: x [T,I], dy [T,O]; before the first step there is no scale to factor a target with."""
        seen = self._window[-1]
        if index in self._basis:
            self._project(seen, index, x, dy)
        else:
            seen.waiting.append((index, x, dy))

    def _score_tokens(self, seen: _Seen, index: int, x: Tensor, dy: Tensor) -> None:
        if seen.tokens is not None:
            offsets, used = seen.batch.documents.offsets, self._scales[index]
            found = ops.influence_dot(x, dy, offsets, self._start[index], precondition=used, per="token")
            seen.tokens += _given(found.scores)

    def _project(self, seen: _Seen, index: int, x: Tensor, dy: Tensor) -> None:
        basis, offsets = self._basis[index], seen.batch.documents.offsets
        h, z = x.to(basis.V.dtype) @ basis.V, dy.to(basis.U.dtype) @ basis.U  # [T, C]
        seen.cores.append((index, basis, ops.document_grads(h, z, offsets)))
        if seen.tokens is not None:
            seen.tokens += _given(ops.influence_dot(h, z, offsets, basis.M, per="token").scores)

    # the optimizer's step

    def weigh_step(self, factors: Tensor) -> None:
        """Scale each source's documents [S] in the step about to be taken."""
        for seen in self._window:
            seen.factor = factors[seen.batch.sources.to(factors.device)][:, None]

    def drop_step(self) -> None:
        """Forget micro-batches whose step the trainer skipped (an overflow under fp16)."""
        self._window = []

    def book_step(self, step: int, scale: Tensor, remaining: int | None) -> None:
        """Take note of the optimizer's step: its scale, and how it will echo."""
        before = self._scales
        self.steps += 1
        self._read_scales()
        if not self._basis or (self.steps & (self.steps - 1)) == 0:  # v changes by 1/t a step: redo at powers of two
            self._factor()
        for seen in self._window:
            for index, x, dy in seen.waiting:
                if self.layout.is_exact[index]:
                    self._score_tokens(seen, index, x, dy)
                else:
                    self._project(seen, index, x, dy)
            seen.waiting = []
            if self.settings.store:
                self._sketched.append((step, seen.batch, scale * seen.factor * self._sketch_of(seen)))
        slots = [self.layout.layer_slots[index] for index in self._exact]
        echo, pace = self.rule.echo(), self.rule.pace(self.layout.slots[0].group)
        self._open.append(
            _Step(
                step,
                self._window,
                scale,
                start=[self._start[index] for index in self._exact],
                used=[before.get(index, self._scales[index]) for index in self._exact],
                units=[
                    self._scales[index] * self.rule.pace(slot.group)
                    for index, slot in zip(self._exact, slots, strict=True)
                ],
                pace=pace,
                effect=echo.extra + echo.first * (pace + echo.decay * self.rule.tail(remaining)),
                jacobian=[self.rule.jacobian(slot.parameter, slot.group) for slot in slots]
                if self.settings.factor == "jacobian"
                else None,
            )
        )
        self._window = []

    def _sketch_of(self, seen: _Seen) -> Tensor:
        """The sketches [D, K] that the backward pass made, or else those of the gradients it left."""
        if seen.sketch is not None:
            return seen.sketch
        sketch = self.layout.zeros(len(seen.batch.documents), self.settings.sketch_size)
        for index, grads in seen.grads.items():
            root = self._scales[index].sqrt()
            sketch += ops.sketch_matrix(grads, sketch.shape[1], self._seeds[index], precondition=root)
        return sketch

    def take_sketches(self) -> list[tuple[int, Batch, Tensor]]:
        """Hand over step, batch and sketches [D, K] of the micro-batches since the last call."""
        taken, self._sketched = self._sketched, []
        return taken

    def _read_scales(self) -> None:
        self._scales, self._roots, self._rooted = {}, {}, {}
        for index in self._exact:
            slot = self.layout.layer_slots[index]
            scale = self.rule.scale(slot.parameter, slot.group)
            if scale is None and self.steps:  # no gradient reached it yet: any scale of nothing is nothing
                scale = torch.ones_like(slot.parameter, dtype=self.layout.dtype)
            if scale is not None:
                self._scales[index] = scale

    # the interval

    def begin(self, gradient: Tensor) -> None:
        """Start an interval: gradient [A, N] of the targets."""
        self._start = self._split(gradient)
        self._read_scales()
        if self.steps:
            self._factor()

    def _factor(self) -> None:
        """Find each wide layer's common basis of the scaled target gradients (randomised range finder)."""
        for index, exact in enumerate(self.layout.is_exact):
            if exact:
                continue
            targets = self._scaled(index, self._start[index])
            U = _range(torch.cat(list(targets), 1), self.settings.rank, self.settings.seed)
            V = _range(torch.cat(list(targets.mT), 1), self.settings.rank, self.settings.seed)
            self._basis[index] = _Basis(U, V, U.T @ targets @ V)

    def _scaled(self, index: int, matrices: Tensor) -> Tensor:
        slot = self.layout.layer_slots[index]
        scale = self.rule.scale(slot.parameter, slot.group)
        return matrices if scale is None else matrices * scale

    def close(
        self, end: Tensor, sources: int, remaining: int | None, *, settle: bool
    ) -> tuple[list[Columns], Tensor, Tensor]:
        """Close the interval at target gradients `end` [A, N]; `settle`: book all that is left of every sample.

        Returns the samples that are settled; what this interval booked to samples, by source [S, A]; and the part of
        that on layers followed by factors [S, A].
        """
        last = self._split(end)
        booked = [(each.phi.clone(), each.wide.clone()) for step in self._open for each in step.seen]
        shares = self._shares(remaining, settle=settle)
        self._book_exact(last, shares)
        self._book_wide(last, shares)
        total = torch.zeros(sources, self.num_abilities, dtype=torch.float64)
        wide_total = torch.zeros_like(total)
        places = [(step, each) for step in self._open for each in step.seen]
        for (step, each), (phi, wide) in zip(places, booked, strict=True):
            total.index_add_(0, each.batch.sources, -(step.scale * each.factor * (each.phi - phi)).double().cpu())
            wide_total.index_add_(
                0, each.batch.sources, -(step.scale * each.factor * (each.wide - wide)).double().cpu()
            )
        columns: list[Columns] = []
        still: list[_Step] = []
        for step, share in zip(self._open, shares, strict=True):
            if share.settles:
                columns += [self._columns(step, each) for each in step.seen]
            else:
                step.weight, step.intervals, step.units = share.left, step.intervals + 1, []
                still.append(step)
        self._open = still
        return columns, total, wide_total

    def _columns(self, step: _Step, each: _Seen) -> Columns:
        tokens = None
        if each.tokens is not None:
            factor = each.factor
            if isinstance(factor, Tensor):  # of each token, its document's
                factor = factor.repeat_interleave(each.batch.documents.offsets.diff(), 0, output_size=len(each.tokens))
            tokens = -(step.scale * step.effect * factor * each.tokens).float().cpu()
        return Columns(step.step, each.batch, -(step.scale * each.factor * each.phi).double().cpu(), tokens)

    def _shares(self, remaining: int | None, *, settle: bool) -> list[_Share]:
        """How much of each open step's echo falls into the interval that closes now."""
        fresh = [step for step in self._open if step.intervals == 0]
        echo, tail = self.rule.echo(), self.rule.tail(remaining)
        shares: list[_Share] = []
        for step in self._open:
            if step.intervals == 0:
                ahead = fresh[fresh.index(step) :]
                enters, extra = echo.first, echo.extra
                left = echo.first * echo.decay ** (len(ahead) - 1)
            else:
                ahead, enters, extra = fresh, step.weight * echo.decay, 0.0
                left = step.weight * echo.decay ** len(fresh)
            settles = settle or step.jacobian is not None or left < OPEN * echo.first
            within = extra + enters * sum(echo.decay**k * each.pace for k, each in enumerate(ahead))
            shares.append(_Share(enters, extra, within, left, left * echo.decay * tail if settles else 0.0, settles))
            if step.jacobian is not None:
                shares[-1] = _Share(enters, extra, step.effect, 0.0, 0.0, True)
        return shares

    def _book_exact(self, last: list[Tensor], shares: list[_Share]) -> None:
        size = self.settings.sketch_size
        fresh = [step for step in self._open if step.intervals == 0]
        decay = self.rule.echo().decay
        sketched = size > 0 and any(each.sketch is not None for step in self._open for each in step.seen)
        sketches = [self.layout.zeros(self.num_abilities, size) for _ in self._open] if sketched else []
        for place, index in enumerate(self._exact):
            end, middle = last[index], (self._start[index] + last[index]) / 2
            ahead: dict[int, Tensor] = {}  # response of a unit of first moment, from a step to the end of the interval
            response = torch.zeros_like(end[0])
            for step in reversed(fresh):
                response = step.units[place] + decay * response
                ahead[step.step] = response
            now = self._scales[index] * self._rate(index)
            table = ops.sjlt_table(self.layers[index].shape, size, self._seeds[index], end.device) if sketches else None
            for number, (step, share) in enumerate(zip(self._open, shares, strict=True)):
                psi = share.enters * (ahead[step.step] if step.intervals == 0 else response) + share.extra
                if step.jacobian is not None:
                    psi = step.jacobian[place] * step.effect
                wanted = middle * psi
                if share.tail:
                    wanted = wanted + end * (now * share.tail)
                for each in step.seen:
                    if index in each.grads:
                        each.phi += each.grads[index].flatten(1) @ wanted.flatten(1).T
                if table is not None:
                    known = step.start[place] * (step.used[place] * (share.within + share.tail))
                    lacking = ((wanted - known) / step.used[place].sqrt()).flatten(1)  # [A, O*I]
                    sketches[number].index_add_(1, table[0], lacking * table[1].to(lacking.dtype))
        for number, (step, share) in enumerate(zip(self._open, shares, strict=True)):
            for each in step.seen:
                if not each.keep:
                    each.phi += each.scores * (share.within + share.tail)
                if each.sketch is not None:
                    each.phi += each.sketch @ sketches[number].T

    def _rate(self, index: int) -> float:
        """This layer's learning rate over that of the first group, in whose units `tail` is."""
        base = float(self.layout.slots[0].group["lr"])
        return float(self.layout.layer_slots[index].group["lr"]) / base if base else 1.0

    def _book_wide(self, last: list[Tensor], shares: list[_Share]) -> None:
        """Wide layers: the cores dotted with both ends' targets, at the optimizer's present scale."""
        cores: dict[_Basis, Tensor] = {}
        for step, share in zip(self._open, shares, strict=True):
            for each in step.seen:
                for index, basis, core in each.cores:
                    if basis not in cores:
                        middle = self._scaled(index, (self._start[index] + last[index]) / 2)
                        cores[basis] = basis.U.T @ middle @ basis.V
                    part = core.flatten(1) @ cores[basis].flatten(1).T * (share.within + share.tail)
                    each.phi += part
                    each.wide += part

    def _split(self, vectors: Tensor) -> list[Tensor]:
        """Cut vectors [A, N] into one contiguous [A, O, I] a layer."""
        return [
            vectors[:, self.layout.span(index)].reshape(len(vectors), *layer.shape).contiguous()
            for index, layer in enumerate(self.layers)
        ]


@dataclass(frozen=True)
class _Share:
    """How an open step's gradient acts in the interval that closes: it `enters` the first moment (and acts by `extra`
    at once); on a constant scale it does `within` in the interval; `left` remains in the moment; `tail` is booked
    beyond the end because the step `settles`."""

    enters: float
    extra: float
    within: float
    left: float
    tail: float
    settles: bool


@dataclass(frozen=True, eq=False)
class Columns:
    """Influence of one micro-batch's documents: phi [D, A]; tokens [T, A] where asked for."""

    step: int
    batch: Batch
    phi: Tensor
    tokens: Tensor | None


def _given(scores: Tensor | None) -> Tensor:
    assert scores is not None  # targets were passed
    return scores


def _range(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Orthonormal basis [rows, at most rank] of the leading column space (Halko, Martinsson & Tropp 2011, alg. 4.4)."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn(matrix.shape[1], rank + 4, generator=generator, dtype=torch.float32)
    basis = torch.linalg.qr(matrix @ noise.to(matrix)).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    small = basis.T @ matrix
    left = torch.linalg.svd(small @ small.T).U
    return basis @ left[:, :rank]
