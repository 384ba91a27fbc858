"""Experts as LoRA directories of PEFT, there and back."""

# r an expert's rank, M memory rank, I inputs, O outputs

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsft.adapters.config import GatedError
from fastsft.adapters.factor import Pair
from fastsft.adapters.files import read_tensors, written_whole
from fastsft.adapters.gated import Gated
from fastsft.adapters.layer import Adapter, is_conv1d

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# import_expert reads these, or they don't touch what a trained LoRA computes; any other setting must be off
KNOWN = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
# ways to begin that leave the base as it was; others keep part of it in A and B
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
REASONS = {
    "use_dora": "DoRA rescales the base weights, which an expert beside them can't do",
    "modules_to_save": "it holds whole modules beside the LoRA, and an expert is low-rank alone",
    "lora_bias": "an expert has no bias",
    "trainable_token_indices": "it holds embeddings of tokens, and an expert adapts linear layers alone",
    "target_parameters": "it adapts bare parameters, and an expert adapts linear layers alone",
    "layer_replication": "it makes a model of other layers",
}
WAY_OUT = "Train a LoRA without it, on linear layers alone, and import that."


class Lora(NamedTuple):
    """One layer of a LoRA: what it adds to a weight [O, I] is scale * b @ a. a [r, I], b [O, r]."""

    a: Tensor
    b: Tensor
    scale: float


def export_expert(gated: Gated, name: str, folder: str | Path, *, memory: bool = False) -> Path:
    """Write one expert, at gate 1, as a LoRA directory that PEFT loads: adapter_config.json, adapter_model.safetensors.

    memory: with the memory, as one LoRA of rank r + M. The memory always speaks, so where there is one the expert
    alone is not what the gated model computes: it is what `name` adds to it. Neither is what the model computes at
    other gates than 1 for `name` and 0 for the rest. Layers are named in full, so that PEFT adapts these and no others.
    Returns the folder.
    """
    from safetensors.torch import save_file

    gated._check_expert(name)
    if memory and not gated.has_memory:
        raise GatedError("`memory` was asked for, and these adapters have none: leave it out.")
    pairs = {layer: _stacked(adapter, name, memory=memory) for layer, adapter in gated.adapters.items()}
    rank = gated.config.rank + (gated.config.memory_rank if memory else 0)
    # PEFT knows a whole lora_alpha; what it can't say of the scale goes into B
    scale = gated.config.scale
    alpha = max(1, round(scale * rank))
    rest = scale * rank / alpha
    tensors = {}
    for layer, (a, b) in pairs.items():
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = (b if rest == 1 else b * rest).cpu().contiguous()
    folder = Path(folder)
    with written_whole(folder) as unfinished:
        save_file(tensors, str(unfinished / WEIGHTS), metadata={"format": "pt"})
        _lora_config(gated, rank, alpha).save_pretrained(str(unfinished))
    return folder


def import_expert(gated: Gated, folder: str | Path, name: str, *, gate_bias: float | None = None) -> None:
    """Add an expert from a LoRA directory of PEFT: at gate 1 it adds what the LoRA does. Make the optimizer anew.

    The LoRA's scale goes into B. Where its rank is below the adapters', the ranks left over begin as a new expert's
    do, adding nothing, and so do layers that it lacks. Its dropout is not taken over. gate_bias: as in
    `Gated.add_expert`. Raises GatedError, with nothing changed, where an expert can't do what the LoRA does.
    """
    folder = Path(folder)
    loras = _read_loras(folder)
    for layer, lora in loras.items():
        _check_fit(gated, folder, layer, lora)
    gated.add_expert(name, gate_bias=gate_bias)
    for layer, lora in loras.items():
        _fill(gated.adapters[layer].experts[name], lora, gated.config.scale)


# there


@torch.no_grad()
def _stacked(adapter: Adapter, name: str, *, memory: bool) -> tuple[Tensor, Tensor]:
    """A [r, I] and B [O, r] of an expert, or [r + M, I] and [O, r + M] with the memory."""
    pairs: list[Pair] = [adapter.experts[name]]
    if memory:
        pairs += [pair for pair in (adapter.held, adapter.memory) if pair is not None]
    return torch.cat([pair.A.weight for pair in pairs]), torch.cat([pair.B.weight for pair in pairs], 1)


def _lora_config(gated: Gated, rank: int, alpha: int) -> Any:
    from peft import LoraConfig

    model = gated.model
    layers = {name: model.get_submodule(name) for name in gated.adapters}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        fan_in_fan_out=any(is_conv1d(layer) for layer in layers.values()),
        task_type=_task_type(model),
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
        inference_mode=True,
    )
    # set afterwards: PEFT would make a set of it, whose order in the file changes from run to run
    config.target_modules = _targets(model, list(layers))
    return config


def _targets(model: nn.Module, layers: list[str]) -> list[str] | str:
    """Full names, which PEFT takes as ends of names too; a pattern where another module of the model ends so."""
    wanted = set(layers)
    others = [name.split(".") for name, _ in model.named_modules() if name not in wanted]
    if wanted.isdisjoint(".".join(parts[start:]) for parts in others for start in range(1, len(parts))):
        return layers
    return "|".join(map(re.escape, layers))


