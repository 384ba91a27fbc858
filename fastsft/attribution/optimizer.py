"""The optimizer's step as a linear map of the batch gradient, given its own second moment.

AdamW, Adam and SGD move weights by a linear filter of past gradients: dw_t = sum over sources of dw_t(s) + decay,
exactly, momentum included, because the first moment is linear and the second moment is shared by all sources.

Letters: P followed parameters (flat), S rows: sources, then `decay`, then `carried` (momentum from before).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastsft.attribution.ranks import rank


@dataclass(frozen=True, eq=False)
class Slot:
    """One followed parameter: its place in the flat vectors and its optimizer settings."""

    parameter: nn.Parameter
    start: int
    end: int
    group: dict[str, Any]


@dataclass(frozen=True)
class Echo:
    """How a gradient lives on in the first moment: it enters times `first`, then shrinks by `decay` a step; `extra` is
    what it displaces at once beside the moment (Nesterov)."""

    first: float
    decay: float
    extra: float


class Rule(Protocol):
    """How one family of optimizers turns gradients into displacements."""

    def steps(self) -> int: ...

    def stepped(self) -> None: ...

    def scale(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor | None: ...

    def jacobian(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor: ...

    def pace(self, group: dict[str, Any]) -> float: ...

    def echo(self) -> Echo: ...

    def tail(self, remaining: int | None) -> float: ...

    def advance(
        self, slots: list[Slot], parts: list[Tensor], moments: list[Tensor], displacements: list[Tensor]
    ) -> None: ...

    def carried(self, slots: list[Slot], out: Tensor) -> None: ...


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """Choose the rule for `optimizer`, or say which ones there are."""
    name = type(optimizer).__name__
    for option in ("amsgrad", "maximize"):
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(f"the books of {name} with {option}=True are not supported: use {option}=False.")
    if isinstance(optimizer, torch.optim.Adam):  # AdamW derives from it
        return AdamRule(optimizer)
    if isinstance(optimizer, torch.optim.SGD):
        return SGDRule(optimizer)
    raise ValueError(
        f"the books need torch's AdamW, Adam or SGD (fused or not): got {name}. "
        f"With a transformers trainer set optim='adamw_torch' or 'sgd'."
    )


class AdamRule:
    """torch.optim.AdamW and Adam (Kingma & Ba 2015; Loshchilov & Hutter 2019, decoupled decay)."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._count = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)

    def steps(self) -> int:
        """The number of steps that the second moments have seen."""
        return self._count

    def stepped(self) -> None:
        """Count a step: asking the optimizer may wait for the device."""
        self._count += 1

    def _age(self, state: dict[str, Any]) -> int:
        """The steps of one parameter: its own count where that is on the host, else that of the run."""
        step = state["step"]
        if isinstance(step, Tensor) and step.device.type != "cpu":
            return self._count
        return int(step)

    def scale(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor | None:
        """1 / (sqrt(v_hat) + eps) after the last step, of the parameter's shape; None before the first step."""
        state = self.optimizer.state.get(parameter)
        if not state or "exp_avg_sq" not in state:
            return None
        correction = 1.0 - float(group["betas"][1]) ** self._age(state)
        return (_wide(state["exp_avg_sq"]) / correction).sqrt_().add_(group["eps"]).reciprocal_()

    def jacobian(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The derivative of the last step by its own gradient, in the units of `scale`.

        J(G) / ((1-b1)/c1) = s - m_hat (1-b2) G c1 / ((1-b1) c2 sqrt(v_hat)) s^2, with s = 1/(sqrt(v_hat)+eps):
        the second moment moves with the gradient too. Zero where v_hat is zero.
        """
        scale, gradient = self.scale(parameter, group), parameter.grad
        if scale is None or gradient is None:  # the parameter took no part: its samples' gradients are zero too
            return torch.ones_like(_wide(parameter.detach()))
        state = self.optimizer.state[parameter]
        beta1, beta2 = (float(beta) for beta in group["betas"])
        c2 = 1.0 - beta2 ** self._age(state)
        root = (_wide(state["exp_avg_sq"]) / c2).sqrt_()
        bend = _wide(state["exp_avg"]) * _wide(gradient) * ((1.0 - beta2) / ((1.0 - beta1) * c2)) / root
        return scale - torch.where(root > 0, bend, 0.0) * scale * scale

    def pace(self, group: dict[str, Any]) -> float:
        """What the step just taken multiplied `scale` times its first moment by: lr / (1 - beta1^t)."""
        return float(group["lr"]) / (1.0 - float(group["betas"][0]) ** self._count)

    def echo(self) -> Echo:
        beta = float(self.optimizer.param_groups[0]["betas"][0])
        return Echo(first=1.0 - beta, decay=beta, extra=0.0)

    def tail(self, remaining: int | None) -> float:
        """What one unit of first moment will still displace after the step just taken, over `scale` and lr as they
        are now: sum over k >= 1 of beta1^(k-1) / (1 - beta1^(t+k)), cut where training ends (None: unknown)."""
        group = self.optimizer.param_groups[0]
        beta, step = float(group["betas"][0]), self._count
        weights = _powers(beta, remaining)
        return float(group["lr"]) * sum(w / (1.0 - beta ** (step + k)) for k, w in enumerate(weights, start=1))

    def advance(
        self, slots: list[Slot], parts: list[Tensor], moments: list[Tensor], displacements: list[Tensor]
    ) -> None:
        """Book the step just taken. Each list has a [S, n] a slot; `parts` is each row's gradient, zero in the rows
        for decay and carried momentum."""
        for slot, part, row, displacement in zip(slots, parts, moments, displacements, strict=True):
            group, scale = slot.group, self.scale(slot.parameter, slot.group)
            if scale is None or slot.parameter.grad is None:
                continue  # torch leaves a parameter without a gradient as it is, its moments too
            beta, lr, decay = float(group["betas"][0]), float(group["lr"]), float(group["weight_decay"])
            state = self.optimizer.state[slot.parameter]
            unit = scale.view(-1) * (lr / (1.0 - beta ** self._age(state)))
            if decay and rank() == 0:  # rows are summed over ranks, and decay is the same on all
                first = state["exp_avg"].view(-1).to(row.dtype)
                before = slot.parameter.detach().view(-1).to(row.dtype) + unit * first
                if group.get("decoupled_weight_decay", False):
                    displacement[-2] -= before * (lr * decay / (1.0 - lr * decay))
                else:
                    part[-2] = decay * before
            row.mul_(beta).add_(part, alpha=1.0 - beta)
            displacement.addcmul_(row, unit, value=-1.0)

    def carried(self, slots: list[Slot], out: Tensor) -> None:
        """Add the momentum that the optimizer already holds to `out` [P]."""
        for slot in slots:
            first = self.optimizer.state.get(slot.parameter, {}).get("exp_avg")
            if first is not None:
                out[slot.start : slot.end] += first.view(-1).to(out.dtype)


class SGDRule:
    """torch.optim.SGD with momentum, dampening, Nesterov and coupled weight decay."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        # torch starts a momentum buffer as a copy of the first gradient, undamped
        self._started = {id(p) for p, state in optimizer.state.items() if state.get("momentum_buffer") is not None}

    def steps(self) -> int:
        """SGD has no second moment that would have to grow old: it counts as long under way."""
        return 1_000_000

    def stepped(self) -> None:
        return None

    def scale(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor | None:
        return torch.ones_like(_wide(parameter.detach()))

    def jacobian(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        return torch.ones_like(_wide(parameter.detach()))

    def pace(self, group: dict[str, Any]) -> float:
        momentum = float(group["momentum"])
        return float(group["lr"]) * (momentum if group["nesterov"] else 1.0)

    def echo(self) -> Echo:
        group = self.optimizer.param_groups[0]
        momentum = float(group["momentum"])
        first = 1.0 - float(group["dampening"]) if momentum else 1.0
        return Echo(first=first, decay=momentum, extra=float(group["lr"]) if group["nesterov"] else 0.0)

    def tail(self, remaining: int | None) -> float:
        group = self.optimizer.param_groups[0]
        return self.pace(group) * sum(_powers(float(group["momentum"]), remaining))

    def advance(
        self, slots: list[Slot], parts: list[Tensor], moments: list[Tensor], displacements: list[Tensor]
    ) -> None:
        """Book the step just taken. Each list has a [S, n] a slot; `parts` is each row's gradient, zero in the rows
        for decay and carried momentum."""
        for slot, part, row, displacement in zip(slots, parts, moments, displacements, strict=True):
            group = slot.group
            if slot.parameter.grad is None:
                continue  # torch leaves a parameter without a gradient as it is, its momentum too
            momentum, lr, decay = float(group["momentum"]), float(group["lr"]), float(group["weight_decay"])
            if decay and rank() == 0:  # rows are summed over ranks, and decay is the same on all
                part[-2] = decay * self._before(slot).to(part.dtype)
            if momentum == 0.0:
                displacement.sub_(part, alpha=lr)
                continue
            if id(slot.parameter) in self._started:
                row.mul_(momentum).add_(part, alpha=1.0 - float(group["dampening"]))
            else:
                row.copy_(part)
                self._started.add(id(slot.parameter))
            displacement.sub_(part + momentum * row if group["nesterov"] else row, alpha=lr)

    def _before(self, slot: Slot) -> Tensor:
        """The weights before the step, from those after it and what the step used."""
        group, after = slot.group, slot.parameter.detach().view(-1)
        momentum, lr, decay = float(group["momentum"]), float(group["lr"]), float(group["weight_decay"])
        if momentum and not group["nesterov"]:
            return after + lr * self.optimizer.state[slot.parameter]["momentum_buffer"].view(-1)
        gradient = slot.parameter.grad
        if gradient is None:
            raise RuntimeError("weight decay of SGD needs the gradient of the step just taken.")
        step = gradient.view(-1)
        if momentum:
            step = step + momentum * self.optimizer.state[slot.parameter]["momentum_buffer"].view(-1)
        return (after + lr * step) / (1.0 - lr * decay)

    def carried(self, slots: list[Slot], out: Tensor) -> None:
        for slot in slots:
            buffer = self.optimizer.state.get(slot.parameter, {}).get("momentum_buffer")
            if buffer is not None:
                out[slot.start : slot.end] += buffer.view(-1).to(out.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _powers(decay: float, remaining: int | None) -> list[float]:
    """decay^0, decay^1, ... for the `remaining` further steps, cut where they no longer count."""
    weights: list[float] = []
    weight = 1.0
    while decay and weight > 1e-12 and (remaining is None or len(weights) < remaining):
        weights.append(weight)
        weight *= decay
    return weights
