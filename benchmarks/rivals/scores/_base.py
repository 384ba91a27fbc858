"""A scoring case on disk, for ourselves and rivals alike: a model, its checkpoints, training rows and queries.

A folder holds case.json {method, base, lora: {r, alpha, targets}, pad_id, checkpoints: [{name, share}]}, rows.json and
queries.json ([{id, source, input_ids, labels}]), and checkpoints/K/model.safetensors, the trainable weights by the
model's names for them, in the order of steps. Rivals read it in their environments: torch, transformers, safetensors
and peft are imported here, never fastsft.
"""

# N samples, Q queries, B rows of a batch, T tokens

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.system.index_case import Line

if TYPE_CHECKING:
    from fastsft.attribution.methods import Checkpoint
    from fastsft.data import Row

# settings of a LoRA that change what it computes, and that a case does not tell
_UNTOLD = {
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "exclude_modules": None,
    "modules_to_save": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A loaded case. `method` is "lora" or "full"; `base`: the folder of the model that was trained."""

    folder: Path
    method: str
    base: Path
    lora: dict[str, Any] | None
    pad_id: int
    checkpoints: list[str]
    shares: list[float]
    rows: list[Line]
    queries: list[Line]

    @property
    def shape(self) -> str:
        tokens = sum(len(row.input_ids) for row in self.rows)
        return f"N{len(self.rows)} Q{len(self.queries)}, {tokens} tokens, {self.method}"

    @property
    def query_tokens(self) -> Tensor:
        """Each query's supervised tokens [Q]."""
        return torch.tensor([sum(label != -100 for label in row.labels[1:]) for row in self.queries])


class Seconds(NamedTuple):
    """Of the wall and of the CPU."""

    wall: float
    cpu: float


def timed(run: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Seconds(round(time.perf_counter() - wall, 3), round(time.process_time() - cpu, 3))


@dataclasses.dataclass(frozen=True)
class Scored:
    """What an adapter hands back: scores [N, Q] in the order of the case, positive = training on the sample helps."""

    scores: Tensor
    settings: dict[str, Any]
    # seconds of fit and of score, where they can be told apart
    parts: dict[str, Seconds] = dataclasses.field(default_factory=dict)


# a case and a folder to work in -> its scores
Adapter = Callable[[Case, Path], Scored]


def write_case(
    folder: Path,
    model: Any,
    checkpoints: Sequence[Checkpoint],
    samples: Sequence[Row],
    queries: Sequence[Row],
    *,
    base: Path,
    pad_id: int,
) -> Path:
    """Write a case from a transformers or peft model whose untrained weights are those of the folder `base`."""
    from safetensors.torch import save_file

    lora = _lora_of(model)
    for number, checkpoint in enumerate(checkpoints):
        weights = checkpoint.weights() if callable(checkpoint.weights) else checkpoint.weights
        place = folder / "checkpoints" / str(number)
        place.mkdir(parents=True, exist_ok=True)
        kept = {name: weights[name].detach().cpu().contiguous() for name in _trainable(model)}
        save_file(kept, place / "model.safetensors")
    for name, rows in (("rows", samples), ("queries", queries)):
        told = [dataclasses.asdict(Line(row.id, row.source, list(row.input_ids), list(row.labels))) for row in rows]
        (folder / f"{name}.json").write_text(json.dumps(told))
    about = {
        "method": "full" if lora is None else "lora",
        "base": str(Path(base).resolve()),
        "lora": lora,
        "pad_id": pad_id,
        "checkpoints": [{"name": each.name, "share": each.share} for each in checkpoints],
    }
    (folder / "case.json").write_text(json.dumps(about, indent=1))
    return folder


def _lora_of(model: Any) -> dict[str, Any] | None:
    configs = getattr(model, "peft_config", None)
    if configs is None:
        return None
    (config,) = configs.values()
    changed = [name for name, usual in _UNTOLD.items() if getattr(config, name, usual) != usual]
    if changed:
        raise ValueError(
            f"a scoring case tells r, alpha and targets of a LoRA only; this one also sets {', '.join(changed)}. Train "
            f"without, or add it to the case."
        )
    targets = config.target_modules  # names, or one pattern
    targets = targets if isinstance(targets, str) else sorted(targets)
    return {"r": config.r, "alpha": config.lora_alpha, "targets": targets}


def _trainable(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def load_case(folder: Path) -> Case:
    told = json.loads((folder / "case.json").read_text())
    rows, queries = (
        [Line(**row) for row in json.loads((folder / f"{name}.json").read_text())] for name in ("rows", "queries")
    )
    return Case(
        folder=folder,
        method=told["method"],
        base=folder / told["base"],  # an absolute one stands for itself
        lora=told["lora"],
        pad_id=told["pad_id"],
        checkpoints=[each["name"] for each in told["checkpoints"]],
        shares=[each["share"] for each in told["checkpoints"]],
        rows=rows,
        queries=queries,
    )


def load_model(case: Case, number: int = -1) -> Any:
    """Load the model at one of its checkpoints, the last unless told, trainable where it was trained, in eval mode."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    place = case.folder / "checkpoints" / str(range(len(case.checkpoints))[number]) / "model.safetensors"
    weights = load_file(place)
    dtype = next(iter(weights.values())).dtype
    model: Any = AutoModelForCausalLM.from_pretrained(case.base, dtype=dtype)
    if case.lora is not None:
        from peft import LoraConfig, get_peft_model

        told = {"r": case.lora["r"], "lora_alpha": case.lora["alpha"], "target_modules": case.lora["targets"]}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **told)).to(dtype)
    parameters = dict(model.named_parameters())
    if strange := sorted(set(weights) - set(parameters)):
        raise ValueError(f"{place} has weights that the model of {case.base} has not: {', '.join(strange[:3])} ...")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in weights)
            if name in weights:
                parameter.copy_(weights[name])
    return model.eval()


class Lines(Dataset[Line]):
    """Rows, longest first, so that batches hold rows of like lengths; `order` [N] tells the place each came from."""

    def __init__(self, rows: Sequence[Line]) -> None:
        self.order = sorted(range(len(rows)), key=lambda at: -len(rows[at].input_ids))
        self.rows = [rows[at] for at in self.order]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Line:
        return self.rows[number]

    def back(self, scores: Tensor, dim: int) -> Tensor:
        """Put scores of the sorted rows back in the order that the rows came in."""
        places = torch.empty(len(self.order), dtype=torch.int64)
        places[torch.tensor(self.order)] = torch.arange(len(self.order))
        return scores.index_select(dim, places)


def counted_mask(labels: Tensor) -> Tensor:
    """Which tokens come before their row's last supervised one, labels [B, T] -> [B, T]: others have no gradient."""
    supervised = (labels != -100).float()
    after = supervised.flip(1).cumsum(1).flip(1) - supervised
    return (after > 0).to(labels.dtype)
