"""Gated adapters on a model: attached by hooks, so that every base layer stays what it was and keeps its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastsft.adapters.block import Block
from fastsft.adapters.config import GatedConfig, GatedError, check_name
from fastsft.adapters.context import Context, make_context
from fastsft.adapters.factor import freeze
from fastsft.adapters.hooks import (
    after_block,
    after_layer,
    after_model,
    before_block,
    before_child,
    before_layer,
    before_model,
)
from fastsft.adapters.layer import Adapter, is_conv1d, is_plain
from fastsft.adapters.router import Router, TaskGates
from fastsft.adapters.targets import block_of, find_targets, make_groups

if TYPE_CHECKING:
    from fastsft.adapters.memory import Consolidation


def attach_gated(model: nn.Module, config: GatedConfig) -> Gated:
    """Put gated adapters beside the linear layers of `model`, in place, and freeze everything else.

    The model keeps its class, its methods and its parameters' names; outputs begin as they were (B is zero). Give the
    optimizer `gated.parameter_groups(learning_rate)`, so that the memory has its own learning rate. Raises GatedError
    where no layer fits `config.targets`, or the model has gated adapters already.
    """
    return Gated(model, config)


class Gated:
    """The gated adapters of one model: what `attach_gated` gives, and `load_gated`.

    experts: their names, in order. tasks: the names that `set_task` takes: the experts', also of those that have gone
    into the memory. adapters: {name of the base layer: Adapter}.
    """

    def __init__(self, model: nn.Module, config: GatedConfig) -> None:
        if hasattr(model, "gated_adapters"):
            raise GatedError("the model has gated adapters: take them off first (`gated.detach()` or `gated.merge()`).")
        self.model, self.config = model, config
        self.experts, self.tasks = list(config.experts), list(config.experts)
        self.context = Context()
        self._task: Tensor | None = None
        self._signature = inspect.signature(model.forward)
        self._caches: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()
        found = find_targets(model, config)
        self.adapters = {name: Adapter(name, base, config) for name, base in found.items()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.blocks, self._scopes = self._make_blocks()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for name, base in found.items():
            base.gated = self.adapters[name]
            self._handles += [base.register_forward_pre_hook(before_layer), base.register_forward_hook(after_layer)]
        self._follow_scopes()
        for module in (*self.adapters.values(), *self.gatings):
            module.train(model.training)  # routers remember what they see in training alone
        model.gated_adapters = self  # type: ignore[assignment]

    def _make_blocks(self) -> tuple[list[Block], dict[str, list[Block]]]:
        """Group the adapters into blocks, and blocks by the module whose pass begins and ends them."""
        scopes: dict[str, list[Adapter]] = {}
        for name, adapter in self.adapters.items():
            scopes.setdefault(block_of(name), []).append(adapter)
        blocks, places = list[Block](), dict[str, list[Block]]()
        for scope, members in scopes.items():
            shared = [members] if self.config.sharing == "block" else [[adapter] for adapter in members]
            for adapters in shared:
                name = scope if self.config.sharing == "block" else adapters[0].name
                groups = make_groups(adapters)
                gating = self._make_gating(name, groups[0].adapters[0])
                block = Block(name or "the model", len(blocks), groups, gating, self)
                for group in groups:
                    for adapter in group.adapters:
                        adapter.__dict__["block"], adapter.__dict__["group"] = block, group
                blocks.append(block)
                places.setdefault(scope, []).append(block)
                self._home(block).gating = gating
        return blocks, places

    def _home(self, block: Block) -> nn.Module:
        """What a block's gating is a child of: the block's module, or its first layer where that would call it."""
        module = self.model.get_submodule("" if block.name == "the model" else block.name)
        if isinstance(module, nn.Sequential | nn.ModuleList):
            return self.model.get_submodule(block.groups[0].adapters[0].name)
        return module

    def _make_gating(self, name: str, first: Adapter) -> Router | TaskGates:
        if self.config.granularity == "task":
            return TaskGates(self.config, first.device, first.dtype)
        return Router(name, first.inputs, self.config, first.device, first.dtype)

    def _follow_scopes(self) -> None:
        self._handles.append(self.model.register_forward_pre_hook(before_model, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(after_model))
        for scope, blocks in self._scopes.items():
            if not scope:
                continue  # begun with the model's own pass
            module = self.model.get_submodule(scope)
            module.__dict__["gated_blocks"] = blocks
            self._handles.append(module.register_forward_pre_hook(before_block, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after_block))
            for child in module.children():
                child.__dict__["gated_blocks"] = blocks
                self._handles.append(child.register_forward_pre_hook(before_child))

    # a forward pass of the model

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A pass of the model begins: find out what its layers must know."""
        task_ids = kwargs.pop("task_ids", None)
        given = {**dict(zip(self._signature.parameters, args)), **kwargs}
        task = self._task if task_ids is None else task_ids
        cache = given.get("past_key_values")
        gates = None
        if self.config.granularity == "sequence" and cache is not None and cache.get_seq_length() > 0:
            gates = self._caches.get(cache)
            if gates is None:
                raise GatedError(
                    "this cache was filled without these adapters' gates, so the gates of its prompt are not known: "
                    "let the model that goes on with a cache fill it."
                )
        if task is not None:
            task = task.reshape(-1).to(next(iter(self.adapters.values())).device)
        strict = self.model.training and torch.is_grad_enabled()
        self.context = make_context(self.config, given, task, gates, strict=strict)
        for block in self._scopes.get("", []):
            block.begin(None)
        return args, kwargs

    def after(self, output: Any) -> None:
        """It has ended: the gates of its prompts go on with its cache."""
        cache = output.get("past_key_values") if isinstance(output, Mapping) else None
        if cache is not None and self.config.granularity == "sequence":
            self._caches[cache] = self.context.gates
        for block in self._scopes.get("", []):
            block.end()

    # tasks and experts

    def set_task(self, task: str | Sequence[str] | None) -> None:
        """Say the task of what comes next: one for all, or one a sequence of each batch. For gates per task.

        A batch of several tasks can carry them itself: call the model with `task_ids` [B], numbers into `gated.tasks`.
        """
        if task is None:
            self._task = None
            return
        names = [task] if isinstance(task, str) else list(task)
        unknown = [name for name in names if name not in self.tasks]
        if unknown or not names:
            raise GatedError(f"unknown task {unknown[:1] or names}: the tasks are {', '.join(self.tasks)}.")
        self._task = torch.tensor([self.tasks.index(name) for name in names])

    def add_expert(self, name: str, *, gate_bias: float | None = None) -> None:
        """Add an expert that begins at zero output. Make the optimizer anew: there are new parameters.

        gate_bias: its gate before training, as a logit; None takes the config's.
        """
        check_name(name)
        if name in self.tasks:
            raise GatedError(f"there is, or was, an expert {name!r}: choose another name.")
        self.experts.append(name)
        self.tasks.append(name)
        self.config = replace(self.config, experts=self.experts)
        for adapter in self.adapters.values():
            adapter.config = self.config
            adapter.add_expert(name)
        for gating in self.gatings:
            gating.config = self.config
            if isinstance(gating, Router):
                gating.add_expert(name, gate_bias)
            else:
                gating.add_expert(name, self.tasks.index(name))

    def freeze_expert(self, name: str, *, frozen: bool = True) -> None:
        """Stop training an expert and its row of the router, or (frozen=False) train it again."""
        self._check_expert(name)
        for adapter in self.adapters.values():
            freeze(adapter.experts[name], frozen=frozen)
        for gating in self.gatings:
            if isinstance(gating, Router):
                freeze(gating.experts[name], frozen=frozen)
                if self.config.orthogonal:
                    gating.experts[name].bias.requires_grad_(False)

    def is_frozen(self, name: str) -> bool:
        self._check_expert(name)
        adapter = next(iter(self.adapters.values()))
        return not adapter.experts[name].A.weight.requires_grad

    def remove_expert(self, name: str) -> None:
        """Take an expert out. Its name stays a task, whose gates then have no expert of its own."""
        self._check_expert(name)
        index = self.experts.index(name)
        self.experts.remove(name)
        if not self.experts and not self.has_memory:
            self.experts.insert(index, name)
            raise GatedError(f"{name!r} is all that is left: take the adapters off with `gated.detach()`.")
        self.config = replace(self.config, experts=self.experts)
        for adapter in self.adapters.values():
            adapter.config = self.config
            del adapter.experts[name]
        for gating in self.gatings:
            gating.config = self.config
            if isinstance(gating, Router):
                del gating.experts[name]
            else:
                gating.remove_expert(index)

    def _check_expert(self, name: str) -> None:
        if name not in self.experts:
            raise GatedError(f"there is no expert {name!r}: the experts are {', '.join(self.experts) or 'none'}.")

    @property
    def has_memory(self) -> bool:
        return any(adapter.memory_rank for adapter in self.adapters.values())

    @property
    def gatings(self) -> list[Router | TaskGates]:
        return [block.gating for block in self.blocks]

    def protect_router(self) -> dict[str, int]:
        """Keep the gates of all inputs seen in training since the last call, from now on; needs `orthogonal=True`.

        Call it when a task is done. Returns how many directions each router protects. What is protected is what a
        router read: inputs of later blocks still move as experts and memory of earlier ones train.
        """
        if not self.config.orthogonal:
            raise GatedError("routers remember what they saw only with GatedConfig(orthogonal=True).")
        return {gating.name: gating.protect() for gating in self.gatings if isinstance(gating, Router)}

    # parameters

    def parameter_groups(self, learning_rate: float, **settings: Any) -> list[dict[str, Any]]:
        """What trains, as an optimizer takes it: experts and gates, then the memory with `memory_lr` times their rate.

        settings: of both groups, for example weight_decay=0.0.
        """
        memory = {
            id(parameter)
            for adapter in self.adapters.values()
            if adapter.memory
            for parameter in adapter.memory.parameters()
        }
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        own = {"params": [p for p in trained if id(p) not in memory], "lr": learning_rate, **settings}
        kept = {
            "params": [p for p in trained if id(p) in memory],
            "lr": learning_rate * self.config.memory_lr,
            **settings,
        }
        return [group for group in (own, kept) if group["params"]]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapters' own parameters, under the model's names for them."""
        own = {id(p) for adapter in self.adapters.values() for p in adapter.parameters()}
        own |= {id(p) for gating in self.gatings for p in gating.parameters()}
        return ((name, p) for name, p in self.model.named_parameters() if id(p) in own)

    # the memory

    def consolidate(self, name: str, *, weight: float = 1.0, remove: bool = True) -> Consolidation:
        """Fold an expert into the memory, see `fastsft.adapters.memory.consolidate`."""
        from fastsft.adapters.memory import consolidate

        return consolidate(self, name, weight=weight, remove=remove)

    def select_memory(self, importance: Mapping[str, Tensor], share: float) -> None:
        """Let only the memory ranks of highest `importance` train, see `fastsft.adapters.memory`."""
        from fastsft.adapters.memory import select_memory

        select_memory(self, importance, share)

    def release_memory(self) -> None:
        """Let all memory ranks train again."""
        from fastsft.adapters.memory import release_memory

        release_memory(self)

    # leaving

    @torch.no_grad()
    def merge(self, gates: Mapping[str, float] | None = None, *, task: str | None = None) -> nn.Module:
        """Add experts at given gates, and the memory, to the base weights, and take the adapters off.

        gates: {expert: gate}, 0 for those it leaves out. task: its gates, where gates are per task. Raises GatedError
        where gates depend on the input and none are given, or a base layer is not a plain one.
        """
        if gates is not None:
            for name in gates:
                self._check_expert(name)
        elif self.config.granularity != "task":
            raise GatedError(
                f"gates per {self.config.granularity} depend on the input, so no weights can hold them: give `gates`, "
                f"for example {{{self.experts[0] if self.experts else 'expert'!r}: 1.0}}, or keep the adapters."
            )
        elif task not in self.tasks:
            raise GatedError(f"name the `task` whose gates to merge, one of {', '.join(self.tasks)}: got {task!r}.")
        for name in self.adapters:
            base = self.model.get_submodule(name)
            if not is_plain(base):
                raise GatedError(
                    f"{name} ({type(base).__name__}) is no plain linear layer, and its weights can't be added to: keep "
                    f"the adapters beside it."
                )
        for name, adapter in self.adapters.items():
            base = self.model.get_submodule(name)
            delta = self.delta(adapter, gates if gates is not None else self._task_gates(adapter, str(task)))
            weight: Any = base.weight
            weight += (delta.T if is_conv1d(base) else delta).to(weight.dtype)
        return self.detach()

    def _task_gates(self, adapter: Adapter, task: str) -> dict[str, float]:
        gating = adapter.block.gating
        assert isinstance(gating, TaskGates)
        values = gating(
            torch.tensor([self.tasks.index(task)], device=adapter.device), torch.zeros((), dtype=adapter.dtype)
        )
        return dict(zip(self.experts, values[0].tolist()))

    def delta(self, adapter: Adapter, gates: Mapping[str, float]) -> Tensor:
        """What an adapter adds to its layer's weight [O, I] at given gates, memory included."""
        total = torch.zeros(adapter.outputs, adapter.inputs, device=adapter.device, dtype=adapter.dtype)
        for name, pair in zip([*adapter.experts, *[None] * 2], adapter.pairs):
            factor = 1.0 if name is None else gates.get(name, 0.0)
            total += factor * self.config.scale * (pair.B.weight @ pair.A.weight)
        return total

    def detach(self) -> nn.Module:
        """Take the adapters off; the base model is as it was, frozen. Returns it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name in self.adapters:
            del self.model.get_submodule(name).gated
        for block in self.blocks:
            del self._home(block).gating
        for scope in self._scopes:
            if scope:
                module = self.model.get_submodule(scope)
                for each in (module, *module.children()):
                    each.__dict__.pop("gated_blocks", None)
        del self.model.gated_adapters
        return self.model

    # files

    def save(self, folder: str | Path) -> Path:
        """Write the adapters (not the base) to `folder`: gated.json and gated.safetensors."""
        from fastsft.adapters.files import save_gated

        return save_gated(self, folder)
