"""The run file of `fastsft run`: every key checked, an unknown one refused with its nearest neighbour."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from fastsft.attribution import Attribution
from fastsft.data import DataError
from fastsft.tasks import MixError
from fastsft.train.sampler import Draws
from fastsft.train.steering import APPLY


class ConfigError(ValueError):
    """A run file that can't be used, with the key and the way out."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where a source or target is: a file (jsonl[.gz|.zst], parquet) or a datasets hub id."""

    path: str
    ability: str | None = None
    limit: int | None = None
    # keep rows whose fields equal these values
    where: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to fine-tune; handed on to transformers' Trainer and PEFT."""

    method: str = "lora"
    rank: int = 16
    # None: twice the rank
    alpha: float | None = None
    steps: int = 300
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "linear"
    optimizer: str = "adamw"
    max_grad_norm: float = 1.0
    max_length: int = 512
    packing: bool = False
    over_long: str = "drop"
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    save_every: int = 100
    # checkpoints to keep, the newest; None: 2 of full weights, and all of LoRA, which are small; methods that
    # score after the run read them
    keep_checkpoints: int | None = None
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", ("lora", "full")),
            ("optimizer", ("adamw", "sgd")),
            ("precision", ("fp32", "bf16")),
            ("over_long", ("error", "drop", "truncate")),
            ("schedule", ("linear", "cosine", "constant")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"train.{name} must be one of {', '.join(allowed)}: got {getattr(self, name)!r}.")
        for name in ("rank", "steps", "batch_size", "accumulation", "max_length", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be a whole number, at least 1: got {getattr(self, name)}.")
        if self.keep_checkpoints is not None and self.keep_checkpoints < 1:
            raise ConfigError(
                f"train.keep_checkpoints must be at least 1, or nothing for all of LoRA and 2 of full weights: got "
                f"{self.keep_checkpoints}."
            )
        if self.learning_rate <= 0:
            raise ConfigError(f"train.learning_rate must be positive: got {self.learning_rate}.")

    @property
    def kept(self) -> int | None:
        """How many checkpoints stay, or None for all."""
        return self.keep_checkpoints if self.keep_checkpoints or self.method == "lora" else 2


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How sources are mixed. `proportional`: every row once an epoch, in the trainer's own shuffled order.

    Any other policy draws through a stream that follows a mix (`fastsft.mixing` names the policies); keys that are not
    of this class are the policy's own.
    """

    policy: str = "proportional"
    # the mix to begin with, and the prior that a policy is anchored to: uniform, proportional, {source: share}, or a
    # file that `fastsft mix plan` wrote; None: the policy's own default
    start: str | dict[str, Any] | None = None
    unit: str = "tokens"
    max_epochs: float | None = None
    exhausted: str = "redistribute"
    max_tokens: int | None = None
    # stop drawing from a source whose ability overfits
    guard: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [
            f.name for f in dataclasses.fields(self) if f.name != "policy" and getattr(self, f.name) != _default(f)
        ]
        if not self.steered and given:
            raise ConfigError(
                f"mix.{given[0]} needs a policy that draws by a mix, and 'proportional' keeps the trainer's own order: "
                f"name one with mix.policy (align, uniform, temperature, ...)."
            )
        try:
            self.draws(0)
        except MixError as error:
            raise ConfigError(f"mix: {error}") from None

    @property
    def steered(self) -> bool:
        """Whether draws follow a mix."""
        return self.policy != "proportional"

    def draws(self, seed: int) -> Draws:
        return Draws(
            unit=self.unit,
            max_epochs=self.max_epochs,
            exhausted=self.exhausted,
            max_tokens=self.max_tokens,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class ConflictConfig:
    """How abilities that pull against each other are weighed: a resolver of `fastsft.mixing`, or `none`."""

    resolver: str = "none"
    # "lagged", by the targets' gradients until the next refresh; "exact", anew in every step (LoRA)
    apply: str = "lagged"
    # abilities that no step may harm (gem)
    protected: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.apply not in APPLY:
            raise ConfigError(f"conflict.apply must be one of {', '.join(APPLY)}: got {self.apply!r}.")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One fine-tuning run with its books."""

    model: str
    sources: dict[str, SourceConfig]
    targets: dict[str, SourceConfig]
    out: str
    train: TrainConfig = field(default_factory=TrainConfig)
    attribution: Attribution = field(default_factory=Attribution)
    mix: MixConfig = field(default_factory=MixConfig)
    conflict: ConflictConfig = field(default_factory=ConflictConfig)

    @property
    def steered(self) -> bool:
        """Whether the run needs a policy or a resolver handed to it."""
        return self.mix.steered or self.conflict.resolver != "none"

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_config(path: str | Path) -> RunConfig:
    """Read a run file. Raises ConfigError naming file, key and the way out."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} is no file: name a run file (see examples/).")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML in UTF-8: {' '.join(str(error).split())}. Mend that place.") from None
    try:
        return parse_config(raw)
    except (ConfigError, DataError) as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(raw: object) -> RunConfig:
    """Turn a mapping into a RunConfig, section by section."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"a run file is a mapping of keys, got {type(raw).__name__}.")
    _check_keys(raw, RunConfig, "")
    missing = [key for key in ("model", "sources", "targets", "out") if key not in raw]
    if missing:
        raise ConfigError(f"the key `{missing[0]}` is missing.")
    sources = {str(name): _section(value, SourceConfig, f"sources.{name}") for name, value in _named(raw, "sources")}
    targets = {str(name): _section(value, SourceConfig, f"targets.{name}") for name, value in _named(raw, "targets")}
    return RunConfig(
        model=str(raw["model"]),
        sources=sources,
        targets=targets,
        out=str(raw["out"]),
        train=_section(raw.get("train") or {}, TrainConfig, "train"),
        attribution=_section(raw.get("attribution") or {}, Attribution, "attribution"),
        mix=_section(_gather_settings(raw.get("mix") or {}), MixConfig, "mix"),
        conflict=_section(raw.get("conflict") or {}, ConflictConfig, "conflict"),
    )


def _gather_settings(section: object) -> object:
    """Put the keys of `mix` that are the policy's own under `settings`, where its maker checks them."""
    if not isinstance(section, Mapping):
        return section
    known = {f.name for f in dataclasses.fields(MixConfig)}
    own = {str(key): value for key, value in section.items() if key not in known}
    settings = section.get("settings") or {}
    return {**{k: v for k, v in section.items() if k in known}, "settings": {**settings, **own}}


def _named(raw: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    if not isinstance(raw[key], Mapping) or not raw[key]:
        raise ConfigError(f"`{key}` must name at least one entry: {key}: {{a_name: {{path: ...}}}}.")
    return list(raw[key].items())


def _section(value: object, kind: type[Any], place: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place} must be a mapping of keys, got {value!r}.")
    _check_keys(value, kind, f"{place}.")
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(value))
    if missing:
        raise ConfigError(f"the key `{place}.{missing[0]}` is missing.")
    _check_types(value, kind, place)
    try:
        return kind(**value)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def _check_types(value: Mapping[str, Any], kind: type[Any], place: str) -> None:
    """Refuse a value that isn't of its field's type; a whole number does for a float."""
    for key, hint in get_type_hints(kind).items():
        if key not in value:
            continue
        types = [get_origin(each) or each for each in (get_args(hint) if get_origin(hint) is UnionType else [hint])]
        given = type(value[key])
        if given not in types and not (given is int and float in types):
            names = " or ".join("nothing" if each is type(None) else each.__name__ for each in types)
            way_out = " Write a number with a point, 1.0e-3." if given is str and float in types else ""
            raise ConfigError(f"{place}.{key} must be {names}: got {value[key]!r}.{way_out}")


def _check_keys(value: Mapping[Any, Any], kind: type[Any], prefix: str) -> None:
    known = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else f"known keys: {', '.join(known)}."
            raise ConfigError(f"unknown key `{prefix}{key}`: {hint}")
