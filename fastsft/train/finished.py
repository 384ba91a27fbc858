"""A run on disk, loaded again: its settings, its checkpoints, its model and its optimizer."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from fastsft.data import file_digest
from fastsft.record import Record
from fastsft.train.config import ConfigError, RunConfig, parse_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastsft.attribution.methods import Checkpoint, Moments

_WEIGHTS = ("adapter_model*", "model*.safetensors", "pytorch_model*.bin")
# what `config.yaml` of a run directory says beside the run file
_BESIDE = ("versions", "root")


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What `fastsft run` left in a folder. `root` is where relative paths of its run file start."""

    out: Path
    config: RunConfig
    root: Path | None
    # of the packages that trained it
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, out: str | Path, *, root: Path | None = None) -> FinishedRun:
        """Read a run directory's settings; `root` replaces the one the run was started with."""
        out = Path(out)
        path = out / "config.yaml"
        if not path.exists():
            Record.open(out)  # not a run at all is said first
            raise ConfigError(
                f"{out} was attached to a trainer of your own, so it has no config.yaml that says how to load its "
                f"model and data: load them yourself, then call fastsft.attribute_model(model, rows, out=..., "
                f"spec=SketchSpec(...))."
            )
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        beside = {key: written.pop(key, None) for key in _BESIDE}
        if root is None and beside["root"] is not None:
            root = out / beside["root"]  # an absolute one stands for itself
        return cls(out=out, config=parse_config(written), root=root, versions=beside["versions"] or {})

    @property
    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint with weights, in order."""
        found = []
        for folder in (self.out / "checkpoints").glob("checkpoint-*"):
            step = folder.name.removeprefix("checkpoint-")
            if step.isdigit() and self._weight_files(folder):
                found.append(int(step))
        return sorted(found)

    def checkpoint(self, which: int | str = "last") -> Path:
        """Find the checkpoint of a step, or the last one."""
        steps = self.steps
        if not steps:
            raise ConfigError(
                f"{self.out / 'checkpoints'} holds no checkpoint with weights: was the run cut off early?"
            )
        step = steps[-1] if which == "last" else int(which) if str(which).isdigit() else None
        if step not in steps:
            raise ConfigError(
                f"there is no checkpoint {which!r} in {self.out / 'checkpoints'}: "
                f"name one of the steps {', '.join(map(str, steps))}, or 'last'."
            )
        return self.out / "checkpoints" / f"checkpoint-{step}"

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that the run kept, in order, for methods that score after it.

        weights: read when asked for. share: the learning rates of the steps since the checkpoint before it, summed.
        about: step and learning_rate.
        """
        from fastsft.train.history import checkpoints_of

        return checkpoints_of(self)

    def check_moments(self, checkpoint: Path) -> None:
        """Refuse a checkpoint that has no second moments."""
        if self.config.train.optimizer != "adamw":
            raise ConfigError(
                f"{self.out} was trained with {self.config.train.optimizer}, which keeps no second moments: take "
                f"'ekfac', which needs no optimizer."
            )
        if not (checkpoint / "optimizer.pt").exists():
            raise ConfigError(
                f"{checkpoint / 'optimizer.pt'} is missing, and the optimizer's second moments are in it: take "
                f"'ekfac', which needs no optimizer, or another checkpoint."
            )

    def moments(self, model: PreTrainedModel, checkpoint: Path) -> Moments:
        """Read the optimizer's moments at a checkpoint by the parameter names of `model`, the run's, loaded."""
        from fastsft.attribution.methods import moments_of

        self.check_moments(checkpoint)
        return moments_of(model, self.optimizer(model, checkpoint))

    @staticmethod
    def _weight_files(checkpoint: Path) -> list[Path]:
        return sorted(path for pattern in _WEIGHTS for path in checkpoint.glob(pattern))

    def digest(self, checkpoint: Path) -> str:
        """Name the weights that a checkpoint holds by 64 hex digits."""
        found = hashlib.sha256()
        for path in self._weight_files(checkpoint):
            found.update(f"{path.name} {file_digest(path)}\n".encode())
        return found.hexdigest()

    def load(self, checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
        """Load the model of a checkpoint, trainable where the run trained it, its tokenizer and its padding id."""
        from safetensors import SafetensorError

        from fastsft.train.loop import padding_id

        try:
            model, tokenizer = self._load(checkpoint)
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"the weights in {checkpoint} can't be loaded ({reason}): take another checkpoint, and the base model "
                f"that the run had, {self.config.model!r}."
            ) from None
        model.config.use_cache = False
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        return model.to(device), tokenizer, padding_id(tokenizer)  # type: ignore[arg-type]

    def _load(self, checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from fastsft.train.loop import load_model

        if self.config.train.method != "lora":
            return load_model(str(checkpoint.resolve()), None)
        from peft import PeftModel

        model, tokenizer = load_model(self.config.model, self.root)
        return PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True), tokenizer  # type: ignore[return-value]

    def optimizer(self, model: PreTrainedModel, checkpoint: Path) -> torch.optim.Optimizer:
        """Load the optimizer of a checkpoint onto `model`: the trainer's parameter groups, its file's states."""
        from fastsft.train.loop import make_trainer

        path = checkpoint / "optimizer.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ConfigError(
                f"{path} is missing, and the optimizer's second moments are in it: take precondition 'ekfac', which "
                f"needs no optimizer, or another checkpoint."
            ) from None
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ConfigError(
                f"{path} can't be read ({str(error).splitlines()[0]}): take another checkpoint."
            ) from None
        # the trainer itself splits parameters into groups, and states in the file are numbered in the order of these
        optimizer = make_trainer(self.config, [], model, None, self.out).create_optimizer()
        try:
            optimizer.load_state_dict(state)
        except ValueError as error:
            raise ConfigError(f"{path} does not fit this model ({error}): is it of another run?") from None
        _check_shapes(path, model, optimizer.state)
        return optimizer


def _check_shapes(path: Path, model: PreTrainedModel, states: Any) -> None:
    for name, parameter in model.named_parameters():
        for key, value in states.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                raise ConfigError(
                    f"{path} does not fit this model: its {key} of {name} has the shape {list(value.shape)}, the "
                    f"weight {list(parameter.shape)}. Is it of another run?"
                )