def _task_type(model: nn.Module) -> str | None:
    can_generate = getattr(model, "can_generate", None)
    if not callable(can_generate) or not can_generate():
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


# and back


def _read_loras(folder: Path) -> dict[str, Lora]:
    """Read a LoRA directory: {layer: Lora}, layers under the base model's names."""
    settings = _read_settings(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise GatedError(
            f"{folder} has no {WEIGHTS}: save the LoRA again with PEFT (`save_pretrained`), as safetensors."
        )
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        layer, _, end = key.removeprefix(PREFIX).rpartition(".lora_")
        if not layer or end not in ("A.weight", "B.weight") or tensor.ndim != 2:
            raise GatedError(
                f"{path} holds {key!r} {list(tensor.shape)}, which is no A or B of a linear layer's LoRA. {WAY_OUT}"
            )
        sides.setdefault(layer, {})[end[0]] = tensor
    if not sides:
        raise GatedError(f"{path} holds no LoRA at all: save it again with PEFT (`save_pretrained`).")
    return {layer: _pair_up(path, layer, found, settings) for layer, found in sides.items()}


def _pair_up(path: Path, layer: str, found: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Lora:
    if len(found) < 2:
        raise GatedError(f"{path} has only lora_{next(iter(found))} of {layer}: the file is damaged, save it again.")
    rank, alpha = (
        _of_layer(settings, "rank_pattern", "r", layer),
        _of_layer(settings, "alpha_pattern", "lora_alpha", layer),
    )
    a, b = found["A"], found["B"]
    if not len(a) == b.shape[1] == rank:
        raise GatedError(
            f"{path} has lora_A {list(a.shape)} and lora_B {list(b.shape)} of {layer}, and by {CONFIG} their rank is "
            f"{rank}: the two files are not of one LoRA, save it again."
        )
    return Lora(a, b, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _of_layer(settings: Mapping[str, Any], patterns: str, default: str, layer: str) -> Any:
    """A layer's rank or alpha, by the patterns as PEFT itself reads them."""
    from peft.utils.other import get_pattern_key

    found = settings.get(patterns) or {}
    return found.get(get_pattern_key(list(found), layer), settings[default])


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json, and refuse what an expert can't do."""
    path = folder / CONFIG
    if not path.is_file():
        other = " It holds gated adapters: read it with `load_gated`." if (folder / "gated.json").exists() else ""
        raise GatedError(f"{folder} is no LoRA directory of PEFT: it has no {CONFIG}.{other}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GatedError(f"{path} is damaged, it can't be read as JSON ({error}): save the LoRA again.") from None
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise GatedError(f"{path} is of the PEFT type {kind}, and only LORA becomes an expert.")
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), int | float) or settings[key] <= 0:
            raise GatedError(f"{path} must have a {key!r} over 0, it is {settings.get(key)!r}: save the LoRA again.")
    if settings.get("bias", "none") != "none":
        raise GatedError(f"{path} has bias={settings['bias']!r}: an expert has no bias. {WAY_OUT}")
    if settings.get("init_lora_weights") not in PLAIN_STARTS:
        raise GatedError(
            f"{path} has init_lora_weights={settings['init_lora_weights']!r}, which moved part of the base weights "
            f"into the LoRA: save it as a plain one, by `path_initial_model_for_weight_conversion` of save_pretrained."
        )
    for key, value in settings.items():
        if key not in KNOWN | {"bias"} and value:
            reason = REASONS.get(key, "which changes what the LoRA computes, or is not known to this fastsft")
            raise GatedError(f"{path} has {key}={value!r}: {reason}. {WAY_OUT}")
    return settings


def _check_fit(gated: Gated, folder: Path, layer: str, lora: Lora) -> None:
    adapter = gated.adapters.get(layer)
    if adapter is None:
        raise GatedError(
            f"{folder} has a LoRA of {layer}, which these adapters leave out: attach them with `targets` that name it, "
            f"or take the LoRA's base model."
        )
    if (lora.a.shape[1], len(lora.b)) != (adapter.inputs, adapter.outputs):
        raise GatedError(
            f"{folder} is of another model: its {layer} has {lora.a.shape[1]} inputs and {len(lora.b)} outputs, and "
            f"here it has {adapter.inputs} and {adapter.outputs}."
        )
    if len(lora.a) > gated.config.rank:
        raise GatedError(
            f"{folder} has rank {len(lora.a)} in {layer}, and experts have rank {gated.config.rank}: attach the "
            f"adapters with GatedConfig(rank={len(lora.a)}), or cut the LoRA to a lower rank first."
        )


@torch.no_grad()
def _fill(pair: Pair, lora: Lora, scale: float) -> None:
    """Copy a LoRA into a new expert's first ranks; the others' B stays zero."""
    rank = len(lora.a)
    pair.A.weight[:rank] = lora.a
    pair.B.weight[:, :rank] = lora.b.to(pair.B.weight.dtype) * (lora.scale / scale)
