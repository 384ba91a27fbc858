"""What the run is judged by: one held-out set per ability, its loss, and the gradient of that loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsft.data import told_labels


class TokenRow(Protocol):
    """A tokenised row: labels are -100 where the loss does not look."""

    @property
    def input_ids(self) -> list[int]: ...

    @property
    def labels(self) -> list[int]: ...


@dataclass(frozen=True, eq=False)
class TargetState:
    """The targets at one set of weights.

    losses {ability: nats per response token}; row_losses {ability: [rows] summed nats}; row_tokens {ability: [rows]};
    gradient [A, N] of the losses over the trainable parameters, in the order of the layout. same_batch_gram [A, A]:
    their inner products in the metric that was asked for; `gram` is the same with the squared norms on its diagonal
    free of the noise of the rows, products of the gradients of two halves of the rows (nan for a single row).
    """

    losses: dict[str, float]
    row_losses: dict[str, Tensor]
    row_tokens: dict[str, Tensor]
    gradient: Tensor
    same_batch_gram: Tensor
    gram: Tensor

    def error(self, ability: str) -> float:
        """Standard error of the loss over draws of target rows."""
        return ratio_error(self.row_losses[ability], self.row_tokens[ability])

    def change_error(self, ability: str, earlier: TargetState) -> float:
        """Standard error of the change of the loss since `earlier`, over draws of target rows (paired)."""
        return ratio_error(self.row_losses[ability] - earlier.row_losses[ability], self.row_tokens[ability])


def ratio_error(sums: Tensor, counts: Tensor) -> float:
    """Standard error of sum(sums)/sum(counts) over draws of rows (ratio estimator); nan for a single row."""
    rows = len(sums)
    if rows < 2:
        return float("nan")
    rest = sums - counts * (sums.sum() / counts.sum())
    return float((rest.square().sum() * rows / (rows - 1)).sqrt() / counts.sum())


class Targets:
    """The target rows of every ability, in batches of at most `batch_tokens` padded tokens."""

    def __init__(
        self, rows: Mapping[str, Sequence[TokenRow]], *, pad_id: int, batch_tokens: int = 4096, max_rows: int = 64
    ) -> None:
        if not rows:
            raise ValueError("`targets` is empty: name at least one ability and its held-out rows.")
        for ability, ability_rows in rows.items():
            if not ability_rows:
                raise ValueError(f"target {ability!r} has no rows: give it held-out samples or leave it out.")
        self.abilities = list(rows)
        self.rows = {ability: list(ability_rows) for ability, ability_rows in rows.items()}
        self.tokens = {
            ability: [sum(label != -100 for label in row.labels[1:]) for row in ability_rows]
            for ability, ability_rows in self.rows.items()
        }
        for ability, counts in self.tokens.items():
            if min(counts) == 0:
                raise ValueError(f"target {ability!r}: row {counts.index(0)} has no response token to judge by.")
        self.pad_id, self.batch_tokens, self.max_rows = pad_id, batch_tokens, max_rows

    def measure(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype,
        metric: Tensor | None = None,
    ) -> TargetState:
        """Compute losses and their gradients at the present weights; the model and the RNG are left as they were.

        metric [N]: elementwise, of the inner products of gradients; None for the plain ones.
        Under torch.distributed every rank takes a share of the rows and the sums are reduced.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        device = parameters[0].device
        size = sum(p.numel() for p in parameters)
        gradient = torch.zeros(len(self.abilities), size, device=device, dtype=dtype)
        half = torch.zeros(size, device=device, dtype=dtype)
        norms = torch.zeros(len(self.abilities), dtype=torch.float64)
        row_losses: dict[str, Tensor] = {}
        with evaluation(model), torch.enable_grad():
            for index, ability in enumerate(self.abilities):
                sums = torch.zeros(len(self.rows[ability]), device=device, dtype=torch.float64)
                total = sum(self.tokens[ability])
                for part in (0, 1):  # the rows of even places, then the others
                    for batch in self._batches(ability, rank, world, rows=range(part, len(self.rows[ability]), 2)):
                        losses = self._row_losses(model, ability, batch, device)
                        sums[batch] = losses.detach().double()
                        grads = torch.autograd.grad(losses.sum() / total, list(parameters), allow_unused=True)
                        start = 0
                        for parameter, grad in zip(parameters, grads, strict=True):
                            if grad is not None:
                                gradient[index, start : start + parameter.numel()] += grad.reshape(-1)
                            start += parameter.numel()
                    if part == 0:
                        half.copy_(gradient[index])
                if world > 1:
                    dist.all_reduce(gradient[index])
                    dist.all_reduce(half)
                    dist.all_reduce(sums)
                row_losses[ability] = sums
                norms[index] = self._norm(ability, half, gradient[index], metric)
        cpu = {ability: sums.cpu() for ability, sums in row_losses.items()}
        tokens = {ability: torch.tensor(counts, dtype=torch.float64) for ability, counts in self.tokens.items()}
        losses_now = {ability: float(cpu[ability].sum() / tokens[ability].sum()) for ability in self.abilities}
        same_batch = ((gradient if metric is None else gradient * metric) @ gradient.T).double().cpu()
        gram = same_batch.clone()
        gram.diagonal().copy_(norms)
        return TargetState(losses_now, cpu, tokens, gradient, same_batch, gram)

    def _norm(self, ability: str, half: Tensor, whole: Tensor, metric: Tensor | None) -> float:
        """The squared norm of the gradient as a product of two halves' estimates of it: the noise of a row meets only
        that of other rows."""
        total, first = sum(self.tokens[ability]), sum(self.tokens[ability][::2])
        if len(self.rows[ability]) < 2:
            return float("nan")
        rest = whole - half
        product = (half if metric is None else half * metric) @ rest
        return float(product) * (total / first) * (total / (total - first))

    def _batches(self, ability: str, rank: int, world: int, rows: Sequence[int] | None = None) -> list[list[int]]:
        """This rank's of all rows, or of those told, by length, in batches of at most `batch_tokens` padded tokens."""
        own, batches = self.rows[ability], list[list[int]]()
        order = sorted(range(len(own)) if rows is None else rows, key=lambda i: (len(own[i].input_ids), i))
        for index in order[rank::world]:
            size = len(batches[-1]) + 1 if batches else 0
            if batches and size <= self.max_rows and size * len(own[index].input_ids) <= self.batch_tokens:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def _row_losses(self, model: nn.Module, ability: str, batch: list[int], device: torch.device) -> Tensor:
        rows = [self.rows[ability][index] for index in batch]
        length = max(len(row.input_ids) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        labels = torch.full((len(rows), length), -100, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            size = len(row.input_ids)
            input_ids[number, :size] = torch.tensor(row.input_ids)
            labels[number, :size] = torch.tensor(row.labels)
            mask[number, :size] = 1
        with told_labels(labels):
            output: Any = model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False)
        logits = output.logits[:, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        shifted = labels[:, 1:].to(device)
        nll = nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), shifted.reshape(-1), ignore_index=-100, reduction="none"
        )
        return nll.view(shifted.shape).sum(1)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Switch off dropout; put every module's mode and the random state back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    cuda = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=cuda):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
