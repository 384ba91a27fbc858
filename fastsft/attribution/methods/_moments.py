"""An optimizer's moments by parameter name, from a live optimizer or from what training tools leave on disk.

What is read: optimizer.pt of a transformers Trainer (states by number), optimizer.bin of accelerate's FSDP and any dump
keyed by parameter name, folders of torch.distributed.checkpoint, torch's own state_dict; states of torch's Adam and
AdamW (fused or not) and of bitsandbytes' in 8 and 32 bits.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsft.attribution.methods._base import Moments

# what FSDP, torch.compile and activation checkpointing put between the names of modules (DataParallel's "module" stands
# in front, where names are matched by their ends)
_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
_FILES = ("optimizer.pt", "optimizer.bin")
_SHARDED = "optimizer_0"  # accelerate's folder of a sharded dump
_QUANTISED = "__bnb_optimizer_quant_state__"


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
    """Copy the moments that an Adam or AdamW holds of `model`'s parameters now.

    -> {parameter name: {"exp_avg", "exp_avg_sq": of the parameter's shape, float32 at least; "step": number of steps}}.
    Parameters that it has not moved yet are left out.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    place = type(inner).__name__
    found = {
        name: _decoded(inner.state[parameter], parameter, name, place)
        for name, parameter in model.named_parameters()
        if inner.state.get(parameter)
    }
    if not found:
        raise ValueError(
            f"{place} holds no state of this model's parameters: ask after its first step, and with the model that it "
            f"trains."
        )
    return found


def read_moments(path: Path | str, model: nn.Module, *, trainable_order: Sequence[str] | None = None) -> Moments:
    """Read the moments of `model`'s parameters from a checkpoint folder or an optimizer's file -> as `moments_of`.

    States keyed by name are matched by name, but for wrappers' prefixes, and by the name's end where only one parameter
    has it. States keyed by number are matched in the order of the file's parameter groups: by the names in the groups
    where there are any, else as a transformers Trainer groups this model's trainable parameters (with weight decay,
    then without), or, if the file has one group, in the model's own order, trainable ones or all. Every shape is
    checked. trainable_order: the names in the order in which an optimizer of your own was given them.
    """
    path = _file_of(Path(path))
    states, groups = _contents(path)
    if states and all(isinstance(key, str) for key in states):
        names = _by_name(path, list(states), model)
    else:
        names = _by_number(path, list(states), groups, model, trainable_order)
    parameters = dict(model.named_parameters())
    return {name: _decoded(states[key], parameters[name], name, str(path)) for key, name in names.items()}


# the file


def _file_of(path: Path) -> Path:
    """Find the optimizer's file, or the folder of a sharded dump, that `path` means."""
    if path.is_file() or (path / ".metadata").exists():
        return path
    for name in _FILES:
        if (path / name).exists():
            return path / name
    if (path / _SHARDED / ".metadata").exists():
        return path / _SHARDED
    there = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) if path.is_dir() else "nothing"
    raise ValueError(
        f"{path} holds {there or 'nothing'}, and no optimizer that can be read: {', '.join(_FILES)}, or a folder "
        f"{_SHARDED} of torch.distributed.checkpoint. Save the checkpoint with its optimizer, and gather states that "
        f"each rank or DeepSpeed keeps apart into one file before."
    )


def _contents(path: Path) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """Read the states by key, and the parameter groups."""
    try:
        loaded = _loaded(path)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} can't be read as plain tensors ({str(error).splitlines()[0]}): save it whole with torch.save, "
            f"or take another checkpoint."
        ) from None
    for key in ("optimizer", "optimizer_state_dict"):
        if isinstance(loaded, Mapping) and "state" not in loaded and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if isinstance(loaded, Mapping) and "state" not in loaded:
        loaded = {"state": _unflattened(loaded)}
    if not isinstance(loaded, Mapping) or not loaded["state"]:
        raise ValueError(
            f"{path} holds no optimizer's states, which a state_dict keeps under 'state': give the optimizer's "
            f"state_dict after its first step."
        )
    return dict(loaded["state"]), list(loaded.get("param_groups", []))


def _loaded(path: Path) -> Any:
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(path, whole)
        return torch.load(whole, map_location="cpu", weights_only=True)


