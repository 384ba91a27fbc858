"""Which layers of a model get adapters, which block each belongs to, and which read the same tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from fastsft.adapters.block import Group
from fastsft.adapters.config import ENDS, SAME_INPUT, GatedConfig, GatedError
from fastsft.adapters.layer import Adapter, is_linear


def find_targets(model: nn.Module, config: GatedConfig) -> dict[str, nn.Module]:
    """The linear layers that `config.targets` names, without the output layer."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    linear = {
        name: module for name, module in model.named_modules() if is_linear(module) and module is not head and name
    }
    if config.targets == "all-linear":
        found = linear
    else:
        ends = [config.targets] if isinstance(config.targets, str) else list(config.targets)
        found = {
            name: module
            for name, module in linear.items()
            if any(re.search(rf"(^|\.){re.escape(end)}$", name) for end in ends)
        }
    if not found:
        some = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear})) or "none"
        raise GatedError(f"`targets` {config.targets!r} names no linear layer of the model: its layers are {some}.")
    return found


def block_of(name: str) -> str:
    """The block that a layer belongs to: the innermost member of a list of modules that holds it, "" for none."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end - 1].isdigit():
            return ".".join(parts[:end])
    return ""


def make_groups(adapters: Sequence[Adapter]) -> list[Group]:
    """Group adapters of layers that read the same tensor, by their names (`SAME_INPUT`).

    The first group is one that a block calls first, as far as names tell: a router reads what it reads.
    """
    groups: dict[tuple[str, object], list[Adapter]] = {}
    for adapter in adapters:
        parent, _, leaf = adapter.name.rpartition(".")
        number = next((number for number, names in enumerate(SAME_INPUT) if leaf in names), None)
        groups.setdefault((parent, leaf if number is None else number), []).append(adapter)
    found = [Group(members) for members in groups.values()]
    begins = [group for group in found if group.adapters[0].name.rpartition(".")[2] not in ENDS]
    return sorted(found, key=lambda group: group is not begins[0]) if begins else found
