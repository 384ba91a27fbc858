"""dattri 0.3.0: LoGra with the empirical Fisher, and TRAK, TracIn, gradient cosine and DataInf through torch.func.

Its functional methods map one sample's loss over a batch, so rows come as tensors with a mask of four dimensions, which
transformers takes as it is: to make its own it asks tensors for their values. Its EK-FAC is left out: it is written for
losses that hand over the inputs of every layer themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.rivals._base import SIDES, linear_names
from benchmarks.rivals.scores._base import Adapter, Case, Lines, Scored, load_model
from benchmarks.system.index_case import Line, pad, sample_losses

BATCH = 8
# larger batches: its inner products compute every query again for each batch of samples
WIDE_BATCH = 32
# of LoGra's mean eigenvalue; left to itself it takes 1e-5
DAMPING = 0.1


def logra(case: Case, place: Path) -> Scored:
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    model = load_model(case)
    # it multiplies a batch's gradient by its number of samples, so it must be given their mean
    task = AttributionTask(
        loss_func=lambda model, batch, device: sample_losses(model, batch).mean(),
        model=model,
        checkpoints=[model.state_dict()],
    )
    rows, queries = Lines(case.rows), Lines(case.queries)
    side = SIDES[case.method]
    torch.manual_seed(0)  # its projections have no seed of their own
    names = linear_names(model, case.method)
    attributor = LoGraAttributor(
        task, names, hessian="eFIM", damping=DAMPING, proj_dim=side * side, offload="none", cache_dir=str(place)
    )
    # dictionaries go to the model itself, whose loss is the mean over a batch's tokens: one query a batch
    loader, asked = (
        DataLoader(lines, batch, collate_fn=lambda rows: pad(rows, case.pad_id))
        for lines, batch in ((rows, BATCH), (queries, 1))
    )
    attributor.cache(loader)
    scores = attributor.attribute(loader, asked)
    settings = {"projection": f"{side} x {side} a module", "hessian": "eFIM", "damping": f"{DAMPING} * mean eigenvalue"}
    return Scored(queries.back(rows.back(scores, 0), 1), settings)


class Functional:
    """A case as dattri's functional methods take it: a loss of (parameters, one sample), checkpoints, and loaders."""

    def __init__(self, case: Case, checkpoints: Sequence[int] = (-1,)) -> None:
        from dattri.task import AttributionTask

        self.model = load_model(case)
        weights = [load_model(case, number).state_dict() for number in checkpoints]
        self.task = AttributionTask(loss_func=self.loss, model=self.model, checkpoints=weights)
        self.odds = AttributionTask(loss_func=self.margin, model=self.model, checkpoints=weights)
        self._sorted = Lines(case.rows), Lines(case.queries)
        self.rows, self.queries = (
            DataLoader(lines, WIDE_BATCH, collate_fn=lambda rows: masked(rows, case.pad_id)) for lines in self._sorted
        )

    def losses(self, weights: Any, data: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """One sample's loss of each token [T - 1], zero where not supervised, and which are."""
        T = data[0].shape[-1]
        ids, labels, mask = data[0].reshape(1, T), data[1].reshape(T)[1:], data[2].reshape(1, 1, T, T)
        told = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(T)[None], "use_cache": False}
        logits = torch.func.functional_call(self.model, weights, kwargs=told).logits
        losses = nn.functional.cross_entropy(logits[0, :-1], labels.clamp(min=0), reduction="none")
        return losses * (labels != -100), labels != -100

    def loss(self, weights: Any, data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.losses(weights, data)[0].sum()

    def margin(self, weights: Any, data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Sum of log(p / (1 - p)) over supervised tokens."""
        losses, supervised = self.losses(weights, data)
        rest = torch.log(-torch.expm1(-losses.clamp(min=1e-6)))
        return ((-losses - rest) * supervised).sum()

    def probability(self, weights: Any, data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The mean probability of supervised tokens."""
        losses, supervised = self.losses(weights, data)
        return ((-losses).exp() * supervised).sum() / supervised.sum()

    def back(self, scores: Tensor) -> Tensor:
        rows, queries = self._sorted
        return queries.back(rows.back(scores, 0), 1)


def masked(rows: Sequence[Line], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad rows -> ids [B, T], labels [B, T], and what is added to attention [B, 1, T, T]."""
    told = pad(rows, pad_id)
    B, T = told["input_ids"].shape
    hidden = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)  # padding on the right is never seen
    return told["input_ids"], told["labels"], hidden.expand(B, 1, T, T)


def tracin(case: Case, place: Path) -> Scored:
    """Dot products of whole gradients, summed over all checkpoints by their shares."""
    shares = torch.tensor(case.shares) / sum(case.shares)
    made = Functional(case, range(len(case.checkpoints)))
    return _dots(made, shares, cosine=False, told={"checkpoints": case.checkpoints, "shares": shares.tolist()})


def grad_cos(case: Case, place: Path) -> Scored:
    """Cosine of whole gradients at the last checkpoint."""
    return _dots(Functional(case), torch.ones(1), cosine=True, told={"checkpoints": case.checkpoints[-1:]})


def _dots(made: Functional, weights: Tensor, *, cosine: bool, told: dict[str, Any]) -> Scored:
    from dattri.algorithm.tracin import TracInAttributor

    attributor = TracInAttributor(made.task, weight_list=weights, normalized_grad=cosine)
    attributor.projector_kwargs = None  # a None given to it means its default, 512 numbers
    scores = attributor.attribute(made.rows, made.queries)
    return Scored(made.back(scores), {"projection": "none", "of": "all trainable parameters", **told})


def datainf(case: Case, place: Path) -> Scored:
    from dattri.algorithm.influence_function import IFAttributorDataInf

    if case.method == "full":  # measured: 48 rows and 6 queries of a model of 4 M weights ended a machine's memory
        raise ValueError("dattri's DataInf keeps every gradient several times: over 15 GB at 48 rows of 4 M weights")
    made = Functional(case)
    # one damping for all layers; its default, 0, divides by zero
    attributor = IFAttributorDataInf(made.task, regularization=0.1)
    attributor.cache(made.rows)
    scores = attributor.attribute(made.rows, made.queries)
    return Scored(made.back(scores), {"damping": 0.1, "of": "all trainable parameters"})


def trak(case: Case, place: Path) -> Scored:
    from dattri.algorithm.trak import TRAKAttributor

    made = Functional(case)
    size = trak_size(len(case.rows))
    projector = {"proj_dim": size, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"}
    attributor = TRAKAttributor(made.odds, made.probability, projector_kwargs=projector)
    attributor.cache(made.rows)
    scores = attributor.attribute(made.queries)
    return Scored(made.back(scores), {"K": size, "regularization": 0, "of": "all trainable parameters"})


def trak_size(num_rows: int, most: int = 512) -> int:
    """The largest power of two of at most half the rows: TRAK inverts Phi^T Phi, which is singular where K > N."""
    size = 1
    while 2 * size <= min(num_rows // 2, most):
        size *= 2
    return size


METHODS: dict[str, Adapter] = {
    "logra": logra,
    "tracin": tracin,
    "grad_cos": grad_cos,
    "datainf": datainf,
    "trak": trak,
}