def _unflattened(loaded: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Gather "state.<parameter>.<key>", as torch.distributed flattens states on request."""
    states: dict[str, dict[str, Any]] = {}
    for key, value in loaded.items():
        if isinstance(key, str) and key.startswith("state."):
            name, _, part = key.removeprefix("state.").rpartition(".")
            states.setdefault(name, {})[part] = value
    return states


# which state is whose


def _by_name(path: Path, keys: list[str], model: nn.Module) -> dict[Any, str]:
    """Match states to parameters by name -> {key: name}."""
    bare = {name: _bare(name) for name, _ in model.named_parameters()}
    found: dict[Any, str] = {}
    for key in keys:
        named = [name for name, plain in bare.items() if plain == _bare(key)]
        named = named or [name for name, plain in bare.items() if _ends_alike(plain, _bare(key))]
        if len(named) != 1 or named[0] in found.values():
            what = f"fits {len(named)} of them" if len(named) != 1 else f"is a second one of {named[0]}"
            raise ValueError(
                f"{path} has a state of {key!r}, which must fit one parameter of this model and {what}: the model has "
                f"{', '.join(list(bare)[:2])} ... Load the model as it was trained, adapters included, or rename the "
                f"file's keys to its parameters."
            )
        found[key] = named[0]
    return found


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _ends_alike(one: str, other: str) -> bool:
    return one.endswith("." + other) or other.endswith("." + one)


def _by_number(
    path: Path, keys: list[Any], groups: list[dict[str, Any]], model: nn.Module, order: Sequence[str] | None
) -> dict[Any, str]:
    """Match states to parameters by their numbers' places in the groups -> {number: name}."""
    numbers = [list(group["params"]) for group in groups]
    flat = [number for group in numbers for number in group]
    names = list(order) if order is not None else _order(path, groups, [len(group) for group in numbers], model)
    known = {name for name, _ in model.named_parameters()}
    if len(names) != len(flat) or (unknown := [name for name in names if name not in known]):
        what = f"names {unknown[0]!r}, no parameter of this model" if len(names) == len(flat) else f"names {len(names)}"
        raise ValueError(
            f"{path} numbers {len(flat)} parameters, and their order {what}: give in `trainable_order` the name of "
            f"each parameter that the optimizer was given, in its order."
        )
    of = dict(zip(flat, names, strict=True))
    if strange := [key for key in keys if key not in of]:
        raise ValueError(
            f"{path} has a state {strange[0]!r} that no parameter group numbers: save the state_dict anew."
        )
    return {key: of[key] for key in keys}


def _order(path: Path, groups: list[dict[str, Any]], sizes: list[int], model: nn.Module) -> list[str]:
    """Name the parameters in the order of the file's groups, as sizes of groups tell."""
    if groups and all("param_names" in group for group in groups):
        return [name for group in groups for name in group["param_names"]]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    grouped = _trainer_groups(model, trainable)
    every = [name for name, _ in model.named_parameters()]
    for candidate in (grouped, [trainable], [every]):
        if sizes == [len(group) for group in candidate]:
            return [name for group in candidate for name in group]
    raise ValueError(
        f"{path} numbers its states, in groups of {sizes} parameters, and of this model a Trainer would make groups of "
        f"{[len(group) for group in grouped]}, and a plain optimizer one of {len(trainable)} or {len(every)}: load the "
        f"model with the same weights trainable, or name the parameters in their order in `trainable_order`."
    )


def _trainer_groups(model: nn.Module, trainable: list[str]) -> list[list[str]]:
    """Split names as the Trainer does: with weight decay, without."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it reads no settings
    return [[name for name in trainable if name in decayed], [name for name in trainable if name not in decayed]]


# one state


def _decoded(state: Mapping[str, Any], parameter: Tensor, name: str, place: str) -> dict[str, Tensor | float]:
    """Bring a parameter's state to the names and the form of torch's Adam, and check its shape."""
    state = {**state, **state.get(_QUANTISED, {})}
    found: dict[str, Tensor | float] = {}
    for key, values in _pairs(state):
        if values is None:
            there = ", ".join(map(str, state)) or "nothing"
            raise ValueError(
                f"{place} has no {key} of {name}, which Adam keeps: its state has {there}. Give the state of torch's "
                f"Adam or AdamW, or of bitsandbytes' with blockwise 8 bits."
            )
        if values.shape != parameter.shape:
            raise ValueError(
                f"{place} does not fit this model: its {key} of {name} has the shape {list(values.shape)}, the "
                f"parameter {list(parameter.shape)}. Is it of another model, or one rank's share?"
            )
        found[key] = values.detach().to(torch.promote_types(values.dtype, torch.float32), copy=True)
    return {**found, "step": float(state.get("step", 0))}


def _pairs(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor | None]]:
    for number, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
        values = state.get(key, state.get(f"state{number}"))
        if isinstance(values, Tensor) and values.dtype == torch.uint8:
            qmap, absmax = state.get(f"qmap{number}"), state.get(f"absmax{number}")
            values = None if qmap is None or absmax is None else dequantised(values, qmap, absmax)
        yield key, values


def dequantised(codes: Tensor, qmap: Tensor, absmax: Tensor) -> Tensor:
    """Decode bitsandbytes' blockwise 8-bit values: qmap[code] * absmax[block], qmap [256], one absmax a block.

    Blocks are of a power of two of neighbouring numbers (2048 in early versions, 256 now): only one such size cuts the
    numbers into as many blocks as there are `absmax`.
    """
    numbers, blocks = codes.numel(), absmax.numel()
    sizes = [1 << power for power in range(31) if -(-numbers // (1 << power)) == blocks]
    if not sizes:
        raise ValueError(
            f"8-bit states of {numbers} numbers can't have {blocks} blocks of a power of two each: is the dump whole?"
        )
    block = torch.arange(numbers, device=codes.device) // sizes[-1]
    return (qmap[codes.flatten().long()] * absmax[block]).reshape(codes.shape)
