"""A finished run as a chain of plain steps: taken again from its first weights, then walked from the last step back.

A step's loss is the sum over its samples of their summed token losses, divided by the step's supervised tokens; its
gradient is clipped by the norm over all trainable parameters; then the optimizer moves the weights.
"""

# S steps, Q vectors, P trainable parameters end to end

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastsft.attribution.methods._curvature_products import predict, twice_differentiable
from fastsft.attribution.methods._optimizer_steps import AdamW, Rule, Sgd, State, clip_back, clip_factor
from fastsft.data import Row
from fastsft.sketch.passes import Batch, Batching, make_batch


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a run did at each of its S steps: enough to take every step again."""

    # of each step the places of its samples, in the order that `fit` is given them; micro-batches merged
    batches: Sequence[Sequence[int]]
    # of each step
    learning_rate: Sequence[float]
    # torch's AdamW (decoupled decay) or SGD (momentum without dampening; decay is added to the gradient)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    # of all parameters, or by parameter name; what is not named does not decay
    weight_decay: float | Mapping[str, float] = 0.0
    # over all trainable parameters; None for none
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if not self.batches or len(self.batches) != len(self.learning_rate) or not all(map(len, self.batches)):
            raise ValueError(
                f"a Schedule needs one `learning_rate` a step, and at least one sample in each step's `batches`: got "
                f"{len(self.learning_rate)} rates for {len(self.batches)} steps, the smallest of "
                f"{min(map(len, self.batches), default=0)} samples."
            )
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"`optimizer` must be 'adamw' or 'sgd': got {self.optimizer!r}. No other can be replayed.")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)) or self.eps <= 0:
            raise ValueError(
                f"`betas` and `momentum` must be from 0 to below 1, and `eps` above 0: got {self.betas}, "
                f"{self.momentum} and {self.eps}."
            )
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"`max_grad_norm` must be above 0, or None for no clipping: got {self.max_grad_norm}.")

    def __len__(self) -> int:
        return len(self.batches)


class Step(NamedTuple):
    """One step of the run: its number from 0, the state before it, and its gradient [P] before clipping."""

    number: int
    state: State
    gradient: Tensor


class Replay:
    """Take a run again from the weights that `model` has now.

    States are kept on the CPU: of every step where they fit `keep_bytes`, else of every k-th, and the steps between are
    taken again on each walk back.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Row],
        schedule: Schedule,
        *,
        batching: Batching,
        keep_bytes: int,
        smooth: float,
    ) -> None:
        self.model, self.samples, self.schedule, self.batching = model, samples, schedule, batching
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _check_weights(model, self.parameters)
        _check_schedule(schedule, samples, self.parameters)
        self.device = next(iter(self.parameters.values())).device
        self.rule = self._rule(smooth)
        self.tokens = [sum(samples[at].num_supervised for at in batch) for batch in schedule.batches]
        self._kept: list[Step] = []
        self._starts: dict[int, State] = {}
        state = self.rule.start(self._weights())
        self.every = self._every(state.num_tensors, keep_bytes)
        for number in range(len(schedule)):
            if self.every > 1 and number % self.every == 0:
                self._starts[number] = state.to("cpu")
            step = self._step(number, state)
            if self.every == 1:
                self._kept.append(Step(number, state.to("cpu"), step.gradient.cpu()))
            state = self._after(step)
        self.final = state.weights

    def _rule(self, smooth: float) -> Rule:
        schedule, decay = self.schedule, self.schedule.weight_decay
        rates = [decay.get(name, 0.0) if isinstance(decay, Mapping) else decay for name in self.parameters]
        decays = torch.cat([p.new_full((p.numel(),), rate) for p, rate in zip(self.parameters.values(), rates)])
        if schedule.optimizer == "sgd":
            return Sgd(decays, schedule.momentum)
        return AdamW(decays, *schedule.betas, schedule.eps, smooth)

    def _every(self, tensors: int, keep_bytes: int) -> int:
        """The smallest k for which every k-th state, and a segment of k steps, fit; 1 keeps every step."""
        S = len(self.schedule)
        one = sum(p.numel() * p.element_size() for p in self.parameters.values())
        if S * (tensors + 1) * one <= keep_bytes:
            return 1
        sizes = {k: (-(-S // k) * tensors + k * (tensors + 1)) * one for k in range(2, max(2, S) + 1)}
        fitting = [k for k, size in sizes.items() if size <= keep_bytes]
        return min(fitting) if fitting else min(sizes, key=lambda k: sizes[k])

    def back(self) -> Iterator[Step]:
        """Walk from the last step to the first: tensors on the model's device, the model at each step's weights."""
        if self.every == 1:
            segments = iter([self._kept])
        else:
            segments = (self._segment(start) for start in sorted(self._starts, reverse=True))
        for segment in segments:
            for number, state, gradient in reversed(segment):
                state = state.to(self.device)
                self.load(state.weights)
                yield Step(number, state, gradient.to(self.device))

    def _segment(self, start: int) -> list[Step]:
        state, found = self._starts[start].to(self.device), []
        for number in range(start, min(start + self.every, len(self.schedule))):
            step = self._step(number, state)
            found.append(Step(number, state.to("cpu"), step.gradient.cpu()))
            state = self._after(step)
        return found

    def _step(self, number: int, state: State) -> Step:
        self.load(state.weights)
        return Step(number, state, self._gradient(number))

    def _after(self, step: Step) -> State:
        clipped = step.gradient * self._clip(step.gradient)
        return self.rule.step(step.state, clipped, self.schedule.learning_rate[step.number], step.number + 1)

    def step_back(self, step: Step, adjoint: State) -> tuple[State, Tensor]:
        """Take the adjoint of the state after a step to that of the state before it, less what flows through the
        gradient [Q, P], all in float64.

        What flows through Adam's two moments nearly cancels in its first steps: float32 would keep two digits or three.
        """
        factor, rate = self._clip(step.gradient).double(), self.schedule.learning_rate[step.number]
        state, gradient = step.state.to(torch.float64), step.gradient.double()
        before, vectors = self.rule.back(state, gradient * factor, rate, step.number + 1, adjoint)
        if self.schedule.max_grad_norm is not None:
            vectors = clip_back(gradient, self.schedule.max_grad_norm, factor, vectors)
        return before, vectors

    def _clip(self, gradient: Tensor) -> Tensor:
        most = self.schedule.max_grad_norm
        return gradient.new_ones(()) if most is None else clip_factor(self.split(gradient[None]), most)

    def _gradient(self, number: int) -> Tensor:
        total = torch.zeros_like(self.rule.decay)
        with twice_differentiable(self.model):
            for _, batch in self.parts(number):
                loss = predict(self.model, batch).losses().sum() / self.tokens[number]
                total += self.grad(loss)
        return total

    def grad(self, loss: Tensor) -> Tensor:
        """The gradient of `loss` by all trainable parameters [P]."""
        weights = list(self.parameters.values())
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return torch.cat([
            (torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(weights, found, strict=True)
        ])  # fmt: skip

    def parts(self, number: int) -> Iterator[tuple[list[int], Batch]]:
        """Lay a step's samples into batches of `max_tokens`, each with its samples' places."""
        return self.batches_of(self.samples, self.schedule.batches[number])

    def batches_of(self, rows: Sequence[Row], places: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
        # a row without a supervised token took no part in the loss
        counted = [at for at in places if rows[at].num_supervised]
        batches: list[list[int]] = []
        for at in sorted(counted, key=lambda at: -len(rows[at].input_ids)):
            if not batches or len(rows[batches[-1][0]].input_ids) * (len(batches[-1]) + 1) > self.batching.max_tokens:
                batches.append([])
            batches[-1].append(at)
        for batch in batches:
            yield batch, make_batch([rows[at] for at in batch], self.batching, self.device)

    def _weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters.values()])

    def load(self, weights: Tensor) -> None:
        """Copy weights [P] into the model."""
        with torch.no_grad():
            for parameter, part in zip(self.parameters.values(), self.split(weights[None]), strict=True):
                parameter.copy_(part[0])

    def split(self, vectors: Tensor) -> list[Tensor]:
        """Cut vectors [Q, P] into one [Q, *shape] a parameter."""
        parts = vectors.split([p.numel() for p in self.parameters.values()], dim=1)
        return [part.view(-1, *p.shape) for part, p in zip(parts, self.parameters.values(), strict=True)]


def _check_weights(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    dtypes, devices = {p.dtype for p in parameters.values()}, {p.device for p in model.parameters()}
    if not parameters or len(devices) > 1:
        raise ValueError(
            f"a run is replayed on one device, with trainable parameters: got {len(parameters)} of them, on "
            f"{', '.join(sorted(map(str, devices)))}."
        )
    if dtypes not in ({torch.float32}, {torch.float64}):
        raise ValueError(
            f"a run is replayed with trainable weights all in float32, or all in float64: got "
            f"{', '.join(sorted(map(str, dtypes)))}. Load the model with dtype=torch.float32."
        )


def _check_schedule(schedule: Schedule, samples: Sequence[Row], parameters: Mapping[str, nn.Parameter]) -> None:
    places = {at for batch in schedule.batches for at in batch}
    if min(places) < 0 or max(places) >= len(samples):
        raise ValueError(
            f"the schedule does not fit the samples: its batches name places from {min(places)} to {max(places)}, "
            f"and there are {len(samples)} samples. Places count from 0 in the order given to `fit`."
        )
    for number, batch in enumerate(schedule.batches):
        if not any(samples[at].num_supervised for at in batch):
            raise ValueError(
                f"the schedule does not fit the samples: step {number} has no supervised token, so it has no loss. "
                f"Are the places those of the list given to `fit`?"
            )
    if isinstance(schedule.weight_decay, Mapping) and (unknown := set(schedule.weight_decay) - set(parameters)):
        raise ValueError(
            f"`weight_decay` names {sorted(unknown)[0]}, which is not a trainable parameter of the model; those are "
            f"{', '.join(list(parameters)[:3])} ..."
        )
