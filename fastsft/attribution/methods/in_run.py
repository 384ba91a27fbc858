"""In-run influence: what a finished run booked, while it trained, to every sample it drew."""

# N samples, Q queries, K numbers of a sketch

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastsft.attribution.methods._base import Moments, Queries
from fastsft.attribution.methods._checkpoints import load, present, restored
from fastsft.attribution.methods._samples_only import SampleMethod
from fastsft.attribution.methods._scores import Block
from fastsft.data import Row
from fastsft.ops import decode_rows
from fastsft.record import Record
from fastsft.sketch import LayerWhitening, SketchSpec, Whitening, sketch_samples
from fastsft.sketch.passes import Batching
from fastsft.store import Store, is_store

BOOKED = "nats per response token that the run's steps on the sample took off, as it booked them"
ASKED = (
    "nats per response token that the sample's shares of the run's steps take off, to first order, by the gradient at "
    "the last checkpoint and sketches of training"
)


class InRun(SampleMethod):
    """score(i, q) = - sum over steps of phi(i, q): the run books what lowers a loss as negative, here it is positive.

    The queries are the run's abilities, by name: their rows are not looked at. Where the run kept its sketches
    (`attribution.store`), anything else can be asked too:

        score(i, q) = sum over steps of lr * <g_q at the last checkpoint, the sample's share of the step>

    for which `fit` needs the optimizer's moments at that checkpoint, if it was AdamW's. beta2, eps: AdamW's. Samples
    that the run never drew score 0.
    """

    name = "in_run"
    unit = BOOKED

    def __init__(
        self,
        run_dir: str | Path,
        *,
        beta2: float = 0.999,
        eps: float = 1e-8,
        batching: Batching | None = None,
        queries_at_once: int = 64,
    ) -> None:
        self.record = Record.open(run_dir)
        self.abilities: list[str] = list(self.record.start["abilities"])
        self.beta2, self.eps = beta2, eps
        self.batching = Batching() if batching is None else batching
        self.queries_at_once = queries_at_once
        place = self.record.out / "store" / "training"
        self.store = Store.open(place) if is_store(place) or is_store(place / "rank000") else None

    def is_booked(self, names: list[str]) -> bool:
        """Say whether queries of these names are the run's own abilities; refuse others where there is no store."""
        if set(names) <= set(self.abilities):
            if not self.record.influence_parts():
                raise ValueError(
                    f"{self.record.out} booked sources alone (samples: false), so there is no influence of samples in "
                    f"it: take a method that scores after the run, such as ekfac."
                )
            return True
        if self.store is None:
            raise ValueError(
                f"in_run knows what was booked for the run's own abilities, {', '.join(self.abilities)}, by their "
                f"names, and {self.record.out} kept no store that could be asked for more: got "
                f"{', '.join(repr(name) for name in names[:3])}{', ...' if len(names) > 3 else ''}. Name an ability, "
                f"train with `attribution: {{store: true}}`, or take a method that scores after the run, such as ekfac."
            )
        return False

    def unit_of(self, queries: Queries) -> str:
        """Say what a score of these queries is."""
        return BOOKED if self.is_booked(queries.names) else ASKED

    def blocks(self, queries: Queries) -> Iterator[Block]:
        """Yield the scores of what was booked, or of what the store answers."""
        places = list(range(len(self.samples)))
        if self.is_booked(queries.names):
            yield Block(places, 0, -self._booked(queries.names).float())
            return
        for first in range(0, len(queries), self.queries_at_once):
            until = first + self.queries_at_once
            part = Queries(queries.names[first:until], queries.rows[first:until])
            yield Block(places, first, self._asked(part).float())

    def _booked(self, names: list[str]) -> Tensor:
        """phi summed over the steps [N, Q]."""
        table = self.record.influence()
        sums = table.group_by(["sample_id", "ability"]).aggregate([("phi", "sum")]).to_pydict()
        ids, abilities, values = sums["sample_id"], sums["ability"], sums["phi_sum"]
        phi = {(id, ability): value for id, ability, value in zip(ids, abilities, values, strict=True)}
        if not {row.id for row in self.samples} & set(ids):
            raise ValueError(
                f"none of the {len(self.samples)} samples was drawn by {self.record.out}: give the rows that it was "
                f"trained on, under their ids."
            )
        found = [[phi.get((row.id, name), 0.0) for name in names] for row in self.samples]
        return torch.tensor(found, dtype=torch.float64)

    def _asked(self, queries: Queries) -> Tensor:
        """Sum lr * query sketch . stored row over the steps [N, Q]."""
        assert self.store is not None
        sketches = self._sketches(queries).double()  # [Q, K]
        rates = {event["step"]: event["lr"] for event in self.record.events("step")}
        number = {id: at for at, id in enumerate(dict.fromkeys(row.id for row in self.samples))}
        total = torch.zeros(len(number) + 1, len(queries), dtype=torch.float64)  # the last: rows of other samples
        for rows, meta in self.store.pieces():
            lr = torch.tensor([rates[step] for step in meta["step"].to_pylist()], dtype=torch.float64)
            of = torch.tensor([number.get(id, len(number)) for id in meta["id"].to_pylist()])
            total.index_add_(0, of, lr[:, None] * (decode_rows(rows).double() @ sketches.T))
        return total[torch.tensor([number[row.id] for row in self.samples], dtype=torch.int64)]

    def _sketches(self, queries: Queries) -> Tensor:
        """Sketch each query's gradient in nats per response token as the store's rows were [Q, K]."""
        assert self.store is not None
        spec = SketchSpec.from_dict({**self.store.spec["sketch"], "precondition": "adam"})
        numbered = [
            Row(f"{number} {place}", "", row.input_ids, row.labels)
            for number, rows in enumerate(queries.rows)
            for place, row in enumerate(rows)
        ]
        found = torch.zeros(len(queries), spec.size)
        settings = {"loss": "sum", "max_tokens": self.batching.max_tokens, "pad_id": self.batching.pad_id}
        with restored(self.model):
            load(self.model, (self.checkpoints or [present(self.model)])[-1])
            for batch in sketch_samples(self.model, numbered, spec, whitening=self._scale(), **settings):  # type: ignore[arg-type]
                of = torch.tensor([int(id.split()[0]) for id in batch.ids])
                found.index_add_(0, of, batch.sketches.cpu().float())
        return found / torch.tensor(queries.tokens)[:, None]

    def _scale(self) -> Whitening:
        """The square root of the optimizer's elementwise scale; zero on layers that the store does not hold."""
        assert self.store is not None
        adam = self.store.spec["sketch"]["precondition"] == "adam"
        held = set(self.store.spec["layers"])
        maps = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                scale = torch.zeros_like(parameter)
                if name in held:
                    scale = self._root_scale(name) if adam else torch.ones_like(parameter)
                maps[name] = LayerWhitening(scale.detach().to(parameter))
        return Whitening("adam", maps)

    def _root_scale(self, name: str) -> Tensor:
        moments: Moments = self.optimizer_state[-1] if self.optimizer_state else {}
        if name not in moments:
            raise ValueError(
                f"in_run asks sketches of AdamW's steps with the optimizer's moments at the last checkpoint, and there "
                f"are none of {name}: give `fit` the `optimizer_state`."
            )
        second, step = moments[name]["exp_avg_sq"], int(moments[name]["step"])
        assert isinstance(second, Tensor)
        correction = 1.0 - self.beta2**step
        return (second / correction).sqrt().add(self.eps).reciprocal().sqrt()
