"""Gated adapters as a folder: what they are made of in gated.json, their tensors in gated.safetensors. Not the base."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsft.adapters.config import GatedConfig, GatedError
from fastsft.adapters.factor import freeze
from fastsft.adapters.gated import Gated, attach_gated
from fastsft.adapters.layer import is_linear, widths
from fastsft.adapters.router import TaskGates
from fastsft.adapters.targets import find_targets
from fastsft.data import file_digest
from fastsft.record import versions

SCHEMA = 1
DESCRIPTION = "gated.json"
WEIGHTS = "gated.safetensors"
KEYS = ("schema", "config", "experts", "tasks", "frozen", "layers", "versions", "sha256")
AGAIN = "Save the adapters again, or take another copy of the folder."


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a gated.json says. layers: {name: (inputs, outputs)}; sha256: of gated.safetensors."""

    path: Path
    config: GatedConfig
    tasks: list[str]
    frozen: list[str]
    layers: dict[str, tuple[int, int]]
    sha256: str


def save_gated(gated: Gated, folder: str | Path) -> Path:
    """Write the adapters to `folder`: gated.json and gated.safetensors. The base model is not in it.

    Memory ranks that are held (`Gated.select_memory`) are saved as memory like the others, and come first in it. An
    earlier save in the folder is replaced once the new one is on the disk. Returns the folder.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    with written_whole(folder) as unfinished:
        save_file(_to_save(gated), str(unfinished / WEIGHTS))
        description = {
            "schema": SCHEMA,
            "config": {key: value for key, value in gated.config.as_dict().items() if key != "experts"},
            "experts": gated.experts,
            "tasks": gated.tasks,
            "frozen": [name for name in gated.experts if gated.is_frozen(name)],
            "layers": {name: [adapter.inputs, adapter.outputs] for name, adapter in gated.adapters.items()},
            "versions": versions(),
            "sha256": file_digest(unfinished / WEIGHTS),
        }
        (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return folder


def load_gated(model: nn.Module, folder: str | Path, *, trainable: bool = True) -> Gated:
    """Attach to `model`, in place, the adapters that `Gated.save` wrote to `folder`; outputs are those of the save.

    Weights are in the type that `attach_gated` gives adapters of this model. Experts that were frozen are frozen again;
    trainable=False freezes everything. Raises GatedError where the folder is damaged or of another model; the model is
    then as it was.
    """
    folder = Path(folder)
    described = read_description(folder)
    weights = _read_weights(folder, described)
    _check_layers(model, described)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gated = None
    try:
        gated = attach_gated(model, described.config)
        _fill(gated, described, weights, folder / WEIGHTS)
    except BaseException:
        if gated is not None:
            gated.detach()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    if not trainable:
        for module in (*gated.adapters.values(), *gated.gatings):
            freeze(module)
    return gated


# tensors


def _state(gated: Gated) -> dict[str, Tensor]:
    """All parameters and persistent buffers, the model's own tensors under the model's names."""
    found: dict[str, Tensor] = {}
    for name, adapter in gated.adapters.items():
        found |= adapter.state_dict(prefix=f"{name}.gated.")
    names = {id(module): name for name, module in gated.model.named_modules()}
    for gating in gated.gatings:
        found |= gating.state_dict(prefix=f"{names[id(gating)]}.")
    return found


def _to_save(gated: Gated) -> dict[str, Tensor]:
    """The tensors as files hold them: on the CPU, held memory ranks together with the others."""
    state = _state(gated)
    for name, adapter in gated.adapters.items():
        if adapter.held is None:
            continue
        held, memory = f"{name}.gated.held.", f"{name}.gated.memory."
        for key, dimension in (("A.weight", 0), ("B.weight", 1)):
            # in the order in which they are stacked, not in their old places: sums stay the same to the bit
            state[memory + key] = torch.cat([state[held + key], state[memory + key]], dimension)
        state = {key: tensor for key, tensor in state.items() if not key.startswith(held)}
    return {key: tensor.cpu().contiguous() for key, tensor in state.items()}


@torch.no_grad()
def _fill(gated: Gated, described: Described, weights: dict[str, Tensor], path: Path) -> None:
    """Copy the saved tensors into adapters that were just attached."""
    _make_room(gated, described, weights)
    state = _state(gated)
    missing, unknown = [name for name in state if name not in weights], sorted(weights.keys() - state.keys())
    if missing:
        raise GatedError(f"{path} lacks {_some(missing)}, which {DESCRIPTION} beside it tells of. {AGAIN}")
    if unknown:
        raise GatedError(f"{path} holds {_some(unknown)}, of which {DESCRIPTION} says nothing. {AGAIN}")
    for name, tensor in state.items():
        if tensor.shape != weights[name].shape:
            raise GatedError(
                f"{path} has {name} with the shape {list(weights[name].shape)}, and by {DESCRIPTION} it must be "
                f"{list(tensor.shape)}. {AGAIN}"
            )
    for name, tensor in state.items():
        tensor.copy_(weights[name])
    for name in described.frozen:
        gated.freeze_expert(name)


def _make_room(gated: Gated, described: Described, weights: dict[str, Tensor]) -> None:
    """Give the gates the sizes that they grew to: a row a task, directions that routers protect."""
    gated.tasks = list(described.tasks)
    names = {id(module): name for name, module in gated.model.named_modules()}
    for gating in gated.gatings:
        if isinstance(gating, TaskGates):
            # a task whose expert went into the memory keeps its row
            shape = len(described.tasks), len(described.config.experts)
            gating.own = gating.own.new_zeros(shape)
            if gating.table is not None:
                gating.table = nn.Parameter(gating.table.new_zeros(shape))
            continue
        saved = weights.get(f"{names[id(gating)]}.protected")
        if saved is not None and saved.ndim == 2 and saved.shape[1] <= gating.inputs:
            # column by column in memory, as a QR decomposition leaves it: products round alike
            gating.protected = gating.protected.new_zeros(saved.shape[1], gating.inputs).T


# reading and checking


def read_description(folder: Path) -> Described:
    """Read gated.json and check all that it says by itself."""
    path = folder / DESCRIPTION
    if not folder.is_dir():
        raise GatedError(f"there is no folder {folder}: give the one that `Gated.save` wrote.")
    if not path.is_file():
        other = (
            " It is a LoRA of PEFT: read it with `import_expert`." if (folder / "adapter_config.json").exists() else ""
        )
        raise GatedError(f"{folder} is not a folder of gated adapters: it has no {DESCRIPTION}.{other}")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GatedError(f"{path} is damaged, it can't be read as JSON ({error}). {AGAIN}") from None
    if not isinstance(told, dict) or "schema" not in told:
        raise GatedError(f"{path} is no description of gated adapters: it names no schema. {AGAIN}")
    if told["schema"] != SCHEMA:
        writer = told["versions"].get("fastsft") if isinstance(told.get("versions"), dict) else None
        raise GatedError(
            f"{path} has schema {told['schema']}, this fastsft reads schema {SCHEMA}. Read it with the fastsft that "
            f"wrote it ({writer or 'unknown'})."
        )
    _check_keys(path, told)
    return Described(
        path=path,
        config=_read_config(path, told["config"], told["experts"]),
        tasks=told["tasks"],
        frozen=told["frozen"],
        layers={name: (int(inputs), int(outputs)) for name, (inputs, outputs) in told["layers"].items()},
        sha256=told["sha256"],
    )


def _check_keys(path: Path, told: dict[str, Any]) -> None:
    missing, unknown = [key for key in KEYS if key not in told], sorted(told.keys() - set(KEYS))
    if missing or unknown:
        wrong = f"lacks {_some(missing)}" if missing else f"says {_some(unknown)}, which this fastsft does not know"
        raise GatedError(f"{path} {wrong}. {AGAIN}")
    for key in ("experts", "tasks", "frozen"):
        names = told[key]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise GatedError(f"{path} is damaged: {key!r} must be a list of names, it is {names!r}. {AGAIN}")
    if len(set(told["tasks"])) != len(told["tasks"]) or not set(told["frozen"]) <= set(told["experts"]) <= set(
        told["tasks"]
    ):
        raise GatedError(
            f"{path} is damaged: tasks must be distinct, experts be among them and frozen ones be experts, and "
            f"they are {told['tasks']}, {told['experts']} and {told['frozen']}. {AGAIN}"
        )
    layers = told["layers"]
    if not isinstance(layers, dict) or not all(
        isinstance(shape, list) and [type(width) for width in shape] == [int, int] for shape in layers.values()
    ):
        raise GatedError(f"{path} is damaged: 'layers' must give two widths a layer. {AGAIN}")


def _read_config(path: Path, settings: object, experts: list[str]) -> GatedConfig:
    if not isinstance(settings, dict):
        raise GatedError(f"{path} is damaged: 'config' must hold settings, it is {settings!r}. {AGAIN}")
    unknown = settings.keys() - {field.name for field in dataclasses.fields(GatedConfig)} | settings.keys() & {
        "experts"
    }
    if unknown:
        raise GatedError(
            f"{path} has the settings {_some(sorted(unknown))}, which this fastsft does not know. Read it with the "
            f"fastsft that wrote it."
        )
    try:
        return GatedConfig(**settings, experts=experts)
    except (GatedError, TypeError) as error:
        raise GatedError(f"{path} has settings that can't be: {error} {AGAIN}") from None


def _read_weights(folder: Path, described: Described) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise GatedError(f"{path} is missing, {DESCRIPTION} is there. {AGAIN}")
    if file_digest(path) != described.sha256:
        raise GatedError(
            f"{path} is not the file that {DESCRIPTION} tells of (another sha256): it was cut off, damaged or "
            f"exchanged. {AGAIN} If a folder {UNFINISHED}* is in there, a save was killed "
            f"while it renamed: move its file here."
        )
    return read_tensors(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise GatedError(
            f"{path} is no whole safetensors file ({error}): save it again, or take another copy."
        ) from None


def _check_layers(model: nn.Module, described: Described) -> None:
    """See that the model has the layers of the save, and its targets no others."""
    modules = dict(model.named_modules())
    lacking = [name for name in described.layers if name not in modules or not is_linear(modules[name])]
    if lacking:
        raise GatedError(
            f"{described.path} is of another model: this one has no linear layer {_some(lacking)}. Load it beside the "
            f"base model on which it was trained."
        )
    for name, expected in described.layers.items():
        found = widths(name, modules[name])
        if found != expected:
            raise GatedError(
                f"{described.path} is of another model: {name} had {expected[0]} inputs and {expected[1]} outputs, and "
                f"here it has {found[0]} and {found[1]}. Load it beside the base model on which it was trained."
            )
    here = find_targets(model, described.config).keys()
    if here != described.layers.keys():
        raise GatedError(
            f"{described.path} is of another model, or its `targets` {described.config.targets!r} were changed: they "
            f"differ by the layers {_some(sorted(here ^ described.layers.keys()))}. Load it beside the base model on "
            f"which it was trained."
        )


def _some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    first, *rest = names
    return f"{first!r} and {len(rest)} more" if rest else repr(first)


# writing

UNFINISHED = "unfinished-"


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into; its files go to `folder` once all of them are on the disk, or none does."""
    if folder.exists() and not folder.is_dir():
        raise GatedError(f"{folder} is a file: give the name of a folder to write.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as unfinished:
        yield Path(unfinished)
        files = sorted(Path(unfinished).iterdir())
        for file in files:
            _sync(file)
        for file in files:
            os.replace(file, folder / file.name)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
